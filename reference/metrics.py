"""What to watch while training. Names and meanings are TRL's where TRL has the quantity.

A clip flag is averaged over tokens; but over sequences, those without tokens included, where a sequence
has only one: one ratio by its level, and one advantage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reference.advantages import GroupSizes, group_sizes, nan_std, no_spread, of_completions, split_groups
from reference.corrections import CORRECTIONS, ONE_WEIGHT_PER_SEQUENCE, difference
from reference.knobs import Knobs
from reference.levels import ONE_RATIO_PER_SEQUENCE
from reference.tensors import as_column, masked_mean, nan_min
from reference.terms import (
    Tokens,
    clip_bounds,
    clip_branches,
    dppo_cap,
    dppo_keeps,
    future_of,
    vespo_log_w,
    vespo_phi,
)


def ratio_metrics(r: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """ρ before any clipping, and approx_kl = mean(ρ − 1 − log ρ) ≈ KL(π_old ‖ π_θ), Schulman's k3."""
    rho = r.exp()
    rho_seen = torch.where(mask, rho, torch.nan)
    return {
        "ratio/mean": masked_mean(rho, mask),
        "ratio/min": nan_min(rho_seen),
        "ratio/max": -nan_min(-rho_seen),
        "approx_kl": masked_mean(rho - 1 - r, mask),
    }


# --- By term: (tokens, advantages as given, knobs) → metrics ---------------------------------------------------


def one_per_sequence(advantages: Tensor) -> bool:
    return as_column(advantages).shape[1] == 1


def sequence_values(flag: Tensor, x: Tokens, advantages: Tensor, k: Knobs) -> Tensor:
    """(B,): the sequences' means of a flag; NaN where a sequence has neither tokens nor a value of its own."""
    if k.level in ONE_RATIO_PER_SEQUENCE and one_per_sequence(advantages):
        return (flag & x.mask).any(dim=1).to(x.r.dtype)
    return (flag & x.mask).sum(dim=1).to(x.r.dtype) / x.mask.sum(dim=1)


def mean_of(flag: Tensor, x: Tokens, advantages: Tensor, k: Knobs) -> Tensor:
    if k.level in ONE_RATIO_PER_SEQUENCE and one_per_sequence(advantages):
        return sequence_values(flag, x, advantages, k).sum() / max(flag.shape[0], 1)
    return masked_mean(flag.to(x.r.dtype), x.mask)


def region_metrics(low: Tensor, high: Tensor, x: Tokens, advantages: Tensor, k: Knobs) -> dict[str, Tensor]:
    """How many tokens the clip holds: `low` made less likely, `high` more likely, `region` either.

    low_min and high_max range over the sequences' own means; NaN if there is none.
    """
    return {
        "clip_ratio/low_mean": mean_of(low, x, advantages, k),
        "clip_ratio/low_min": nan_min(sequence_values(low, x, advantages, k)),
        "clip_ratio/high_mean": mean_of(high, x, advantages, k),
        "clip_ratio/high_max": -nan_min(-sequence_values(high, x, advantages, k)),
        "clip_ratio/region_mean": mean_of(low | high, x, advantages, k),
    }


def clipped_metrics(x: Tokens, advantages: Tensor, k: Knobs) -> dict[str, Tensor]:
    """ρ is taken after the cap δ."""
    low, high = clip_bounds(k)
    rho = x.r.exp()
    capped = rho.clamp(max=torch.inf if k.delta is None else k.delta)
    metrics = region_metrics((capped < 1 - low) & (x.A < 0), (capped > 1 + high) & (x.A > 0), x, advantages, k)
    if k.dual_clip is not None:
        metrics["clip_ratio/dual_mean"] = mean_of(clip_branches(rho, x.A, k).dual, x, advantages, k)
    return metrics


def up_metrics(x: Tokens, advantages: Tensor, k: Knobs) -> dict[str, Tensor]:
    """Where A > 0 there is no clip; such tokens still count in the means."""
    return clipped_metrics(x._replace(A=x.A.clamp(max=0)), advantages, k)


def fipo_metrics(x: Tokens, advantages: Tensor, k: Knobs) -> dict[str, Tensor]:
    """The names are ms-swift's, without their endings."""
    future = future_of(x, k)
    return clipped_metrics(x, advantages, k) | {
        "fipo/future_kl": masked_mean(future.kl, x.mask),
        "fipo/influence_weight": masked_mean(future.influence, x.mask),
        "fipo/safety_keep": masked_mean(future.safe.to(x.r.dtype), x.mask),
    }


def dppo_metrics(x: Tokens, advantages: Tensor, k: Knobs) -> dict[str, Tensor]:
    keep = dppo_keeps(x, k)
    capped = keep & (x.r.exp() > dppo_cap(k))
    return {
        **region_metrics(~keep & ~(x.A > 0), ~keep & (x.A > 0), x, advantages, k),
        "clip_ratio/dual_mean": mean_of(capped, x, advantages, k),
    }


def gmpo_metrics(x: Tokens, advantages: Tensor, k: Knobs) -> dict[str, Tensor]:
    low, high = clip_bounds(k)
    return region_metrics((x.r < -low) & (x.A < 0), (x.r > high) & (x.A > 0), x, advantages, k)


def topr_metrics(x: Tokens, advantages: Tensor, k: Knobs) -> dict[str, Tensor]:
    return region_metrics(torch.zeros_like(x.mask), (x.r.exp() > 1) & (x.A < 0), x, advantages, k)


def cispo_metrics(x: Tokens, advantages: Tensor, k: Knobs) -> dict[str, Tensor]:
    bound = torch.inf if k.cispo_max is None else k.cispo_max
    return {"cispo_clip_ratio": mean_of((x.r.exp() > bound) & (x.A > 0), x, advantages, k)}


def vespo_metrics(x: Tokens, advantages: Tensor, k: Knobs) -> dict[str, Tensor]:
    """φ belongs to the sequence at every level, if the advantage does."""
    log_w = vespo_log_w(x)
    if one_per_sequence(advantages):
        phi = vespo_phi(log_w, as_column(advantages).to(log_w.dtype), k)
        return {"vespo/phi_seq_mean": phi.sum() / max(phi.shape[0], 1)}
    return {"vespo/phi_seq_mean": masked_mean(vespo_phi(log_w, x.A, k), x.mask)}


TERM_METRICS: dict[str, Callable[[Tokens, Tensor, Knobs], dict[str, Tensor]]] = {
    "clipped": clipped_metrics,
    "up": up_metrics,
    "fipo": fipo_metrics,
    "dppo_tv": dppo_metrics,
    "dppo_kl": dppo_metrics,
    "gmpo": gmpo_metrics,
    "topr": topr_metrics,
    "cispo": cispo_metrics,
    "vespo": vespo_metrics,
}  # sapo, reinforce and dro have nothing that clips


def sampling_metrics(
    old: Tensor, samp: Tensor, mask: Tensor, weights: Tensor | None, k: Knobs
) -> dict[str, Tensor]:
    """How far the sampler is from the trainer: |log π_old − log π_sampler| where the sampler has said something, and
    the ratio of the two, a correction's bounds applied: of tokens, or of sequences (those without tokens included).

    Args:
        weights: (B, T) or (B, 1), what `k.sampling_correction` makes; None without one.
    """
    d = difference(old, samp, mask)
    gap = d.abs()[mask & ~samp.isnan()]
    ratio = d.exp() if weights is None else weights
    counts = torch.ones_like(ratio, dtype=torch.bool) if k.sampling_correction in ONE_WEIGHT_PER_SEQUENCE else mask
    metrics = {
        "sampling/sampling_logp_difference/mean": gap.sum() / max(gap.numel(), 1),
        "sampling/sampling_logp_difference/max": gap.max() if gap.numel() else d.new_zeros(()),
        "sampling/importance_sampling_ratio/min": nan_min(ratio[counts]),
        "sampling/importance_sampling_ratio/mean": ratio[counts].sum() / max(int(counts.sum()), 1),
        "sampling/importance_sampling_ratio/max": -nan_min(-ratio[counts]),
    }
    if weights is not None:
        free = CORRECTIONS[k.sampling_correction](d, mask, -torch.inf, torch.inf)
        metrics["sampling/corrected_share"] = masked_mean((weights != free).to(d.dtype), counts)
        metrics["sampling/weight_mean"] = masked_mean(weights.expand(mask.shape), mask)
    return metrics


def reward_metrics(rewards: Tensor, num_generations: GroupSizes, scale_rewards: str) -> dict[str, Tensor]:
    """Mean and unbiased std of all finite rewards, how many are not, and the share of completions that teach nothing
    since the rewards they are compared with (the group's; the batch's if that scales) are all equal."""
    compared = [len(rewards)] if scale_rewards == "batch" else group_sizes(num_generations, rewards)
    flat = of_completions(no_spread(split_groups(rewards, compared)), compared)
    valid = rewards[rewards.isfinite()]
    std = nan_std(valid[None], unbiased=True)[0, 0] if len(valid) > 1 else rewards.new_tensor(torch.nan)
    return {
        "reward": valid.mean(),
        "reward_std": std,
        "frac_reward_zero_std": flat.to(rewards.dtype).mean(),
        "reward_not_finite": rewards.new_tensor(float(len(rewards) - len(valid))),
    }
