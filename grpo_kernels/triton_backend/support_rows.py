"""Device functions over the K ids that a row is restricted to: nothing else of the row is read.

They stand in place of `score_row` and `write_slope`, and give the same. The token's own entry is none of the K, and
is added. ``ids[first:last]`` are the row's; one that is `REPEATED` is passed over, one outside the vocabulary makes
the row NaN.
"""

from grpo_kernels.objective.language import constant, jit, tl
from grpo_kernels.objective.softmax import LOWEST, zero_of
from grpo_kernels.objective.supports import REPEATED
from grpo_kernels.triton_backend.row import absorb, capped, joined, slope_at, slopes, token_logit, write_fill

_REPEATED = constant(REPEATED)
# Ids that a program looks up at once, at least: a logit's address is known only when its id has come, so the loads of
# several ids must be on their way together. For each of the loss's 1024 threads more than one id seemed to cost
# time on an H100, see docs/performance.md.
LEAST = constant(512)


@jit
def range_of(first, last, at, M):
    """Where a row's ids begin and end, (0, 0) without a support; bounds outside of the M ids are no addresses."""
    if first is not None:
        begin = tl.load(first + at).to(tl.int64)
        end = tl.load(last + at).to(tl.int64)
        return tl.where(begin < 0, 0, begin), tl.where(end > M, M, end)
    else:
        return tl.zeros([], tl.int64), tl.zeros([], tl.int64)


@jit
def entries(row, ids, i, last, token, V, cap):
    """(id, logit, whether it counts, whether it is no id) of the ids at i, [N]; −inf where it does not count."""
    j = tl.load(ids + i, mask=i < last, other=_REPEATED)
    known = (j >= 0) & (j < V)
    counts = known & (j != token)
    x = tl.load(row + j, mask=counts, other=float("-inf")).to(tl.float32)
    return j, capped(x, cap), counts, (~known) & (j != _REPEATED)


@jit
def score_support(row, token, ids, first, last, V, scale, cap, N: tl.constexpr, ENTROPY: tl.constexpr,
                  PART: tl.constexpr):  # fmt: skip
    """(top, total, mean, x_token, its depth) over the ids and the token, top the largest logit of them.

    A PART of a row may not have the token, nor any of the ids; the token's logit and depth are then NaN.
    """
    M: tl.constexpr = N if N > LEAST else LEAST
    x_token = token_logit(row, token, V, cap)
    x_own = x_token
    if PART:
        x_own = tl.where((token >= 0) & (token < V), x_token, float("-inf"))
    own_top = tl.maximum(x_own, LOWEST)
    first_one = tl.arange(0, M) == 0
    tops = tl.where(first_one, own_top, LOWEST)
    total = tl.where(first_one, tl.exp2((x_own - own_top) * scale), 0.0)
    moment = tl.zeros([M], tl.float32)
    for start in range(first, last, M):
        _, x, _, unknown = entries(row, ids, start + tl.arange(0, M), last, token, V, cap)
        x = tl.where(unknown, float("nan"), x)
        tops, total, moment = absorb(tops, total, moment, tl.reshape(x, [1, M, 1]), scale, ENTROPY)
    top, row_total, mean = joined(tops, total, moment, scale, ENTROPY)
    return top, row_total, mean, x_token, (x_token - top) * scale


@jit
def write_support(out, row, token, x_token, ids, first, last, scratch, V, scale, cap, top, total, mean, g, h,
                  ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr,
                  ENTROPY: tl.constexpr):  # fmt: skip
    """The gradient of a row: zeros, and then the entries of the ids and of the token.

    Over the row itself the logits are gone by then: ``scratch``, as long as the ids, holds the entries meanwhile.
    """
    M: tl.constexpr = N if N > LEAST else LEAST
    scale, off, slope, pull, token_entry = slopes(x_token, scale, cap, top, total, mean, g, h, ENTROPY)
    if scratch is not None:
        for start in range(first, last, M):
            i = start + tl.arange(0, M)
            _, x, _, _ = entries(row, ids, i, last, token, V, cap)
            tl.store(scratch + i, slope_at(x, scale, off, cap, slope, pull, ENTROPY), mask=i < last)
    tl.debug_barrier()  # in place: every logit was read before an entry is overwritten
    write_fill(out, zero_of(slope), V, ALIGNED, K, N, W, EDGE)  # 0; in a row that is NaN, NaN
    tl.debug_barrier()  # the entries are stored by other threads than the zeros
    for start in range(first, last, M):
        i = start + tl.arange(0, M)
        if scratch is not None:
            j = tl.load(ids + i, mask=i < last, other=_REPEATED)
            counts = (j >= 0) & (j < V) & (j != token)
            d = tl.load(scratch + i, mask=i < last, other=0.0)
        else:
            j, x, counts, _ = entries(row, ids, i, last, token, V, cap)
            d = slope_at(x, scale, off, cap, slope, pull, ENTROPY)
        tl.store(out + j, d.to(out.dtype.element_ty), mask=counts)
    tl.store(out + token, token_entry.to(out.dtype.element_ty), mask=(token >= 0) & (token < V))
