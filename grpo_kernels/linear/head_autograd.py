"""Autograd of the losses from hidden states.

Two forms, as with logits (`grpo_kernels.call.autograd`):

* `_Fused`: the forward makes the gradients too, so that the head is multiplied three times in all;
* `_Deferred`: what depends on the whole batch, on an upstream gradient per token, or on a loss scaler
  (fp16), is made in the backward, from logits that are computed again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.call import ops
from grpo_kernels.call.autograd import (
    Objective,
    backward_may_run_again,
    given_slopes,
    is_one,
    refuse_double_backward,
    slopes_of,
)
from grpo_kernels.linear import head_ops
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.plan import Plan


class ChunkOptions(NamedTuple):
    """How the products are made: rows of logits at a time, rows read (-1: unknown), dtype of ∂L/∂W, backend; whether
    each row takes only the rows of the head that its support names; whether logits are fp32 whatever the head is."""

    height: int
    count: int
    in_fp32: bool
    backend: str
    gather: bool = False
    fp32_logits: bool = False


def wanted_by(ctx) -> str:
    return "".join(letter for letter, needed in zip("hwb", ctx.needs_input_grad) if needed)


def given(gradients: tuple[Tensor, ...], wanted: str) -> tuple[Tensor | None, ...]:
    return tuple(x if letter in wanted else None for letter, x in zip("hwb", gradients))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, tensors, numbers, plan, entropy, options: ChunkOptions):
        ctx.wanted, ctx.backend = wanted_by(ctx), options.backend
        logps, entropies, loss, sums, metrics, *gradients = head_ops.linear_loss_op(
            hidden, weight, bias, tensors, numbers, plan, entropy, ctx.wanted,
            options.in_fp32, options.height, options.count, options.gather, options.fp32_logits, options.backend,
        )  # fmt: skip
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(logps, entropies, sums, metrics)
        ctx.set_materialize_grads(False)
        return loss, logps, entropies, sums, metrics

    @staticmethod
    def backward(ctx, up, *_):
        return *times_up(ctx, up), *(None,) * 5


def times_up(ctx, up: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that a forward has made of hidden states, weight and bias, by the upstream gradient."""
    refuse_double_backward()
    again = backward_may_run_again()
    gradients = [
        x if dtype is None else _times(x, up, dtype, again, ctx.backend)
        for x, dtype in zip(ctx.saved_tensors, ctx.dtypes)
    ]
    return given(gradients, ctx.wanted)


def _times(x: Tensor, up: Tensor, dtype: torch.dtype, again: bool, backend: str) -> Tensor:
    """x · up in this dtype; in place where nobody needs x any more."""
    if x.dtype != dtype:
        # into the dtype at once: as large as a weight, one more in fp32 would count
        return x.to(dtype) if is_one(up) else torch.mul(x, up, out=x.new_empty(x.shape, dtype=dtype))
    if x.numel() == 0 or (not again and is_one(up)):
        return x
    rows = x.view(1, -1, x.shape[-1])
    if again:
        return ops.scale_op(rows, up, backend).view(x.shape)
    ops.scale_op_(rows, up, backend)
    return x


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, tensors, numbers, plan, entropy, options: ChunkOptions, data_group):
        logps, entropies, stats, count = head_ops.linear_logprobs_op(
            hidden, weight, bias, tensors, numbers, plan, entropy, options.height,
            options.count, options.gather, options.fp32_logits, options.backend,
        )  # fmt: skip
        it = Objective(logps, entropies if entropy else None, tensors, numbers, plan, options.backend, data_group)
        ctx.wanted, ctx.plan, ctx.options = wanted_by(ctx), plan, options
        ctx.save_for_backward(hidden, weight, bias, numbers, stats, count, *it.save(ctx), *tensors)
        ctx.mark_non_differentiable(logps, entropies, it.sums, it.metrics)
        ctx.set_materialize_grads(False)
        return it.loss, logps, entropies, it.sums, it.metrics

    @staticmethod
    def backward(ctx, up, *_):
        refuse_double_backward()
        hidden, weight, bias, numbers, stats, count, *rest = ctx.saved_tensors
        saved, tensors = rest[:4], tuple(rest[4:])
        g, h, up = slopes_of(ctx, saved, up, Batch(*tensors).cu)
        gradients = _pull_back(ctx, hidden, weight, bias, tensors, numbers, stats, count, g, h, up)
        return *gradients, *(None,) * 6


def _pull_back(ctx, hidden, weight, bias, tensors, numbers, stats, count, g, h, up):
    gradients = head_ops.linear_slope_op(
        hidden, weight, bias, tensors, numbers, stats, g, h, up, ctx.plan, ctx.wanted,
        ctx.options.in_fp32, ctx.options.height, count, ctx.options.gather, ctx.options.fp32_logits,
        ctx.options.backend,
    )  # fmt: skip
    dtypes = (hidden.dtype, weight.dtype, weight.dtype)
    return given([x.to(dtype) for x, dtype in zip(gradients, dtypes)], ctx.wanted)


class LinearLogprobsFunction(torch.autograd.Function):
    """Log-probabilities and entropies, both differentiable."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, tensors, numbers, plan, entropy, options: ChunkOptions):
        logps, entropies, stats, count = head_ops.linear_logprobs_op(
            hidden, weight, bias, tensors, numbers, plan, entropy, options.height,
            options.count, options.gather, options.fp32_logits, options.backend,
        )  # fmt: skip
        ctx.wanted, ctx.plan, ctx.options, ctx.entropy = wanted_by(ctx), plan, options, entropy
        ctx.save_for_backward(hidden, weight, bias, numbers, stats, count, *tensors)
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, g, h):
        refuse_double_backward()
        hidden, weight, bias, numbers, stats, count, *tensors = ctx.saved_tensors
        g, h = given_slopes(g, h if ctx.entropy else None, tensors[0])
        gradients = _pull_back(ctx, hidden, weight, bias, tensors, numbers, stats, count, g, h, None)
        return *gradients, *(None,) * 5


def run_linear_loss(
    hidden, weight, bias, batch: Batch, plan: Plan, *, entropy: bool, options: ChunkOptions, data_group=None
) -> tuple[Tensor, ...]:
    """(loss, logps, entropies, sums, metrics), differentiable in hidden states, weight and bias."""
    packed = (*batch.pack(), plan.key())
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if needed and plan.weighted and not plan.quantile and hidden.dtype != torch.float16:
        return _Fused.apply(hidden, weight, bias, *packed, entropy, options)
    return _Deferred.apply(hidden, weight, bias, *packed, entropy, options, data_group)
