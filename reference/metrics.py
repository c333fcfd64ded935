"""What to watch while training. Names and meanings are TRL's where TRL has the quantity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reference.advantages import nan_std, no_spread, split_groups
from reference.objective import Knobs, clip_bounds
from reference.tensors import masked_mean, nan_min


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


def clip_metrics(r: Tensor, A: Tensor, mask: Tensor, k: Knobs) -> dict[str, Tensor]:
    """How many tokens the clip holds: `low` made less likely, `high` more likely, `region` either.

    ρ is taken after the cap δ. low_min and high_max range over the sequences' own means; sequences
    without tokens have none. NaN if there is no token at all.
    """
    lo, hi = clip_bounds(k)
    rho = r.exp().clamp(max=torch.inf if k.delta is None else k.delta)
    low = ((rho < lo) & (A < 0)).to(r.dtype)
    high = ((rho > hi) & (A > 0)).to(r.dtype)
    m = mask.to(r.dtype)

    def sequence_means(x: Tensor) -> Tensor:
        return (x * m).sum(dim=1) / m.sum(dim=1)  # 0/0 = NaN marks a sequence without tokens

    return {
        "clip_ratio/low_mean": masked_mean(low, mask),
        "clip_ratio/low_min": nan_min(sequence_means(low)),
        "clip_ratio/high_mean": masked_mean(high, mask),
        "clip_ratio/high_max": -nan_min(-sequence_means(high)),
        "clip_ratio/region_mean": masked_mean(low + high, mask),
    }


TermMetrics = Callable[[Tensor, Tensor, Tensor, Knobs], dict[str, Tensor]]
TERM_METRICS: dict[str, TermMetrics] = {"clipped": clip_metrics}


def reward_metrics(rewards: Tensor, num_generations: int, scale_rewards: str) -> dict[str, Tensor]:
    """Mean and unbiased std of all valid rewards, and the share of completions that teach nothing
    since the rewards they are compared with (the group's; the batch's if that scales) are all equal."""
    groups = split_groups(rewards, num_generations)
    compared = groups.reshape(1, -1) if scale_rewards == "batch" else groups
    two_valid = (~rewards.isnan()).sum() > 1
    return {
        "reward": rewards.nanmean(),
        "reward_std": torch.where(two_valid, nan_std(rewards[None], unbiased=True)[0, 0], torch.nan),
        "frac_reward_zero_std": no_spread(compared).to(rewards.dtype).mean(),
    }
