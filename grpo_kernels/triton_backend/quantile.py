"""The entropy threshold from sorted entropies, by bisection: one small program."""

from grpo_kernels.objective.language import jit, tl
from grpo_kernels.objective.quantile import interpolated, rank_of
from grpo_kernels.triton_backend.row_kernels import kernel


@jit
def first_at_least(values, n, x):
    """Index of the first of n ascending values that is not below x; NaN, which sorts last, is not below."""
    low = tl.zeros([], tl.int64)
    high = n.to(tl.int64)
    for _ in range(0, 48):
        middle = (low + high) // 2
        open = low < high
        below = tl.load(values + middle, mask=open, other=0.0) < x
        low = tl.where(open & below, middle + 1, low)
        high = tl.where(open & (below == 0), middle, high)
    return low


@kernel
def threshold_kernel(ordered, everywhere, value, kept, n, n_everywhere, q: tl.float32):
    """`grpo_kernels.objective.quantile.threshold`, its value and count."""
    last = first_at_least(everywhere, n_everywhere, float("inf")) - 1
    rank = rank_of(last, (last.to(tl.float32) * q).to(tl.float64), last.to(tl.float64) * q)
    below = tl.floor(rank)
    start = tl.load(everywhere + below.to(tl.int64))
    end = tl.load(everywhere + tl.ceil(rank).to(tl.int64))
    part = (rank - below).to(tl.float32)
    found = interpolated(start, end, part)
    tl.store(value, found)
    finite = first_at_least(ordered, n, float("inf"))
    tl.store(kept, (finite - first_at_least(ordered, n, found)).to(tl.float32))
