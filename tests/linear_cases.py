"""Batches of hidden states with a head, and what float64 makes of them."""

import torch

import reference
from cases import DEVICE, make_case, on_device
from grpo_kernels import fused_linear_grpo_loss

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


def logits_of(hidden, weight, bias=None, logit_scale=1.0, softcap=None, dtype=torch.float64):
    """What the head makes, rounded to the head's dtype where it is half precision, as a model's own head rounds it."""
    z = hidden.to(dtype) @ weight.to(dtype).T
    z = z if bias is None else z + bias.to(dtype)
    if hidden.dtype in (torch.bfloat16, torch.float16):
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


def expected(head, inputs, *, frozen=(), upstream=None, logit_scale=1.0, softcap=None, **kwargs):
    """The same in float64 by `reference/`."""
    drop = ("skip_zero_advantage", "return_entropy", "chunk_bytes", "num_rows", "accumulate_in_fp32")
    kwargs = {name: value for name, value in kwargs.items() if name not in drop}
    leaves = leaves_of(head, frozen)
    z = logits_of(**leaves, logit_scale=logit_scale, softcap=softcap)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    out = reference.grpo_loss(z, **inputs, **kwargs)
    return out, gradients(out.loss, leaves, upstream)


def assert_close(got, want, dtype=torch.float32):
    """Outputs, and gradients by their largest entry: each is a sum over rows or over the vocabulary."""
    (out, grads), (want_out, want_grads) = got, want
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(out.loss.detach().cpu().double(), want_out.loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logps.cpu().double(), want_out.logps.detach().double(), rtol=1e-5, atol=1e-5)
    assert len(grads) == len(want_grads)
    for a, b in zip(grads, want_grads):
        assert a.dtype == dtype and b.abs().max() > 0
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * b.abs().max().item())
    for name, value in out.metrics.items():
        want_value = want_out.metrics[name].double()
        torch.testing.assert_close(value.cpu().double(), want_value, rtol=1e-5, atol=1e-5, msg=name)
