"""Group-relative advantages inside a launch: each program reads the few rewards that it needs."""

from grpo_kernels.objective.advantages import divisor_of, is_known, spread_of, standardise
from grpo_kernels.objective.language import jit, tl

TILE = tl.constexpr(32)  # one warp holds a tile, so that its sums need no barrier between warps


@jit
def reward_moments(rewards, n, UNBIASED: tl.constexpr):
    """(mean, std, count) of those of n rewards that are finite; std is exactly 0 where max == min or one is left."""
    at = tl.arange(0, TILE)
    count = tl.zeros([TILE], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    low = tl.full([TILE], float("inf"), tl.float32)
    high = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, n, TILE):
        r = tl.load(rewards + start + at, mask=start + at < n, other=float("nan")).to(tl.float32)
        valid = is_known(r)
        count += tl.where(valid, 1.0, 0.0)
        total += tl.where(valid, r, 0.0)
        low = tl.minimum(low, tl.where(valid, r, float("inf")))
        high = tl.maximum(high, tl.where(valid, r, float("-inf")))
    valid_count = tl.sum(count, axis=0)
    mean = tl.sum(total, axis=0) / tl.where(valid_count < 1.0, 1.0, valid_count)
    square = tl.zeros([TILE], tl.float32)
    for start in range(0, n, TILE):
        r = tl.load(rewards + start + at, mask=start + at < n, other=float("nan")).to(tl.float32)
        square += tl.where(is_known(r), (r - mean) * (r - mean), 0.0)
    lowest, highest = tl.min(low, axis=0), tl.max(high, axis=0)
    return mean, spread_of(tl.sum(square, axis=0), valid_count, lowest, highest, UNBIASED), valid_count


@jit
def group_advantage(rewards, groups, batch_std, seq, B, G, eps, SCALE: tl.constexpr, UNBIASED: tl.constexpr):
    """(advantage, std of what it was compared with) of sequence ``seq``; its group is rows [k·G, (k+1)·G).

    ``groups`` [2, B]: first row and size of its group, where they differ in size; size 0: it has none, and
    gets NaN. ``batch_std``: of `batch_std_kernel`, for SCALE "batch"; SCALE: of `divisor_of`.
    """
    first, size, nothing = seq // G * G, G, 0.0
    if groups is not None:
        first = tl.load(groups + seq).to(tl.int64)
        size = tl.load(groups + B + seq)
        nothing = tl.where(size == 0, float("nan"), 0.0)
    mean, spread, count = reward_moments(rewards + first, size, UNBIASED)
    scale = spread
    if SCALE == "batch":
        scale = tl.load(batch_std).to(tl.float32)
    reward = tl.load(rewards + seq).to(tl.float32)
    return standardise(reward, mean, spread, divisor_of(mean, scale, count, eps, SCALE)) + nothing, scale
