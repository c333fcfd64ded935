"""Custom ops and their autograd. Each op runs on either backend; the graph never sees inside.

Two forms of the loss, with the same maths:

* one launch: the forward writes the gradient beside the log-probabilities (`_OneLaunch`);
* two launches: log-probabilities now, the gradient from two numbers per row in the backward
  (`_TwoLaunches`): a loss per token, and fp16, where rounding before a loss scaler's 65536 would
  zero most of the gradient.
"""

import importlib

import torch
from torch import Tensor

from grpo_kernels import checks
from grpo_kernels.inputs import Coefs, Inputs
from grpo_kernels.metrics import METRIC_NAMES, SUM_NAMES
from grpo_kernels.variants import Plan

_BACKENDS = {"torch": "grpo_kernels.torch_backend", "triton": "grpo_kernels.kernels.launch"}


def _backend(name: str):
    return importlib.import_module(_BACKENDS[name])


def choose_backend(backend: str | None, logits: Tensor) -> str:
    """``"triton"`` on CUDA (and ROCm) tensors, else ``"torch"``, unless the caller says which."""
    if backend is None:
        return "triton" if logits.is_cuda else "torch"
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be None, 'triton' or 'torch', got {backend!r}.")
    if backend == "triton" and not torch.compiler.is_compiling():
        _backend(backend).require_available(logits.device)
    return backend


def _check_values(logits: Tensor, ids: Tensor, mask: Tensor | None) -> None:
    if checks.validates(logits.device):
        checks.check_values(ids, mask, logits.shape[-1])


@torch.library.custom_op("grpo_kernels::logprobs", mutates_args=())
def logprobs_op(
    logits: Tensor, ids: Tensor, mask: Tensor | None, adv: Tensor | None, rewards: Tensor | None, coefs: Tensor,
    plan: str, num_generations: int, entropy: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_values(logits, ids, mask)
    inputs = Inputs(ids=ids, mask=mask, adv=adv, rewards=rewards, num_generations=num_generations)
    return _backend(backend).logprobs(logits, inputs, Coefs.unpack(coefs), Plan.from_key(plan), entropy)


@logprobs_op.register_fake
def _(logits, ids, mask, adv, rewards, coefs, plan, num_generations, entropy, backend):
    logps, entropies = _fake_rows(logits, ids, entropy)
    stats = (0,) if backend == "torch" else (ids.shape[0] * ids.shape[1], 3)
    return logps, entropies, logps.new_empty(stats)


def _fake_rows(logits: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    logps = logits.new_empty(ids.shape, dtype=torch.float32)
    return logps, torch.empty_like(logps) if entropy else logps.new_empty(0)


def _loss(logits, out, tensors, coefs, plan, num_generations, entropy, backend) -> tuple[Tensor, Tensor]:
    inputs = Inputs(*tensors, num_generations)
    _check_values(logits, inputs.ids, inputs.mask)
    return _backend(backend).loss(logits, out, inputs, Coefs.unpack(coefs), Plan.from_key(plan), entropy)


@torch.library.custom_op("grpo_kernels::loss", mutates_args=())
def loss_op(
    logits: Tensor, ids: Tensor, mask: Tensor | None, old: Tensor | None, ref: Tensor | None, adv: Tensor | None,
    rewards: Tensor | None, is_weight: Tensor | None, count: Tensor | None, loss_scale: Tensor | None,
    tokens: Tensor | None, coefs: Tensor, plan: str, num_generations: int, entropy: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps, entropies, gradient of the logits)"""
    out = logits.new_empty(logits.shape)
    tensors = (ids, mask, old, ref, adv, rewards, is_weight, count, loss_scale, tokens)
    return *_loss(logits, out, tensors, coefs, plan, num_generations, entropy, backend), out


@loss_op.register_fake
def _(logits, ids, *args):
    return *_fake_rows(logits, ids, args[-2]), logits.new_empty(logits.shape)


@torch.library.custom_op("grpo_kernels::loss_", mutates_args=("logits",))
def loss_op_(
    logits: Tensor, ids: Tensor, mask: Tensor | None, old: Tensor | None, ref: Tensor | None, adv: Tensor | None,
    rewards: Tensor | None, is_weight: Tensor | None, count: Tensor | None, loss_scale: Tensor | None,
    tokens: Tensor | None, coefs: Tensor, plan: str, num_generations: int, entropy: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logps, entropies); the gradient takes the place of the logits."""
    tensors = (ids, mask, old, ref, adv, rewards, is_weight, count, loss_scale, tokens)
    return _loss(logits, logits, tensors, coefs, plan, num_generations, entropy, backend)


@loss_op_.register_fake
def _(logits, ids, *args):
    return _fake_rows(logits, ids, args[-2])


@torch.library.custom_op("grpo_kernels::objective", mutates_args=())
def objective_op(
    logps: Tensor, entropies: Tensor | None, ids: Tensor, mask: Tensor | None, old: Tensor | None,
    ref: Tensor | None, adv: Tensor | None, rewards: Tensor | None, is_weight: Tensor | None, count: Tensor | None,
    loss_scale: Tensor | None, tokens: Tensor | None, coefs: Tensor, plan: str, num_generations: int,
    weighted: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], ℓ [B, T], ∂/∂lp [B, T], ∂/∂H [B, T], sums [S], metrics [M])"""
    inputs = Inputs(
        ids, mask, old, ref, adv, rewards, is_weight, count, loss_scale, tokens, num_generations
    )
    return _backend(backend).objective(
        logps, entropies, inputs, Coefs.unpack(coefs), Plan.from_key(plan), weighted
    )


@objective_op.register_fake
def _(logps, *args):
    losses, g, h = (torch.empty_like(logps) for _ in range(3))
    sums = logps.new_empty(len(SUM_NAMES), dtype=torch.float64)
    return logps.new_empty(()), losses, g, h, sums, logps.new_empty(len(METRIC_NAMES))


@torch.library.custom_op("grpo_kernels::slope", mutates_args=())
def slope_op(
    logits: Tensor, ids: Tensor, mask: Tensor | None, stats: Tensor, g: Tensor, h: Tensor | None, up: Tensor | None,
    coefs: Tensor, backend: str,
) -> Tensor:  # fmt: skip
    """Gradient of the logits, (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)] times ``up``."""
    out = logits.new_empty(logits.shape)
    _backend(backend).slope(logits, out, ids, mask, stats, g, h, up, Coefs.unpack(coefs))
    return out


@slope_op.register_fake
def _(logits, *args):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("grpo_kernels::slope_", mutates_args=("logits",))
def slope_op_(
    logits: Tensor, ids: Tensor, mask: Tensor | None, stats: Tensor, g: Tensor, h: Tensor | None, up: Tensor | None,
    coefs: Tensor, backend: str,
) -> None:  # fmt: skip
    """`slope`, the gradient taking the place of the logits."""
    _backend(backend).slope(logits, logits, ids, mask, stats, g, h, up, Coefs.unpack(coefs))


@torch.library.custom_op("grpo_kernels::scale", mutates_args=())
def scale_op(grad: Tensor, up: Tensor, backend: str) -> Tensor:
    out = torch.empty_like(grad)
    _backend(backend).scale(grad, out, up)
    return out


@scale_op.register_fake
def _(grad, up, backend):
    return torch.empty_like(grad)


@torch.library.custom_op("grpo_kernels::scale_", mutates_args=("grad",))
def scale_op_(grad: Tensor, up: Tensor, backend: str) -> None:
    _backend(backend).scale(grad, grad, up)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "grpo_kernels does not support double backward (create_graph=True): its gradient is written by a kernel. "
            "Use the plain PyTorch code in reference/ for second derivatives."
        )


def _backward_may_run_again() -> bool:
    """Whether this backward keeps its graph, so that what it saved must survive."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._get_current_graph_task_keep_graph()


class _OneLaunch(torch.autograd.Function):
    """Loss whose gradient the forward has already written."""

    @staticmethod
    def forward(ctx, logits, tensors, coefs, plan, num_generations, entropy, backend, inplace):
        if inplace:
            logps, entropies = loss_op_(logits, *tensors, coefs, plan, num_generations, entropy, backend)
            grad = logits.detach()
        else:
            logps, entropies, grad = loss_op(logits, *tensors, coefs, plan, num_generations, entropy, backend)
        given = entropies if entropy else None
        loss, _, _, _, sums, metrics = objective_op(
            logps, given, *tensors, coefs, plan, num_generations, True, backend
        )
        ctx.backend = backend
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(logps, entropies, sums, metrics)
        ctx.set_materialize_grads(False)  # or zeros would be made for what has no gradient
        return loss, logps, entropies, sums, metrics

    @staticmethod
    def backward(ctx, up, *_):
        _refuse_double_backward()
        (grad,) = ctx.saved_tensors
        if _backward_may_run_again():
            grad = scale_op(grad, up, ctx.backend)
        else:
            scale_op_(grad, up, ctx.backend)  # ours alone from here on
        return grad, None, None, None, None, None, None, None


class _TwoLaunches(torch.autograd.Function):
    """Loss whose gradient is written in the backward, upstream gradient included, before rounding."""

    @staticmethod
    def forward(ctx, logits, tensors, coefs, plan, num_generations, entropy, backend, inplace, weighted):
        ids, mask, _, _, adv, rewards = tensors[:6]
        logps, entropies, stats = logprobs_op(
            logits, ids, mask, adv, rewards, coefs, plan, num_generations, entropy, backend
        )
        given = entropies if entropy else None
        loss, losses, g, h, sums, metrics = objective_op(
            logps, given, *tensors, coefs, plan, num_generations, weighted, backend
        )
        ctx.backend, ctx.inplace, ctx.bonus = backend, inplace, weighted and Plan.from_key(plan).bonus
        ctx.save_for_backward(logits, ids, stats, g, h, coefs)
        ctx.mark_non_differentiable(logps, entropies, sums, metrics)
        ctx.set_materialize_grads(False)
        return loss if weighted else losses, logps, entropies, sums, metrics

    @staticmethod
    def backward(ctx, up, *_):
        _refuse_double_backward()
        logits, ids, stats, g, h, coefs = ctx.saved_tensors
        h = h if ctx.bonus else None
        grad = write_gradient(logits, ids, None, stats, g, h, up, coefs, ctx.backend, ctx.inplace)
        return grad, *(None,) * 8


class TokenLogprobsFunction(torch.autograd.Function):
    """Log-probabilities and entropies, both differentiable."""

    @staticmethod
    def forward(ctx, logits, ids, mask, coefs, plan, entropy, backend):
        logps, entropies, stats = logprobs_op(logits, ids, mask, None, None, coefs, plan, 1, entropy, backend)
        ctx.backend, ctx.entropy = backend, entropy
        ctx.save_for_backward(logits, ids, mask, stats, coefs)
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, g, h):
        _refuse_double_backward()
        logits, ids, mask, stats, coefs = ctx.saved_tensors
        g = torch.zeros(ids.shape, device=logits.device) if g is None else g.contiguous()
        h = h.contiguous() if ctx.entropy and h is not None else None
        grad = write_gradient(logits, ids, mask, stats, g, h, None, coefs, ctx.backend, False)
        return grad, None, None, None, None, None, None


def write_gradient(logits, ids, mask, stats, g, h, up, coefs, backend, inplace) -> Tensor:
    """The gradient of the logits, in a new tensor or in the logits' own."""
    if not inplace:
        return slope_op(logits, ids, mask, stats, g, h, up, coefs, backend)
    slope_op_(logits, ids, mask, stats, g, h, up, coefs, backend)
    return logits.detach()


def run_loss(
    logits, inputs: Inputs, coefs: Tensor, plan: Plan, *, entropy: bool, backend: str, inplace: bool, weighted: bool
) -> tuple[Tensor, ...]:
    """(loss, logps, entropies, sums, metrics), differentiable in the logits if they require grad."""
    tensors, G = tuple(inputs[:-1]), inputs.num_generations
    key = plan.key()
    if not (torch.is_grad_enabled() and logits.requires_grad):
        ids, mask, adv, rewards = inputs.ids, inputs.mask, inputs.adv, inputs.rewards
        logits = logits.detach()
        logps, entropies, _ = logprobs_op(logits, ids, mask, adv, rewards, coefs, key, G, entropy, backend)
        given = entropies if entropy else None
        loss, losses, _, _, sums, metrics = objective_op(logps, given, *tensors, coefs, key, G, weighted, backend)
        return loss if weighted else losses, logps, entropies, sums, metrics
    if weighted and logits.dtype != torch.float16:
        return _OneLaunch.apply(logits, tensors, coefs, key, G, entropy, backend, inplace)
    return _TwoLaunches.apply(logits, tensors, coefs, key, G, entropy, backend, inplace, weighted)
