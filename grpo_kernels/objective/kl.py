"""KL estimators: ``(u, limits, CLAMPED) -> (value, ∂value/∂ log π_θ)`` with ``u = log π_ref − log π_θ``.

The estimators are those of John Schulman's note "Approximating KL Divergence". Where CLAMPED,
``limits.u`` holds u and ``limits.kl`` the value, and the gradient is 0 beyond, as verl has it for k3.
"""

from grpo_kernels.objective.language import jit, tl


@jit
def between(x, bound, CLAMPED: tl.constexpr):
    """x within ±bound. NaN, which fails every comparison, stays."""
    if CLAMPED:
        return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
    else:
        return x


@jit
def limited(u, value, slope, limits, CLAMPED: tl.constexpr):
    if CLAMPED:
        beyond = (value > limits.kl) | (value < -limits.kl) | (u > limits.u) | (u < -limits.u)
        return between(value, limits.kl, CLAMPED), tl.where(beyond, 0.0, slope)
    else:
        return value, slope


@jit
def k1(u, limits, CLAMPED: tl.constexpr):
    """k1 = −u: unbiased, of high variance, and can be negative."""
    return limited(u, -between(u, limits.u, CLAMPED), tl.where(u == u, 1.0, u), limits, CLAMPED)


@jit
def absolute(u, limits, CLAMPED: tl.constexpr):
    """|u|: biased."""
    sign = tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, u))
    return limited(u, tl.abs(between(u, limits.u, CLAMPED)), -sign, limits, CLAMPED)


@jit
def k2(u, limits, CLAMPED: tl.constexpr):
    """k2 = ½u²: biased, of low variance; its gradient is that of the KL."""
    inside = between(u, limits.u, CLAMPED)
    return limited(u, 0.5 * inside * inside, -u, limits, CLAMPED)


@jit
def k3(u, limits, CLAMPED: tl.constexpr):
    """k3 = eᵘ − u − 1: unbiased, of low variance, never negative."""
    inside = between(u, limits.u, CLAMPED)
    growth = tl.exp(inside)
    return limited(u, growth - inside - 1.0, 1.0 - growth, limits, CLAMPED)


@jit
def k1_plus(u, limits, CLAMPED: tl.constexpr):
    """The value of k1 with the gradient of k2, which is that of the KL (straight-through)."""
    return k1(u, limits, CLAMPED)[0], -u


@jit
def k3_plus(u, limits, CLAMPED: tl.constexpr):
    """The value of k3 with the gradient of k2, which is that of the KL (straight-through)."""
    return k3(u, limits, CLAMPED)[0], -u
