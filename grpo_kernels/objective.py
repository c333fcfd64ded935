"""From a token's log-probability to its loss and derivative: the assembly every backend shares.

    ℓ_policy = term(r, A) · is_weight,    ℓ = ℓ_policy + β · kl,    loss = Σ w · ℓ − Σ w_H · H

The weights w and w_H are known before the loss (`grpo_kernels.weights`), so a kernel that has ∂ℓ/∂lp
can write the final gradient at once.
"""

from grpo_kernels.jit import jit, tl


@jit
def weight(count, factor, scale):
    """A reduction's weight: factor · scale / max(count, 1)."""
    return factor * scale / tl.where(count < 1.0, 1.0, count)


@jit
def log_ratio(lp, old):
    """r = lp − old; 0 where they are the same, −inf included. On-policy old is lp, detached. NaN stays."""
    return tl.where(lp == old, 0.0, lp - old)


@jit
def token_objective(r, lp, ref, A, is_weight, beta, c, TERM: tl.constexpr, KL: tl.constexpr):
    """One token: (ℓ_policy, kl, ∂ℓ/∂r, ∂ℓ/∂lp), the derivatives those of ℓ = ℓ_policy + β·kl.

    ``KL`` is None where β = 0.
    """
    policy, d_ratio, d_lp = TERM(r, lp, A, c)
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
