"""Group-relative advantages of checked rewards, on torch tensors and in kernels."""

from collections.abc import Sequence

import torch

from grpo_kernels.objective.language import jit, on_torch, tl

# Advantage estimator -> what it divides R − mean by, see `divisor_of`; "": what `scale_rewards` says.
ESTIMATORS = {"group": "", "rloo": "others", "maxrl": "mean", "gdpo": "none"}


def divisor_name(estimator: str, scale_rewards: str) -> str:
    return ESTIMATORS[estimator] or scale_rewards


@jit
def is_known(reward):
    """Whether a reward counts: it is neither NaN nor infinite."""
    return tl.abs(reward) < float("inf")


@jit
def standardise(reward, mean, spread, divisor):
    """(R − mean)/divisor; exactly 0 in a group without spread, and for a reward that is not finite."""
    return tl.where((spread > 0.0) & is_known(reward), (reward - mean) / divisor, 0.0)


@jit
def divisor_of(mean, spread, count, eps, HOW: tl.constexpr):
    """What R − mean is divided by: 1, the spread, the mean, or (n − 1)/n, which leaves the mean of the n − 1 others."""
    if HOW == "none":
        return 1.0
    elif HOW == "mean":
        return mean + 1e-6
    elif HOW == "others":
        return tl.where(count < 2.0, 1.0, (count - 1.0) / count)
    else:
        return spread + eps


@jit
def spread_of(square, count, low, high, UNBIASED: tl.constexpr):
    """Standard deviation from the sum of squared differences; exactly 0 where all of them are the same."""
    freedom = count - 1.0 if UNBIASED else count
    std = tl.sqrt(square / tl.where(freedom < 1.0, 1.0, freedom))
    return tl.where(high > low, std, 0.0)


def group_sizes(num_generations: int | Sequence[int] | torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """The sizes as a tensor on the device of ``like``; None for one number.

    A list goes to a GPU in one small copy from pinned memory; the host does not wait for it.
    """
    if isinstance(num_generations, torch.Tensor):
        if num_generations.device == like.device:
            return num_generations
        num_generations = num_generations.tolist()  # a CPU tensor: the host waits for no device
    elif not isinstance(num_generations, (list, tuple)):
        return None
    sizes = torch.tensor([int(size) for size in num_generations], dtype=torch.int32, device="cpu")
    if like.is_cuda and not torch.compiler.is_compiling():
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a CUDA graph would keep a list of group sizes as it is, and read it from host memory that is gone by "
                "then: pass num_generations as a tensor on the device."
            )
        sizes = sizes.pin_memory()
    return sizes.to(like.device, non_blocking=True)


def group_rows(sizes: torch.Tensor, B: int) -> torch.Tensor:
    """(2, B) int32: first row and size of each row's group; size 0 where that does not lie within the B rows."""
    ends = sizes.cumsum(0)
    at = torch.arange(B, device=sizes.device)
    group = torch.searchsorted(ends, at, right=True).clamp(max=sizes.shape[0] - 1)
    size, end = sizes.long()[group], ends[group]
    first = end - size
    fits = (first >= 0) & (first <= at) & (at < end) & (end <= B)
    return torch.stack([torch.where(fits, first, at), torch.where(fits, size, 0)]).int()


def relative_advantages(rewards, size: int, groups, divisor: str, unbiased, eps, batch_std) -> torch.Tensor:
    """(B,), see `grpo_kernels.group_advantages`.

    Args:
        size: of every group, where ``groups`` is None.
        groups: (2, B), see `group_rows`.
        divisor: of `divisor_name`.
        batch_std: of `batch_spread`, where that is ``"batch"``.
    """
    if rewards.numel() == 0:
        return rewards.clone()
    mean, spread, count = group_moments(rewards, size, groups, unbiased)
    by = on_torch(divisor_of)(mean, batch_std if divisor == "batch" else spread, count, eps, divisor)
    advantages = on_torch(standardise)(rewards, mean, spread, by)
    return advantages if groups is None else torch.where(groups[1] == 0, torch.nan, advantages)


def weighted_sum(rewards: torch.Tensor, weights: Sequence[float] | torch.Tensor | None) -> torch.Tensor:
    """(B,) of (B, K): of the rewards that are known; NaN where none is. (B,) stays as it is."""
    if rewards.dim() == 1:
        return rewards
    known = rewards.isfinite()
    columns = torch.where(known, rewards, 0.0).unbind(1)
    total = sum(weight * column for weight, column in zip(_weights(weights, len(columns)), columns))
    return torch.where(known.any(1), total, torch.nan)


def _weights(weights: Sequence[float] | torch.Tensor | None, K: int):
    """K numbers, or 0-d tensors: no list goes to the device."""
    return (1.0,) * K if weights is None else weights


def normalised_sum(rewards, weights, size: int, groups, unbiased: bool, eps: float, data_group) -> torch.Tensor:
    """(B,) of (B, K), or of (B,) as K = 1: each reward is normalised in its group, and their sum in the batch. GDPO.

    The sum's mean is 0, as what is normalised adds up to 0 in each group. It is not subtracted: its rounding would make
    an advantage of a group without spread.
    """
    rewards = rewards if rewards.dim() == 2 else rewards[:, None]
    columns, known, total = rewards.unbind(1), on_torch(is_known)(rewards).any(1), 0.0
    for weight, column in zip(_weights(weights, len(columns)), columns):
        mean, spread, _ = group_moments(column, size, groups, unbiased)
        total = total + weight * on_torch(standardise)(column, mean, spread, spread + eps)
    if groups is not None:
        known = known & (groups[1] != 0)
    total = torch.where(known, total, torch.nan)
    spread = batch_spread(total, unbiased, data_group)
    advantages = on_torch(standardise)(total, 0.0, spread, spread + eps)
    return advantages if groups is None else torch.where(groups[1] == 0, torch.nan, advantages)


def group_moments(rewards, size: int, groups, unbiased: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, std, how many are finite) of each row's group, (B,) each; see `moments`."""
    if groups is None:
        return tuple(x.expand(-1, size).reshape(-1) for x in moments(rewards.reshape(-1, size), unbiased))
    first, count = groups.long()
    starts = torch.where(first == torch.arange(len(first), device=first.device), count, 0)  # a size, at its first row
    offsets = torch.nn.functional.pad(starts.cumsum(0), (1, 0)).clamp(max=len(first))
    valid = on_torch(is_known)(rewards)

    def over_groups(x: torch.Tensor, how: str, nothing: float) -> torch.Tensor:
        x = torch.where(valid, x, nothing)
        return torch.segment_reduce(x, how, offsets=offsets, initial=nothing, unsafe=True)[first]

    known = over_groups(torch.ones_like(rewards), "sum", 0.0)
    mean = over_groups(rewards, "sum", 0.0) / known.clamp(min=1.0)
    square = over_groups((rewards - mean).square(), "sum", 0.0)
    low, high = over_groups(rewards, "min", torch.inf), over_groups(rewards, "max", -torch.inf)
    return mean, on_torch(spread_of)(square, known, low, high, unbiased), known


def batch_spread(rewards: torch.Tensor, unbiased: bool, group=None) -> torch.Tensor:
    """The std of these rewards [], or of those of all ranks of a process group, as `moments` has it; 0 of none."""
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    if group is None:
        return moments(rewards.view(1, -1), unbiased)[1][0, 0] if rewards.numel() else rewards.new_zeros(())
    reduce = torch.distributed.all_reduce
    valid = on_torch(is_known)(rewards)
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


def moments(rows: torch.Tensor, unbiased: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, std, count) of each row, [n, 1] each, of what is finite; std exactly 0 where all of that is the same."""
    valid = on_torch(is_known)(rows)
    count = valid.sum(-1, keepdim=True).to(rows.dtype)
    mean = torch.where(valid, rows, 0.0).sum(-1, keepdim=True) / count.clamp(min=1.0)
    square = torch.where(valid, (rows - mean).square(), 0.0).sum(-1, keepdim=True)
    high = torch.where(valid, rows, -torch.inf).amax(-1, keepdim=True)
    low = torch.where(valid, rows, torch.inf).amin(-1, keepdim=True)
    return mean, on_torch(spread_of)(square, count, low, high, unbiased), count
