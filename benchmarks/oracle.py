"""Is a result right? Compared with `reference` in float64 before any speed is reported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines import Outcome
from benchmarks.cases import BETA, EPSILON, Inputs, row_chunks
from reference import grpo_loss

# Everyone computes in fp32, whatever the logits' dtype. What that costs grows with the vocabulary: the
# log-probs of sharp rows over 151936 words are 3e-5 off with PyTorch's own softmax on the CPU.
FP32_TOLERANCE = 1e-4  # absolute for the loss, the log-probs (relative above 1) and p; relative for g
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-4 + 2.0**-8}  # relative, of a gradient in that dtype
TAIL = 1e-6  # of g: probabilities below it need not be right
CACHE_BYTES = 1 << 30


class Truth(NamedTuple):
    """Rows [start, stop) of sequence b, in float64."""

    b: int
    start: int
    stop: int
    loss: Tensor  # 0-d: their share of the loss
    logps: Tensor  # (rows,)
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
    """The float64 truth about some inputs; computed again for every check if it is too large to keep."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        case = inputs.case
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
        got = _demand("logps", outcome.logps, self.inputs.completion_ids.shape).double()
        mask = self.inputs.mask.bool()
        want = torch.zeros_like(got)
        for t in self.truth():
            want[t.b, t.start : t.stop] = t.logps
        error = (got - want).abs() / (FP32_TOLERANCE * want.abs().clamp(min=1))
        return [Verdict(_largest(error[mask]), "log-probs")]

    def _check_loss(self, outcome: Outcome) -> list[Verdict]:
        """dlogits = g·(onehot − p): what is tolerated of an entry depends on it and, through 1 − p at
        the target, on g. Rows without a gradient must be exactly 0."""
        grad = _demand("grad", outcome.grad, self.inputs.logits.shape)
        loss, worst = 0.0, [_largest(grad[:, -1].abs().double() / 1e-300)]
        for t in self.truth():
            loss = loss + t.loss
            ids = self.inputs.completion_ids[t.b, t.start : t.stop, None]
            g = t.grad.gather(1, ids).abs() / -t.logps[:, None].clamp(max=-1e-12).expm1()
            allowed = t.grad.abs().mul_(ROUNDING[grad.dtype]).add_(TAIL * g)
            allowed.scatter_add_(1, ids, FP32_TOLERANCE * g)
            error = (grad[t.b, t.start : t.stop].double() - t.grad).abs_()
            worst.append(_largest(error.div_(allowed.clamp_(min=1e-300))))
        got = _demand("loss", outcome.loss, torch.Size()).double()
        largest = torch.tensor(worst).amax().item()  # amax keeps a NaN
        return [Verdict(((got - loss).abs() / FP32_TOLERANCE).item(), "loss"), Verdict(largest, "gradient")]

    def truth(self) -> Iterator[Truth]:
        return iter(self._truth) if self._truth is not None else self._compute()

    def _compute(self) -> Iterator[Truth]:
        """loss = (1/B) Σ_b (1/|y_b|) Σ_t ℓ: any rows of a sequence, n of them unmasked, have the part
        n/(|y_b|·B) of it, times their own mean. So the rows can be taken a few at a time."""
        inputs, B = self.inputs, self.inputs.case.batch
        tokens = inputs.mask.sum(1).clamp(min=1)
        for b, start, stop in row_chunks(inputs.case):
            rows = slice(b, b + 1), slice(start, stop)
            x = inputs.logits[rows].double().requires_grad_()
            mask = inputs.mask[rows]
            out = grpo_loss(
                x,
                inputs.completion_ids[rows],
                inputs.advantages[b : b + 1],
                old_logps=inputs.old_logps[rows],
                ref_logps=inputs.ref_logps[rows],
                completion_mask=mask,
                loss_scale=mask.sum().double() / (tokens[b] * B),
                loss_type="grpo",
                beta=BETA,
                epsilon=EPSILON,
            )
            (grad,) = torch.autograd.grad(out.loss, x)
            yield Truth(b, start, stop, out.loss.detach(), out.logps[0], grad[0])


def _demand(name: str, tensor: Tensor | None, shape: torch.Size) -> Tensor:
    if tensor is None or tensor.shape != shape:
        got = None if tensor is None else tuple(tensor.shape)
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {got}")
    return tensor


def _largest(x: Tensor) -> float:
    return x.amax().item() if x.numel() else 0.0
