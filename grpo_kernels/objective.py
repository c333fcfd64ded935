"""From a token's log-probability to its loss and derivative: the assembly every backend shares.

    ℓ_policy = term(r, A) · is_weight,    ℓ = ℓ_policy + β · kl,    loss = Σ w · ℓ − Σ w_H · H

The weights w and w_H are known before the loss (`grpo_kernels.weights`), so a kernel that has ∂ℓ/∂lp
can write the final gradient at once.
"""

from grpo_kernels.jit import jit, tl


@jit
def weight(count, factor, scale):
    """A reduction's weight: factor · scale / max(count, 1). ``count`` and ``scale`` may be None (1)."""
    w = factor
    if scale is not None:
        w = w * scale
    if count is not None:
        w = w / tl.where(count < 1.0, 1.0, count)
    return w


@jit
def log_ratio(lp, old):
    """r = lp − old. Without old log-probabilities old = lp, detached: 0 with a gradient (NaN stays)."""
    if old is not None:
        return lp - old
    else:
        return tl.where(lp == lp, 0.0, lp)


@jit
def token_objective(r, lp, ref, A, is_weight, beta, c, TERM: tl.constexpr, KL: tl.constexpr):
    """One token: (ℓ_policy, kl, ∂ℓ/∂r, ∂ℓ/∂lp), the derivatives those of ℓ = ℓ_policy + β·kl.

    ``ref`` and ``is_weight`` may be None; ``KL`` is None where β = 0.
    """
    policy, d_ratio, d_lp = TERM(r, lp, A, c)
    if is_weight is not None:
        policy = policy * is_weight
        d_ratio = d_ratio * is_weight
        d_lp = d_lp * is_weight
    # A term chooses by comparisons, which NaN answers with "no": pass it on explicitly.
    bad = (r != r) | (lp != lp) | (A != A)
    poison = r + lp + A
    policy = tl.where(bad, poison, policy)
    d_ratio = tl.where(bad, poison, d_ratio)
    kl = tl.where(bad, poison, 0.0)
    if KL is not None:
        kl, d_kl = KL(ref - lp)
        d_lp = d_lp + beta * d_kl
    return policy, kl, d_ratio, d_lp
