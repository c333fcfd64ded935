"""Is a result right? Compared with `reference` in float64 before any speed is reported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines import Outcome
from benchmarks.cases import Inputs, row_chunks
from reference import policy_loss, token_logprobs

# Everyone computes in fp32, whatever the logits' dtype. What that costs grows with the vocabulary: the
# log-probs of sharp rows over 151936 words are 3e-5 off with PyTorch's own softmax on the CPU.
FP32_TOLERANCE = 1e-4  # absolute for the loss, the log-probs (relative above 1) and p; relative for g
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-4 + 2.0**-8}  # relative, of a gradient in that dtype
TAIL = 1e-6  # of g: probabilities below it need not be right
ALL_ROWS_BYTES = 1 << 30  # a gradient that is no larger in float64 is checked entry by entry
SAMPLED_ROWS = 64  # of a larger one


class Truth(NamedTuple):
    """The gradient of some rows, in float64."""

    b: Tensor  # (rows,): their sequences
    t: Tensor  # (rows,): their places in them
    grad: Tensor  # (rows, V)


@dataclass(frozen=True)
class Verdict:
    """`error` is the largest error as a multiple of what is tolerated; `what` says of which quantity."""

    error: float
    what: str

    @property
    def passed(self) -> bool:
        return self.error <= 1.0  # False for NaN


class Oracle:
    """The float64 truth about some inputs.

    Log-probs and entropies are those of all rows, and so are the loss and its derivative by each log-prob: a
    loss may couple the tokens of a sequence as it likes. The gradient of a small case is checked entry by
    entry. Of a large one it is that of a fixed sample of rows; of every other row the token's entry and the sum
    over the row, which is 0 for whatever came out of a softmax.

    Attributes:
        loss: 0-d.
        logps, entropies: (B, T), 0 where masked.
        dlogps: (B, T), dloss/dlogps.
        slack: (B, T), how far dlogps moves if every log-prob moves by what is tolerated of it. Where the
            KL pulls one way and the policy term the other, or is clipped, that is much of what is left.
        truth: the gradient, a few rows at a time: all of them, or the sample.
        sampled: is it a sample?
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        case = inputs.case
        self.logps, self.entropies = self._compute_logps()
        self.loss, self.dlogps = loss_and_slopes(inputs, self.logps)
        moved = FP32_TOLERANCE * self.logps.abs().clamp(min=1)
        others = [loss_and_slopes(inputs, self.logps + sign * moved)[1] for sign in (1, -1)]
        self.slack = torch.stack([(other - self.dlogps).abs() for other in others]).amax(0)
        self.sampled = case.batch * case.length * case.vocab * 8 > ALL_ROWS_BYTES
        self.truth = [self._gradient(*rows) for rows in (self._sample() if self.sampled else self._all())]

    def check(self, mode: str, outcome: Outcome) -> Verdict:
        """The worst deviation of an outcome of this mode.

        Raises:
            ValueError: the outcome lacks a tensor that the mode asks for, or has the wrong shape.
        """
        if mode in ("logprobs", "entropies"):
            verdicts = [self._check_tokens("log-probs", outcome.logps, self.logps)]
            if mode == "entropies":
                verdicts.append(self._check_tokens("entropies", outcome.entropies, self.entropies))
        else:
            verdicts = self._check_loss(outcome)
        # max() would pass over a NaN
        return max(verdicts, key=lambda v: float("inf") if v.error != v.error else v.error)

    def _check_tokens(self, what: str, got: Tensor | None, want: Tensor) -> Verdict:
        got = demand(what, got, want.shape).double()
        error = (got - want).abs() / (FP32_TOLERANCE * want.abs().clamp(min=1))
        return Verdict(largest(error[self.inputs.mask.bool()]), what)

    def _check_loss(self, outcome: Outcome) -> list[Verdict]:
        """dlogits = g·(onehot − p), g = dloss/dlogps: what is tolerated of an entry depends on it, on what
        is tolerated of g and, through 1 − p at the target, on g. Rows without a gradient must be exactly 0."""
        grad = demand("grad", outcome.grad, self.inputs.logits.shape)
        worst = [self._check_idle_rows(grad)]
        if self.sampled:
            worst += self._check_every_row(grad)
        for t in self.truth:
            ids = self.inputs.completion_ids[t.b, t.t, None]
            g = self.dlogps[t.b, t.t, None].abs()
            slack = self.slack[t.b, t.t, None] / g.clamp(min=1e-300)
            allowed = t.grad.abs().mul_(ROUNDING[grad.dtype] + slack).add_(TAIL * g)
            allowed.scatter_add_(1, ids, FP32_TOLERANCE * g)
            error = (grad[t.b, t.t].double() - t.grad).abs_()
            worst.append(largest(error.div_(allowed.clamp_(min=1e-300))))
        got = demand("loss", outcome.loss, torch.Size()).double()
        scale = self.dlogps.abs().sum().clamp(min=1)  # what an error of the log-probs makes of the loss
        worst_of_all = torch.tensor(worst).amax().item()  # amax keeps a NaN
        return [
            Verdict(((got - self.loss).abs() / (FP32_TOLERANCE * scale)).item(), "loss"),
            Verdict(worst_of_all, "gradient"),
        ]

    def _check_idle_rows(self, grad: Tensor) -> float:
        """The last position and what is masked."""
        idle = torch.nn.functional.pad(self.inputs.mask == 0, (0, 1), value=True)
        some = any(bool(grad[b, idle[b]].count_nonzero()) for b in range(self.inputs.case.batch))  # NaN counts
        return float("inf") if some else 0.0

    def _check_every_row(self, grad: Tensor) -> list[float]:
        """The token's entry, g·(1 − p), and the sum over a row, 0."""
        mask, ids = self.inputs.mask.bool(), self.inputs.completion_ids[..., None]
        g, missed = self.dlogps.abs(), 1 - self.logps.exp()
        relative = ROUNDING[grad.dtype] + self.slack / g.clamp(min=1e-300)
        allowed = (relative * g * missed + (TAIL + FP32_TOLERANCE) * g).clamp(min=1e-300)
        entry = grad[:, :-1].gather(-1, ids)[..., 0].double()
        sums = torch.stack([rows[:-1].sum(-1, dtype=torch.float32) for rows in grad]).double()
        # the other entries are as large as the token's together, and rounded as it is
        errors = ((entry - self.dlogps * missed).abs() / allowed, sums.abs() / (2 * allowed))
        return [largest(error[mask]) for error in errors]

    def _all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(sequences, places) of all rows, in chunks."""
        for b, start, stop in row_chunks(self.inputs.case):
            t = torch.arange(start, stop, device=self.inputs.mask.device)
            yield torch.full_like(t, b), t

    def _sample(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of `SAMPLED_ROWS` rows that count, always the same ones for a case."""
        rows = self.inputs.mask.nonzero()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SAMPLED_ROWS]
        rows = rows[order.sort().values.to(rows.device)]
        yield rows[:, 0], rows[:, 1]

    def _compute_logps(self) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies)"""
        found = [torch.zeros_like(self.inputs.old_logps, dtype=torch.float64) for _ in range(2)]
        with torch.no_grad():
            for b, start, stop in row_chunks(self.inputs.case):
                rows = slice(b, b + 1), slice(start, stop)
                x = self.inputs.logits[rows].double()
                got = token_logprobs(x, self.inputs.completion_ids[rows], mask=self.inputs.mask[rows])
                for whole, part in zip(found, got):
                    whole[rows] = part
        return tuple(found)

    def _gradient(self, b: Tensor, t: Tensor) -> Truth:
        x = self.inputs.logits[b, t].double()[None].requires_grad_()
        ids, mask = self.inputs.completion_ids[b, t][None], self.inputs.mask[b, t][None]
        logps = token_logprobs(x, ids, mask=mask).logps
        return Truth(b, t, torch.autograd.grad(logps, x, self.dlogps[b, t][None])[0][0])


def loss_and_slopes(inputs: Inputs, logps: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, dloss/dlogps)"""
    logps = logps.clone().requires_grad_()
    if inputs.case.objective == "cross-entropy":
        loss = -(logps * inputs.mask).sum()
    else:
        loss = policy_loss(logps, **inputs.objective()).loss
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


def demand(name: str, tensor: Tensor | None, shape: torch.Size) -> Tensor:
    if tensor is None or tensor.shape != shape:
        got = None if tensor is None else tuple(tensor.shape)
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {got}")
    return tensor


def largest(x: Tensor) -> float:
    return x.amax().item() if x.numel() else 0.0
