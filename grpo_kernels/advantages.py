"""Group-relative advantages."""

import torch

from grpo_kernels.checks import check_rewards
from grpo_kernels.jit import jit, on_torch, tl


@jit
def standardise(reward, mean, spread, divisor):
    """(R − mean)/divisor; exactly 0 in a group without spread, and for a NaN reward."""
    return tl.where((spread > 0.0) & (reward == reward), (reward - mean) / divisor, 0.0)


@jit
def spread_of(square, count, low, high, UNBIASED: tl.constexpr):
    """Standard deviation from the sum of squared differences; exactly 0 where all of them are the same."""
    freedom = count - 1.0 if UNBIASED else count
    std = tl.sqrt(square / tl.where(freedom < 1.0, 1.0, freedom))
    return tl.where(high > low, std, 0.0)


def group_advantages(
    rewards: torch.Tensor,
    num_generations: int | None,
    *,
    scale_rewards: str = "group",
    unbiased: bool = True,
    eps: float = 1e-4,
    data_group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Group-relative advantages of the rewards of ``num_generations`` completions per prompt.

    ==========  ============================================  ==========================
    group       (R − mean_group)/(std_group + eps)            GRPO, arXiv:2402.03300
    batch       (R − mean_group)/(std_batch + eps)            TRL
    none        R − mean_group                                Dr. GRPO, arXiv:2503.20783
    ==========  ============================================  ==========================

    A NaN reward is left out of mean and std and gets advantage 0. A group whose rewards are all the
    same, or with one valid reward, gets exactly 0.

    Args:
        rewards: (B,), float; rows [k·G, (k+1)·G) belong to one prompt.
        num_generations: G, the completions per prompt; B must be a multiple of it.
        scale_rewards: ``"group"``, ``"batch"`` or ``"none"``, as in the table.
        unbiased: divide the variance by n − 1 (TRL), not n.
        eps: added to the standard deviation (TRL: 1e-4, verl: 1e-6).
        data_group: process group of data-parallel ranks, whose rewards all count for the batch's std.

    Returns:
        (B,) advantages, fp32 (fp64 for fp64 rewards), detached.

    Raises:
        ValueError: wrong shape, B not a multiple of G, G < 2 with ``"group"``, unknown ``scale_rewards``.
        TypeError: rewards that are not floating point.
    """
    check_rewards(rewards, num_generations, scale_rewards)
    rewards = rewards.detach()
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    batch_std = batch_spread(rewards, unbiased, data_group) if scale_rewards == "batch" else None
    return relative_advantages(rewards, num_generations, scale_rewards, unbiased, eps, batch_std)


def relative_advantages(rewards, num_generations, scale_rewards, unbiased, eps, batch_std=None) -> torch.Tensor:
    """`group_advantages` of checked arguments; ``batch_std``: as known, else that of these rewards."""
    if rewards.numel() == 0:
        return rewards.clone()
    groups = rewards.reshape(-1, num_generations)  # [B/G, G]
    mean, spread = moments(groups, unbiased)
    if scale_rewards == "none":
        divisor = torch.ones_like(spread)
    elif scale_rewards == "batch":
        divisor = (moments(rewards.reshape(1, -1), unbiased)[1] if batch_std is None else batch_std) + eps
    else:
        divisor = spread + eps
    return on_torch(standardise)(groups, mean, spread, divisor).reshape(-1)


def batch_spread(rewards: torch.Tensor, unbiased: bool, group) -> torch.Tensor | None:
    """The std of the rewards of all ranks [], as `moments` has it; None without a group."""
    if group is None:
        return None
    reduce = torch.distributed.all_reduce
    valid = rewards == rewards
    known = torch.where(valid, rewards, 0.0).double()
    totals = torch.stack([valid.sum(dtype=torch.float64), known.sum()])
    reduce(totals, group=group)
    count, mean = totals[0], totals[1] / totals[0].clamp(min=1.0)
    square = torch.where(valid, (known - mean).square(), 0.0).sum()
    reduce(square, group=group)
    ends = torch.stack([_largest(torch.where(valid, x, -torch.inf)) for x in (rewards, -rewards)])  # max, −min
    reduce(ends, torch.distributed.ReduceOp.MAX, group)
    return on_torch(spread_of)(square, count, -ends[1], ends[0], unbiased).to(rewards.dtype)


def _largest(x: torch.Tensor) -> torch.Tensor:
    """The largest entry [], −inf where a rank has none."""
    return x.amax() if x.numel() else x.new_full((), -torch.inf)


def moments(rows: torch.Tensor, unbiased: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of each row, [n, 1] each, NaN left out; std exactly 0 where all valid are the same."""
    valid = rows == rows
    count = valid.sum(-1, keepdim=True).to(rows.dtype)
    mean = torch.where(valid, rows, 0.0).sum(-1, keepdim=True) / count.clamp(min=1.0)
    square = torch.where(valid, (rows - mean).square(), 0.0).sum(-1, keepdim=True)
    high = torch.where(valid, rows, -torch.inf).amax(-1, keepdim=True)
    low = torch.where(valid, rows, torch.inf).amin(-1, keepdim=True)
    return mean, on_torch(spread_of)(square, count, low, high, unbiased)
