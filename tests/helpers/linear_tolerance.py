"""What `tolerance.py` derives for logits, carried on to hidden states, a head's weight and its bias.

With z = h·Wᵀ + b, k the slope of what scale and softcap make of z, and dz the gradient in z::

    δz  ≤ u·(steps(H)·(|h|·|W|ᵀ + |b|) + |z|)     half precision: and what rounding makes of that
    δdz ≤ |k|·δ(gradient in the logits) + |δk|·|gradient in the logits|
    δdW ≤ |δdz|ᵀ·|h| + u·steps(N)·|dz|ᵀ·|h|,      δdh, δdb likewise

and half precision rounds dz once before the products and each product once on being written. fp32 logits of a head in
half precision (``logits_dtype``) have the first line's error alone: products of half precision are exact in fp32.
"""

import torch
from torch import Tensor

import reference
from reference.supports import restrict
from tolerance import EPS, RUN_ONLY, Bounds, U, assert_within, bounds, logprob_bounds, steps, written

LINEAR_ONLY = (*RUN_ONLY, "chunk_bytes", "num_rows", "accumulate_in_fp32")
HALF = (torch.bfloat16, torch.float16)


def linear_bounds(head: dict, inputs: dict, *, frozen=(), upstream=None, logit_scale=1.0, softcap=None, roundings=1,
                  logits_dtype=None, **kwargs) -> tuple[Bounds, list[Tensor]]:  # fmt: skip
    """(bounds of the outputs; of the gradients of hidden, weight, bias, as far as they exist and are not frozen).

    Args: as of `linear_cases.expected`.
        support: of padded input, as lists of ids.
        roundings: how often a gradient is rounded on its way out, once more for an upstream gradient.
    """
    dtype = head["hidden"].dtype
    given = (head.get(name) for name in ("hidden", "weight", "bias"))
    h, W, b = (x if x is None else x.detach().cpu().double() for x in given)
    kwargs = {k: v for k, v in {**inputs, **kwargs}.items() if k not in LINEAR_ONLY}
    kwargs = {k: v.cpu() if torch.is_tensor(v) else v for k, v in kwargs.items()}
    support = kwargs.pop("support", None)
    z, d_z = product(h, W, b, logits_dtype or dtype)
    z, slope, d_z, d_slope = capped(z, d_z, logit_scale, softcap)
    if support is not None:
        ids, mask = kwargs["completion_ids"], kwargs["completion_mask"]
        T = ids.shape[1]
        z = torch.cat([restrict(z[:, :T], ids.where(mask, 0), mask, support), z[:, T:]], dim=1)
    allowed = bounds(z, **kwargs, upstream=upstream, d_logits=d_z, dtype=torch.float64)

    leaf = z.clone().requires_grad_()
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kwargs.items()}
    loss = reference.grpo_loss(leaf, **exact).loss
    up = torch.ones_like(loss) if upstream is None else torch.as_tensor(upstream, dtype=torch.float64)
    (g,) = torch.autograd.grad(loss, leaf, up.expand_as(loss))
    return allowed, carried_on(g, allowed.grad, slope, d_slope, h, W, b, dtype, frozen, roundings)


def linear_logprob_bounds(head, ids, mask, temperature, objective, *, logit_scale=1.0, softcap=None,
                          logits_dtype=None):  # fmt: skip
    """The same for `linear_token_logprobs` and a scalar objective(logps, entropy)."""
    dtype = head["hidden"].dtype
    given = (head.get(name) for name in ("hidden", "weight", "bias"))
    h, W, b = (x if x is None else x.detach().cpu().double() for x in given)
    z, slope, d_z, d_slope = capped(*product(h, W, b, logits_dtype or dtype), logit_scale, softcap)
    allowed = logprob_bounds(z, ids, mask, temperature, objective, d_z, torch.float64)
    leaf = z.clone().requires_grad_()
    lp, H = reference.token_logprobs(leaf, ids, temperature, mask)
    (g,) = torch.autograd.grad(objective(lp, H), leaf)
    return allowed, carried_on(g, allowed.grad, slope, d_slope, h, W, b, dtype)


def product(h, W, b, dtype) -> tuple[Tensor, Tensor]:
    """The head's logits as the dtype holds them, and their error."""
    z = h @ W.T if b is None else h @ W.T + b
    size = h.abs() @ W.abs().T + (0.0 if b is None else b.abs())
    error = U * (steps(h.shape[-1]) * size + z.abs())
    if dtype not in HALF:
        return z, error
    if b is not None:  # the product may be rounded before the bias is added
        error = error + EPS[dtype] / 2 * (z - b).abs()
    near = [x.to(dtype).double() for x in (z, z + error, z - error)]
    return near[0], torch.maximum(near[1] - near[0], near[0] - near[2])


def capped(z, d_z, scale, softcap):
    """(logits, their slope in z, the errors of both) after scale and softcap."""
    z, d_z = scale * z, abs(scale) * d_z + 2 * U * (scale * z).abs()
    if softcap is None:
        return z, torch.full_like(z, scale), d_z, torch.zeros_like(z)
    t = torch.tanh(z / softcap)
    slope = 1 - t.square()
    d_slope = abs(scale) * (2 * t.abs() * d_z / softcap + 8 * U)
    return softcap * t, scale * slope, slope * d_z + 8 * U * softcap * t.abs(), d_slope


def carried_on(g, d_g, slope, d_slope, h, W, b, dtype, frozen=(), roundings=1) -> list[Tensor]:
    """From the gradient in the logits and its error to bounds of those of hidden states, weight and bias."""
    dz, d_dz = g * slope, d_g * slope.abs() + g.abs() * (d_slope + 2 * U)
    if dtype in HALF:
        d_dz = d_dz + written(dz, dtype) * (g != 0)
    flat, size, error, states = (x.flatten(0, -2) for x in (dz, dz.abs(), d_dz, h))
    n, V = flat.shape
    rounded = lambda x: written(x, dtype, roundings)  # noqa: E731
    out = {
        "hidden": error @ W.abs() + U * steps(V) * size @ W.abs() + rounded(flat @ W),
        "weight": error.T @ states.abs() + U * steps(n) * size.T @ states.abs() + rounded(flat.T @ states),
    }
    out["hidden"] = out["hidden"].view_as(h)
    if b is not None:
        out["bias"] = error.sum(0) + U * steps(n) * size.sum(0) + rounded(flat.sum(0))
    return [x for name, x in out.items() if name not in frozen]


def assert_gradients(got, want, allowed, factor: float = 1.0) -> None:
    assert len(got) == len(want) == len(allowed)
    for a, b, most in zip(got, want, allowed):
        assert_within(a, b, most, f"gradient of shape {tuple(b.shape)}", factor)
