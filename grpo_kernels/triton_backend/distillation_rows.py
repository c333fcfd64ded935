"""Device functions over a row of a student's logits and the teacher's: what is kept of both, and the gradient.

Tiles are those of `grpo_kernels.triton_backend.row`, the same in both rows. Of each row ``(top, total, mean)`` is
kept, as there, top the largest logit. Beside them goes the gap, Σ 2^d·(d − d') over the row whose probabilities weigh:
with the totals it makes a KL divergence, so that one pass is enough for it. A divergence from the mixture needs both
totals before it can begin, and a pass more. A logit of either row that is −inf, or that is not there, has p = 0.
"""

from grpo_kernels.objective.divergence import outcome, share, shifted, slope
from grpo_kernels.objective.language import jit, tl
from grpo_kernels.objective.softmax import LN2, LOWEST
from grpo_kernels.triton_backend.row import (
    DEEP,
    capped,
    edges_at,
    load_edges,
    load_tile,
    per_thread_sum,
    slack,
    split,
    tile_at,
)


@jit
def gap_of(p_part, p_depth, q_part, q_depth, MIXED: tl.constexpr, BY_TEACHER: tl.constexpr):
    """2^d·(d − d') of the row that weighs; nothing where no row does by itself."""
    if MIXED:
        return p_part * 0.0
    elif BY_TEACHER:
        return share(q_part, q_depth, p_depth)
    else:
        return share(p_part, p_depth, q_depth)


@jit
def shifted_gap(gap, p_total, p_shrink, p_drop, q_total, q_shrink, q_drop, MIXED: tl.constexpr,
                BY_TEACHER: tl.constexpr):  # fmt: skip
    if MIXED:
        return gap
    elif BY_TEACHER:
        return shifted(gap, q_total, q_shrink, q_drop, p_drop)
    else:
        return shifted(gap, p_total, p_shrink, p_drop, q_drop)


@jit
def absorb_both_edges(row, other, head, length, V, p_scale, q_scale, p_cap, q_cap, N: tl.constexpr, EDGE: tl.constexpr,
                      MIXED: tl.constexpr, BY_TEACHER: tl.constexpr):  # fmt: skip
    """The seven accumulators [N]: the first thread starts out with what the edges come to."""
    at, mask = edges_at(head, length, V, EDGE)
    x = capped(load_edges(row, at, mask, None), p_cap)
    z = capped(load_edges(other, at, mask, None), q_cap)
    p_top = tl.maximum(tl.max(x, axis=0), LOWEST)
    q_top = tl.maximum(tl.max(z, axis=0), LOWEST)
    p_depth = (x - p_top) * p_scale
    q_depth = (z - q_top) * q_scale
    p_part = tl.exp2(p_depth)
    q_part = tl.exp2(q_depth)
    gap = gap_of(p_part, p_depth, q_part, q_depth, MIXED, BY_TEACHER)
    first = tl.arange(0, N) == 0
    return (
        tl.where(first, p_top, LOWEST),
        tl.where(first, tl.sum(p_part, axis=0), 0.0),
        tl.where(first, tl.sum(p_part * tl.maximum(p_depth, DEEP), axis=0), 0.0),
        tl.where(first, q_top, LOWEST),
        tl.where(first, tl.sum(q_part, axis=0), 0.0),
        tl.where(first, tl.sum(q_part * tl.maximum(q_depth, DEEP), axis=0), 0.0),
        tl.where(first, tl.sum(gap, axis=0), 0.0),
    )


@jit
def absorb_both(p_top, p_total, p_moment, q_top, q_total, q_moment, gap, row, other, start, V, p_scale, q_scale, p_cap,
                q_cap, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr, MIXED: tl.constexpr,
                BY_TEACHER: tl.constexpr):  # fmt: skip
    """Fold a tile of both rows into the accumulators, each [N]."""
    x = tl.reshape(load_tile(row, start, V, p_cap, None, K, N, W, MASKED, "evict_last"), [K, N, W])
    z = tl.reshape(load_tile(other, start, V, q_cap, None, K, N, W, MASKED, "evict_last"), [K, N, W])
    p_new = tl.maximum(p_top, tl.max(tl.max(x, axis=2), axis=0))
    q_new = tl.maximum(q_top, tl.max(tl.max(z, axis=2), axis=0))
    p_drop = (p_top - p_new) * p_scale
    q_drop = (q_top - q_new) * q_scale
    p_shrink = tl.exp2(p_drop)
    q_shrink = tl.exp2(q_drop)
    p_depth = (x - p_new[None, :, None]) * p_scale
    q_depth = (z - q_new[None, :, None]) * q_scale
    p_part = tl.exp2(p_depth)
    q_part = tl.exp2(q_depth)
    gap = shifted_gap(gap, p_total, p_shrink, p_drop, q_total, q_shrink, q_drop, MIXED, BY_TEACHER)
    gap += per_thread_sum(gap_of(p_part, p_depth, q_part, q_depth, MIXED, BY_TEACHER))
    p_moment = p_shrink * (p_moment + p_total * tl.maximum(p_drop, DEEP))
    p_moment += per_thread_sum(p_part * tl.maximum(p_depth, DEEP))
    q_moment = q_shrink * (q_moment + q_total * tl.maximum(q_drop, DEEP))
    q_moment += per_thread_sum(q_part * tl.maximum(q_depth, DEEP))
    p_total = p_total * p_shrink + per_thread_sum(p_part)
    q_total = q_total * q_shrink + per_thread_sum(q_part)
    return p_new, p_total, p_moment, q_new, q_total, q_moment, gap


@jit
def read_both(row, other, V, p_scale, q_scale, p_cap, q_cap, ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
              W: tl.constexpr, EDGE: tl.constexpr, MIXED: tl.constexpr, BY_TEACHER: tl.constexpr):  # fmt: skip
    """First pass: (top, total, mean) of the student's row and of the teacher's, and the mean gap of which one weighs.

    NaN in a row makes its total NaN.
    """
    TILE: tl.constexpr = K * N * W
    REST: tl.constexpr = 1 if W > 1 else K
    body, head, length = split(row, V, ALIGNED, W, EDGE)
    other_body = split(other, V, ALIGNED, W, EDGE)[0]
    if ALIGNED:
        p_top = tl.full([N], LOWEST, tl.float32)
        p_total = tl.zeros([N], tl.float32)
        p_moment = tl.zeros([N], tl.float32)
        q_top = tl.full([N], LOWEST, tl.float32)
        q_total = tl.zeros([N], tl.float32)
        q_moment = tl.zeros([N], tl.float32)
        gap = tl.zeros([N], tl.float32)
    else:
        p_top, p_total, p_moment, q_top, q_total, q_moment, gap = absorb_both_edges(
            row, other, head, length, V, p_scale, q_scale, p_cap, q_cap, N, EDGE, MIXED, BY_TEACHER
        )
    whole = length // TILE * TILE
    for at in range(0, whole, TILE):
        p_top, p_total, p_moment, q_top, q_total, q_moment, gap = absorb_both(
            p_top, p_total, p_moment, q_top, q_total, q_moment, gap, body, other_body, at, length, p_scale, q_scale,
            p_cap, q_cap, K, N, W, False, MIXED, BY_TEACHER,
        )  # fmt: skip
    for at in range(whole, length, REST * N * W):
        p_top, p_total, p_moment, q_top, q_total, q_moment, gap = absorb_both(
            p_top, p_total, p_moment, q_top, q_total, q_moment, gap, body, other_body, at, length, p_scale, q_scale,
            p_cap, q_cap, REST, N, W, True, MIXED, BY_TEACHER,
        )  # fmt: skip

    p_all = tl.max(p_top, axis=0)
    q_all = tl.max(q_top, axis=0)
    p_drop = (p_top - p_all) * p_scale
    q_drop = (q_top - q_all) * q_scale
    p_shrink = tl.exp2(p_drop)
    q_shrink = tl.exp2(q_drop)
    gap = tl.sum(shifted_gap(gap, p_total, p_shrink, p_drop, q_total, q_shrink, q_drop, MIXED, BY_TEACHER), axis=0)
    p_sum = tl.sum(p_total * p_shrink, axis=0)
    q_sum = tl.sum(q_total * q_shrink, axis=0)
    p_mean = tl.sum(p_shrink * (p_moment + p_total * tl.maximum(p_drop, DEEP)), axis=0) / p_sum
    q_mean = tl.sum(q_shrink * (q_moment + q_total * tl.maximum(q_drop, DEEP)), axis=0) / q_sum
    if BY_TEACHER:
        gap = gap / q_sum
    else:
        gap = gap / p_sum
    return p_all, p_sum, p_mean, q_all, q_sum, q_mean, gap


@jit
def outcome_at(x, z, p_top, p_log, q_top, q_log, p_scale, q_scale, beta, MIXED: tl.constexpr, BY_TEACHER: tl.constexpr):
    """(value, pull, p) of entries, from their logits and log2 of both totals."""
    log_p = (x - p_top) * p_scale - p_log
    log_q = (z - q_top) * q_scale - q_log
    p = tl.exp2(log_p)
    value, pull = outcome(p, log_p, tl.exp2(log_q), log_q, beta, MIXED, BY_TEACHER)
    return value, pull, p


@jit
def mix_tile(value, pulls, row, other, start, V, p_top, p_log, q_top, q_log, p_scale, q_scale, p_cap, q_cap, beta,
             K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    x = load_tile(row, start, V, p_cap, None, K, N, W, MASKED, "evict_last")
    z = load_tile(other, start, V, q_cap, None, K, N, W, MASKED, "evict_last")
    more, pull, _ = outcome_at(x, z, p_top, p_log, q_top, q_log, p_scale, q_scale, beta, True, False)
    value += per_thread_sum(tl.reshape(more, [K, N, W]))
    pulls += per_thread_sum(tl.reshape(pull, [K, N, W]))
    return value, pulls


@jit
def mix_both(row, other, V, p_top, p_log, q_top, q_log, p_scale, q_scale, p_cap, q_cap, beta, ALIGNED: tl.constexpr,
             K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """A second pass, from the end to the start, for the mixture: (divergence, Σ pull)."""
    TILE: tl.constexpr = K * N * W
    REST: tl.constexpr = 1 if W > 1 else K
    LINE: tl.constexpr = REST * N * W
    body, head, length = split(row, V, ALIGNED, W, EDGE)
    other_body = split(other, V, ALIGNED, W, EDGE)[0]
    value = tl.zeros([N], tl.float32)
    pulls = tl.zeros([N], tl.float32)
    whole = length // TILE * TILE
    lines = (length - whole + LINE - 1) // LINE
    for i in range(0, lines):
        value, pulls = mix_tile(value, pulls, body, other_body, whole + (lines - 1 - i) * LINE, length, p_top, p_log,
                                q_top, q_log, p_scale, q_scale, p_cap, q_cap, beta, REST, N, W, True)  # fmt: skip
    for i in range(0, whole, TILE):
        value, pulls = mix_tile(value, pulls, body, other_body, whole - TILE - i, length, p_top, p_log, q_top, q_log,
                                p_scale, q_scale, p_cap, q_cap, beta, K, N, W, False)  # fmt: skip
    row_value = tl.sum(value, axis=0)
    row_pulls = tl.sum(pulls, axis=0)
    if not ALIGNED:
        at, mask = edges_at(head, length, V, EDGE)
        x = capped(load_edges(row, at, mask, None), p_cap)
        z = capped(load_edges(other, at, mask, None), q_cap)
        more, pull, _ = outcome_at(x, z, p_top, p_log, q_top, q_log, p_scale, q_scale, beta, True, False)
        row_value += tl.sum(more, axis=0)
        row_pulls += tl.sum(pull, axis=0)
    return row_value, row_pulls


@jit
def slope_both_tile(out, row, other, start, V, p_top, p_log, q_top, q_log, p_scale, q_scale, p_cap, q_cap, beta, pulls,
                    g, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr, MIXED: tl.constexpr,
                    BY_TEACHER: tl.constexpr):  # fmt: skip
    at = tile_at(start, K, N, W)
    x = load_tile(row, start, V, p_cap, None, K, N, W, MASKED, "evict_first")
    z = load_tile(other, start, V, q_cap, None, K, N, W, MASKED, "evict_first")
    _, pull, p = outcome_at(x, z, p_top, p_log, q_top, q_log, p_scale, q_scale, beta, MIXED, BY_TEACHER)
    d = (slope(pull, p, pulls) * g * slack(x, p_cap)).to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + at, d, mask=at < V)
    else:
        tl.store(out + at, d)


@jit
def write_both(out, row, other, V, p_top, p_log, q_top, q_log, p_scale, q_scale, p_cap, q_cap, beta, pulls, g,
               ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr,
               MIXED: tl.constexpr, BY_TEACHER: tl.constexpr):  # fmt: skip
    """Last pass: out = (1/temperature)·g·(pull − p·Σ pull), safe over the student's row itself.

    It goes the other way than the pass before it, whose last entries the cache still holds.
    """
    TILE: tl.constexpr = K * N * W
    REST: tl.constexpr = 1 if W > 1 else K
    LINE: tl.constexpr = REST * N * W
    g = g * (p_scale * LN2)
    body, head, length = split(row, V, ALIGNED, W, EDGE)
    other_body = split(other, V, ALIGNED, W, EDGE)[0]
    dst = split(out, V, ALIGNED, W, EDGE)[0]
    whole = length // TILE * TILE
    lines = (length - whole + LINE - 1) // LINE
    if MIXED:
        for at in range(0, whole, TILE):
            slope_both_tile(dst, body, other_body, at, length, p_top, p_log, q_top, q_log, p_scale, q_scale, p_cap,
                            q_cap, beta, pulls, g, K, N, W, False, MIXED, BY_TEACHER)  # fmt: skip
        for i in range(0, lines):
            slope_both_tile(dst, body, other_body, whole + i * LINE, length, p_top, p_log, q_top, q_log, p_scale,
                            q_scale, p_cap, q_cap, beta, pulls, g, REST, N, W, True, MIXED, BY_TEACHER)  # fmt: skip
    else:
        for i in range(0, lines):
            slope_both_tile(dst, body, other_body, whole + (lines - 1 - i) * LINE, length, p_top, p_log, q_top, q_log,
                            p_scale, q_scale, p_cap, q_cap, beta, pulls, g, REST, N, W, True, MIXED,
                            BY_TEACHER)  # fmt: skip
        for i in range(0, whole, TILE):
            slope_both_tile(dst, body, other_body, whole - TILE - i, length, p_top, p_log, q_top, q_log, p_scale,
                            q_scale, p_cap, q_cap, beta, pulls, g, K, N, W, False, MIXED, BY_TEACHER)  # fmt: skip
    if not ALIGNED:
        at, mask = edges_at(head, length, V, EDGE)
        x = capped(load_edges(row, at, mask, None), p_cap)
        z = capped(load_edges(other, at, mask, None), q_cap)
        _, pull, p = outcome_at(x, z, p_top, p_log, q_top, q_log, p_scale, q_scale, beta, MIXED, BY_TEACHER)
        d = slope(pull, p, pulls) * g * slack(x, p_cap)
        tl.store(out + at, d.to(out.dtype.element_ty), mask=mask)
