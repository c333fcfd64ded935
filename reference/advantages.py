"""What a completion is worth: its reward against those of its siblings."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.tensors import compute_dtype


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    *,
    scale_rewards: str = "group",
    unbiased: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """A = (R − mean_group) / (std + eps): how much better than its siblings a completion did.

    The group's mean stands in for PPO's value network (GRPO). `scale_rewards` says whose std divides:
    the "group"'s, the whole "batch"'s, or "none"'s: dividing favours prompts that are almost always
    or almost never solved (Dr. GRPO). `unbiased` divides the variance by n − 1 rather than n.

    A completion without a reward (NaN) is left out of mean and std and gets A = 0. So does a group
    whose rewards are all equal, *exactly*: R − mean is rounding noise there, and eps would magnify it.

    Args:
        rewards: (B,); rows [i·G, (i+1)·G) answer the same prompt.
        num_generations: G.

    Returns: (B,), float32 or float64.

    Raises:
        ValueError: B is not a multiple of G, G < 2 with "group", or an unknown `scale_rewards`.
    """
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards={scale_rewards!r} is unknown; choose 'group', 'batch' or 'none'")
    if scale_rewards == "group" and num_generations < 2:
        raise ValueError(f"num_generations={num_generations}: a group needs two completions to have a std")
    groups = split_groups(rewards.to(compute_dtype(rewards)), num_generations)

    centred = torch.where(no_spread(groups), 0, groups - groups.nanmean(dim=1, keepdim=True))
    if scale_rewards == "group":
        centred = centred / (nan_std(groups, unbiased) + eps)
    elif scale_rewards == "batch":
        centred = centred / (nan_std(groups.reshape(1, -1), unbiased) + eps)
    return torch.where(groups.isnan(), 0, centred).reshape(-1)


def split_groups(rewards: Tensor, num_generations: int) -> Tensor:
    """(B,) → (B/G, G)."""
    if rewards.dim() != 1 or num_generations < 1 or rewards.numel() % num_generations:
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)} do not divide into groups of "
            f"num_generations={num_generations}"
        )
    return rewards.reshape(-1, num_generations)


def no_spread(groups: Tensor) -> Tensor:
    """(P, G) → (P, 1) bool: the valid rewards of a group are all equal, or fewer than two."""
    highest = groups.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(dim=1, keepdim=True)
    lowest = groups.nan_to_num(torch.inf, torch.inf, -torch.inf).amin(dim=1, keepdim=True)
    return highest <= lowest


def nan_std(groups: Tensor, unbiased: bool) -> Tensor:
    """(P, G) → (P, 1): standard deviation of the entries that are not NaN; 0 if that is undefined."""
    valid = ~groups.isnan()
    deviation = torch.where(valid, groups - groups.nanmean(dim=1, keepdim=True), 0)
    count = valid.sum(dim=1, keepdim=True) - int(unbiased)
    return (deviation.square().sum(dim=1, keepdim=True) / count.clamp(min=1)).sqrt()
