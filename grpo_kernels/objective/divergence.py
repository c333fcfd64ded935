"""Divergences of a student's distribution p from a teacher's q, outcome by outcome; every backend shares them.

    forward    KL(q ‖ p) = Σ q·(log q − log p)
    reverse    KL(p ‖ q) = Σ p·(log p − log q)
    mixed      β·KL(q ‖ m) + (1−β)·KL(p ‖ m),    m = (1−β)·p + β·q

The gradient by the student's logits is, of an outcome j, ``pull_j − p_j·Σ pull``: see `outcome`. MIXED and BY_TEACHER
(the teacher's probabilities weigh) say which divergence it is. Logarithms that go in are base 2, as in
`grpo_kernels.objective.softmax`; values and pulls are in nats. What is not an outcome of either has p = q = 0, and
adds nothing.
"""

from grpo_kernels.objective.language import constant, jit, tl
from grpo_kernels.objective.softmax import LN2, LOWEST, zero_of

LEAST = constant(2.0**-126)  # of a mixture: what is below is nobody's
TAIL_CLAMP = constant(-1e-7)  # log of the largest share that the K tokens may have, in nats


@jit
def share(weight, log_a, log_b):
    """weight·(log a − log b), 0 where the weight is, whatever the others."""
    return tl.where(weight == 0.0, 0.0, weight * (log_a - log_b))


@jit
def outcome(p, log_p, q, log_q, beta, MIXED: tl.constexpr, BY_TEACHER: tl.constexpr):
    """(what an outcome adds to the divergence, its pull: p·∂/∂p of that, up to a multiple of p)."""
    if MIXED:
        m = (1.0 - beta) * p + beta * q
        log_m = tl.log2(tl.where(m < LEAST, LEAST, m))
        pull = share(p, log_p, log_m) * ((1.0 - beta) * LN2)
        return share(q, log_q, log_m) * (beta * LN2) + pull, pull
    elif BY_TEACHER:
        return share(q, log_q, log_p) * LN2, -q
    else:
        value = share(p, log_p, log_q) * LN2
        return value, value


@jit
def centre(pulls, value):
    """Σ pull as the gradient takes it: NaN where it is infinite or the divergence NaN, so that all of the row's is."""
    return tl.where(value == value, pulls, value) + zero_of(pulls)


@jit
def slope(pull, p, pulls):
    """∂/∂log p of the whole divergence at one outcome; pulls is Σ pull."""
    return pull - p * pulls


@jit
def shifted(gap, total, shrink, drop, other_drop):
    """Σ 2^d·(d − d') of entries that lie ``drop`` deeper in the weighing row, ``other_drop`` in the other.

    total is Σ 2^d and shrink 2^drop; where that is 0 nothing is left of them.
    """
    return tl.where(shrink == 0.0, 0.0, shrink * (gap + share(total, drop, other_drop)))


@jit
def rest(log_together):
    """(log of what K outcomes leave to all others, 1 where it moves with them, else 0).

    1 − 2^x by its series where x is near 0. The K have at most e^−1e-7 together; there the rest is constant.
    """
    x = log_together * LN2
    moves = tl.where(x > TAIL_CLAMP, 0.0, 1.0)
    x = tl.where(x > TAIL_CLAMP, TAIL_CLAMP, x)
    series = 1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0))))
    series = -x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * series))
    return tl.log2(tl.where(x > -0.3, series, 1.0 - tl.exp(x))), moves


@jit
def unclosed(pull, p, MIXED: tl.constexpr, BY_TEACHER: tl.constexpr):
    """The pull where the outcomes' p do not add up to a constant: with the multiple of p that `outcome` leaves out."""
    if MIXED:
        return pull
    elif BY_TEACHER:
        return pull
    else:
        return pull + p


@jit
def highest(x, here):
    """The largest of K numbers [K], where they are here; finite where there is none."""
    top = tl.max(tl.where(here, x, float("-inf")), axis=0)
    return tl.where(top < LOWEST, LOWEST, top)


@jit
def log_shares(x, here):
    """(log2, as they are) of 2^x of K outcomes [K], renormalised; what is not here has no share."""
    top = highest(x, here)
    x = tl.where(here, x, float("-inf"))
    return x - top - tl.log2(tl.sum(tl.exp2(x - top), axis=0))


@jit
def disorder(p, log_p):
    """Entropy in nats of outcomes [K]."""
    return tl.sum(share(p, log_p, 0.0), axis=0) * -LN2


@jit
def compare(log_p, log_q, here, beta, MIXED: tl.constexpr, BY_TEACHER: tl.constexpr, REST: tl.constexpr,
            FEW: tl.constexpr):  # fmt: skip
    """Of K tokens [K], where they are here, by the log2 of both models' probabilities: (divergence, gradient by the
    logits of the K [K], gradient by another's over its p, entropy of both's outcomes).

    REST: what the K leave is one outcome more. FEW: the K are all there is, renormalised. Else they are as they are.
    On torch tensors [K, n] in place of [K].
    """
    if FEW:
        log_p = log_shares(log_p, here)
        log_q = log_shares(log_q, here)
    p = tl.where(here, tl.exp2(log_p), 0.0)
    q = tl.where(here, tl.exp2(log_q), 0.0)
    values, pull = outcome(p, log_p, q, log_q, beta, MIXED, BY_TEACHER)
    value = tl.sum(values, axis=0)
    p_entropy = disorder(p, log_p)
    q_entropy = disorder(q, log_q)
    if REST:
        p_rest, moves = rest(tl.log2(tl.sum(p, axis=0)))
        q_rest, _ = rest(tl.log2(tl.sum(q, axis=0)))
        left = tl.exp2(p_rest)
        left_q = tl.exp2(q_rest)
        more, rest_pull = outcome(left, p_rest, left_q, q_rest, beta, MIXED, BY_TEACHER)
        rest_pull = tl.where(moves == 0.0, 0.0, rest_pull)
        value = value + more
        pulls = centre(tl.sum(pull, axis=0) + rest_pull, value)
        p_entropy = p_entropy - left * p_rest * LN2
        q_entropy = q_entropy - left_q * q_rest * LN2
        return value, slope(pull, p, pulls), rest_pull / left - pulls, p_entropy, q_entropy
    elif FEW:
        pulls = centre(tl.sum(pull, axis=0), value)
        return value, slope(pull, p, pulls), pulls * 0.0, p_entropy, q_entropy
    else:
        pull = unclosed(pull, p, MIXED, BY_TEACHER)
        pulls = centre(tl.sum(pull, axis=0), value)
        return value, slope(pull, p, pulls), -pulls, p_entropy, q_entropy
