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
CACHE_BYTES = 1 << 30


class Truth(NamedTuple):
    """The gradient of rows [start, stop) of sequence b, in float64."""

    b: int
    start: int
    stop: int
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

    The logits are gone over twice, a few rows at a time: for the log-probs, and, when the loss and its
    derivative by each of them are known, for the gradient. So a loss may couple the tokens of a sequence
    as it likes. A gradient too large to keep is computed again for every check.

    Attributes:
        loss: 0-d.
        logps: (B, T), 0 where masked.
        dlogps: (B, T), dloss/dlogps.
        slack: (B, T), how far dlogps moves if every log-prob moves by what is tolerated of it. Where the
            KL pulls one way and the policy term the other, or is clipped, that is much of what is left.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        case = inputs.case
        self.logps = self._compute_logps()
        self.loss, self.dlogps = loss_and_slopes(inputs, self.logps)
        moved = FP32_TOLERANCE * self.logps.abs().clamp(min=1)
        others = [loss_and_slopes(inputs, self.logps + sign * moved)[1] for sign in (1, -1)]
        self.slack = torch.stack([(other - self.dlogps).abs() for other in others]).amax(0)
        keep = case.batch * case.length * case.vocab * 8 <= CACHE_BYTES
        self._truth: list[Truth] | None = list(self._compute()) if keep else None

    def check(self, mode: str, outcome: Outcome) -> Verdict:
        """The worst deviation of an outcome of this mode.

        Raises:
            ValueError: the outcome lacks a tensor that the mode asks for, or has the wrong shape.
        """
        verdicts = self._check_logps(outcome) if mode == "logprobs" else self._check_loss(outcome)
        # max() would pass over a NaN
        return max(verdicts, key=lambda v: float("inf") if v.error != v.error else v.error)

    def _check_logps(self, outcome: Outcome) -> list[Verdict]:
        got = demand("logps", outcome.logps, self.inputs.completion_ids.shape).double()
        mask = self.inputs.mask.bool()
        error = (got - self.logps).abs() / (FP32_TOLERANCE * self.logps.abs().clamp(min=1))
        return [Verdict(largest(error[mask]), "log-probs")]

    def _check_loss(self, outcome: Outcome) -> list[Verdict]:
        """dlogits = g·(onehot − p), g = dloss/dlogps: what is tolerated of an entry depends on it, on what
        is tolerated of g and, through 1 − p at the target, on g. Rows without a gradient must be exactly 0."""
        grad = demand("grad", outcome.grad, self.inputs.logits.shape)
        worst = [largest(grad[:, -1].abs().double() / 1e-300)]
        for t in self.truth():
            ids = self.inputs.completion_ids[t.b, t.start : t.stop, None]
            g = self.dlogps[t.b, t.start : t.stop, None].abs()
            slack = self.slack[t.b, t.start : t.stop, None] / g.clamp(min=1e-300)
            allowed = t.grad.abs().mul_(ROUNDING[grad.dtype] + slack).add_(TAIL * g)
            allowed.scatter_add_(1, ids, FP32_TOLERANCE * g)
            error = (grad[t.b, t.start : t.stop].double() - t.grad).abs_()
            worst.append(largest(error.div_(allowed.clamp_(min=1e-300))))
        got = demand("loss", outcome.loss, torch.Size()).double()
        worst_of_all = torch.tensor(worst).amax().item()  # amax keeps a NaN
        return [Verdict(((got - self.loss).abs() / FP32_TOLERANCE).item(), "loss"), Verdict(worst_of_all, "gradient")]

    def truth(self) -> Iterator[Truth]:
        return iter(self._truth) if self._truth is not None else self._compute()

    def _rows(self, b: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Their logits (1, rows, V) in float64, as a leaf, and their log-probs (1, rows)."""
        rows = slice(b, b + 1), slice(start, stop)
        x = self.inputs.logits[rows].double().requires_grad_()
        return x, token_logprobs(x, self.inputs.completion_ids[rows], mask=self.inputs.mask[rows]).logps

    def _compute_logps(self) -> Tensor:
        logps = torch.zeros_like(self.inputs.old_logps, dtype=torch.float64)
        with torch.no_grad():
            for b, start, stop in row_chunks(self.inputs.case):
                logps[b, start:stop] = self._rows(b, start, stop)[1][0]
        return logps

    def _compute(self) -> Iterator[Truth]:
        for b, start, stop in row_chunks(self.inputs.case):
            x, logps = self._rows(b, start, stop)
            (grad,) = torch.autograd.grad(logps, x, self.dlogps[b : b + 1, start:stop])
            yield Truth(b, start, stop, grad[0])


def loss_and_slopes(inputs: Inputs, logps: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, dloss/dlogps)"""
    logps = logps.clone().requires_grad_()
    loss = policy_loss(logps, **inputs.objective()).loss
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


def demand(name: str, tensor: Tensor | None, shape: torch.Size) -> Tensor:
    if tensor is None or tensor.shape != shape:
        got = None if tensor is None else tuple(tensor.shape)
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {got}")
    return tensor


def largest(x: Tensor) -> float:
    return x.amax().item() if x.numel() else 0.0
