"""Per-token policy terms: value and derivatives, one small function each.

A term is ``(r, lp, old, A, c) -> (ℓ, ∂ℓ/∂r, ∂ℓ/∂lp)`` with

* ``r``    the log ratio of the ratio level (of the token, or of the sequence), or the term's own
           statistic of the sequence where it has one,
* ``lp``   the token's own log-probability ``log π_θ``,
* ``old``  the token's ``log π_old``; on-policy it is ``lp``, detached,
* ``A``    the advantage,
* ``c``    the term's own coefficients, a NamedTuple of floats (infinity means "off").

There are two derivatives because a sequence level spreads ``∂ℓ/∂r`` over the sequence while
``∂ℓ/∂lp`` stays on its token. Beside most terms stands a region, ``(r_hat, r, lp, old, A, c) ->
(low, high, cap)``: where it limits the ratio, for the metrics; ``r_hat`` is the level's log ratio.
A statistic ``(r, A, c) -> (x, ∂x/∂r)`` is summed or averaged over the sequence's tokens, and what
``(importance weight) -> y`` adds to it likewise. What ``(r, c) -> (x, log₂ γ)`` says of a token is summed with all that
follow it in its sequence, x of the k-th after it times γ^k: its future. ``(future, r, A, c) -> (W, keep)`` makes a
factor of it for the loss of the token, detached, and 0 where that was held back, for the metrics.

The same bodies run inside the kernels and on torch tensors (`grpo_kernels.objective.language`). They choose with
comparisons and ``where``, never with ``tl.minimum``/``tl.maximum``, which drop NaN on hardware.
A policy gradient must be exactly 0 for A = 0, whatever the ratio.
"""

from typing import NamedTuple

from grpo_kernels.objective.language import jit, tl


class Clip(NamedTuple):
    """The closed interval [lo, hi] of ρ, δ (cap of the free branch) and the dual clip c."""

    lo: float
    hi: float
    delta: float
    dual: float


@jit
def clip_bounds(A, c):
    """(floor, ceiling) of ρ: lo ≤ 1 ≤ hi and dual > 1 make one interval of the min, δ and the dual clip.

    A > 0: min(ρ', clip(ρ)) = min(ρ, δ, hi). A < 0: max(ρ', clip(ρ)) = max(lo, min(ρ, max(δ, hi))), at most
    dual. For A = 0 any finite ceiling will do, so that it is a number that A is multiplied with.
    """
    gain = A >= 0.0
    outer = tl.where(c.delta > c.hi, c.delta, c.hi)
    ceiling = tl.where(gain, tl.where(c.delta < c.hi, c.delta, c.hi), tl.where(outer < c.dual, outer, c.dual))
    return tl.where(gain, -1.0, c.lo), ceiling


@jit
def clipped(r, lp, old, A, c):
    """Clipped surrogate: ℓ = −min(ρ'A, clip(ρ, lo, hi)·A) with ρ = exp r and ρ' = min(ρ, δ).

    For A < 0 the dual clip bounds it: ℓ = min(ℓ, −c·A). The gradient is that of the branch the min
    takes, the first on a tie; bounds are closed. PPO, arXiv:1707.06347; clip-higher: DAPO,
    arXiv:2503.14476; δ: INTELLECT-2, arXiv:2505.07291; dual clip: arXiv:1912.09729.
    """
    ratio = tl.exp(r)
    floor, ceiling = clip_bounds(A, c)
    below = ratio < floor
    above = ratio > ceiling
    value = tl.where(above, ceiling, tl.where(below, floor, ratio)) * -A
    return value, tl.where(below | above, 0.0, value), 0.0


@jit
def clipped_region(r_hat, r, lp, old, A, c):
    """Below, or above, the interval with the advantage pushing further out; held by the dual clip."""
    ratio = tl.exp(r)
    pushed_up, pushed_down = A > 0.0, A < 0.0
    outer = tl.where(c.delta > c.hi, c.delta, c.hi)
    high = tl.where(c.delta > c.hi, (ratio > c.hi) & pushed_up, False)
    return (ratio < c.lo) & pushed_down, high, tl.where(outer > c.dual, (ratio > c.dual) & pushed_down, False)


@jit
def weighted_logp(factor, lp, A):
    """ℓ = −sg[factor]·A·lp, which has a gradient by lp alone."""
    live = A != 0.0
    return tl.where(live, -factor * A * lp, 0.0), 0.0, tl.where(live, -factor * A, 0.0)


@jit
def up(r, lp, old, A, c):
    """A > 0: ℓ = −A·exp(lp − sg[lp]), of value −A, no clip, no old policy; else clipped. UP-GRPO, arXiv:2607.06987."""
    gain = A > 0.0
    value, slope, _ = clipped(r, lp, old, A, c)
    return tl.where(gain, -A, value), tl.where(gain, 0.0, slope), tl.where(gain, -A, 0.0)


@jit
def up_region(r_hat, r, lp, old, A, c):
    """As clipped where A ≤ 0; no other token is held."""
    low, _, cap = clipped_region(r_hat, r, lp, old, A, c)
    return low, 0.0, cap


class Fipo(NamedTuple):
    """Those of `Clip`; the bounds [least, most] of W; the ρ from which W may not reward; log₂ γ."""

    lo: float
    hi: float
    delta: float
    dual: float
    least: float
    most: float
    threshold: float
    log2_decay: float


@jit
def fipo_future(r, c):
    """What a token adds to its suffix's sum: r·[ρ ≤ δ]."""
    return tl.where(tl.exp(r) > c.delta, 0.0, r), c.log2_decay


@jit
def fipo_influence(future, r, A, c):
    """W = clamp(exp F, least, most), within [0.8, 1] where A < 0 and ρ > threshold; and 0 there, else 1."""
    raw = tl.exp(future)
    weight = tl.where(raw < c.least, c.least, tl.where(raw > c.most, c.most, raw))
    held = tl.where(weight < 0.8, 0.8, tl.where(weight > 1.0, 1.0, weight))
    unsafe = (A < 0.0) & (tl.exp(r) > c.threshold)
    return tl.where(unsafe, held, weight), tl.where(unsafe, 0.0, 1.0)


class NoCoefficients(NamedTuple):
    """A term without coefficients; a kernel argument cannot be an empty tuple."""

    unused: float = 0.0


@jit
def reinforce(r, lp, old, A, c):
    """ℓ = −A·lp. REINFORCE; verl calls it gpg."""
    return weighted_logp(1.0, lp, A)


class Cispo(NamedTuple):
    """Raw bounds of ρ."""

    lo: float
    hi: float


@jit
def cispo(r, lp, old, A, c):
    """ℓ = −sg[clip(ρ, lo, hi)]·A·lp: no token loses its gradient. MiniMax-M1, arXiv:2506.13585."""
    ratio = tl.exp(r)
    return weighted_logp(tl.where(ratio < c.lo, c.lo, tl.where(ratio > c.hi, c.hi, ratio)), lp, A)


@jit
def cispo_region(r_hat, r, lp, old, A, c):
    """The ratio is above its bound and the advantage positive."""
    return 0.0, tl.where((tl.exp(r) > c.hi) & (A > 0.0), 1.0, 0.0), 0.0


class Sapo(NamedTuple):
    """Temperatures of the gate, for A > 0 and for the rest."""

    pos: float
    neg: float


@jit
def sapo(r, lp, old, A, c):
    """ℓ = −A·σ(τ(ρ − 1))·4/τ: a soft gate instead of a clip. SAPO, arXiv:2511.20347."""
    ratio = tl.exp(r)
    steep = tl.where(A > 0.0, c.pos, c.neg)
    z = steep * (ratio - 1.0)
    gate = 1.0 / (1.0 + tl.exp(-z))
    tail = 1.0 / (1.0 + tl.exp(z))
    slope = tl.where((A == 0.0) | (tail == 0.0), 0.0, -4.0 * A * ratio * gate * tail)  # ρ = inf: 0
    return tl.where(A == 0.0, 0.0, -A * gate * 4.0 / steep), slope, 0.0


class Vespo(NamedTuple):
    """Exponents k and rates λ of φ, for A ≥ 0 and for A < 0."""

    k_pos: float
    lambda_pos: float
    k_neg: float
    lambda_neg: float


@jit
def vespo_statistic(r, A, c):
    """A token's part of log w; detached."""
    return tl.where(r < -20.0, -20.0, tl.where(r > 20.0, 20.0, r)), 0.0


@jit
def vespo_correction(weight):
    """What an importance weight adds to log w: its logarithm, within [log 1e-8, 20]."""
    x = tl.log(weight)
    return tl.where(x < -18.420680743952367, -18.420680743952367, tl.where(x > 20.0, 20.0, x))


@jit
def vespo_phi(r, A, c):
    """φ = exp(λ + k·log w − λ·w), log w the statistic, within [log 1e-8, 20]; inf and NaN count 0."""
    log_w = tl.where(r < -18.420680743952367, -18.420680743952367, tl.where(r > 20.0, 20.0, r))
    k = tl.where(A >= 0.0, c.k_pos, c.k_neg)
    rate = tl.where(A >= 0.0, c.lambda_pos, c.lambda_neg)
    phi = tl.exp(rate + k * log_w - rate * tl.exp(log_w))
    return tl.where(phi < float("inf"), phi, 0.0)


@jit
def vespo(r, lp, old, A, c):
    """ℓ = −sg[φ]·A·lp, φ a soft weight of the sequence's ratio. VESPO, arXiv:2602.10693."""
    return weighted_logp(vespo_phi(r, A, c), lp, A)


@jit
def vespo_region(r_hat, r, lp, old, A, c):
    return 0.0, vespo_phi(r, A, c), 0.0


class Gmpo(NamedTuple):
    """Bounds of the token's log ratio, both above 0."""

    low: float
    high: float


@jit
def gmpo_statistic(r, A, c):
    """δ = sgn A·min(sgn A·r, sgn A·clamp(r, −ε_low, ε_high)) and its slope."""
    held = ((A > 0.0) & (r > c.high)) | ((A < 0.0) & (r < -c.low))
    bound = tl.where(A > 0.0, c.high, -c.low)
    return tl.where(A == 0.0, 0.0, tl.where(held, bound, r)), tl.where(held | (A == 0.0), 0.0, 1.0)


@jit
def gmpo_correction(weight):
    return tl.log(weight)


@jit
def gmpo(r, lp, old, A, c):
    """ℓ = −A·exp(r), r the mean over the sequence of δ + log is. GMPO, arXiv:2507.20673."""
    value = tl.where(A == 0.0, 0.0, -A * tl.exp(r))
    return value, value, 0.0


@jit
def gmpo_region(r_hat, r, lp, old, A, c):
    low = tl.where((r_hat < -c.low) & (A < 0.0), 1.0, 0.0)
    return low, tl.where((r_hat > c.high) & (A > 0.0), 1.0, 0.0), 0.0


class Dppo(NamedTuple):
    """Bounds of the divergence for A ≤ 0 and A > 0, and the cap of ρ."""

    low: float
    high: float
    cap: float


@jit
def dppo_tv_keep(lp, old, A, c):
    """Keep a token whose probability has not moved by more than ε where its advantage pushes it."""
    moved = tl.exp(lp) - tl.exp(old)
    return tl.where(A > 0.0, moved <= c.high, moved >= -c.low)


@jit
def dppo_kl_keep(lp, old, A, c):
    """The same with the KL of the two-point distribution {token, rest}, whichever way it has moved."""
    p = tl.exp(lp)
    p_old = tl.exp(old)
    gone = tl.where(p_old == 0.0, 0.0, p_old * (old - lp))  # −inf · 0
    kl = gone + (1.0 - p_old) * tl.log((1.0 - p_old + 1e-8) / (1.0 - p + 1e-8))
    return tl.where(A > 0.0, (kl <= c.high) | (p <= p_old), (kl <= c.low) | (p >= p_old))


@jit
def dppo_factor(r, keep, c):
    ratio = tl.exp(r)
    return tl.where(keep, tl.where(ratio > c.cap, c.cap, ratio), 0.0)


@jit
def dppo_region_of(r, keep, A, c):
    low = tl.where((A > 0.0) | keep, 0.0, 1.0)
    high = tl.where((A > 0.0) & (keep == 0), 1.0, 0.0)
    return low, high, tl.where(keep & (tl.exp(r) > c.cap), 1.0, 0.0)


@jit
def dppo_tv(r, lp, old, A, c):
    """ℓ = −A·sg[min(ρ, c)·keep]·lp, keep by total variation. DPPO, arXiv:2602.04879."""
    return weighted_logp(dppo_factor(r, dppo_tv_keep(lp, old, A, c), c), lp, A)


@jit
def dppo_tv_region(r_hat, r, lp, old, A, c):
    return dppo_region_of(r, dppo_tv_keep(lp, old, A, c), A, c)


@jit
def dppo_kl(r, lp, old, A, c):
    """ℓ = −A·sg[min(ρ, c)·keep]·lp, keep by binary KL. DPPO, arXiv:2602.04879."""
    return weighted_logp(dppo_factor(r, dppo_kl_keep(lp, old, A, c), c), lp, A)


@jit
def dppo_kl_region(r_hat, r, lp, old, A, c):
    return dppo_region_of(r, dppo_kl_keep(lp, old, A, c), A, c)


@jit
def topr(r, lp, old, A, c):
    """ℓ = −A·lp for A > 0, else −sg[min(ρ, 1)]·A·lp: tapered off-policy REINFORCE, arXiv:2503.14286."""
    ratio = tl.exp(r)
    return weighted_logp(tl.where((A > 0.0) | (ratio > 1.0), 1.0, ratio), lp, A)


@jit
def topr_region(r_hat, r, lp, old, A, c):
    return 0.0, tl.where((A < 0.0) & (tl.exp(r) > 1.0), 1.0, 0.0), 0.0


class Dro(NamedTuple):
    beta: float


@jit
def dro(r, lp, old, A, c):
    """ℓ = −A·lp + ½β·r²; the second part does not vanish with A. DRO, arXiv:2405.19107."""
    value, _, slope = weighted_logp(1.0, lp, A)
    return value + 0.5 * c.beta * r * r, c.beta * r, slope


@jit
def no_region(r_hat, r, lp, old, A, c):
    return 0.0, 0.0, 0.0
