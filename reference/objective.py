"""The pieces an objective is put together from: levels, terms, KL estimators, weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Knobs:
    """The hyper-parameters of the objective."""

    loss_type: str = "grpo"  # a key of LOSS_TYPES
    epsilon: float = 0.2  # ε_l: the ratio is clipped from below at 1 − ε_l
    epsilon_high: float | None = None  # ε_h: and from above at 1 + ε_h ("clip higher", DAPO); None: ε_l
    delta: float | None = None  # δ: cap on the ratio where the minimum leaves it unbounded (INTELLECT-2)
    importance_sampling_level: str = "token"  # a key of LEVELS
    beta: float = 0.0  # β: strength of the pull towards the reference policy
    kl_estimator: str = "k3"  # a key of KL_ESTIMATORS
    max_completion_length: int | None = None  # the constant that dr_grpo divides by; None: T
    entropy_coef: float = 0.0  # reward for staying undecided
    scale_rewards: str = "group"  # "group", "batch" or "none": see group_advantages
    advantage_eps: float = 1e-4
    advantage_unbiased: bool = True


# --- Levels: (r, mask) → r̂, the log of the ratio ρ that the term sees --------------------------------
#
# r = log π_θ − log π_old of the sampled token: how much more likely it has become since it was sampled.


def level_token(r: Tensor, mask: Tensor) -> Tensor:
    """r̂_t = r_t: every token for itself (PPO, GRPO)."""
    return r


LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"token": level_token}


# --- Terms: (r̂, lp, A, knobs) → ℓ ---------------------------------------------------------------------


def clip_bounds(k: Knobs) -> tuple[float, float]:
    return 1 - k.epsilon, 1 + (k.epsilon if k.epsilon_high is None else k.epsilon_high)


def term_clipped(r: Tensor, lp: Tensor, A: Tensor, k: Knobs) -> Tensor:
    """ℓ = −min(min(ρ, δ)·A, clip(ρ, 1−ε_l, 1+ε_h)·A),  ρ = e^r̂

    Once a token has moved by ε in the direction its advantage asks for, the clip holds it: no more
    gradient from this batch (PPO). In the other direction there is no bound, so that mistakes are
    undone; for A < 0 that can explode, hence δ (INTELLECT-2).

    Ties take the first argument and bounds belong to the inside. Written with min and clamp, autograd
    would multiply the zero gradient of a clipped token by ρ, which may be ∞. So the token's branch is
    chosen on numbers first, and only a ρ that still moves ℓ is given to autograd.
    """
    lo, hi = clip_bounds(k)
    delta = torch.inf if k.delta is None else k.delta
    r = torch.where(A == 0, 0, r)  # no advantage, no signal, whatever the ratio: 0·∞ must not become NaN
    rho = r.detach().exp()
    capped, clipped = rho.clamp(max=delta), rho.clamp(lo, hi)
    first = capped * A <= clipped * A
    held = torch.where(first, rho > delta, (rho < lo) | (rho > hi))
    constant = torch.where(first, capped, clipped)
    moving = torch.where(held, 0, r).exp()
    return -torch.where(held, constant, moving) * A


TERMS: dict[str, Callable[[Tensor, Tensor, Tensor, Knobs], Tensor]] = {"clipped": term_clipped}


# --- KL estimators: (lp, ref) → kl ----------------------------------------------------------------------
#
# Three estimates of KL(π_θ ‖ π_ref) from one sample of π_θ, with u = log π_ref − log π_θ.
# John Schulman, "Approximating KL divergence", 2020.


def kl_k1(lp: Tensor, ref: Tensor) -> Tensor:
    """−u: unbiased; of either sign, so noisy."""
    return lp - ref


def kl_k2(lp: Tensor, ref: Tensor) -> Tensor:
    """u²/2: never negative, biased; its expected gradient is the true KL's."""
    return (ref - lp).square() / 2


def kl_k3(lp: Tensor, ref: Tensor) -> Tensor:
    """e^u − u − 1: unbiased and never negative (GRPO's choice)."""
    u = ref - lp
    return u.exp() - u - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


# --- Weights: (m, N, max_length) → w, so that Σ w·ℓ is the loss type's average ---------------------------
#
# m (B, T): the mask as numbers. N: tokens in the whole batch. Denominators are at least 1, so that an
# empty sequence or batch counts 0.


def weights_grpo(m: Tensor, num_items: Tensor, max_length: int) -> Tensor:
    """Mean over each sequence's tokens, then over sequences: a token of a long answer counts less."""
    return m / (m.sum(dim=1, keepdim=True).clamp(min=1) * m.shape[0])


def weights_bnpo(m: Tensor, num_items: Tensor, max_length: int) -> Tensor:
    """Mean over the tokens of this call."""
    return m / m.sum().clamp(min=1)


def weights_dapo(m: Tensor, num_items: Tensor, max_length: int) -> Tensor:
    """Mean over the tokens of the whole batch, of which this call may see a part (DAPO)."""
    return m / num_items.clamp(min=1)


def weights_dr_grpo(m: Tensor, num_items: Tensor, max_length: int) -> Tensor:
    """Sum over tokens, divided by a constant: length has no say at all (Dr. GRPO)."""
    return m / (m.shape[0] * max_length)


WEIGHTS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "grpo": weights_grpo,
    "bnpo": weights_bnpo,
    "dapo": weights_dapo,
    "dr_grpo": weights_dr_grpo,
}


class LossType(NamedTuple):
    term: str  # a key of TERMS
    weights: str  # a key of WEIGHTS


LOSS_TYPES: dict[str, LossType] = {
    "grpo": LossType("clipped", "grpo"),
    "bnpo": LossType("clipped", "bnpo"),
    "dapo": LossType("clipped", "dapo"),
    "dr_grpo": LossType("clipped", "dr_grpo"),
}
