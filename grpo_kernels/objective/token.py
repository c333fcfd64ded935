"""From a token's log-probability to its loss and derivatives: the assembly every backend shares.

    ℓ_policy = term(ρ, A) · trust,    ℓ = ℓ_policy + β · kl,    loss = Σ w · ℓ − Σ w_H · H

``trust`` is the product of importance weight, off-policy mask and entropy mask. The weights w and
w_H are known before the loss (`grpo_kernels.objective.aggregations`), so a kernel that has ∂ℓ/∂lp can write the
final gradient at once.
"""

from typing import NamedTuple

from grpo_kernels.objective.language import jit, tl


class Limits(NamedTuple):
    """Bounds of the level's log ratio, of the KL's u and of its value; infinite: off."""

    low: float
    high: float
    u: float
    kl: float


@jit
def weight(count, factor):
    """A reduction's weight: factor / max(count, 1)."""
    return factor / tl.where(count < 1.0, 1.0, count)


@jit
def log_ratio(lp, old):
    """r = lp − old; 0 where they are the same, −inf included. On-policy old is lp, detached. NaN stays."""
    return tl.where(lp == old, 0.0, lp - old)


@jit
def limited_ratio(r, limits, LIMITED: tl.constexpr):
    """(r within the limits, 1 where its gradient survives else 0); as it is where there are none."""
    if LIMITED:
        beyond = (r > limits.high) | (r < limits.low)
        inside = tl.where(r > limits.high, limits.high, tl.where(r < limits.low, limits.low, r))
        return inside, tl.where(beyond, 0.0, 1.0)
    else:
        return r, 1.0


@jit
def joined(step_later, later, step, x):
    """(step, x) of a run of tokens, from those of its two parts: F = x + step·F of what follows; x where step is 0."""
    return step * step_later, x + tl.where(step == 0.0, 0.0, step * later)


@jit
def product(x, trust):
    """x·trust, 0 where either is 0: a mask removes infinities too, and A = 0 outdoes an infinite weight."""
    x = x + tl.where(trust == 0.0, 0.0, 0.0)  # a term may return a plain number
    return tl.where((trust == 0.0) | (x == 0.0), 0.0, x * trust)


@jit
def scaled(beta, x):
    """β·x; 0 where β is, whatever x: a KL that is only watched changes nothing, infinite or NaN as it may be."""
    return tl.where(beta == 0.0, 0.0, beta * x)


@jit
def token_objective(r_hat, passes, r, lp, old, ref, A, trust, beta, limits, c, TERM: tl.constexpr, KL: tl.constexpr,
                    BIAS: tl.constexpr, OWN: tl.constexpr, TRUST: tl.constexpr, LIMITED: tl.constexpr,
                    CLAMPED: tl.constexpr):  # fmt: skip
    """One token: (ℓ_policy, kl, ∂ℓ/∂r, ∂ℓ/∂r̂, ∂ℓ/∂lp), the derivatives those of ℓ = ℓ_policy + β·kl.

    ``r_hat, passes`` is the log ratio of the level, from `limited_ratio`. Where the term has a
    statistic of its own (OWN) it sees that, ``r``, instead. ``KL`` is None without a reference; BIAS
    multiplies the KL by ρ = exp r̂, CLAMPED holds it. TRUST: there is one; LIMITED: of `limited_ratio`.
    """
    d_term = 0.0
    d_ratio = 0.0
    if OWN:
        policy, d_term, d_lp = TERM(r, lp, old, A, c)
    else:
        policy, d_ratio, d_lp = TERM(r_hat, lp, old, A, c)
    if TRUST:
        policy = product(policy, trust)
        d_term = product(d_term, trust)
        d_ratio = product(d_ratio, trust)
        d_lp = product(d_lp, trust)
    # A term chooses by comparisons, which NaN answers with "no": pass it on explicitly.
    poison = r_hat + lp + A
    if TRUST:
        poison = poison + tl.where((trust != trust) & (A != 0.0), trust, 0.0)
    bad = poison != poison
    policy = tl.where(bad, poison, policy)
    kl = 0.0
    if KL is not None:
        kl, d_kl = KL(log_ratio(ref, lp), limits, CLAMPED)
        if BIAS:
            ratio = tl.exp(r_hat)
            d_ratio = d_ratio + scaled(beta, ratio * kl)
            kl = kl * ratio
            d_kl = d_kl * ratio
        d_lp = d_lp + scaled(beta, d_kl)
    if LIMITED:
        d_ratio = tl.where(passes == 0.0, 0.0, d_ratio)
    return policy, kl, d_term, d_ratio, tl.where(bad, poison, d_lp)


@jit
def drift_of(lp, sampled):
    """How far log π has fallen since the token was sampled; 0 where the sampler has no log-probability (NaN)."""
    d = sampled - lp
    return tl.where(d == d, d, 0.0)


@jit
def keeps_sequence(drift, A, threshold):
    """Off-policy sequence mask: A ≥ 0, or a mean drift that is not above the threshold."""
    return tl.where(A >= 0.0, 1.0, tl.where(drift <= threshold, 1.0, 0.0))
