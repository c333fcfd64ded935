"""What a completion is worth: its reward against those of its siblings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reference.tensors import compute_dtype

GroupSizes = int | Sequence[int] | Tensor


def group_advantages(
    rewards: Tensor,
    num_generations: GroupSizes,
    *,
    advantage_estimator: str = "group",
    reward_weights: Sequence[float] | Tensor | None = None,
    scale_rewards: str = "group",
    unbiased: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """A = (R − mean_group) / (std + eps): how much better than its siblings a completion did.

    The group's mean stands in for PPO's value network (GRPO). `scale_rewards` says whose std divides:
    the "group"'s, the whole "batch"'s, or "none"'s: dividing favours prompts that are almost always
    or almost never solved (Dr. GRPO). `unbiased` divides the variance by n − 1 rather than n.

    A completion without a finite reward (NaN, ±inf) is left out of mean and std and gets A = 0. So does a group
    whose rewards are all equal, *exactly*: R − mean is rounding noise there, and eps would magnify it.

    Other estimators: "rloo", R less the mean of the *others*' rewards (RLOO); "maxrl", (R − mean)/(mean + 1e-6), so
    that a prompt counts the more the rarer its solutions are (MaxRL); "gdpo", see `normalised_sum`.

    Args:
        rewards: (B,), or (B, K) with `reward_weights`, of which all but "gdpo" take the weighted sum first; rows
            [i·G, (i+1)·G) answer the same prompt.
        num_generations: G; or the sizes of the groups, if they differ.

    Returns: (B,), float32 or float64.

    Raises:
        ValueError: B is not a multiple of G, or not the sum of the sizes, G < 2 with "group", or an unknown
            `scale_rewards`.
    """
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards={scale_rewards!r} is unknown; choose 'group', 'batch' or 'none'")
    if advantage_estimator not in ("group", "rloo", "maxrl", "gdpo"):
        raise ValueError(f"advantage_estimator={advantage_estimator!r} is unknown")
    if advantage_estimator == "gdpo":
        return normalised_sum(rewards, num_generations, reward_weights, unbiased, eps)
    rewards = summed_rewards(rewards, reward_weights)
    if advantage_estimator != "group":
        sizes = group_sizes(num_generations, rewards)
        groups = split_groups(rewards.to(compute_dtype(rewards)), sizes)
        valid = ~groups.isnan()
        count, total = valid.sum(dim=1, keepdim=True), groups.nansum(dim=1, keepdim=True)
        if advantage_estimator == "rloo":
            compared = groups - (total - groups) / (count - 1).clamp(min=1)
        else:
            if (groups < 0).any():
                raise ValueError("maxrl needs rewards that are not negative")
            mean = total / count.clamp(min=1)
            compared = (groups - mean) / (mean + 1e-6)
        return of_completions(torch.where(no_spread(groups) | ~valid, 0, compared), sizes)
    if scale_rewards == "group" and isinstance(num_generations, int) and num_generations < 2:
        raise ValueError(f"num_generations={num_generations}: a group needs two completions to have a std")
    sizes = group_sizes(num_generations, rewards)
    groups = split_groups(rewards.to(compute_dtype(rewards)), sizes)

    centred = torch.where(no_spread(groups), 0, groups - groups.nanmean(dim=1, keepdim=True))
    if scale_rewards == "group":
        centred = centred / (nan_std(groups, unbiased) + eps)
    elif scale_rewards == "batch":
        centred = centred / (nan_std(groups.reshape(1, -1), unbiased) + eps)
    return of_completions(torch.where(groups.isnan(), 0, centred), sizes)


def summed_rewards(rewards: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    """(B, K) → (B,): Σ_k w_k·R_k over the finite rewards; NaN for a row without one. (B,) stays."""
    if rewards.dim() == 1:
        return rewards
    w = torch.ones(rewards.shape[1]) if weights is None else torch.as_tensor(weights)
    finite = rewards.isfinite()
    return torch.where(finite.any(dim=1), torch.where(finite, rewards, 0) @ w.to(rewards.dtype), torch.nan)


def normalised_sum(
    rewards: Tensor,
    num_generations: GroupSizes,
    weights: Sequence[float] | Tensor | None = None,
    unbiased: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """GDPO: y = Σ_k w_k·z_k, z_k the k-th reward normalised in its group, then (y − mean)/(std + eps) over the batch.

    The mean is 0, since each z_k adds up to 0 in each group; its rounding noise is left out.

    Rewards of different scales then count by their weights, not by their spread. A reward that is not finite adds
    nothing; a completion without a finite one is left out, and gets 0.
    """
    rewards = (rewards if rewards.dim() == 2 else rewards[:, None]).to(compute_dtype(rewards))
    w = [1.0] * rewards.shape[1] if weights is None else weights
    z = [group_advantages(column, num_generations, unbiased=unbiased, eps=eps) for column in rewards.unbind(1)]
    y = sum(w_k * z_k for w_k, z_k in zip(w, z))
    y = torch.where(rewards.isfinite().any(dim=1), y, torch.nan)[None]
    A = torch.where(no_spread(y) | y.isnan(), 0, y / (nan_std(y, unbiased) + eps))
    return A[0]


def group_sizes(num_generations: GroupSizes, rewards: Tensor) -> list[int]:
    """How many completions each prompt has."""
    count = rewards.numel()
    if isinstance(num_generations, int):
        sizes = [num_generations] * (count // max(num_generations, 1))
    else:
        sizes = [int(size) for size in num_generations]
    if rewards.dim() != 1 or any(size < 1 for size in sizes) or sum(sizes) != count:
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)} do not divide into groups of "
            f"num_generations={num_generations}"
        )
    return sizes


def split_groups(rewards: Tensor, sizes: list[int]) -> Tensor:
    """(B,) → (P, the largest group's size): NaN where a group has no such completion, or it no finite reward."""
    known = torch.where(rewards.isfinite(), rewards, torch.nan)
    return torch.nn.utils.rnn.pad_sequence(known.split(sizes), batch_first=True, padding_value=torch.nan)


def of_completions(groups: Tensor, sizes: list[int]) -> Tensor:
    """(P, G), or (P, 1) for one value per group → (B,)."""
    return torch.cat([row.expand(max(sizes))[:size] for row, size in zip(groups, sizes)])


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
