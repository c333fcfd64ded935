"""Device functions over one row of logits: the first pass (softmax) and the second (gradient).

A tile is [K, N·W]: each of N threads holds K lines of W neighbouring entries, W being what it moves
at once. Sums are kept per thread, and meet once per row. Exponentials are base 2. −inf logits (banned
tokens) have p = 0.

What is kept of a row is ``(top, total, mean)``, see `grpo_kernels.objective.softmax`. The first pass takes
the sampled token's logit as top (`sum_row`): an entry then costs a fused multiply-add, an exponential and
an addition. Where the sum is not sound, and where a part of a vocabulary has no token, it is the largest
logit, as a running maximum per thread finds it (`read_row`). With a cap x is the capped logit. Of a row that a mask
restricts (``only``, see `masks`) the other entries are −inf.
"""

from grpo_kernels.objective.language import constant, is_interpreted, jit, tl
from grpo_kernels.objective.softmax import LN2, LOG2E, LOWEST, logp_of, token_slope
from grpo_kernels.triton_backend.masks import moved, within

TWO_BANNED = constant(-(0x007F << 16) - 0x0080)  # the word of two −inf in bf16, 0xFF80 each
DEEP = constant(-160.0)  # 2^d is 0 from here on: in products d stops here, since 0·(−inf) would be NaN
# Above this Σ 2^(x − x_token) is not used. −g/Σ stays normal up to 2^64; an entropy, the difference of log2 Σ and
# a mean of that size, stays within 1e-5 up to 2^32.
MOST, MOST_OF_ENTROPIES = constant(2.0**64), constant(2.0**32)


@jit
def split(row, V, ALIGNED: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr):
    """(body, head, length): where whole accesses of W entries start, after how many entries, and how many they cover.

    The body starts at a boundary of EDGE entries. Left over are the edges: up to EDGE − 1 entries before it and
    W − 1 behind it. ALIGNED rows have none, and no test for them.
    """
    if ALIGNED:
        return row, 0, V
    else:
        BYTES: tl.constexpr = EDGE * (row.dtype.element_ty.primitive_bitwidth // 8)
        past = (row.to(tl.int64) % BYTES).to(tl.int32) * EDGE // BYTES  # entries since the last boundary
        head = tl.minimum((EDGE - past) % EDGE, V)
        return tl.multiple_of(row + head, BYTES), head, tl.multiple_of((V - head) // W * W, W)


@jit
def edges_at(head, length, V, EDGE: tl.constexpr):
    """(at, mask) of the edges, [2·EDGE]."""
    i = tl.arange(0, 2 * EDGE)
    at = tl.where(i < EDGE, i, head + length + i - EDGE)
    return at, tl.where(i < EDGE, i < head, at < V)


@jit
def tile_at(start, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    return start + tl.arange(0, K)[:, None] * (N * W) + tl.arange(0, N * W)[None, :]


@jit
def load_edges(row, at, mask, only):
    return within(tl.load(row + at, mask=mask, other=float("-inf")).to(tl.float32), at, only)  # [2·EDGE]


@jit
def capped(x, cap):
    """bound·tanh(inner·x); −inf, which also stands for what is not there, stays."""
    if cap is not None:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(x * cap.inner * 2.0 * LOG2E))
        return tl.where(x == float("-inf"), x, cap.bound * tanh)
    else:
        return x


INTERPRETED = constant(is_interpreted(capped))


@jit
def load(row, at, V, other, MASKED: tl.constexpr, HINT: tl.constexpr):
    if MASKED:
        return tl.load(row + at, mask=at < V, other=other, eviction_policy=HINT)
    else:
        return tl.load(row + at, eviction_policy=HINT)


@jit
def load_tile(row, start, V, cap, only, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr,
              HINT: tl.constexpr):  # fmt: skip
    """A tile in fp32, capped, [K, N·W].

    Two bf16 come as one word and are its halves, which takes one instruction each. Not under a cap, where that
    would spill (Triton 3.7.1, gfx942).
    """
    if W > 1 and cap is None and row.dtype.element_ty == tl.bfloat16:
        words = (row + start).to(tl.pointer_type(tl.int32))
        pair = load(words, tile_at(0, K, N, W // 2), (V - start) // 2, TWO_BANNED, MASKED, HINT)
        first, second = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
        return within(tl.reshape(tl.join(first, second), [K, N * W]), tile_at(start, K, N, W), only)
    else:
        at = tile_at(start, K, N, W)
        x = load(row, at, V, float("-inf"), MASKED, HINT)
        return within(capped(x.to(tl.float32), cap), at, only)  # cast first: the interpreter's bf16 arithmetic is wrong


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
    """[K, N, W] → [N]; over lines first, which takes fewer registers: with entropies nothing spills then."""
    return tl.sum(tl.sum(x, axis=0), axis=1)


@jit
def absorb_edges(row, head, length, V, scale, cap, only, N: tl.constexpr, EDGE: tl.constexpr, ENTROPY: tl.constexpr):
    """`absorb_tile`'s accumulators as a row begins: the first thread has taken in the edges, the others nothing."""
    at, mask = edges_at(head, length, V, EDGE)
    x = capped(load_edges(row, at, mask, only), cap)
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
def absorb(top, total, moment, x, scale, ENTROPY: tl.constexpr):
    """Fold entries [K, N, W] into the threads' accumulators: top, total = Σ 2^d and moment = Σ 2^d·d, each [N]."""
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
def joined(top, total, moment, scale, ENTROPY: tl.constexpr):
    """(top, total, mean) of all that the threads have taken in."""
    row_top = tl.max(top, axis=0)
    drop = (top - row_top) * scale
    shrink = tl.exp2(drop)
    row_total = tl.sum(total * shrink, axis=0)
    mean = 0.0
    if ENTROPY:
        mean = tl.sum(shrink * (moment + total * tl.maximum(drop, DEEP)), axis=0) / row_total
    return row_top, row_total, mean


@jit
def absorb_tile(top, total, moment, row, start, V, scale, cap, only, K: tl.constexpr, N: tl.constexpr,
                W: tl.constexpr, MASKED: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """`absorb` of one tile."""
    x = load_tile(row, start, V, cap, only, K, N, W, MASKED, HINT)
    # Reshaped only now: loaded so, Triton 3.6 would spread the lines over threads.
    return absorb(top, total, moment, tl.reshape(x, [K, N, W]), scale, ENTROPY)


@jit
def read_row(row, V, scale, cap, only, ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
             W: tl.constexpr, EDGE: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """First pass without a token: (top, total, mean) of a row, top its maximum. NaN in the row makes total NaN."""
    TILE: tl.constexpr = K * N * W
    REST: tl.constexpr = 1 if W > 1 else K  # lines of a tile in the rest of the row, less than a whole tile
    body, head, length = split(row, V, ALIGNED, W, EDGE)
    if ALIGNED:
        top = tl.full([N], LOWEST, tl.float32)
        total = tl.zeros([N], tl.float32)
        moment = tl.zeros([N], tl.float32)
    else:
        top, total, moment = absorb_edges(row, head, length, V, scale, cap, only, N, EDGE, ENTROPY)
    if only is not None:
        only = moved(only, head)
    whole = length // TILE * TILE
    for at in range(0, whole, TILE):
        top, total, moment = absorb_tile(top, total, moment, body, at, length, scale, cap, only, K, N, W, False,
                                         ENTROPY, HINT)  # fmt: skip
    for at in range(whole, length, REST * N * W):
        top, total, moment = absorb_tile(top, total, moment, body, at, length, scale, cap, only, REST, N, W, True,
                                         ENTROPY, HINT)  # fmt: skip
    return joined(top, total, moment, scale, ENTROPY)


@jit
def depth_at(x, scale, off):
    """x·scale − off, rounded once: an entry's depth, if off is top·scale. The interpreter has no such instruction."""
    if INTERPRETED:
        return (x.to(tl.float64) * scale - off).to(tl.float32)
    else:
        return tl.fma(x, scale, -off)


@jit
def parts_of(x, scale, off):
    """(2^d, d) of entries; d such that their product is a number."""
    depth = depth_at(x, scale, off)
    return tl.exp2(depth), tl.maximum(depth, DEEP)


@jit
def add_tile(total, moment, row, start, V, scale, off, cap, only, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
             MASKED: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    x = load_tile(row, start, V, cap, only, K, N, W, MASKED, HINT)
    part, depth = parts_of(x, scale, off)
    total += per_thread_sum(tl.reshape(part, [K, N, W]))
    if ENTROPY:
        moment += per_thread_sum(tl.reshape(part * depth, [K, N, W]))
    return total, moment


@jit
def sum_row(row, x_token, V, scale, cap, only, ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
            EDGE: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """First pass: (total, mean) of a row whose top is x_token. Sound if total is: see `score_row`."""
    TILE: tl.constexpr = K * N * W
    REST: tl.constexpr = 1 if W > 1 else K
    off = x_token * scale
    total = tl.zeros([N], tl.float32)
    moment = tl.zeros([N], tl.float32)
    body, head, length = split(row, V, ALIGNED, W, EDGE)
    if not ALIGNED:
        at, mask = edges_at(head, length, V, EDGE)
        edge_part, edge_depth = parts_of(capped(load_edges(row, at, mask, only), cap), scale, off)
    if only is not None:
        only = moved(only, head)
    whole = length // TILE * TILE
    for at in range(0, whole, TILE):
        total, moment = add_tile(total, moment, body, at, length, scale, off, cap, only, K, N, W, False, ENTROPY, HINT)
    for at in range(whole, length, REST * N * W):
        total, moment = add_tile(total, moment, body, at, length, scale, off, cap, only, REST, N, W, True, ENTROPY,
                                 HINT)  # fmt: skip
    row_total = tl.sum(total, axis=0)
    row_moment = tl.sum(moment, axis=0)
    if not ALIGNED:
        row_total += tl.sum(edge_part, axis=0)
        row_moment += tl.sum(edge_part * edge_depth, axis=0)
    rest = depth_at(x_token, scale, off)  # of the token, whose depth is 0: what the rounding of off left in all of them
    mean = 0.0
    if ENTROPY:
        mean = row_moment / row_total - rest
    return row_total * tl.exp2(-rest), mean


@jit
def token_logit(row, token, V, cap):
    """Logit of a token id, capped; NaN for an id outside the vocabulary, never read."""
    known = (token >= 0) & (token < V)
    return capped(tl.load(row + token, mask=known, other=float("nan")).to(tl.float32), cap)


@jit
def score_row(row, token, V, scale, cap, only, ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
              EDGE: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """First pass: (top, total, mean, x_token, log-probability) of a row and a token id.

    The token's own part of its sum is 1, and rounding takes little of it. A total that is smaller, larger than
    `MOST` or NaN says that the token is improbable or −inf, or that the row holds +inf or NaN, or logits so large
    that top·scale overflows. Then the row is read again, with a maximum.
    """
    LIMIT: tl.constexpr = MOST_OF_ENTROPIES if ENTROPY else MOST
    FEWER: tl.constexpr = (K + 1) // 2  # lines of the second reading: with all of them it spills on sm_100
    x_token = token_logit(row, token, V, cap)
    top = x_token
    total, mean = sum_row(row, x_token, V, scale, cap, only, ALIGNED, K, N, W, EDGE, ENTROPY, HINT)
    if (total > 0.5) & (total < LIMIT):
        total = tl.maximum(total, 1.0)  # no log-probability above 0
    else:
        top, total, mean = read_row(row, V, scale, cap, only, ALIGNED, FEWER, N, W, EDGE, ENTROPY, HINT)
    return top, total, mean, x_token, logp_of((x_token - top) * scale, total)


@jit
def offset(top, scale):
    """(scale, off) that make the depths of the second pass: off is top·scale.

    Its rounding is in every depth, and a factor of the total makes up for it. From 2^30 on that factor could
    overflow. But there neighbouring floats are so far apart that only entries equal to top have a part, and any
    scale of that size gives the same: a power of two makes off exact.
    """
    power = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where(tl.abs(top) < 2.0**64, power, 1.0)  # where top·power, too, might overflow
    scale = tl.where(tl.abs(top * scale) < 2.0**30, scale, power)
    return scale, top * scale


@jit
def slope_at(x, scale, off, cap, slope, pull, ENTROPY: tl.constexpr):
    """2^d·(slope + pull·d), through the cap: the gradient of an entry that is not the token's."""
    part, depth = parts_of(x, scale, off)
    if ENTROPY:
        return part * (slope + pull * depth) * slack(x, cap)
    else:
        return part * slope * slack(x, cap)


@jit
def slopes(x_token, scale, cap, top, total, mean, g, h, ENTROPY: tl.constexpr):
    """(scale, off, slope, pull) of `slope_at` for a row whose statistics are known, and the token's own entry."""
    inv_temperature = scale * LN2
    g = g * inv_temperature
    token_depth = (x_token - top) * scale
    token_entry = token_slope(token_depth, total, g)
    pull = -h * inv_temperature * LN2 / total
    if ENTROPY:
        token_entry += tl.exp2(token_depth) * pull * (tl.maximum(token_depth, DEEP) - mean)
    scale, off = offset(top, scale)
    rest = depth_at(top, scale, off)  # in every depth, see `offset`
    whole_total = total * tl.exp2(rest)
    slope = -g / whole_total
    if ENTROPY:
        pull = -h * inv_temperature * LN2 / whole_total
        slope -= pull * (mean + rest)
    return scale, off, slope, pull, token_entry * slack(x_token, cap)


@jit
def slope_tile(out, row, start, V, scale, off, cap, only, slope, pull, K: tl.constexpr, N: tl.constexpr,
               W: tl.constexpr, MASKED: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    at = tile_at(start, K, N, W)
    x = load_tile(row, start, V, cap, only, K, N, W, MASKED, HINT)
    d = slope_at(x, scale, off, cap, slope, pull, ENTROPY).to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + at, d, mask=at < V)
    else:
        tl.store(out + at, d)


@jit
def write_slope(out, row, token, x_token, V, scale, cap, only, top, total, mean, g, h, ALIGNED: tl.constexpr,
                K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr, ENTROPY: tl.constexpr,
                HINT: tl.constexpr):  # fmt: skip
    """Second pass: out = (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], safe over the row itself.

    It goes from the row's end to its start: what the first pass read last is what the cache still holds. Every
    entry is first written as if it were not the token's; the token's own, formed in fp32, comes last, which
    spares the loop a test per entry.
    """
    TILE: tl.constexpr = K * N * W
    REST: tl.constexpr = 1 if W > 1 else K
    LINE: tl.constexpr = REST * N * W
    scale, off, slope, pull, token_entry = slopes(x_token, scale, cap, top, total, mean, g, h, ENTROPY)
    body, head, length = split(row, V, ALIGNED, W, EDGE)
    dst = split(out, V, ALIGNED, W, EDGE)[0]
    tl.debug_barrier()  # in place: x_token was read by every thread before any entry is overwritten
    inner = only
    if only is not None:
        inner = moved(only, head)
    whole = length // TILE * TILE
    lines = (length - whole + LINE - 1) // LINE
    for i in range(0, lines):
        at = whole + (lines - 1 - i) * LINE
        slope_tile(dst, body, at, length, scale, off, cap, inner, slope, pull, REST, N, W, True, ENTROPY, HINT)
    for i in range(0, whole, TILE):
        at = whole - TILE - i
        slope_tile(dst, body, at, length, scale, off, cap, inner, slope, pull, K, N, W, False, ENTROPY, HINT)
    if not ALIGNED:
        at, mask = edges_at(head, length, V, EDGE)
        d = slope_at(capped(load_edges(row, at, mask, only), cap), scale, off, cap, slope, pull, ENTROPY)
        tl.store(out + at, d.to(out.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # the token's entry is stored by another thread than the tile's
    tl.store(out + token, token_entry.to(out.dtype.element_ty), mask=(token >= 0) & (token < V))


@jit
def write_zeros(out, V, ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr):
    write_fill(out, 0.0, V, ALIGNED, K, N, W, EDGE)


@jit
def write_fill(out, value, V, ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
               EDGE: tl.constexpr):  # fmt: skip
    body, head, length = split(out, V, ALIGNED, W, EDGE)
    values = (tl.zeros([K, N * W], tl.float32) + value).to(out.dtype.element_ty)
    for start in range(0, length, K * N * W):
        at = tile_at(start, K, N, W)
        tl.store(body + at, values, mask=at < length)
    if not ALIGNED:
        at, mask = edges_at(head, length, V, EDGE)
        values = tl.zeros([2 * EDGE], tl.float32) + value
        tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)
