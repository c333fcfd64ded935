"""KL estimators: ``u = log π_ref − log π_θ -> (value, ∂value/∂ log π_θ)``, one small function each.

The estimators are those of John Schulman's note "Approximating KL Divergence".
"""

from grpo_kernels.jit import jit, tl


@jit
def k1(u):
    """k1 = −u: unbiased, of high variance, and can be negative."""
    return -u, tl.where(u == u, 1.0, u)


@jit
def k2(u):
    """k2 = ½u²: biased, of low variance; its gradient is that of the KL."""
    return 0.5 * u * u, -u


@jit
def k3(u):
    """k3 = eᵘ − u − 1: unbiased, of low variance, never negative."""
    growth = tl.exp(u)
    return growth - u - 1.0, 1.0 - growth
