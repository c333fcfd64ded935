"""Distillation by reverse KL: the teacher beside a case's data, the float64 truth, and who is measured.

From logits the teacher's are given too; from hidden states its own, with a head of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.baselines import Implementation, ModelOutput, Outcome, missing_module
from benchmarks.baselines_linear import leaves, outcome
from benchmarks.cases import Case, Inputs, row_chunks
from benchmarks.linear_data import SPREAD, LinearOracle
from benchmarks.oracle import (
    ALL_ROWS_BYTES,
    FP32_TOLERANCE,
    ROUNDING,
    SAMPLED_ROWS,
    TAIL,
    Verdict,
    demand,
    largest,
)
from grpo_kernels import distillation_loss, fused_linear_distillation_loss

OBJECTIVE = "distillation"
NOISE = 1.0  # of the teacher's logits around the student's


def with_teacher(inputs: Inputs, seed: int = 0) -> Inputs:
    """The inputs of a case, with a teacher."""
    case, like = inputs.case, inputs.weight if inputs.case.hidden else inputs.logits
    generator = torch.Generator(like.device).manual_seed(seed + 1)
    given = {"device": like.device, "dtype": like.dtype, "generator": generator}
    if not case.hidden:
        teacher = torch.randn(like.shape, **given).mul_(NOISE).add_(like)
        return replace(inputs, teacher=teacher)
    hidden = torch.randn(inputs.hidden.shape, **given)
    weight = torch.randn(like.shape, **given).mul_(SPREAD / math.sqrt(case.hidden))
    return replace(inputs, teacher_hidden=hidden, teacher_weight=weight)


# --- the truth ------------------------------------------------------------------------------------------


def divergence(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(KL(p‖q) of each row, its derivative by the student's logits x, what that is rounded from), in float64."""
    log_p, log_q = torch.log_softmax(x.double(), -1), torch.log_softmax(z.double(), -1)
    p, gap = log_p.exp(), log_p - log_q
    value = (p * gap).sum(-1)
    return value, p * (gap - value[..., None]), p * (log_p.abs() + log_q.abs() + value[..., None])


class DistillationOracle:
    """The float64 truth about logits: the loss of all rows, and of a large case the gradient of a sample of them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, case = inputs, inputs.case
        self.weight = 1.0 / inputs.mask.sum().item()
        self.loss = torch.zeros((), dtype=torch.float64, device=inputs.mask.device)
        self.scale = self.loss.clone()
        for b, start, stop in row_chunks(case):
            rows = b, slice(start, stop)
            value, _, terms = divergence(inputs.logits[rows], inputs.teacher[rows])
            w = inputs.mask[rows].double() * self.weight
            self.loss += (value * w).sum()
            self.scale += (terms.sum(-1) * w).sum()
        rows = inputs.mask.nonzero()
        if case.batch * case.length * case.vocab * 8 > ALL_ROWS_BYTES:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SAMPLED_ROWS]
            rows = rows[order.to(rows.device)]
        self.rows = rows

    def check(self, mode: str, outcome: Outcome) -> Verdict:
        """The worst deviation of an outcome.

        Raises:
            ValueError: a tensor is not there, or has the wrong shape.
        """
        grad = demand("grad", outcome.grad, self.inputs.logits.shape)
        got = demand("loss", outcome.loss, torch.Size()).double()
        errors = [((got - self.loss).abs() / (FP32_TOLERANCE * self.scale)).item()]
        idle = torch.nn.functional.pad(self.inputs.mask == 0, (0, 1), value=True)
        some = any(bool(grad[b, idle[b]].count_nonzero()) for b in range(self.inputs.case.batch))  # NaN counts
        errors += [math.inf if some else 0.0, *self._of_rows(grad)]
        names = ["loss", "gradient of masked rows", *["gradient"] * (len(errors) - 2)]
        return max(map(Verdict, errors, names), key=lambda v: math.inf if v.error != v.error else v.error)

    def _of_rows(self, grad: Tensor) -> Iterator[float]:
        for b, t in (chunk.unbind(1) for chunk in self.rows.split(SAMPLED_ROWS)):
            _, slope, terms = divergence(self.inputs.logits[b, t], self.inputs.teacher[b, t])
            want = slope * self.weight
            allowed = want.abs() * ROUNDING[grad.dtype] + (terms * FP32_TOLERANCE + TAIL) * self.weight
            yield largest((grad[b, t].double() - want).abs() / allowed)


class LinearDistillationOracle(LinearOracle):
    """The same of hidden states and head: loss, and the gradients of the student's.

    TRL's kernel does not round the logits. Those of the likely tokens lie between 8 and 16, where bf16 rounds by 0.018
    in the mean: that moves the terms of the loss, and probabilities by 2%.
    """

    slack = 4.0

    def _find(self) -> None:
        inputs, weight = self.inputs, self.inputs.weight.double()
        self.scale.zero_()
        for b, start, stop in row_chunks(inputs.case):
            x = self._logits(inputs.hidden, inputs.weight, b, start, stop)
            z = self._logits(inputs.teacher_hidden, inputs.teacher_weight, b, start, stop)
            value, slope, terms = divergence(x, z)
            w = inputs.mask[b, start:stop].double() / inputs.mask.sum()
            self.loss += (value * w).sum()
            self.scale += (terms.sum(-1) * w).sum()
            dz = slope * w[:, None]
            self.d_hidden[b, start:stop] = dz @ weight
            self.d_weight.addmm_(dz.T, inputs.hidden[b, start:stop].double())

    def _logits(self, hidden: Tensor, weight: Tensor, b: int, start: int, stop: int) -> Tensor:
        return (hidden[b, start:stop].double() @ weight.double().T).to(self.inputs.case.dtype)


# --- who is measured ------------------------------------------------------------------------------------


def ours(inputs: Inputs, logits: Tensor) -> Outcome:
    x = logits.detach().requires_grad_()
    return _ours(inputs, x, inplace=False)


def ours_inplace(inputs: Inputs, logits: Tensor) -> Outcome:
    return _ours(inputs, ModelOutput.apply(torch.zeros((), requires_grad=True), logits), inplace=True)


def _ours(inputs: Inputs, x: Tensor, inplace: bool) -> Outcome:
    loss = distillation_loss(x, inputs.teacher, completion_mask=inputs.mask, inplace=inplace).loss
    return Outcome(loss.detach(), torch.autograd.grad(loss, x)[0])


def eager(inputs: Inputs, logits: Tensor) -> Outcome:
    x = logits.detach().requires_grad_()
    loss = _eager_loss(x[:, :-1], inputs.teacher[:, :-1], inputs.mask)
    return Outcome(loss.detach(), torch.autograd.grad(loss, x)[0])


def _eager_loss(x: Tensor, z: Tensor, mask: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(x.float(), -1), torch.log_softmax(z.float(), -1)
    value = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (value * mask).sum() / mask.sum()


def ours_linear(inputs: Inputs, _: Tensor) -> Outcome:
    hidden, weight = leaves(inputs)
    models = hidden, weight, inputs.teacher_hidden, inputs.teacher_weight
    return outcome(fused_linear_distillation_loss(*models, completion_mask=inputs.mask).loss, hidden, weight)


def eager_linear(inputs: Inputs, _: Tensor) -> Outcome:
    hidden, weight = leaves(inputs)
    # Nobody keeps the logits: what is held is what autograd holds.
    linear = torch.nn.functional.linear
    z = linear(inputs.teacher_hidden, inputs.teacher_weight)
    return outcome(_eager_loss(linear(hidden, weight), z, inputs.mask), hidden, weight)


def trl_linear(inputs: Inputs, _: Tensor) -> Outcome:
    """As its DistillationTrainer calls it: rows that do not count are left out."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight = leaves(inputs)
    mask = inputs.mask.bool()
    rows = hidden[mask], weight, None, inputs.teacher_hidden[mask], inputs.teacher_weight, None
    return outcome(ChunkedDivergenceFunction.apply(*rows, 1.0)[0].sum() / mask.sum(), hidden, weight)


def trl_missing(case: Case, device: torch.device) -> str | None:
    return missing_module("trl.kernels.chunked_divergence", "'trl>=1.16'")


IMPLEMENTATIONS = (
    Implementation(
        "grpo_kernels", {"loss": ours, "inplace": ours_inplace, "linear": ours_linear}, objectives=(OBJECTIVE,)
    ),
    Implementation("eager PyTorch", {"loss": eager, "linear": eager_linear}, objectives=(OBJECTIVE,)),
    Implementation("TRL kernel", {"linear": trl_linear}, missing_linear=trl_missing, objectives=(OBJECTIVE,)),
)
