"""KL estimators: ``(u, limits) -> (value, ∂value/∂ log π_θ)`` with ``u = log π_ref − log π_θ``.

The estimators are those of John Schulman's note "Approximating KL Divergence". ``limits.u`` holds u
and ``limits.kl`` the value, and the gradient is 0 beyond, as verl has it for k3; both may be infinite.
"""

from grpo_kernels.jit import jit, tl


@jit
def between(x, bound):
    """x within ±bound. NaN, which fails every comparison, stays."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@jit
def limited(u, value, slope, limits):
    beyond = (value > limits.kl) | (value < -limits.kl) | (u > limits.u) | (u < -limits.u)
    return between(value, limits.kl), tl.where(beyond, 0.0, slope)


@jit
def k1(u, limits):
    """k1 = −u: unbiased, of high variance, and can be negative."""
    return limited(u, -between(u, limits.u), tl.where(u == u, 1.0, u), limits)


@jit
def absolute(u, limits):
    """|u|: biased."""
    sign = tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, u))
    return limited(u, tl.abs(between(u, limits.u)), -sign, limits)


@jit
def k2(u, limits):
    """k2 = ½u²: biased, of low variance; its gradient is that of the KL."""
    inside = between(u, limits.u)
    return limited(u, 0.5 * inside * inside, -u, limits)


@jit
def k3(u, limits):
    """k3 = eᵘ − u − 1: unbiased, of low variance, never negative."""
    inside = between(u, limits.u)
    growth = tl.exp(inside)
    return limited(u, growth - inside - 1.0, 1.0 - growth, limits)


@jit
def k1_plus(u, limits):
    """The value of k1 with the gradient of k2, which is that of the KL (straight-through)."""
    return k1(u, limits)[0], -u


@jit
def k3_plus(u, limits):
    """The value of k3 with the gradient of k2, which is that of the KL (straight-through)."""
    return k3(u, limits)[0], -u
