"""Policy terms: what a token's loss ℓ is, given its advantage A and ratio ρ = e^r̂.

`policy_term` is the entry; the terms are in the table TERMS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reference.knobs import Knobs
from reference.tensors import clip, gradient_of, masked_sum, sequence_mean


class Tokens(NamedTuple):
    """What a term sees, (B, T); lp, old and A are 0 where masked, the rest may be anything there."""

    r: Tensor  # r̂ = log ρ, of the level
    lp: Tensor  # log π_θ of the sampled token
    old: Tensor  # log π_old, likewise
    A: Tensor
    mask: Tensor  # bool
    is_weights: Tensor | None = None  # (B, T) or (B, 1)
    silent: Tensor | None = None  # bool: ℓ is 0, whatever the rest


def policy_term(x: Tokens, k: Knobs, keep: Tensor | None = None) -> Tensor:
    """ℓ·is_weight, (B, T), for the tokens to keep; the others are silent, and so is A = 0.

    Silence must not depend on the ratio, which may be ∞: 0·∞ is NaN, in the backward pass too. So whatever
    is silent gets harmless values before the arithmetic, not a factor 0 after it.
    """
    silent = ~x.mask if keep is None else ~(x.mask & keep)
    weights = None if x.is_weights is None or k.term in WEIGHTS_INSIDE else x.is_weights
    if weights is not None:
        silent = silent | (weights == 0)
    if k.term not in SPEAK_WITHOUT_ADVANTAGE:
        silent = silent | (x.A == 0)
    loss = TERMS[k.term](x._replace(r=torch.where(silent, 0, x.r), silent=silent), k)
    if weights is not None:
        loss = loss * torch.where(silent, 1, weights)
    loss = torch.where(silent, 0, loss)
    # Broken log-probs must show, in the gradient too, even where A = 0.
    r = x.lp - x.old
    broken = r.isnan()
    return torch.where(broken, r * torch.where(broken, torch.nan, 1), loss)


# --- Clipped: PPO, GRPO and most of their relatives -------------------------------------------------------


def clip_bounds(k: Knobs) -> tuple[float, float]:
    """(ε_l, ε_h)"""
    return k.epsilon, k.epsilon if k.epsilon_high is None else k.epsilon_high


class ClipBranches(NamedTuple):
    factor: Tensor  # what stands for ρ in ℓ = −factor·A
    held: Tensor  # bool: it is a bound, not ρ
    dual: Tensor  # bool: the dual clip is chosen


def clip_branches(rho: Tensor, A: Tensor, k: Knobs) -> ClipBranches:
    low, high = clip_bounds(k)
    delta = torch.inf if k.delta is None else k.delta
    c = torch.inf if k.dual_clip is None else k.dual_clip
    capped, clipped = rho.clamp(max=delta), rho.clamp(1 - low, 1 + high)
    first = capped * A <= clipped * A
    held = torch.where(first, rho > delta, (rho < 1 - low) | (rho > 1 + high))
    factor = torch.where(first, capped, clipped)
    dual = (A < 0) & (factor > c)
    return ClipBranches(torch.where(dual, c, factor), held | dual, dual)


def term_clipped(x: Tokens, k: Knobs) -> Tensor:
    """ℓ = −min(min(ρ, δ)·A, clip(ρ, 1−ε_l, 1+ε_h)·A), and for A < 0 at most −c·A

    Once a token has moved by ε in the direction its advantage asks for, the clip holds it: no more
    gradient from this batch (PPO). In the other direction there is no bound, so that mistakes are
    undone; for A < 0 that can explode, hence δ (INTELLECT-2) or the dual clip c (arXiv:1912.09729).

    Ties take the first argument and bounds belong to the inside. Written with min and clamp, autograd
    would multiply the zero gradient of a clipped token by ρ, which may be ∞. So the token's branch is
    chosen on numbers first, and only a ρ that still moves ℓ is given to autograd.
    """
    factor, held, _ = clip_branches(x.r.detach().exp(), x.A, k)
    moving = torch.where(held, 0, x.r).exp()
    return -torch.where(held, factor, moving) * x.A


def term_up(x: Tokens, k: Knobs) -> Tensor:
    """ℓ = −A·exp(lp − sg[lp]) for A > 0, the clipped loss otherwise (UP-GRPO).

    Good tokens are on-policy whoever sampled them: the ratio's value is 1 and its gradient that of lp, so the clip
    never holds them, and the old policy is not asked. Bad ones stay clipped.
    """
    return torch.where(x.A > 0, -x.A * gradient_of(x.lp).exp(), term_clipped(x, k))


class Future(NamedTuple):
    """What comes after a token, all (B, T) and detached."""

    kl: Tensor  # F_t = Σ_{k ≥ t} γ^(k−t)·m_k·r_k·[ρ_k ≤ δ]
    influence: Tensor  # W_t
    safe: Tensor  # bool: W_t was not held back


def future_of(x: Tokens, k: Knobs) -> Future:
    """How the policy has moved on the tokens to come, discounted, and what that makes a token weigh (FIPO).

    A sum of −r is an estimate of the KL divergence of the rest of the sequence. Where the policy has come to like what
    followed a token, the token weighs more than 1. A bad token that has become much more likely is unsafe to reward.
    """
    r = (x.lp - x.old).detach().clamp(*k.log_ratio_bounds)
    rho = r.exp()
    counted = x.mask if k.delta is None else x.mask & ~(rho > k.delta)
    gamma = 2 ** (-1 / k.fipo_decay_rate) if k.fipo_gamma is None else k.fipo_gamma
    distance = torch.arange(r.shape[1], device=r.device) - torch.arange(r.shape[1], device=r.device)[:, None]
    discounts = torch.tensor(gamma, dtype=r.dtype, device=r.device) ** distance.clamp(min=0)  # [t, k]
    ahead = counted[:, None, :] & (distance >= 0)
    kl = torch.where(ahead, discounts * r[:, None, :], 0).sum(-1)
    influence = kl.exp()
    if k.fipo_clip_range:
        least = 1.0 if k.fipo_clip_high_only else 1 - k.fipo_clip_range
        influence = influence.clamp(least, 1 + k.fipo_clip_range)
    safe = torch.ones_like(x.mask)
    if k.fipo_safety_threshold is not None:
        safe = ~((x.A < 0) & (rho > k.fipo_safety_threshold))
    return Future(kl, torch.where(safe, influence, influence.clamp(0.8, 1.0)), safe)


def term_fipo(x: Tokens, k: Knobs) -> Tensor:
    """ℓ = sg[W]·clipped: a token counts for more where the policy has come to like what it led to (FIPO)."""
    return future_of(x, k).influence * term_clipped(x, k)


# --- Terms of the form −sg[weight]·A·lp: the policy gradient, with a weight for each token ------------------


def term_reinforce(x: Tokens, k: Knobs) -> Tensor:
    """ℓ = −A·lp (verl: gpg)"""
    return -x.A * x.lp


def term_cispo(x: Tokens, k: Knobs) -> Tensor:
    """ℓ = −sg[clip(ρ, cispo_min, cispo_max)]·A·lp: the ratio is clipped, no token's gradient is (MiniMax-M1)."""
    rho = x.r.detach().exp()
    if k.cispo_min is not None or k.cispo_max is not None:
        rho = rho.clamp(k.cispo_min, k.cispo_max)
    return -rho * x.A * x.lp


def term_topr(x: Tokens, k: Knobs) -> Tensor:
    """ℓ = −A·lp for A > 0, −sg[clip(ρ, 0, 1)]·A·lp otherwise: good samples are imitated wherever they come
    from, bad ones are pushed away only as far as the policy would still produce them (TOPR)."""
    rho = x.r.detach().exp().clamp(0, 1)
    return -torch.where(x.A > 0, 1, rho) * x.A * x.lp


def dppo_keeps(x: Tokens, k: Knobs) -> Tensor:
    """Bool: the token has not left the trust region in the direction that its advantage asks for."""
    low, high = clip_bounds(k)
    p, p_old = x.lp.detach().exp(), x.old.exp()
    if k.term == "dppo_tv":  # total variation of (token, any other token)
        return torch.where(x.A > 0, p - p_old <= high, p - p_old >= -low)
    kl = p_old * (x.old - x.lp.detach()) + (1 - p_old) * ((1 - p_old + 1e-8) / (1 - p + 1e-8)).log()
    return torch.where(x.A > 0, (kl <= high) | (p <= p_old), (kl <= low) | (p >= p_old))


def dppo_cap(k: Knobs) -> float:
    return 20.0 if k.dual_clip is None else k.dual_clip


def term_dppo(x: Tokens, k: Knobs) -> Tensor:
    """ℓ = −A·sg[min(ρ, c)]·lp·sg[keep]: probabilities are bounded, not their ratio, which says little about
    rare tokens (arXiv:2602.04879)."""
    rho = x.r.detach().exp().clamp(max=dppo_cap(k))
    return -x.A * rho * torch.where(dppo_keeps(x, k), x.lp, 0)


LOG_FLOOR = math.log(1e-8)


def vespo_log_w(x: Tokens) -> Tensor:
    """(B, 1): log of the trajectory's ratio to the policy that sampled, bounded."""
    log_w = masked_sum((x.lp - x.old).detach().clamp(-20, 20), x.mask)
    if x.is_weights is not None:
        log_is = x.is_weights.log().clamp(LOG_FLOOR, 20)
        log_w = log_w + (log_is if log_is.shape[1] == 1 else masked_sum(log_is, x.mask))
    return log_w.clamp(LOG_FLOOR, 20)


def vespo_phi(log_w: Tensor, A: Tensor, k: Knobs) -> Tensor:
    """φ = exp(λ + k·log w − λ·w): 1 at w = 1, and 0 towards both ends."""
    power = torch.where(A >= 0, log_w.new_tensor(k.vespo_k_pos), k.vespo_k_neg)
    rate = torch.where(A >= 0, log_w.new_tensor(k.vespo_lambda_pos), k.vespo_lambda_neg).clamp(min=1e-4)
    return (rate + power * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0, posinf=0, neginf=0)


def term_vespo(x: Tokens, k: Knobs) -> Tensor:
    """ℓ = −sg[φ(w)]·A·lp: every token of a sequence weighs what the whole trajectory's ratio w says (VESPO)."""
    return -vespo_phi(vespo_log_w(x), x.A, k) * x.A * x.lp


# --- Other shapes -------------------------------------------------------------------------------------------


def term_sapo(x: Tokens, k: Knobs) -> Tensor:
    """ℓ = −A·σ(τ(ρ−1))·4/τ: a gate that closes smoothly where the clip is a step (SAPO).

    Far out the gate is 1 and its slope 0; ρ = ∞ must not turn that slope into 0·∞. The gate is exp(log σ), whose slope
    autograd makes of σ(−z); that of σ itself, σ·(1 − σ), is 0 as soon as σ rounds to 1.
    """
    tau = torch.where(x.A > 0, x.A.new_tensor(k.sapo_temperature_pos), k.sapo_temperature_neg)
    open_wide = x.r.detach().exp() == torch.inf
    rho = torch.where(open_wide, 0, x.r).exp()
    return -x.A * torch.where(open_wide, 1, torch.nn.functional.logsigmoid(tau * (rho - 1)).exp()) * 4 / tau


def term_gmpo(x: Tokens, k: Knobs) -> Tensor:
    """ℓ_t = −A_t·exp(mean δ)·exp(mean log is_weight), with δ_t = r_t clipped on the side that A_t asks for:
    the geometric mean of the clipped ratios, which one outlier cannot carry away (GMPO)."""
    low, high = clip_bounds(k)
    r = x.lp - x.old
    upper = torch.where(x.A > 0, r.new_tensor(high), torch.inf)
    lower = torch.where(x.A < 0, r.new_tensor(-low), -torch.inf)
    delta = torch.where(x.A == 0, 0, clip(r, lower, upper))
    log_mean = sequence_mean(delta, x.mask)
    if x.is_weights is not None:
        log_mean = log_mean + sequence_mean(x.is_weights.log().expand(r.shape), x.mask)
    return -x.A * torch.where(x.silent, 0, log_mean).exp()


def term_dro(x: Tokens, k: Knobs) -> Tensor:
    """ℓ = −A·lp + ½·β_dro·r̂²: the policy gradient, and a spring towards the old policy (DRO; Kimi k1.5)."""
    return -torch.where(x.A == 0, 0, x.A * x.lp) + k.dro_beta / 2 * x.r.square()


TERMS: dict[str, Callable[[Tokens, Knobs], Tensor]] = {
    "clipped": term_clipped,
    "up": term_up,
    "fipo": term_fipo,
    "reinforce": term_reinforce,
    "cispo": term_cispo,
    "topr": term_topr,
    "dppo_tv": term_dppo,
    "dppo_kl": term_dppo,
    "vespo": term_vespo,
    "sapo": term_sapo,
    "gmpo": term_gmpo,
    "dro": term_dro,
}
WEIGHTS_INSIDE = ("vespo", "gmpo")  # is_weight is part of their statistic, not a factor
SPEAK_WITHOUT_ADVANTAGE = ("dro",)  # the spring pulls where A = 0 too
