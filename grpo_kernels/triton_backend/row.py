"""Device functions over one row of logits: the first pass (online softmax) and the second (gradient).

A tile is [K, N·W]: each of N threads holds K lines of W neighbouring entries, W being what it moves
at once. The maximum and the sums are kept per thread, rescaled once per tile, and meet once per row.
Exponentials are base 2, with the maximum subtracted before scaling, so that the precision does not
depend on the size of the logits. −inf logits (banned tokens) have p = 0.

What is kept of a row is ``(top, total, mean)``, see `grpo_kernels.objective.softmax`. With a cap x is the capped
logit.
"""

from typing import NamedTuple

from grpo_kernels.objective.language import constant, jit, tl
from grpo_kernels.objective.softmax import LN2, LOG2E, LOWEST, logp_of, token_slope

DEEP = constant(-160.0)  # 2^d is 0 from here on: in products d stops here, since 0·(−inf) would be NaN


class Cap(NamedTuple):
    """Of a soft cap, x = bound·tanh(inner·z): inner is the logits' scale divided by bound."""

    bound: float
    inner: float
    per_bound: float  # 1 / bound: a division costs eight instructions


@jit
def split(row, V, ALIGNED: tl.constexpr, W: tl.constexpr):
    """(body, head, length): where whole accesses of W entries start, after how many entries, and how many they cover.

    Left over are the edges, up to W − 1 entries on either side. ALIGNED rows have none, and no test for them.
    """
    if ALIGNED:
        return row, 0, V
    else:
        BYTES: tl.constexpr = W * (row.dtype.element_ty.primitive_bitwidth // 8)
        past = (row.to(tl.int64) % BYTES).to(tl.int32) * W // BYTES  # entries since the last boundary
        head = tl.minimum((W - past) % W, V)
        return tl.multiple_of(row + head, BYTES), head, tl.multiple_of((V - head) // W * W, W)


@jit
def edges_at(head, length, V, W: tl.constexpr):
    """(at, mask) of the edges, [2·W]."""
    i = tl.arange(0, 2 * W)
    at = tl.where(i < W, i, head + length + i - W)
    return at, tl.where(i < W, i < head, at < V)


@jit
def tile_at(start, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    return start + tl.arange(0, K)[:, None] * (N * W) + tl.arange(0, N * W)[None, :]


@jit
def load_tile(row, at, V, MASKED: tl.constexpr, HINT: tl.constexpr):
    if MASKED:
        x = tl.load(row + at, mask=at < V, other=float("-inf"), eviction_policy=HINT)
    else:
        x = tl.load(row + at, eviction_policy=HINT)
    return x.to(tl.float32)  # [K, N·W]; cast first: the interpreter's bf16 arithmetic is wrong


@jit
def load_edges(row, at, mask):
    return tl.load(row + at, mask=mask, other=float("-inf")).to(tl.float32)  # [2·W]


@jit
def capped(x, cap):
    """bound·tanh(inner·x); −inf, which also stands for what is not there, stays."""
    if cap is not None:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(x * cap.inner * 2.0 * LOG2E))
        return tl.where(x == float("-inf"), x, cap.bound * tanh)
    else:
        return x


@jit
def slack(x, cap):
    """∂/∂x of `capped`, from its value."""
    if cap is not None:
        tanh = x * cap.per_bound
        return tl.where(x == float("-inf"), 0.0, (1.0 - tanh * tanh) * (cap.inner * cap.bound))
    else:
        return 1.0


@jit
def per_thread_sum(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)  # [N]


@jit
def absorb_edges(row, head, length, V, scale, cap, N: tl.constexpr, W: tl.constexpr, ENTROPY: tl.constexpr):
    """(top, total, moment), each [N]: the first thread starts out with what the edges come to."""
    at, mask = edges_at(head, length, V, W)
    x = capped(load_edges(row, at, mask), cap)
    top = tl.maximum(tl.max(x, axis=0), LOWEST)
    depth = (x - top) * scale
    part = tl.exp2(depth)
    first = tl.arange(0, N) == 0
    total = tl.where(first, tl.sum(part, axis=0), 0.0)
    moment = tl.zeros([N], tl.float32)
    if ENTROPY:
        moment = tl.where(first, tl.sum(part * tl.maximum(depth, DEEP), axis=0), 0.0)
    return tl.where(first, top, LOWEST), total, moment


@jit
def absorb_tile(top, total, moment, row, start, V, scale, cap, K: tl.constexpr, N: tl.constexpr,
                W: tl.constexpr, MASKED: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """Fold one tile into the threads' accumulators: top, total = Σ 2^d and moment = Σ 2^d·d, each [N]."""
    x = capped(load_tile(row, tile_at(start, K, N, W), V, MASKED, HINT), cap)
    x = tl.reshape(x, [K, N, W])  # only now: loaded so, Triton 3.6 would spread the lines over threads
    new_top = tl.maximum(top, tl.max(tl.max(x, axis=2), axis=0))
    drop = (top - new_top) * scale
    shrink = tl.exp2(drop)
    depth = (x - new_top[None, :, None]) * scale
    part = tl.exp2(depth)
    if ENTROPY:
        moment = shrink * (moment + total * tl.maximum(drop, DEEP)) + per_thread_sum(part * tl.maximum(depth, DEEP))
    total = total * shrink + per_thread_sum(part)
    return new_top, total, moment


@jit
def read_row(row, V, scale, cap, ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
             W: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """First pass: (top, total, mean) of a row. NaN anywhere in the row makes total NaN."""
    TILE: tl.constexpr = K * N * W
    REST: tl.constexpr = 1 if W > 1 else K  # lines of a tile in the rest of the row, less than a whole tile
    body, head, length = split(row, V, ALIGNED, W)
    if ALIGNED:
        top = tl.full([N], LOWEST, tl.float32)
        total = tl.zeros([N], tl.float32)
        moment = tl.zeros([N], tl.float32)
    else:
        top, total, moment = absorb_edges(row, head, length, V, scale, cap, N, W, ENTROPY)
    whole = length // TILE * TILE
    for at in range(0, whole, TILE):
        top, total, moment = absorb_tile(top, total, moment, body, at, length, scale, cap, K, N, W, False, ENTROPY,
                                         HINT)  # fmt: skip
    for at in range(whole, length, REST * N * W):
        top, total, moment = absorb_tile(top, total, moment, body, at, length, scale, cap, REST, N, W, True, ENTROPY,
                                         HINT)  # fmt: skip

    row_top = tl.max(top, axis=0)
    drop = (top - row_top) * scale
    shrink = tl.exp2(drop)
    row_total = tl.sum(total * shrink, axis=0)
    mean = 0.0
    if ENTROPY:
        mean = tl.sum(shrink * (moment + total * tl.maximum(drop, DEEP)), axis=0) / row_total
    return row_top, row_total, mean


@jit
def score_token(row, token, V, top, total, scale, cap):
    """(log-probability, raw logit) of a token id; NaN for an id outside the vocabulary, never read."""
    known = (token >= 0) & (token < V)
    x = capped(tl.load(row + token, mask=known, other=float("nan")).to(tl.float32), cap)
    return logp_of((x - top) * scale, total), x


@jit
def slope_at(x, top, scale, cap, slope, pull, ENTROPY: tl.constexpr):
    """2^d·(slope + pull·d), through the cap: the gradient of an entry that is not the token's."""
    depth = (x - top) * scale
    part = tl.exp2(depth)
    if ENTROPY:
        return part * (slope + pull * tl.maximum(depth, DEEP)) * slack(x, cap)
    else:
        return part * slope * slack(x, cap)


@jit
def slope_tile(out, row, start, V, scale, cap, top, slope, pull, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
               MASKED: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    at = tile_at(start, K, N, W)
    x = capped(load_tile(row, at, V, MASKED, HINT), cap)
    d = slope_at(x, top, scale, cap, slope, pull, ENTROPY).to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + at, d, mask=at < V)
    else:
        tl.store(out + at, d)


@jit
def write_slope(out, row, token, x_token, V, scale, cap, top, total, mean, g, h, ALIGNED: tl.constexpr,
                K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, ENTROPY: tl.constexpr,
                HINT: tl.constexpr):  # fmt: skip
    """Second pass: out = (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], safe over the row itself.

    Every entry is first written as if it were not the token's; the token's own, formed in fp32, comes
    last, which spares the loop a test per entry.
    """
    TILE: tl.constexpr = K * N * W
    REST: tl.constexpr = 1 if W > 1 else K
    inv_temperature = scale * LN2
    g = g * inv_temperature
    pull = -h * inv_temperature * LN2 / total
    slope = -g / total
    if ENTROPY:
        slope -= pull * mean
    body, head, length = split(row, V, ALIGNED, W)
    dst = split(out, V, ALIGNED, W)[0]
    tl.debug_barrier()  # in place: x_token was read by every thread before any entry is overwritten
    whole = length // TILE * TILE
    for at in range(0, whole, TILE):
        slope_tile(dst, body, at, length, scale, cap, top, slope, pull, K, N, W, False, ENTROPY, HINT)
    for at in range(whole, length, REST * N * W):
        slope_tile(dst, body, at, length, scale, cap, top, slope, pull, REST, N, W, True, ENTROPY, HINT)
    if not ALIGNED:
        at, mask = edges_at(head, length, V, W)
        d = slope_at(capped(load_edges(row, at, mask), cap), top, scale, cap, slope, pull, ENTROPY)
        tl.store(out + at, d.to(out.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # the token's entry is stored by another thread than the tile's
    depth = (x_token - top) * scale
    d = token_slope(depth, total, g)
    if ENTROPY:
        d += tl.exp2(depth) * pull * (tl.maximum(depth, DEEP) - mean)
    d = d * slack(x_token, cap)
    tl.store(out + token, d.to(out.dtype.element_ty), mask=(token >= 0) & (token < V))


@jit
def write_zeros(out, V, ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    body, head, length = split(out, V, ALIGNED, W)
    zeros = tl.zeros([K, N * W], out.dtype.element_ty)
    for start in range(0, length, K * N * W):
        at = tile_at(start, K, N, W)
        tl.store(body + at, zeros, mask=at < length)
    if not ALIGNED:
        at, mask = edges_at(head, length, V, W)
        tl.store(out + at, tl.zeros([2 * W], out.dtype.element_ty), mask=mask)


@jit
def scaled(x, factor):
    return tl.where(x == 0.0, 0.0, x * factor)  # a row without a gradient has none, whatever the factor


@jit
def scale_tile(out, row, start, V, factor, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr):
    at = tile_at(start, K, N, W)
    d = scaled(load_tile(row, at, V, MASKED, ""), factor).to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + at, d, mask=at < V)
    else:
        tl.store(out + at, d)


@jit
def scale_row(out, row, V, factor, ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """out = row · factor."""
    TILE: tl.constexpr = K * N * W
    REST: tl.constexpr = 1 if W > 1 else K
    body, head, length = split(row, V, ALIGNED, W)
    dst = split(out, V, ALIGNED, W)[0]
    whole = length // TILE * TILE
    for at in range(0, whole, TILE):
        scale_tile(dst, body, at, length, factor, K, N, W, False)
    for at in range(whole, length, REST * N * W):
        scale_tile(dst, body, at, length, factor, REST, N, W, True)
    if not ALIGNED:
        at, mask = edges_at(head, length, V, W)
        tl.store(out + at, scaled(load_edges(row, at, mask), factor).to(out.dtype.element_ty), mask=mask)
