"""Small kernels over the rewards: where each row's group lies, and the spread of the whole batch."""

from grpo_kernels.objective.language import tl
from grpo_kernels.triton_backend.rewards import TILE, reward_moments
from grpo_kernels.triton_backend.row_kernels import kernel


@kernel
def groups_kernel(sizes, groups, B, n):
    """One program per group: first row and size, at each of its rows; out: [2, B].

    A group that does not lie within the B rows has size 0, and so have rows that are left after the last.
    """
    group = tl.program_id(0)
    at = tl.arange(0, TILE)
    before = tl.zeros([TILE], tl.int64)
    for start in range(0, group, TILE):
        before += tl.load(sizes + start + at, mask=start + at < group, other=0).to(tl.int64)
    first = tl.sum(before, axis=0)
    size = tl.load(sizes + group).to(tl.int64)
    last = first + size
    if (first < 0) | (last > B):
        size = size * 0
    begin = tl.minimum(tl.maximum(first, 0), B)
    end = tl.where(group == n - 1, B, tl.minimum(last, B))
    for start in range(begin, end, TILE):
        row = start + at
        here = row < last
        tl.store(groups + row, tl.where(here & (size > 0), first, row).to(tl.int32), mask=row < end)
        tl.store(groups + B + row, tl.where(here, size, 0).to(tl.int32), mask=row < end)


@kernel
def batch_std_kernel(rewards, std, B, UNBIASED: tl.constexpr):
    """One program: the spread of all rewards, `grpo_kernels.objective.advantages.batch_spread`."""
    _, spread, _ = reward_moments(rewards, B, UNBIASED)
    tl.store(std, spread)
