"""Per-token policy terms: value and derivatives, one small function each.

A term is ``(r, lp, A, c) -> (ℓ, ∂ℓ/∂r, ∂ℓ/∂lp)`` with

* ``r``   the log ratio ``log π_θ − log π_old`` of the ratio level (per token, or per sequence),
* ``lp``  the token's own log-probability ``log π_θ``,
* ``A``   the advantage,
* ``c``   the term's own coefficients, a NamedTuple of floats (infinity means "off").

There are two derivatives because a sequence level spreads ``∂ℓ/∂r`` over the sequence while
``∂ℓ/∂lp`` stays on its token. A second function ``(r, A, c) -> (low, high)`` marks where a term
limits the ratio, for the clip metrics.

The same bodies run inside the kernels and on torch tensors (`grpo_kernels.jit`). They choose with
comparisons and ``where``, never with ``tl.minimum``/``tl.maximum``, which drop NaN on hardware.
Every term must give exactly 0 for A = 0, whatever the ratio.
"""

from typing import NamedTuple

from grpo_kernels.jit import jit, tl


class Clip(NamedTuple):
    """Coefficients of `clipped`: the closed interval [lo, hi] of ρ, and δ, the cap of its free branch."""

    lo: float
    hi: float
    delta: float


@jit
def clipped(r, lp, A, c):
    """Clipped surrogate: ℓ = −min(ρ'A, clip(ρ, lo, hi)·A) with ρ = exp r and ρ' = min(ρ, δ).

    The gradient is that of the branch the min takes, the first on a tie; bounds are closed.
    PPO, arXiv:1707.06347; clip-higher: DAPO, arXiv:2503.14476; δ: INTELLECT-2, arXiv:2505.07291.
    """
    ratio = tl.exp(r)
    live = A != 0.0  # else inf · 0 is NaN
    free = tl.where(live, tl.where(ratio > c.delta, c.delta, ratio) * A, 0.0)
    clip = tl.where(live, tl.where(ratio < c.lo, c.lo, tl.where(ratio > c.hi, c.hi, ratio)) * A, 0.0)
    take_free = free <= clip
    free_slope = live & take_free & (ratio <= c.delta)
    clip_slope = live & (free > clip) & (ratio >= c.lo) & (ratio <= c.hi)
    slope = tl.where(free_slope | clip_slope, -ratio * A, 0.0)
    return -tl.where(take_free, free, clip), slope, 0.0


@jit
def clipped_region(r, A, c):
    """1 where the ratio is below, or above, the interval and the advantage pushes it further out."""
    ratio = tl.exp(r)
    ratio = tl.where(ratio > c.delta, c.delta, ratio)
    low = tl.where((ratio < c.lo) & (A < 0.0), 1.0, 0.0)
    high = tl.where((ratio > c.hi) & (A > 0.0), 1.0, 0.0)
    return low, high
