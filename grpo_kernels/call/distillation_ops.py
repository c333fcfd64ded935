"""Custom ops of distillation, see `grpo_kernels.call.ops`.

``tensors`` and ``numbers`` are a packed `grpo_kernels.objective.distillation.DistillationBatch`, ``plan`` is the key of
a `DistillationPlan`; ``T`` positions of each sequence are scored. ``teacher`` are its logits, or None where the batch
has some of its tokens. Ops whose names end in an underscore write over their first argument.
"""

import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_kernels.call import checks, distillation_checks
from grpo_kernels.call.library import fake, operator
from grpo_kernels.objective.distillation import DistillationBatch, DistillationPlan
from grpo_kernels.objective.metrics import DISTILLATION_METRICS, DISTILLATION_SUMS

_BACKENDS = {
    "torch": "grpo_kernels.cpu_backend.distillation", "triton": "grpo_kernels.triton_backend.distillation_launch",
}  # fmt: skip
_STATS = {"torch": 0, "triton": 5}  # numbers kept of a row for `distillation_slope_op`; the torch backend keeps none


@functools.cache
def backend_of(name: str):
    return importlib.import_module(_BACKENDS[name])


def check_values(batch: DistillationBatch, device: torch.device, V: int) -> None:
    if checks.validates(device):
        checks.check_mask_values(batch.mask)
        if batch.token_ids is not None:
            distillation_checks.check_told(batch.token_ids, batch.teacher_logps, batch.mask, V)


def stats_shape(rows: int, backend: str) -> tuple[int, ...]:
    """Shape of what `distillation_slope_op` needs of each row."""
    kept = _STATS[backend]
    return (rows, kept) if kept else (0,)


def _loss(logits, teacher, out, tensors, numbers, plan, T, backend) -> tuple[Tensor, ...]:
    batch, plan, run = DistillationBatch.unpack(tensors, numbers), DistillationPlan.from_key(plan), backend_of(backend)
    check_values(batch, logits.device, logits.shape[-1])
    values = run.gradient(logits, teacher, out, batch, plan, T)
    return values, *run.totals(values, batch, plan)


def fake_values(like: Tensor, B: int, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = like.new_empty((3, B, T), dtype=torch.float32)
    sums = like.new_empty(len(DISTILLATION_SUMS), dtype=torch.float64)
    return values, values.new_empty(()), sums, values.new_empty(len(DISTILLATION_METRICS))


@operator()
def distillation_loss_op(
    logits: Tensor, teacher: Tensor | None, tensors: Sequence[Tensor | None], numbers: Tensor, plan: str, T: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(values [3, B, T]: divergence, entropy, the teacher's; loss [], sums [S], metrics [M], gradient of the logits)"""
    out = logits.new_empty(logits.shape)
    return *_loss(logits, teacher, out, tensors, numbers, plan, T, backend), out


@fake(distillation_loss_op)
def _(logits, teacher, tensors, numbers, plan, T, backend):
    return *fake_values(logits, logits.shape[0], T), logits.new_empty(logits.shape)


@operator(writes_over="logits")
def distillation_loss_op_(
    logits: Tensor, teacher: Tensor | None, tensors: Sequence[Tensor | None], numbers: Tensor, plan: str, T: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`distillation_loss_op`, the gradient taking the place of the logits."""
    return _loss(logits, teacher, logits, tensors, numbers, plan, T, backend)


@fake(distillation_loss_op_)
def _(logits, teacher, tensors, numbers, plan, T, backend):
    return fake_values(logits, logits.shape[0], T)


@operator()
def distillation_values_op(
    logits: Tensor, teacher: Tensor | None, tensors: Sequence[Tensor | None], numbers: Tensor, plan: str, T: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(values [3, B, T], loss [], sums [S], metrics [M], what `distillation_slope_op` needs of each row)"""
    batch, plan, run = DistillationBatch.unpack(tensors, numbers), DistillationPlan.from_key(plan), backend_of(backend)
    check_values(batch, logits.device, logits.shape[-1])
    values, stats = run.compare(logits, teacher, batch, plan, T)
    return values, *run.totals(values, batch, plan), stats


@fake(distillation_values_op)
def _(logits, teacher, tensors, numbers, plan, T, backend):
    B = logits.shape[0]
    return *fake_values(logits, B, T), logits.new_empty(stats_shape(B * T, backend), dtype=torch.float32)


def _slope(logits, teacher, out, tensors, numbers, stats, up, plan, T, backend) -> None:
    if out.numel():
        batch, plan = DistillationBatch.unpack(tensors, numbers), DistillationPlan.from_key(plan)
        backend_of(backend).slope(logits, teacher, out, batch, plan, T, stats, up)


@operator()
def distillation_slope_op(
    logits: Tensor, teacher: Tensor | None, tensors: Sequence[Tensor | None], numbers: Tensor, stats: Tensor,
    up: Tensor, plan: str, T: int, backend: str,
) -> Tensor:  # fmt: skip
    """Gradient of the logits times ``up``, [] or (B, T)."""
    out = logits.new_empty(logits.shape)
    _slope(logits, teacher, out, tensors, numbers, stats, up, plan, T, backend)
    return out


@fake(distillation_slope_op)
def _(logits, *args):
    return logits.new_empty(logits.shape)


@operator(writes_over="logits")
def distillation_slope_op_(
    logits: Tensor, teacher: Tensor | None, tensors: Sequence[Tensor | None], numbers: Tensor, stats: Tensor,
    up: Tensor, plan: str, T: int, backend: str,
) -> None:  # fmt: skip
    """`distillation_slope_op`, the gradient taking the place of the logits."""
    _slope(logits, teacher, logits, tensors, numbers, stats, up, plan, T, backend)


@fake(distillation_slope_op_)
def _(*args):
    return None
