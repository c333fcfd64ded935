"""Batches of hidden states with a head, and what float64 makes of them."""

import torch

import reference
from cases import DEVICE, assert_outputs, make_case, on_device
from grpo_kernels import fused_linear_grpo_loss
from linear_tolerance import LINEAR_ONLY, assert_gradients, linear_bounds

B, T, H, V = 5, 6, 9, 37
TOKEN = ("completion_ids", "completion_mask", "old_logps", "ref_logps", "importance_weights")


def batch(seed=0, dtype=torch.float32, extra=0, bias=True):
    """(head {hidden, weight, bias}, inputs of the loss)."""
    case = make_case(B, T, V, seed=seed)
    g = torch.Generator().manual_seed(seed + 100)
    head = {
        "hidden": torch.randn(B, T + extra, H, generator=g).to(dtype),
        "weight": (torch.randn(V, H, generator=g) / 3).to(dtype),
        "bias": torch.randn(V, generator=g).to(dtype) if bias else None,
    }
    lp = reference.token_logprobs(logits_of(**head)[:, :T].double(), case.completion_ids.clamp(min=0)).logps
    inputs = case.inputs(*TOKEN, "advantages")
    inputs["old_logps"] = (lp + 0.4 * torch.randn(B, T, generator=g)).float()
    inputs["ref_logps"] = (lp + 0.4 * torch.randn(B, T, generator=g)).float()
    return head, inputs


def logits_of(hidden, weight, bias=None, logit_scale=1.0, softcap=None, dtype=torch.float64, logits_dtype=None):
    """What the head makes, rounded to the head's dtype where it is half precision, as a model's own head rounds it.

    With ``logits_dtype`` fp32 nothing is rounded.
    """
    z = hidden.to(dtype) @ weight.to(dtype).T
    z = z if bias is None else z + bias.to(dtype)
    if hidden.dtype in (torch.bfloat16, torch.float16) and logits_dtype != torch.float32:
        z = z + (z.to(hidden.dtype).to(dtype) - z).detach()
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def leaves_of(head, frozen=()):
    return {
        name: x if x is None else x.detach().clone().requires_grad_(name not in frozen) for name, x in head.items()
    }


def gradients(loss, leaves, upstream=None):
    wanted = [x for x in leaves.values() if x is not None and x.requires_grad]
    up = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return torch.autograd.grad(loss, wanted, up.expand_as(loss))


def ours(head, inputs, backend, *, frozen=(), upstream=None, **kwargs):
    """(LossOutput, gradients on the CPU)"""
    leaves = {name: None if x is None else x.to(DEVICE) for name, x in head.items()}
    leaves = leaves_of(leaves, frozen)
    out = fused_linear_grpo_loss(**leaves, **on_device(inputs), backend=backend, **kwargs)
    return out, [g.cpu() for g in gradients(out.loss, leaves, upstream)]


class Expected(tuple):
    """(LossOutput, gradients), and `allowed()`, the bounds of both."""


def expected(head, inputs, *, frozen=(), upstream=None, logit_scale=1.0, softcap=None, logits_dtype=None, **kwargs):
    """The same in float64 by `reference/`."""
    of_head = dict(logit_scale=logit_scale, softcap=softcap, logits_dtype=logits_dtype)
    given = dict(frozen=frozen, upstream=upstream, **of_head, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in LINEAR_ONLY}
    leaves = leaves_of(head, frozen)
    z = logits_of(**leaves, **of_head)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    out = reference.grpo_loss(z, **exact, **kwargs)
    want = Expected((out, gradients(out.loss, leaves, upstream)))
    want.allowed = lambda: linear_bounds(head, inputs, **given, roundings=1 if upstream is None else 2)
    return want


def assert_close(got, want, dtype=torch.float32):
    """Outputs and gradients of ours against `expected`'s."""
    (out, grads), (want_out, want_grads) = got, want
    allowed, of_gradients = want.allowed()
    assert_outputs(out, want_out, allowed)
    assert all(a.dtype == dtype and b.abs().max() > 0 for a, b in zip(grads, want_grads))
    assert_gradients(grads, want_grads, of_gradients)
