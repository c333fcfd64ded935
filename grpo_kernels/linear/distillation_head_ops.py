"""Custom ops of distillation from hidden states; see `grpo_kernels.call.distillation_ops` for what they take.

``wanted``, ``height`` and ``count`` are as in `grpo_kernels.linear.head_ops`. ``told``: hidden states, weight and bias
of the teacher; all None where the batch has some of its tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_kernels.call.distillation_ops import backend_of, check_values, fake_values, stats_shape
from grpo_kernels.call.library import fake, operator
from grpo_kernels.linear import distillation_chunks as chunks
from grpo_kernels.linear.distillation_chunks import Pairs
from grpo_kernels.linear.head import Gradients
from grpo_kernels.objective.distillation import DistillationBatch, DistillationPlan


def _pairs(
    hidden, weight, bias, told, tensors, numbers, T: int, height: int, count: int, fp32_logits: bool
) -> Pairs:
    batch = DistillationBatch.unpack(tensors, numbers)
    check_values(batch, hidden.device, weight.shape[0])
    teacher = None if told[0] is None else tuple(told)
    return Pairs((hidden, weight, bias), teacher, batch, T, height, count, fp32_logits)


@operator()
def linear_distillation_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, told: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None], numbers: Tensor, plan: str, T: int, wanted: str, in_fp32: bool, height: int,
    count: int, fp32_logits: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(values [3, B, T], loss [], sums [S], metrics [M], gradients of hidden states, weight and bias)"""
    pairs, run, plan = (
        _pairs(hidden, weight, bias, told, tensors, numbers, T, height, count, fp32_logits), backend_of(backend),
        DistillationPlan.from_key(plan),
    )  # fmt: skip
    into = Gradients.like(hidden, weight, bias, wanted, in_fp32)
    values = chunks.write_gradients(run, pairs, plan, into)
    return values, *run.totals(values, pairs.batch, plan), into.hidden, into.weight, into.bias


@fake(linear_distillation_op)
def _(hidden, weight, bias, told, tensors, numbers, plan, T, wanted, in_fp32, height, count, fp32_logits,
      backend):  # fmt: skip
    into = Gradients.like(hidden, weight, bias, wanted, in_fp32)
    return *fake_values(hidden, hidden.shape[0], T), into.hidden, into.weight, into.bias


@operator()
def linear_distillation_values_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, told: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None], numbers: Tensor, plan: str, T: int, height: int, count: int, fp32_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(values, loss, sums, metrics; for `linear_distillation_slope_op`: what it needs of the rows, how many, on the
    host)"""
    pairs, run, plan = (
        _pairs(hidden, weight, bias, told, tensors, numbers, T, height, count, fp32_logits), backend_of(backend),
        DistillationPlan.from_key(plan),
    )  # fmt: skip
    stats = hidden.new_empty(stats_shape(hidden.shape[0] * T, backend), dtype=torch.float32)
    values = chunks.score(run, pairs, plan, stats)
    return values, *run.totals(values, pairs.batch, plan), stats, torch.tensor(pairs.student.count, device="cpu")


@fake(linear_distillation_values_op)
def _(hidden, weight, bias, told, tensors, numbers, plan, T, height, count, fp32_logits, backend):
    stats = hidden.new_empty(stats_shape(hidden.shape[0] * T, backend), dtype=torch.float32)
    return *fake_values(hidden, hidden.shape[0], T), stats, torch.empty((), dtype=torch.int64, device="cpu")


@operator()
def linear_distillation_slope_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, told: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None], numbers: Tensor, stats: Tensor, up: Tensor, plan: str, T: int, wanted: str,
    in_fp32: bool, height: int, count: Tensor, fp32_logits: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden states, weight and bias times ``up``, [] or (B, T)."""
    count = int(count)  # of a CPU tensor: no device is waited for
    pairs = _pairs(hidden, weight, bias, told, tensors, numbers, T, height, count, fp32_logits)
    into = Gradients.like(hidden, weight, bias, wanted, in_fp32)
    chunks.pull_back(backend_of(backend), pairs, DistillationPlan.from_key(plan), stats, up, into)
    return into.hidden, into.weight, into.bias


@fake(linear_distillation_slope_op)
def _(hidden, weight, bias, told, tensors, numbers, stats, up, plan, T, wanted, in_fp32, height, count,
      fp32_logits, backend):  # fmt: skip
    into = Gradients.like(hidden, weight, bias, wanted, in_fp32)
    return into.hidden, into.weight, into.bias
