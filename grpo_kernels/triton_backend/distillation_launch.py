"""Launches of distillation: the Triton backend, with the same functions as `grpo_kernels.cpu_backend.distillation`."""

import torch

from grpo_kernels.objective.distillation import DistillationBatch, DistillationPlan
from grpo_kernels.objective.language import triton
from grpo_kernels.objective.metrics import DISTILLATION_METRICS, DISTILLATION_SUMS
from grpo_kernels.triton_backend.distillation_kernels import (
    batch_sums_kernel,
    few_tokens_kernel,
    sequence_sums_kernel,
    whole_teacher_kernel,
)
from grpo_kernels.triton_backend.launch import _on, _over, _stride, _strides, _tile
from grpo_kernels.triton_backend.shapes import block_shape, gradient_shape, logprob_shape

STATS = 5  # numbers that are kept of a row between two launches


def gradient(logits, teacher, out, batch: DistillationBatch, plan: DistillationPlan, T: int) -> torch.Tensor:
    """Values [3, B, T] of the rows: divergence, entropy, the teacher's; the gradient goes to ``out`` in the launch."""
    values = _values(logits, T)
    _rows(logits, teacher, out, batch, plan, T, values=values)
    return values


def compare(
    logits, teacher, batch: DistillationBatch, plan: DistillationPlan, T: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [3, B, T], stats [B·T, 5], which `slope` needs)"""
    values = _values(logits, T)
    stats = values.new_empty((values[0].numel(), STATS))
    _rows(logits, teacher, None, batch, plan, T, values=values, stats=stats)
    return values, stats


def slope(logits, teacher, out, batch: DistillationBatch, plan: DistillationPlan, T: int, stats, up) -> None:
    """The gradient times ``up``, by what `compare` has kept."""
    _rows(logits, teacher, out, batch, plan, T, stats=stats, up=up.expand(logits.shape[0], T))


def _values(logits, T: int) -> torch.Tensor:
    return logits.new_empty((3, logits.shape[0], T), dtype=torch.float32)


def _at(batch: DistillationBatch, T: int) -> int:
    """How far apart sequences lie in the values, 0 for packed input, where a token's place is its own."""
    return T if batch.cu is None else 0


def _rows(
    logits, teacher, out, batch: DistillationBatch, plan: DistillationPlan, T: int, *, values=None, stats=None, up=None
) -> None:
    B, rows, V = logits.shape
    wanted = [x for x in (logits, teacher, out) if x is not None]
    shape = logprob_shape if out is None else gradient_shape
    student, told = batch.student, batch.teacher
    tile = _tile(shape, V, *wanted, crowding=_crowding(batch, plan, out is not None))
    # Without a gradient nothing but the scored positions is there to run over.
    programs = B * (rows if out is not None else T)
    rows = rows if out is not None else T
    n, sequences = B * T, batch.sequences(B)
    weighted = plan.weighted and out is not None
    count, loss_scale = (batch.count, batch.loss_scale) if weighted else (None, None)
    common = dict(WEIGHTED=weighted, MIXED=plan.mixed, BY_TEACHER=plan.by_teacher, VALUES=values is not None,
                  GRADIENT=out is not None, **tile)  # fmt: skip
    with _on(logits):
        if teacher is not None:
            _over(whole_teacher_kernel, programs)(
                logits, teacher, out, batch.mask, batch.temperature, batch.segments, values, stats, up, count,
                loss_scale, *_strides(logits, teacher, out, batch.mask, batch.temperature, up), _stride(count),
                _at(batch, T), sequences, T, rows, V, n,
                1.0 / batch.one_temperature, student.factor, told.factor, student.cap, told.cap, batch.beta,
                batch.w_factor, **common,
            )  # fmt: skip
        else:
            L = batch.token_ids.shape[-1]
            _over(few_tokens_kernel, programs)(
                logits, out, batch.token_ids, batch.teacher_logps, batch.mask, batch.temperature, batch.segments,
                values, stats, up, count, loss_scale,
                *_strides(logits, out, batch.token_ids, batch.teacher_logps, batch.mask, batch.temperature, up),
                _stride(count), _at(batch, T), sequences, T, rows, V, n, L,
                1.0 / batch.one_temperature, student.factor, student.cap, batch.beta, batch.w_factor,
                REST=plan.outcomes == "rest", FEW=plan.outcomes == "few", LANES=triton.next_power_of_2(max(L, 1)),
                **common,
            )  # fmt: skip


def _crowding(batch: DistillationBatch, plan: DistillationPlan, gradient: bool) -> int:
    """How many times fewer lines a pass can hold than one over a single row.

    Two rows take twice the registers per entry. A mixture takes more, and so do caps. Without a gradient the first
    pass spills on sm_100 with half of the lines (Triton 3.7.1), and programs are so small that many run at once.
    """
    capped = batch.student.cap is not None or batch.teacher.cap is not None
    if plan.outcomes != "all":
        return 2 if capped else 1
    return 4 if plan.mixed or capped or not gradient else 2


def totals(values, batch: DistillationBatch, plan: DistillationPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss [], sums [S], metrics [M]) of the values [3, B, T] of all rows."""
    _, B, T = values.shape
    sequences = batch.sequences(B)
    partial = values.new_empty((sequences, len(DISTILLATION_SUMS)), dtype=torch.float64)
    sums = values.new_empty(len(DISTILLATION_SUMS), dtype=torch.float64)
    loss, metrics = values.new_empty(()), values.new_empty(len(DISTILLATION_METRICS))
    with _on(values):
        _over(sequence_sums_kernel, sequences)(
            values, batch.mask, batch.count, batch.loss_scale, batch.cu, partial, *_strides(batch.mask),
            _stride(batch.count), _at(batch, T), sequences, T, B * T, batch.w_factor, **block_shape(),
        )  # fmt: skip
        batch_sums_kernel[(1,)](partial, sums, loss, metrics, sequences, **block_shape())
    return loss, sums, metrics
