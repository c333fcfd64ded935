"""Autograd of the losses: which op runs when, and what is kept for the backward.

Two forms of the loss, with the same maths:

* one launch: the forward writes the gradient beside the log-probabilities (`_OneLaunch`);
* two launches: log-probabilities now, the gradient from two numbers per row in the backward
  (`_TwoLaunches`): a loss that depends on more than its own row, a loss per token, a vocabulary that is
  spread over ranks, and fp16, where rounding before a loss scaler's 65536 would zero most of the gradient.

`_FromLogprobs` is the loss of log-probabilities that the caller has made.
"""

import torch
from torch import Tensor

from grpo_kernels.call import ops, overwritten, sharded
from grpo_kernels.objective.batch import SUPPORT, Batch, exchange
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.quantile import sorted_entropies

_OF_ROWS = ("temperature", "cu", "segments", *SUPPORT)  # what a gradient needs besides the ids


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "grpo_kernels does not support double backward (create_graph=True): its gradient is written by a kernel. "
            "Use the plain PyTorch code in reference/ for second derivatives."
        )


def backward_may_run_again() -> bool:
    """Whether this backward keeps its graph, so that what it saved must survive."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._get_current_graph_task_keep_graph()


def is_one(up: Tensor) -> bool:
    """Whether the upstream gradient is known to be 1. One on a device is not read, which would make the host wait."""
    return type(up) is Tensor and up.device.type == "cpu" and not torch.compiler.is_compiling() and up.item() == 1.0


def times(grad: Tensor, up: Tensor, backend: str) -> Tensor:
    """The gradient that a forward has written, by the upstream gradient; in place where nobody needs it again."""
    if backward_may_run_again():
        return ops.scale_op(grad, up, backend)
    if not is_one(up):
        ops.scale_op_(grad, up, backend)
    return grad


class Objective:
    """The [B, T] maths after the log-probabilities: loss, metrics, and the derivatives by lp and H."""

    def __init__(self, logps, entropies, tensors, numbers, key: str, backend: str, data_group=None):
        plan, self.backend = Plan.from_key(key), backend
        if plan.late_correction:
            weights = ops.correct_op(logps, tensors, numbers, plan.correction, backend)
            tensors = exchange(tensors, is_weight=weights)
        if plan.quantile:
            ranked = sorted_entropies(entropies, Batch(*tensors).mask, data_group)
            threshold, tokens = ops.threshold_op(*ranked, tensors, numbers, backend)
            tensors = exchange(tensors, threshold=threshold, tokens=tokens)
        loss, self.sums, self.metrics, losses, *self.slopes = ops.objective_op(
            logps, entropies, tensors, numbers, key, backend
        )
        self.loss = loss if plan.weighted else losses
        self.spreads, self.bonus = bool(plan.spread) and not plan.weighted, plan.bonus

    def save(self, ctx) -> tuple[Tensor, ...]:
        """What `slopes_of` needs."""
        ctx.spreads, ctx.bonus, ctx.backend = self.spreads, self.bonus, self.backend
        return tuple(self.slopes)


def slopes_of(ctx, saved, up: Tensor, cu: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(∂L/∂lp, ∂L/∂H or None, factor of both that is still missing), from what `Objective.save` gave."""
    local, spread, share, h = saved
    if ctx.spreads:
        return ops.join_op(local, spread, share, up, cu, ctx.backend), None, None
    return local, h if ctx.bonus else None, up


class _OneLaunch(torch.autograd.Function):
    """Loss whose gradient the forward has already written."""

    @staticmethod
    def forward(ctx, logits, tensors, numbers, plan, entropy, backend, inplace):
        guarded = inplace and overwritten.are_guarded()
        if inplace and not guarded:
            logps, entropies, loss, sums, metrics = ops.loss_op_(logits, tensors, numbers, plan, entropy, backend)
            grad = logits.detach()
        else:
            logps, entropies, loss, sums, metrics, grad = ops.loss_op(logits, tensors, numbers, plan, entropy, backend)
        if guarded:
            overwritten.give_up(logits)
        ctx.backend = backend
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(logps, entropies, sums, metrics)
        ctx.set_materialize_grads(False)  # or zeros would be made for what has no gradient
        return loss, logps, entropies, sums, metrics

    @staticmethod
    def backward(ctx, up, *_):
        refuse_double_backward()
        return times(*ctx.saved_tensors, up, ctx.backend), *(None,) * 6


class _TwoLaunches(torch.autograd.Function):
    """Loss whose gradient is written in the backward, upstream gradient included, before rounding."""

    @staticmethod
    def forward(ctx, logits, tensors, numbers, plan, entropy, backend, inplace, data_group, vocab_group):
        found = sharded.logprobs(logits, tensors, numbers, plan, entropy, backend, vocab_group)
        logps, entropies, stats, local = found
        it = Objective(logps, entropies if entropy else None, tensors, numbers, plan, backend, data_group)
        ctx.inplace, saved = inplace, it.save(ctx)
        # masked rows will have g = h = 0, which says as much as the mask
        rows = {name: getattr(Batch(*local), name) for name in _OF_ROWS}
        ctx.save_for_backward(logits, numbers, stats, *saved, *Batch(local[0], **rows).tensors)
        ctx.mark_non_differentiable(logps, entropies, it.sums, it.metrics)
        ctx.set_materialize_grads(False)
        return it.loss, logps, entropies, it.sums, it.metrics

    @staticmethod
    def backward(ctx, up, *_):
        refuse_double_backward()
        logits, numbers, stats, *rest = ctx.saved_tensors
        saved, tensors = rest[:4], rest[4:]
        g, h, up = slopes_of(ctx, saved, up, Batch(*tensors).cu)
        how = ctx.inplace, ops.slope_op, ops.slope_op_
        grad = write_gradient(logits, *how, tensors, numbers, stats, g, h, up, ctx.backend)
        return grad, *(None,) * 8


class _FromLogprobs(torch.autograd.Function):
    """Loss of given log-probabilities and entropies, differentiable in both."""

    @staticmethod
    def forward(ctx, logps, entropies, tensors, numbers, plan, backend, data_group):
        it = Objective(
            logps.float().contiguous(), None if entropies is None else entropies.float().contiguous(), tensors, numbers,
            plan, backend, data_group,
        )  # fmt: skip
        saved = it.save(ctx)
        ctx.dtypes = logps.dtype, None if entropies is None else entropies.dtype
        ctx.save_for_backward(*saved, Batch(*tensors).cu)
        ctx.mark_non_differentiable(it.sums, it.metrics)
        ctx.set_materialize_grads(False)
        return it.loss, it.sums, it.metrics

    @staticmethod
    def backward(ctx, up, *_):
        refuse_double_backward()
        *saved, cu = ctx.saved_tensors
        g, h, up = slopes_of(ctx, saved, up, cu)
        g, h = ((x if x is None or up is None else torch.where(x == 0.0, 0.0, x * up)) for x in (g, h))
        lp_dtype, H_dtype = ctx.dtypes
        return g.to(lp_dtype), None if h is None else h.to(H_dtype), *(None,) * 5


class TokenLogprobsFunction(torch.autograd.Function):
    """Log-probabilities and entropies, both differentiable."""

    @staticmethod
    def forward(ctx, logits, tensors, numbers, plan, entropy, backend, vocab_group):
        found = sharded.logprobs(logits, tensors, numbers, plan, entropy, backend, vocab_group)
        logps, entropies, stats, tensors = found
        ctx.backend, ctx.entropy = backend, entropy
        ctx.save_for_backward(logits, numbers, stats, *tensors)
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, g, h):
        refuse_double_backward()
        logits, numbers, stats, *tensors = ctx.saved_tensors
        g, h = given_slopes(g, h if ctx.entropy else None, tensors[0])
        grad = ops.slope_op(logits, tensors, numbers, stats, g, h, None, ctx.backend)
        return grad, *(None,) * 6


def given_slopes(g: Tensor | None, h: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """∂L/∂lp and ∂L/∂H as the kernels read them."""
    g = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device) if g is None else g.contiguous()
    return g, None if h is None else h.contiguous()


def write_gradient(logits, inplace: bool, op, op_, *arguments) -> Tensor:
    """What ``op`` makes of the logits and the arguments; in place ``op_`` writes it over the logits."""
    guarded = inplace and overwritten.are_guarded()
    if guarded or not inplace:
        grad = op(logits, *arguments)
        if guarded:
            overwritten.give_up(logits)
        return grad
    op_(logits, *arguments)
    return logits.detach()


def run_loss(
    logits, batch: Batch, plan: Plan, *, entropy: bool, backend: str, inplace: bool, data_group=None, vocab_group=None
) -> tuple[Tensor, ...]:
    """(loss, logps, entropies, sums, metrics), differentiable in the logits if they require grad."""
    packed = (*batch.pack(), plan.key())
    if not (torch.is_grad_enabled() and logits.requires_grad):
        logps, entropies, *_ = sharded.logprobs(logits.detach(), *packed, entropy, backend, vocab_group)
        it = Objective(logps, entropies if entropy else None, *packed, backend, data_group)
        return it.loss, logps, entropies, it.sums, it.metrics
    if plan.weighted and plan.one_launch and logits.dtype != torch.float16 and vocab_group is None:
        return _OneLaunch.apply(logits, *packed, entropy, backend, inplace)
    return _TwoLaunches.apply(logits, *packed, entropy, backend, inplace, data_group, vocab_group)


def run_policy_loss(
    logps, entropies, batch: Batch, plan: Plan, *, backend: str, data_group=None
) -> tuple[Tensor, ...]:
    """(loss, sums, metrics), differentiable in the log-probabilities and entropies."""
    return _FromLogprobs.apply(logps, entropies, *batch.pack(), plan.key(), backend, data_group)
