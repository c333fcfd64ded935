"""Device functions over one row of logits: the first pass (online softmax) and the second (gradient).

A tile is [K, L]: L is what all threads of the program hold side by side, so that the maximum and the
sums are kept per column ("lane") in registers, rescaled once per tile, and reduced across threads
once per row. Exponentials are base 2, with the maximum subtracted before scaling, so that the
precision does not depend on the size of the logits. −inf logits (banned tokens) have p = 0.

All of a row is described by ``(top, total, mean)``: the largest raw logit, Σ 2^d, and Σ p·d where
d = (x − top)·scale and scale = log2(e)/temperature.
"""

from grpo_kernels.jit import jit, tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@jit
def load_tile(row, start, V, K: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr, HINT: tl.constexpr):
    at = start + tl.arange(0, K)[:, None] * L + tl.arange(0, L)[None, :]
    if MASKED:
        x = tl.load(row + at, mask=at < V, other=float("-inf"), eviction_policy=HINT)
    else:
        x = tl.load(row + at, eviction_policy=HINT)
    return at, x.to(tl.float32)  # [K, L]; cast first: the interpreter's bf16 arithmetic is wrong


@jit
def absorb_tile(top, total, moment, row, start, V, scale, K: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr,
                ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """Fold one tile into the lane accumulators: top, total = Σ 2^d and moment = Σ 2^d·d, each [L]."""
    _, x = load_tile(row, start, V, K, L, MASKED, HINT)
    new_top = tl.maximum(top, tl.max(x, axis=0))
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # −inf − (−inf) would be NaN
    drop = (top - anchor) * scale
    shrink = tl.exp2(drop)
    depth = (x - anchor[None, :]) * scale
    part = tl.exp2(depth)
    if ENTROPY:
        shifted = tl.where(shrink == 0.0, 0.0, shrink * (moment + total * drop))
        moment = shifted + tl.sum(tl.where(part == 0.0, 0.0, part * depth), axis=0)
    total = total * shrink + tl.sum(part, axis=0)
    return new_top, total, moment


@jit
def read_row(row, V, scale, K: tl.constexpr, L: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):
    """First pass: (top, total, mean) of a row. NaN anywhere in the row makes total NaN."""
    top = tl.full([L], float("-inf"), tl.float32)
    total = tl.zeros([L], tl.float32)
    moment = tl.zeros([L], tl.float32)
    whole = V // (K * L) * (K * L)
    for start in range(0, whole, K * L):
        top, total, moment = absorb_tile(top, total, moment, row, start, V, scale, K, L, False, ENTROPY, HINT)
    if whole < V:
        top, total, moment = absorb_tile(top, total, moment, row, whole, V, scale, K, L, True, ENTROPY, HINT)

    row_top = tl.max(top, axis=0)
    anchor = tl.where(row_top == float("-inf"), 0.0, row_top)
    drop = (top - anchor) * scale
    shrink = tl.exp2(drop)
    row_total = tl.sum(total * shrink, axis=0)
    mean = 0.0
    if ENTROPY:
        moment = tl.where(shrink == 0.0, 0.0, shrink * (moment + total * drop))
        mean = tl.sum(moment, axis=0) / row_total
    return anchor, row_total, mean


@jit
def score_token(row, token, V, top, total, scale):
    """(log-probability, raw logit) of a token id; NaN for an id outside the vocabulary, never read."""
    known = (token >= 0) & (token < V)
    x = tl.load(row + token, mask=known, other=float("nan")).to(tl.float32)
    return ((x - top) * scale - tl.log2(total)) * LN2, x


@jit
def entropy_of(total, mean):
    """H = lse − Σ p·x, both relative to the largest logit."""
    return (tl.log2(total) - mean) * LN2


@jit
def slope_tile(out, row, start, V, scale, top, mean, slope, pull, K: tl.constexpr, L: tl.constexpr,
               MASKED: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    at, x = load_tile(row, start, V, K, L, MASKED, HINT)
    depth = (x - top) * scale
    part = tl.exp2(depth)
    d = slope * part
    if ENTROPY:
        d += tl.where(part == 0.0, 0.0, pull * part * (mean - depth))
    d = d.to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + at, d, mask=at < V)
    else:
        tl.store(out + at, d)


@jit
def write_slope(out, row, token, x_token, V, scale, top, total, mean, g, h, K: tl.constexpr,
                L: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """Second pass: out = (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], safe over the row itself.

    Every entry is first written as if it were not the token's; the token's own, formed in fp32, comes
    last, which spares the loop a test per entry.
    """
    inv_temperature = scale * LN2
    g = g * inv_temperature
    slope = -g / total
    pull = h * inv_temperature * LN2 / total
    tl.debug_barrier()  # in place: x_token was read by every thread before any entry is overwritten
    whole = V // (K * L) * (K * L)
    for start in range(0, whole, K * L):
        slope_tile(out, row, start, V, scale, top, mean, slope, pull, K, L, False, ENTROPY, HINT)
    if whole < V:
        slope_tile(out, row, whole, V, scale, top, mean, slope, pull, K, L, True, ENTROPY, HINT)
    tl.debug_barrier()  # the token's entry is stored by another thread than the tile's
    depth = (x_token - top) * scale
    part = tl.exp2(depth)
    d = g * (1.0 - part / total)
    if ENTROPY:
        d += tl.where(part == 0.0, 0.0, pull * part * (mean - depth))
    tl.store(out + token, d.to(out.dtype.element_ty), mask=(token >= 0) & (token < V))


@jit
def write_zeros(out, V, K: tl.constexpr, L: tl.constexpr):
    zeros = tl.zeros([K, L], out.dtype.element_ty)
    for start in range(0, V, K * L):
        at = start + tl.arange(0, K)[:, None] * L + tl.arange(0, L)[None, :]
        tl.store(out + at, zeros, mask=at < V)
