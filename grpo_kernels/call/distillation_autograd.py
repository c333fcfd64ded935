"""Autograd of distillation: one launch or two, as `grpo_kernels.call.autograd` has it for the other losses."""

import torch
from torch import Tensor

from grpo_kernels.call import distillation_ops as ops
from grpo_kernels.call import overwritten
from grpo_kernels.call.autograd import refuse_double_backward, times, write_gradient
from grpo_kernels.objective.distillation import DistillationBatch, DistillationPlan


class _OneLaunch(torch.autograd.Function):
    """Loss whose gradient the forward has already written."""

    @staticmethod
    def forward(ctx, logits, teacher, tensors, numbers, plan, T, backend, inplace):
        guarded = inplace and overwritten.are_guarded()
        if inplace and not guarded:
            values, loss, sums, metrics = ops.distillation_loss_op_(
                logits, teacher, tensors, numbers, plan, T, backend
            )
            grad = logits.detach()
        else:
            values, loss, sums, metrics, grad = ops.distillation_loss_op(
                logits, teacher, tensors, numbers, plan, T, backend
            )
        if guarded:
            overwritten.give_up(logits)
        ctx.backend = backend
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(values, sums, metrics)
        ctx.set_materialize_grads(False)
        return loss, values, sums, metrics

    @staticmethod
    def backward(ctx, up, *_):
        refuse_double_backward()
        return times(*ctx.saved_tensors, up, ctx.backend), *(None,) * 7


class _TwoLaunches(torch.autograd.Function):
    """Loss whose gradient is written in the backward, upstream gradient included, before rounding."""

    @staticmethod
    def forward(ctx, logits, teacher, tensors, numbers, plan, T, backend, inplace):
        values, loss, sums, metrics, stats = ops.distillation_values_op(
            logits, teacher, tensors, numbers, plan, T, backend
        )
        ctx.plan, ctx.T, ctx.backend, ctx.inplace = plan, T, backend, inplace
        ctx.save_for_backward(logits, teacher, numbers, stats, *tensors)
        ctx.mark_non_differentiable(values, sums, metrics)
        ctx.set_materialize_grads(False)
        return loss if DistillationPlan.from_key(plan).weighted else values[0].clone(), values, sums, metrics

    @staticmethod
    def backward(ctx, up, *_):
        refuse_double_backward()
        logits, teacher, numbers, stats, *tensors = ctx.saved_tensors
        how = ctx.inplace, ops.distillation_slope_op, ops.distillation_slope_op_
        rest = (teacher, tensors, numbers, stats, up, ctx.plan, ctx.T, ctx.backend)
        return write_gradient(logits, *how, *rest), *(None,) * 7


def run(
    logits, teacher, batch: DistillationBatch, plan: DistillationPlan, T: int, backend: str, inplace: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, values [3, B, T], sums, metrics), the loss differentiable in the logits if they require grad."""
    packed = (*batch.pack(), plan.key(), T, backend)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        values, loss, sums, metrics, _ = ops.distillation_values_op(logits.detach(), teacher, *packed)
        return loss if plan.weighted else values[0], values, sums, metrics
    if plan.weighted and logits.dtype != torch.float16:
        return _OneLaunch.apply(logits, teacher, *packed, inplace)
    return _TwoLaunches.apply(logits, teacher, *packed, inplace)
