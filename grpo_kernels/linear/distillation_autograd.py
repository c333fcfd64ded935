"""Autograd of distillation from hidden states, in the two forms of `grpo_kernels.linear.head_autograd`."""

import torch
from torch import Tensor

from grpo_kernels.call.autograd import refuse_double_backward
from grpo_kernels.linear import distillation_head_ops as head_ops
from grpo_kernels.linear.head_autograd import ChunkOptions, given, times_up, wanted_by
from grpo_kernels.objective.distillation import DistillationBatch, DistillationPlan

_REST = 6  # arguments of both functions after hidden states, weight and bias


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, told, tensors, numbers, plan, T, options: ChunkOptions):
        ctx.wanted, ctx.backend = wanted_by(ctx), options.backend
        values, loss, sums, metrics, *gradients = head_ops.linear_distillation_op(
            hidden, weight, bias, told, tensors, numbers, plan, T, ctx.wanted, options.in_fp32, options.height,
            options.count, options.fp32_logits, options.backend,
        )  # fmt: skip
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(values, sums, metrics)
        ctx.set_materialize_grads(False)
        return loss, values, sums, metrics

    @staticmethod
    def backward(ctx, up, *_):
        return *times_up(ctx, up), *(None,) * _REST


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, told, tensors, numbers, plan, T, options: ChunkOptions):
        values, loss, sums, metrics, stats, count = head_ops.linear_distillation_values_op(
            hidden, weight, bias, told, tensors, numbers, plan, T, options.height, options.count, options.fp32_logits,
            options.backend,
        )  # fmt: skip
        ctx.wanted, ctx.plan, ctx.T, ctx.options = wanted_by(ctx), plan, T, options
        ctx.save_for_backward(hidden, weight, bias, numbers, stats, count, *told, *tensors)
        ctx.mark_non_differentiable(values, sums, metrics)
        ctx.set_materialize_grads(False)
        return loss if DistillationPlan.from_key(plan).weighted else values[0].clone(), values, sums, metrics

    @staticmethod
    def backward(ctx, up, *_):
        refuse_double_backward()
        hidden, weight, bias, numbers, stats, count, *rest = ctx.saved_tensors
        options = ctx.options
        gradients = head_ops.linear_distillation_slope_op(
            hidden, weight, bias, rest[:3], rest[3:], numbers, stats, up, ctx.plan, ctx.T, ctx.wanted, options.in_fp32,
            options.height, count, options.fp32_logits, options.backend,
        )  # fmt: skip
        dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        return *given([x.to(dtype) for x, dtype in zip(gradients, dtypes)], ctx.wanted), *(None,) * _REST


def run(
    student: tuple, told: tuple, batch: DistillationBatch, plan: DistillationPlan, T: int, options: ChunkOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, values [3, B, T], sums, metrics), differentiable in the student's hidden states, weight and bias."""
    packed = (told, *batch.pack(), plan.key(), T, options)
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student)
    if needed and plan.weighted and student[0].dtype != torch.float16:
        return _Fused.apply(*student, *packed)
    return _Deferred.apply(*student, *packed)
