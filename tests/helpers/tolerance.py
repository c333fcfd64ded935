"""How far two ways to the same numbers may lie apart: the dtype's rounding times the size of the terms that enter.

Everything is derived in float64, per entry, from the data of the test. u is the unit roundoff of fp32, in which the
kernels and the torch backend compute. First order in u throughout, and no term is given the benefit of its sign.

**A row.** With the logits x (after the temperature), M their largest |x| and `steps(V)` the roundings that a sum of V
numbers goes through::

    δlse  ≤ u·(8·M + 4 + steps(V) + 2·log V)   scaling, subtracting the maximum, exp, the sum, log, adding up
    δlp   ≤ u·(3·|x_y| + |lp|) + δlse
    δp_v  ≤ p_v·(u·(4·|x_v| + 4) + δlse)
    δx̄    ≤ Σ_v δp_v·|x_v| + u·steps(V)·Σ_v p_v·|x_v|,    x̄ = Σ p·x,   H = lse − x̄

and its gradient, (g·(1_y − p) + h·p·(x̄ − x))/τ, term by term. For probabilities near 1 or logits near x̄ the entry is
what larger terms leave: its bound is that of the terms.

**The objective**, which makes (loss, g, h, metrics) of the rows' log-probs and entropies, is known to the tests as a
function, `reference.policy_loss`, whose terms have different sizes in every variant. It is evaluated in float64 at
inputs moved by their own errors (δlp, δH; some roundings of each other input), and what it moves by is carried on.
The policy term is off by its own roundings besides (`term_tolerance.py`): those of the exponents that it takes.
Advantages of rewards move as inputs do: R − mean is off by the rounding of the mean, which is that of the rewards
themselves, however near to each other they lie.
A bound near which a ratio lies to within its rounding widens what is allowed in the same way. What a sum or a
KL estimate loses of its own terms is added: u·steps(N)·Σ|w·ℓ|, u·(e^u + |u| + 1).

Two ways that both round may each be off: twice the bound. What must be equal to the bit is compared with
`torch.equal`.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import reference
from reference.advantages import summed_rewards
from reference.metrics import reward_metrics
from term_tolerance import U, policy_loss_off
from variation import unshifted

DRAWS, SAFETY = 8, 2  # the largest of eight uniform draws is below half of the worst case once in 256
KL_METRICS = ("kl", "approx_kl")
# The knobs of `reference.group_advantages`.
ADVANTAGES = ("advantage_estimator", "reward_weights", "scale_rewards", "advantage_eps", "advantage_unbiased")
RUN_ONLY = ("inplace", "skip_zero_advantage", "return_entropy", "backend")  # do not change the numbers
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
TINY = 2.0**-120  # fp32 makes 0 of what is smaller, and of factors of it
LEAST = {torch.float16: 2.0**-24}  # spacing of subnormal numbers


def steps(n: int) -> int:
    """Roundings that a sum of n numbers passes on to each of them: lanes of up to 32 in a row, then a tree."""
    return min(n, 32 + math.ceil(math.log2(max(n, 2))))


def written(x: Tensor, dtype: torch.dtype, roundings: int = 1) -> Tensor:
    """What is lost on writing x: a unit in the last place, as the interpreter truncates where hardware rounds."""
    return roundings * EPS[dtype] * x.abs() + LEAST.get(dtype, TINY)


def near(value, n: int = 1):
    """A number by hand that comes of n fp32 terms of one sign and of some eight operations besides."""
    return pytest.approx(value, rel=(8 + steps(n)) * U, abs=0.0)


def advantage_error(rewards: Tensor, wanted: Tensor, std: float | Tensor = 1.0) -> Tensor:
    """Of (R − mean)/std in fp32: the difference is rounded as the rewards are. What is exactly 0 is to be so."""
    size = rewards.nan_to_num(0.0).abs().max() / std
    return torch.where(wanted == 0, 0.0, (8 + steps(len(rewards))) * U * (size + wanted.abs()))


class Bounds(NamedTuple):
    """Absolute, float64, shaped as what they are for."""

    loss: Tensor
    grad: Tensor
    logps: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


def assert_within(actual, wanted, allowed, name="", factor=1.0) -> None:
    """|actual − wanted| ≤ factor·allowed in every entry; equal infinities and NaN on both sides are equal."""
    actual, wanted, allowed = (torch.as_tensor(x).detach().cpu().double() for x in (actual, wanted, allowed))
    assert actual.shape == wanted.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(wanted.shape)}"
    off, allowed = (actual - wanted).abs(), factor * allowed.expand_as(wanted)
    good = (actual == wanted) | (actual.isnan() & wanted.isnan()) | (off <= allowed)
    if not good.all():
        share = torch.where(good, -1.0, (off / allowed).nan_to_num(math.inf))
        i = share.argmax()
        raise AssertionError(
            f"{name}: {int((~good).sum())} of {good.numel()} entries differ by more than rounding explains; the worst, "
            f"number {i}: {actual.flatten()[i]:.9g} for {wanted.flatten()[i]:.9g}, off by {off.flatten()[i]:.3g}, "
            f"allowed {allowed.flatten()[i]:.3g}"
        )


# --- rows ----------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Float64 of some rows of logits, and the errors of their statistics."""

    x: Tensor  # (..., V), banned tokens 0
    p: Tensor
    mean: Tensor  # (..., 1) x̄
    at_token: Tensor  # (..., V) 1_y
    d_x: Tensor
    d_p: Tensor
    d_mean: Tensor  # (..., 1)
    d_logps: Tensor  # (...)
    d_entropy: Tensor  # (...)
    heat: Tensor  # (..., 1)


def rows(logits: Tensor, ids: Tensor, heat, d_logits: Tensor | float = 0.0) -> Rows:
    """Of rows that count: logits (..., V), ids (...), temperature a number or (...), d_logits the logits' own error."""
    heat = torch.as_tensor(heat, dtype=torch.float64)
    heat = heat[..., None] if heat.dim() else heat
    x = logits.detach().double() / heat
    p, lse, V = x.softmax(-1), x.logsumexp(-1, keepdim=True), x.shape[-1]
    x = x.where(x.isfinite(), 0.0)
    moved = torch.as_tensor(d_logits, dtype=torch.float64) / heat.abs()
    d_x = 3 * U * x.abs() + moved
    d_lse = U * (8 * x.abs().amax(-1, keepdim=True) + 4 + steps(V) + 2 * math.log(V))
    d_lse = d_lse + (p * moved).sum(-1, keepdim=True)
    at_token = torch.zeros_like(x).scatter_(-1, ids[..., None].long(), 1.0)
    x_token = (x * at_token).sum(-1, keepdim=True)
    d_logps = U * (x_token - lse).abs() + (d_x * at_token).sum(-1, keepdim=True) + d_lse
    d_p = p * (d_x + U * (x.abs() + 4) + d_lse)
    mean, size = (p * x).sum(-1, keepdim=True), (p * x.abs()).sum(-1, keepdim=True)
    d_mean = (d_p * x.abs() + p * d_x).sum(-1, keepdim=True) + U * steps(V) * size
    d_entropy = d_lse + d_mean + U * (lse.abs() + size)
    return Rows(x, p, mean, at_token, d_x, d_p, d_mean, d_logps[..., 0], d_entropy[..., 0], heat)


def gradient_error(r: Rows, g: Tensor, h: Tensor, d_g: Tensor, d_h: Tensor) -> Tensor:
    """(..., V): of (g·(1_y − p) + h·p·(x̄ − x))/τ, before it is written. g, h and their errors: (...)."""
    g, h, d_g, d_h = (y.abs()[..., None] for y in (g, h, d_g, d_h))
    far, near = (r.mean - r.x).abs(), r.mean.abs() + r.x.abs()
    of_logps = d_g * (r.at_token - r.p).abs() + g * (r.d_p + 2 * U * (r.at_token + r.p))
    of_entropy = d_h * r.p * far + h * (r.d_p * far + r.p * (r.d_mean + r.d_x + 4 * U * near))
    return (of_logps + of_entropy) / r.heat.abs()


# --- the objective -------------------------------------------------------------------------------


def tail(
    fixed: dict, up, logps: Tensor, entropy: Tensor, term: Tensor, rewards=None, **floats: Tensor
) -> dict[str, Tensor]:
    """Everything that the reference's objective makes of log-probs and entropies, and ∂/∂ of both.

    Rewards are here for their metrics alone: the advantages come with them, as they have errors of their own.
    `term`: (sequences, 1), the share of its own roundings, up to ±1, that the policy term is off by.
    """
    floats = {k: v.detach() for k, v in floats.items()}
    out = policy_loss_off(term, logps, entropy=entropy, **fixed, **floats)
    metrics = out.metrics
    if rewards is not None:
        scale_rewards = fixed.get("scale_rewards", "group") if spans_by_scale(fixed) else "group"
        metrics = metrics | reward_metrics(rewards.detach(), fixed["num_generations"], scale_rewards)
    g, h = slopes((out.loss * up).sum(), logps, entropy)
    return {"loss": out.loss.detach(), "g": g, "h": h, **{f"metric {k}": v.double() for k, v in metrics.items()}}


def spans_by_scale(knobs: dict) -> bool:
    return knobs.get("advantage_estimator", "group") == "group"


def of_rewards(rewards: Tensor, knobs: dict) -> tuple[Tensor, Tensor]:
    """(advantages in float64, their errors): a mean that is off moves a whole group, and no reward does so."""
    short = {"advantage_eps": "eps", "advantage_unbiased": "unbiased"}
    given = {short.get(name, name): knobs[name] for name in ADVANTAGES if name in knobs}
    sizes = knobs["num_generations"]
    wanted = reference.group_advantages(rewards, sizes, **given)
    if given.get("advantage_estimator") == "gdpo":
        given = {name: given[name] for name in ("eps", "unbiased") if name in given}
        return wanted, gdpo_error(rewards, wanted, sizes, knobs.get("reward_weights"), **given)
    total, size = summed_rewards(rewards, knobs.get("reward_weights")), summed_size(rewards, knobs)
    centred = reference.group_advantages(total, sizes, scale_rewards="none")
    return wanted, advantage_error(size, wanted, torch.where(wanted == 0, 1.0, centred / wanted))


def summed_size(rewards: Tensor, knobs: dict) -> Tensor:
    """(B,): the terms of a weighted sum."""
    finite = torch.where(rewards.isfinite(), rewards.abs(), 0.0)
    weights = knobs.get("reward_weights")
    return summed_rewards(finite, None if weights is None else [abs(weight) for weight in weights])


def gdpo_error(rewards, wanted, sizes, weights, **given) -> Tensor:
    """Each z is off as an advantage is, y by all of them, and its spread relatively by as much as y by it."""
    rewards = rewards if rewards.dim() == 2 else rewards[:, None]
    y, d_y = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for column, weight in zip(rewards.unbind(1), weights or [1.0] * rewards.shape[1]):
        z = reference.group_advantages(column, sizes, **given)
        centred = reference.group_advantages(column, sizes, scale_rewards="none")
        d_y = d_y + abs(weight) * advantage_error(column, z, torch.where(z == 0, 1.0, centred / z))
        y = y + weight * z
    own = (8 + steps(len(y))) * U
    off = (d_y.max() + own * y.abs().max()) / y.std().clamp(min=1e-30)
    return torch.where(wanted == 0, 0.0, off * (1 + wanted.abs()) + own * wanted.abs())


def slopes(total: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, of, allow_unused=True, materialize_grads=True)


def moved(x: Tensor, size: Tensor, g: torch.Generator) -> Tensor:
    """x off by up to `size`. Equal numbers of a vector move together: what is without spread stays so."""
    if x.dim() == 1:
        values, which = x.detach().unique(return_inverse=True)
        return x + (2 * torch.rand(len(values), generator=g, dtype=x.dtype) - 1)[which] * size
    return x + (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1) * size


@unshifted()
def carried(evaluate, inputs: dict[str, Tensor], sizes: dict[str, Tensor], draws=DRAWS) -> tuple[dict, dict]:
    """(exact results, their errors), by name, of evaluate(**inputs) where each input is off by its size."""

    def at(inputs):
        return evaluate(**{name: x.detach().clone().requires_grad_() for name, x in inputs.items()})

    exact, g = at(inputs), torch.Generator().manual_seed(0)
    errors = {name: torch.zeros_like(x) for name, x in exact.items()}
    for _ in range(draws):
        other = at({name: moved(x, sizes[name], g) for name, x in inputs.items()})
        for name, x in exact.items():
            errors[name] = torch.maximum(errors[name], (other[name] - x).abs().nan_to_num(0.0, math.inf))
    factor = SAFETY * DRAWS / draws
    return exact, {name: factor * x + 8 * U * exact[name].abs().nan_to_num(0.0) + TINY for name, x in errors.items()}


def bounds_of(evaluate, inputs: dict[str, Tensor], sizes: dict[str, Tensor] | None = None, draws=DRAWS) -> dict:
    """Of fp32 runs of any evaluate(**inputs) -> {name: tensor}: its inputs moved as above, and its own sums.

    Args:
        sizes: the errors of the inputs. None: those of a row of logits, U·(8·M + 4 + steps(V) + 2·log V), which
            log-probs and weights get too, by the largest number of their last dimension.

    An entry is taken to be the sum of 32 terms as large as the largest entry of its tensor, of terms of size 1 in a
    metric: a ratio near 1, a KL estimate that is small.
    """
    inputs = {name: x.detach().double() for name, x in inputs.items()}
    exact, errors = carried(evaluate, inputs, sizes or {name: row_size(x) for name, x in inputs.items()}, draws)
    least = {name: 1.0 if x.dim() == 0 else 0.0 for name, x in exact.items()}
    size = {name: max(x.abs().nan_to_num(0.0).max().item(), least[name]) for name, x in exact.items()}
    return {name: errors[name] + steps(32) * U * size[name] for name in exact}


def row_size(x: Tensor) -> Tensor:
    V = x.shape[-1] if x.dim() else 1
    M = x.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True) if x.dim() else x.abs()
    return U * (8 * M + 4 + steps(V) + 2 * math.log(V))


def kl_size(u: Tensor) -> Tensor:
    """The terms of e^u − 1 − u, or of another estimate."""
    return u.exp() + u.abs() + u.square() + 1


def bounds(logits: Tensor, completion_ids: Tensor, *, upstream=None, d_logits: Tensor | float = 0.0, dtype=None,
           roundings: int = 1, **kwargs) -> Bounds:  # fmt: skip
    """Between one of ours and float64: keywords of the loss, with those of the reference's `Knobs`.

    Args:
        dtype: that the gradient is written in; None: the logits'.
        roundings: how often.
        d_logits: the error of the logits themselves, shaped as they are.
    """
    dtype = dtype or logits.dtype
    if (config := kwargs.pop("config", None)) is not None:
        kwargs |= dataclasses.asdict(config)
    kwargs = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in kwargs.items() if k not in RUN_ONLY}
    completion_ids = completion_ids.cpu()
    kwargs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    mask = kwargs.get("completion_mask")
    mask = torch.ones_like(completion_ids, dtype=torch.bool) if mask is None else mask.bool()
    heat = kwargs.pop("temperature", 1.0)
    if isinstance(heat, Tensor) and heat.dim():
        heat = _per_token(heat, mask, kwargs.get("cu_seqlens"))[mask]
    r, logps, entropy, d_logps, d_entropy = _read(logits, completion_ids, mask, heat, d_logits)
    up = 1.0 if upstream is None else torch.as_tensor(upstream, dtype=torch.float64)
    old, ref = kwargs.get("old_logps"), kwargs.get("ref_logps")
    drift = d_logps + sum(U * x.nan_to_num(0, 0, 0).abs() for x in (logps, old, ref) if x is not None)  # r, u: rounded
    floats = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point() and v.numel()}
    fixed = {k: v for k, v in kwargs.items() if k not in floats}
    sizes = {k: 4 * U * v.nan_to_num(0, 0, 0).abs() for k, v in floats.items()}
    if "rewards" in sizes:
        floats["advantages"], sizes["advantages"] = of_rewards(floats["rewards"], kwargs)
        sizes["rewards"] = 4 * U * summed_size(floats["rewards"], kwargs).amax()  # a mean is subtracted
        floats["rewards"] = summed_rewards(floats["rewards"], kwargs.get("reward_weights"))
    cu = kwargs.get("cu_seqlens")
    term = torch.zeros(mask.shape[0] if cu is None else len(cu) - 1, 1, dtype=torch.float64)
    exact, errors = carried(
        functools.partial(tail, fixed, up),
        {"logps": logps, "entropy": entropy, "term": term, **floats},
        {"logps": drift, "entropy": d_entropy, "term": torch.ones_like(term), **sizes},
    )

    # What sums and KL estimates lose of their own terms.
    out = reference.policy_loss(logps, entropy=entropy, **kwargs)
    n, beta, scale = int(mask.sum()), kwargs.get("beta", 0.0), kwargs.get("loss_scale", 1.0)
    w = out.weights.where(mask, 0.0).abs() if kwargs.get("reduction") != "none" else torch.ones_like(logps)
    kl = torch.zeros_like(logps)
    r_size = torch.zeros_like(logps) if old is None else (logps - old).where(mask, 0.0)
    if beta:
        kl = 8 * U * abs(beta) * kl_size((ref - logps).where(mask, 0.0)) * r_size.abs().exp() * w
    lost = kl + U * steps(n) * w * out.per_token_loss.nan_to_num(0, 0, 0).abs()
    bonus = abs(kwargs.get("entropy_coef") or 0.0) * abs(scale) * U * steps(n) * entropy.abs().amax()
    d_loss = errors["loss"] + (lost if exact["loss"].dim() else lost.sum() + bonus)
    metrics = {k: v + U * steps(n) * exact[k].abs() for k, v in errors.items() if k.startswith("metric ")}
    metrics = {k.removeprefix("metric "): v for k, v in metrics.items()}
    size = (8 + steps(n)) * U
    for name in KL_METRICS:
        if name in metrics:
            at = r_size if name == "approx_kl" else (ref - logps).where(mask, 0.0)
            metrics[name] = metrics[name] + size * (kl_size(at) * r_size.abs().exp()).where(mask, 0.0).sum() / max(n, 1)
    if "policy_loss" in metrics:
        metrics["policy_loss"] = metrics["policy_loss"] + (out.weights.abs() / w.clamp(min=1e-300) * lost).nan_to_num(
            0, 0, 0).where(mask, 0.0).sum()  # fmt: skip
    d_g = errors["g"] + kl * torch.as_tensor(up).abs()
    d_grad = _gradient_bounds(logits, mask, r, exact, {**errors, "g": d_g}, dtype, roundings)
    return Bounds(d_loss, d_grad, d_logps, d_entropy, metrics)


def logprob_bounds(logits, ids, mask, temperature, objective, d_logits: Tensor | float = 0.0, dtype=None) -> Bounds:
    """The same for `token_logprobs` and a scalar objective(logps, entropy), in fp32, whose rounding is added to theirs.

    `loss` and `metrics` are empty.
    """
    r, logps, entropy, d_logps, d_entropy = _read(logits, ids, mask, temperature, d_logits)

    def evaluate(logps, entropy):
        g, h = slopes(objective(logps, entropy) + 0.0 * logps.sum(), logps, entropy)
        return {"g": g.where(mask, 0.0), "h": h.where(mask, 0.0)}

    sizes = {"logps": d_logps + U * logps.abs(), "entropy": d_entropy + U * entropy.abs()}
    exact, errors = carried(evaluate, {"logps": logps, "entropy": entropy}, sizes)
    d_grad = _gradient_bounds(logits, mask, r, exact, errors, dtype or logits.dtype, 1)
    return Bounds(torch.zeros(()), d_grad, d_logps, d_entropy, {})


def _read(logits, ids, mask, heat, d_logits):
    """(Rows of the tokens that count; log-probs and entropies in float64, and their errors, 0 where masked)."""

    def read(x):
        return (x[: mask.shape[0]] if x.dim() == 2 else x[:, : mask.shape[1]])[mask]

    d_logits = read(d_logits) if isinstance(d_logits, Tensor) else d_logits
    r = rows(read(logits.detach().cpu()), ids[mask], heat, d_logits)
    lse = r.x.where(r.p > 0, -math.inf).logsumexp(-1)
    of_rows = ((r.x * r.at_token).sum(-1) - lse, lse - r.mean[..., 0], r.d_logps, r.d_entropy)
    return r, *(torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, x) for x in of_rows)


def _gradient_bounds(logits, mask, r, exact, errors, dtype, roundings) -> Tensor:
    """Of the gradient as it is written, shaped as the logits; 0 in rows that do not count."""
    g, h = exact["g"][mask], exact["h"][mask]
    entry = (g[:, None] * (r.at_token - r.p) + h[:, None] * r.p * (r.mean - r.x)) / r.heat
    inner = gradient_error(r, g, h, errors["g"][mask], errors["h"][mask])
    out = torch.zeros(logits.shape, dtype=torch.float64)
    (out if logits.dim() == 2 else out[:, : mask.shape[1]])[mask] = inner + written(entry, dtype, roundings)
    return out


def _per_token(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B,), (B, 1), (B, T), or packed (S,), (N,) → one for each token."""
    if cu_seqlens is not None:
        return x if x.shape == mask.shape else x.repeat_interleave(cu_seqlens.diff().long())
    return (x if x.dim() == 2 else x[:, None]).expand(mask.shape)
