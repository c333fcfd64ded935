"""Autograd of distillation: one launch or two, as `grpo_kernels.call.autograd` has it for the other losses."""

import torch
from torch import Tensor

from grpo_kernels.call import distillation_ops, ops, overwritten
from grpo_kernels.call.autograd import backward_may_run_again, is_one, refuse_double_backward
from grpo_kernels.objective.distillation import DistillationBatch, DistillationPlan


class _OneLaunch(torch.autograd.Function):
    """Loss whose gradient the forward has already written."""

    @staticmethod
    def forward(ctx, logits, teacher, tensors, numbers, plan, T, backend, inplace):
        guarded = inplace and overwritten.are_guarded()
        if inplace and not guarded:
            values, loss, sums, metrics = distillation_ops.distillation_loss_op_(
                logits, teacher, tensors, numbers, plan, T, backend
            )
            grad = logits.detach()
        else:
            values, loss, sums, metrics, grad = distillation_ops.distillation_loss_op(
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
        (grad,) = ctx.saved_tensors
        if backward_may_run_again():
            grad = ops.scale_op(grad, up, ctx.backend)
        elif not is_one(up):
            ops.scale_op_(grad, up, ctx.backend)  # ours alone from here on
        return grad, *(None,) * 7


class _TwoLaunches(torch.autograd.Function):
    """Loss whose gradient is written in the backward, upstream gradient included, before rounding."""

    @staticmethod
    def forward(ctx, logits, teacher, tensors, numbers, plan, T, backend, inplace):
        values, loss, sums, metrics, stats = distillation_ops.distillation_values_op(
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
        rest = (teacher, tensors, numbers, stats, up, ctx.plan, ctx.T, ctx.backend)
        guarded = ctx.inplace and overwritten.are_guarded()
        if guarded or not ctx.inplace:
            grad = distillation_ops.distillation_slope_op(logits, *rest)
            if guarded:
                overwritten.give_up(logits)
        else:
            distillation_ops.distillation_slope_op_(logits, *rest)
            grad = logits.detach()
        return grad, *(None,) * 7


def run(
    logits, teacher, batch: DistillationBatch, plan: DistillationPlan, T: int, backend: str, inplace: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, values [3, B, T], sums, metrics), the loss differentiable in the logits if they require grad."""
    packed = (*batch.pack(), plan.key(), T, backend)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        values, loss, sums, metrics, _ = distillation_ops.distillation_values_op(logits.detach(), teacher, *packed)
        return loss if plan.weighted else values[0], values, sums, metrics
    if plan.weighted and logits.dtype != torch.float16:
        return _OneLaunch.apply(logits, teacher, *packed, inplace)
    return _TwoLaunches.apply(logits, teacher, *packed, inplace)
