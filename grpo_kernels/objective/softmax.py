"""What is kept of a row of logits, shared by both backends: ``(top, total, mean)``.

``top`` is the logit that the others are seen from, the largest or a token's, ``total`` Σ 2^d and
``mean`` Σ p·d, where d = (x − top)·scale is an entry's depth and scale = log2(e)/temperature. A row that
lies in parts, one per rank, has one such triple per part, from its largest logit; `fold` makes one of two.
"""

from grpo_kernels.objective.language import constant, jit, tl

LN2 = constant(0.6931471805599453)
LOG2E = constant(1.4426950408889634)
LOWEST = constant(-3.4028234663852886e38)  # of no maximum yet; finite, since −inf − (−inf) would be NaN


@jit
def logp_of(depth, total):
    """Log-probability of an entry, in nats."""
    return (depth - tl.log2(total)) * LN2


@jit
def zero_of(x):
    """0, and NaN where x is NaN or infinite.

    Not x − x: a GPU fuses that with the product that x comes from, and has what x was rounded by.
    """
    return tl.where((x > float("-inf")) & (x < float("inf")), 0.0, float("nan"))


@jit
def entropy_of(total, mean):
    """H = lse − Σ p·x, both relative to top; in nats."""
    return (tl.log2(total) - mean) * LN2


@jit
def token_slope(depth, total, g):
    """g·(1 − p), the gradient of the token's own entry by its log-probability; g may be infinite."""
    return g * (1.0 - tl.exp2(depth) / total)


@jit
def fold(top, total, mean, depth, other_top, other_total, other_mean, other_depth, scale):
    """Two parts of a row as one; depth is the token's, NaN in a part that does not hold it.

    An empty part is (LOWEST, 0, anything, NaN), and so is one of −inf alone.
    """
    new_top = tl.where(other_top > top, other_top, top)
    drop = (top - new_top) * scale
    other_drop = (other_top - new_top) * scale
    weight = total * tl.exp2(drop)
    other_weight = other_total * tl.exp2(other_drop)
    new_total = weight + other_weight
    moment = tl.where(weight > 0.0, weight * (mean + drop), 0.0)
    moment = moment + tl.where(other_weight > 0.0, other_weight * (other_mean + other_drop), 0.0)
    depth = tl.where(other_depth == other_depth, other_depth + other_drop, depth + drop)
    return new_top, new_total, moment / new_total, depth
