"""What the tests share: random batches, the reference's answer, and how close a dtype must come."""

import dataclasses

import torch

import reference
from grpo_kernels import fused_grpo_loss
from pretend_gpu import pretended
from tolerance import Bounds, assert_within, bounds
from variation import unshifted

DEVICE = "cuda" if torch.cuda.is_available() or pretended() else "cpu"  # where tests put what kernels are given
BACKENDS = ("torch", "triton")


@dataclasses.dataclass
class Case:
    """A batch on the CPU: float logits of some dtype and every optional input, to pick from."""

    logits: torch.Tensor  # (B, T, V) or (B, T+1, V)
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    advantages: torch.Tensor  # (B,)
    token_advantages: torch.Tensor  # (B, T)
    rewards: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor
    importance_weights: torch.Tensor  # (B, T)

    def inputs(self, *names: str) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in names}


def make_case(B=4, T=5, V=131, *, dtype=torch.float32, extra=0, seed=0, spread=1.0) -> Case:
    """Ratios on both sides of the clip range, one sequence fully masked, ids at masked places anything."""
    g = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(B, T + extra, V, generator=g)).to(dtype)
    ids = torch.randint(0, V, (B, T), generator=g)
    mask = torch.rand(B, T, generator=g) < 0.8
    if B > 2:
        mask[B - 2] = False
    lp = torch.log_softmax(logits[:, :T].double(), -1).gather(-1, ids[..., None])[..., 0]
    noise = torch.randn(4, B, T, generator=g, dtype=torch.float64)
    ids[~mask] = -100
    return Case(
        logits=logits,
        completion_ids=ids,
        completion_mask=mask,
        advantages=torch.randn(B, generator=g),
        token_advantages=torch.randn(B, T, generator=g),
        rewards=torch.randn(B, generator=g),
        old_logps=(lp + 0.4 * noise[0]).float(),
        ref_logps=(lp + 0.4 * noise[1]).float(),
        importance_weights=noise[2].exp().float(),
    )


def on_device(kwargs: dict) -> dict:
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def ours(logits, backend, *, upstream=None, **kwargs):
    """(LossOutput, gradient of the logits on the CPU), from a non-leaf so that inplace may be asked for."""
    leaf = logits.detach().to(DEVICE).clone().requires_grad_()
    grads = []
    x = leaf * 1
    if x.dtype == leaf.dtype:
        x.register_hook(grads.append)
    out = fused_grpo_loss(x, backend=backend, **on_device(kwargs))
    up = torch.ones_like(out.loss) if upstream is None else torch.as_tensor(upstream, dtype=torch.float32).to(DEVICE)
    torch.autograd.backward(out.loss, up.expand_as(out.loss))
    return out, grads[0].cpu()


@unshifted()
def expected(logits, *, upstream=None, **kwargs):
    """The reference's (LossOutput, gradient), in float64 from the same logits."""
    drop = ("inplace", "skip_zero_advantage", "return_entropy", "backend")
    kwargs = {k: v for k, v in kwargs.items() if k not in drop}
    x = logits.detach().double().requires_grad_()
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            kwargs[name] = value.double()
    out = reference.grpo_loss(x, **kwargs)
    up = torch.ones_like(out.loss) if upstream is None else torch.as_tensor(upstream, dtype=torch.float64)
    torch.autograd.backward(out.loss, up.expand_as(out.loss))
    return out, x.grad


def check(logits, backend, *, upstream=None, **kwargs):
    """Ours against the reference: loss, gradient, log-probabilities, entropies and metrics."""
    out, grad = ours(logits, backend, upstream=upstream, **kwargs)
    assert grad.dtype == logits.dtype
    (want, want_grad), allowed = _truth(logits, upstream, kwargs)
    assert_outputs(out, want, allowed)
    assert_within(grad, want_grad, allowed.grad, "gradient")
    return out, grad


_seen: dict = {}  # truths of the last calls: the backends of a test follow each other
_LARGE = 2**20  # logits that are not kept


def _truth(logits, upstream, kwargs) -> tuple[tuple, Bounds]:
    """(what is expected, how far it may be off)"""
    try:
        key = None if logits.numel() > _LARGE else _contents([logits, upstream, kwargs])
    except TypeError:
        key = None
    if key is not None and key in _seen:
        return _seen[key]
    # bf16 that the forward has written is rounded once more by an upstream gradient other than 1
    twice = logits.dtype == torch.bfloat16 and isinstance(upstream, float) and upstream != 1.0
    want = expected(logits, upstream=upstream, **kwargs)
    allowed = bounds(logits, upstream=upstream, roundings=2 if twice else 1, **kwargs)
    if key is not None:
        while len(_seen) >= 8:
            del _seen[next(iter(_seen))]
        _seen[key] = want, allowed
    return want, allowed


def _contents(x) -> object:
    """Equal for equal arguments: what tensors hold, not which they are.

    Raises:
        TypeError: it cannot be told of something.
    """
    if isinstance(x, torch.Tensor):
        held = x.detach().cpu()
        held = held.float() if x.dtype == torch.bfloat16 else held  # which NumPy does not know
        return str(x.dtype), tuple(x.shape), held.numpy().tobytes()
    if dataclasses.is_dataclass(x):
        return type(x).__name__, _contents({each.name: getattr(x, each.name) for each in dataclasses.fields(x)})
    if isinstance(x, dict):
        return tuple((name, _contents(x[name])) for name in sorted(x))
    if isinstance(x, (list, tuple)):
        return type(x).__name__, tuple(map(_contents, x))
    if x is None or isinstance(x, (bool, int, float, str, torch.dtype)):
        return type(x).__name__, str(x)
    raise TypeError(f"{type(x).__name__} is not looked into")


def assert_outputs(out, want, allowed: Bounds, factor: float = 1.0) -> None:
    """Loss, log-probabilities, entropies and metrics of two LossOutputs."""
    assert_within(out.loss, want.loss, allowed.loss, "loss", factor)
    assert_within(out.logps, want.logps, allowed.logps, "logps", factor)
    if out.entropy is not None:
        assert_within(out.entropy, want.entropy, allowed.entropy, "entropy", factor)
    for name, value in out.metrics.items():
        assert_within(value, want.metrics[name], allowed.metrics[name], name, factor)
