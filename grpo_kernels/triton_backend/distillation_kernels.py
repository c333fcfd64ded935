"""The kernels of distillation: one program per row of logits, on a 1-D grid; conventions as in `row_kernels`.

VALUES: the row is compared with the teacher's. GRADIENT: its gradient is written. Both: one launch, in which a row
comes from memory once, and again from the cache. GRADIENT alone goes by what VALUES alone has kept of the row:
``stats`` [B·T, 5], (top, log2 total) of the student and of the teacher, and Σ pull.

Whether there is a mixture, and whose probabilities weigh, is MIXED and BY_TEACHER, as in
`grpo_kernels.objective.divergence`.
"""

from grpo_kernels.objective.divergence import centre, compare, highest
from grpo_kernels.objective.language import constant, jit, tl
from grpo_kernels.objective.metrics import DISTILLATION_METRICS, DISTILLATION_SUMS, mean_of
from grpo_kernels.objective.softmax import LN2, LOG2E, entropy_of
from grpo_kernels.objective.token import product, weight
from grpo_kernels.triton_backend.distillation_rows import mix_both, read_both, write_both
from grpo_kernels.triton_backend.row import capped, read_row, slack, write_fill, write_slope, write_zeros
from grpo_kernels.triton_backend.row_kernels import inverse_or, kernel, load_or, place, row_at

SUMS, METRICS = constant(len(DISTILLATION_SUMS)), constant(len(DISTILLATION_METRICS))
BLOCK = constant(256)


@jit
def store_row(values, at, count, divergence, entropy, teacher_entropy):
    """Into values [3, B·T]."""
    tl.store(values + at, divergence)
    tl.store(values + count + at, entropy)
    tl.store(values + 2 * count + at, teacher_entropy)


@jit
def counts(mask, at, inside):
    """Whether a row is scored and unmasked."""
    if mask is not None:
        return inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    else:
        return inside


@jit
def factor_of(up, count, loss_scale, seq, tok, up_b, up_t, count_b, w_factor, WEIGHTED: tl.constexpr):
    """∂L/∂D of a row: its weight, where the loss is WEIGHTED, times the upstream gradient, where there is one."""
    factor = 1.0
    if WEIGHTED:
        factor = weight(load_or(count, seq * count_b, 1.0), w_factor * load_or(loss_scale, 0, 1.0))
    return factor * load_or(up, seq * up_b + tok * up_t, 1.0)


@kernel
def whole_teacher_kernel(
    logits, teacher, out, mask, temperature, segments,  # [B, rows, V] ×3, [B, T], [B, T], [N]
    values, stats, up, count, loss_scale,  # [3, B, T], [B·T, 5], [B, T] or [], [B] or [], []
    logits_b, logits_t, teacher_b, teacher_t, out_b, out_t, mask_b, mask_t, temp_b, temp_t, up_b, up_t, count_b, at_b,
    B, T, rows, V, n, inv_temperature: tl.float32, p_factor: tl.float32, q_factor: tl.float32, cap, teacher_cap,
    beta: tl.float32, w_factor: tl.float32,
    MIXED: tl.constexpr, BY_TEACHER: tl.constexpr, WEIGHTED: tl.constexpr, VALUES: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The teacher has a logit for each of the student's. n is B·T."""
    seq, tok = place(segments, rows)
    at = seq * at_b + tok
    inside = (tok < T) & (seq < B)
    if not counts(mask, seq * mask_b + tok * mask_t, inside):
        if VALUES:
            if inside | (segments is not None):
                store_row(values, at, n, 0.0, 0.0, 0.0)
        if GRADIENT:
            write_zeros(row_at(out, seq, tok, out_b, out_t, ALIGNED), V, ALIGNED, K, N, W, EDGE)
        return
    if GRADIENT:
        dst = row_at(out, seq, tok, out_b, out_t, ALIGNED)
        g = factor_of(up, count, loss_scale, seq, tok, up_b, up_t, count_b, w_factor, WEIGHTED)
        if not VALUES:
            if g == 0.0:
                write_zeros(dst, V, ALIGNED, K, N, W, EDGE)
                return
    inverse = inverse_or(temperature, seq * temp_b + tok * temp_t, inv_temperature) * LOG2E
    p_scale = inverse * p_factor
    q_scale = inverse * q_factor
    row = row_at(logits, seq, tok, logits_b, logits_t, ALIGNED)
    other = row_at(teacher, seq, tok, teacher_b, teacher_t, ALIGNED)
    if VALUES:
        p_top, p_total, p_mean, q_top, q_total, q_mean, gap = read_both(
            row, other, V, p_scale, q_scale, cap, teacher_cap, ALIGNED, K, N, W, EDGE, MIXED, BY_TEACHER
        )
        p_log = tl.log2(p_total)
        q_log = tl.log2(q_total)
        if MIXED:
            value, pulls = mix_both(row, other, V, p_top, p_log, q_top, q_log, p_scale, q_scale, cap, teacher_cap, beta,
                                    ALIGNED, K, N, W, EDGE)  # fmt: skip
        elif BY_TEACHER:
            value = (gap - q_log + p_log) * LN2
            pulls = -1.0
        else:
            value = (gap - p_log + q_log) * LN2
            pulls = centre(value, value)
        store_row(values, at, n, value, entropy_of(p_total, p_mean), entropy_of(q_total, q_mean))
        if not GRADIENT:
            tl.store(stats + at * 5, p_top)
            tl.store(stats + at * 5 + 1, p_log)
            tl.store(stats + at * 5 + 2, q_top)
            tl.store(stats + at * 5 + 3, q_log)
            tl.store(stats + at * 5 + 4, pulls)
    else:
        p_top = tl.load(stats + at * 5)
        p_log = tl.load(stats + at * 5 + 1)
        q_top = tl.load(stats + at * 5 + 2)
        q_log = tl.load(stats + at * 5 + 3)
        pulls = tl.load(stats + at * 5 + 4)
    if GRADIENT:
        if g != 0.0:
            write_both(dst, row, other, V, p_top, p_log, q_top, q_log, p_scale, q_scale, cap, teacher_cap, beta, pulls,
                       g, ALIGNED, K, N, W, EDGE, MIXED, BY_TEACHER)  # fmt: skip
        else:
            tl.debug_barrier()  # in place: every thread has read the row
            write_zeros(dst, V, ALIGNED, K, N, W, EDGE)


@kernel
def few_tokens_kernel(
    logits, out, token_ids, teacher_logps, mask, temperature, segments,  # [B, rows, V] ×2, [B, T, L] ×2, [B, T] ×2, [N]
    values, stats, up, count, loss_scale,  # [3, B, T], [B·T, 5], [B, T] or [], [B] or [], []
    logits_b, logits_t, out_b, out_t, ids_b, ids_t, told_b, told_t, mask_b, mask_t, temp_b, temp_t, up_b, up_t, count_b,
    at_b,
    B, T, rows, V, n, L, inv_temperature: tl.float32, p_factor: tl.float32, cap, beta: tl.float32, w_factor: tl.float32,
    MIXED: tl.constexpr, BY_TEACHER: tl.constexpr, REST: tl.constexpr, FEW: tl.constexpr, WEIGHTED: tl.constexpr,
    VALUES: tl.constexpr, GRADIENT: tl.constexpr, LANES: tl.constexpr,
    ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The teacher has told L tokens and their log-probabilities; FEW reads nothing of the student's row but these."""
    seq, tok = place(segments, rows)
    at = seq * at_b + tok
    inside = (tok < T) & (seq < B)
    if not counts(mask, seq * mask_b + tok * mask_t, inside):
        if VALUES:
            if inside | (segments is not None):
                store_row(values, at, n, 0.0, 0.0, 0.0)
        if GRADIENT:
            write_zeros(row_at(out, seq, tok, out_b, out_t, ALIGNED), V, ALIGNED, K, N, W, EDGE)
        return
    if GRADIENT:
        dst = row_at(out, seq, tok, out_b, out_t, ALIGNED)
        g = factor_of(up, count, loss_scale, seq, tok, up_b, up_t, count_b, w_factor, WEIGHTED)
        if not VALUES:
            if g == 0.0:
                write_zeros(dst, V, ALIGNED, K, N, W, EDGE)
                return
    scale = inverse_or(temperature, seq * temp_b + tok * temp_t, inv_temperature) * LOG2E * p_factor
    row = row_at(logits, seq, tok, logits_b, logits_t, ALIGNED)
    lane = tl.arange(0, LANES)
    token = tl.load(token_ids + seq * ids_b + tok * ids_t + lane, mask=lane < L, other=-1).to(tl.int64)
    log_q = tl.load(teacher_logps + seq * told_b + tok * told_t + lane, mask=lane < L, other=float("-inf"))
    log_q = log_q.to(tl.float32) * LOG2E
    here = (token >= 0) & (log_q != float("-inf"))
    x = capped(tl.load(row + token, mask=here & (token < V), other=float("nan")).to(tl.float32), cap)
    top = 0.0
    total = 1.0
    mean = 0.0
    if FEW:
        top = highest(x, here)  # logits far from 0 lose nothing to the temperature
    else:
        if VALUES:
            top, total, mean = read_row(row, V, scale, cap, None, ALIGNED, K, N, W, EDGE, True, "evict_last")
            if not GRADIENT:
                tl.store(stats + at * 5, top)
                tl.store(stats + at * 5 + 1, total)
        else:
            top = tl.load(stats + at * 5)
            total = tl.load(stats + at * 5 + 1)
    log_p = tl.where(here, (x - top) * scale - tl.log2(total), float("-inf"))
    log_q = tl.where(here, log_q, float("-inf"))
    value, d, others, p_entropy, q_entropy = compare(log_p, log_q, here, beta, MIXED, BY_TEACHER, REST, FEW)
    if VALUES:
        if not FEW:
            p_entropy = entropy_of(total, mean)
        store_row(values, at, n, value, p_entropy, q_entropy)
    if GRADIENT:
        tl.debug_barrier()  # in place: the tokens' logits were read by every thread before they are overwritten
        if g == 0.0:
            write_zeros(dst, V, ALIGNED, K, N, W, EDGE)
            return
        if FEW:
            write_fill(dst, others, V, ALIGNED, K, N, W, EDGE)  # 0, or NaN
        else:
            nobody = tok * 0 - 1  # an id of no token
            write_slope(dst, row, nobody, top, V, scale, cap, None, top, total, mean, -others * g, 0.0, ALIGNED, K, N,
                        W, EDGE, False, "evict_first")  # fmt: skip
        tl.debug_barrier()  # the tokens' entries are stored by other threads than the tiles'
        d = d * (g * scale * LN2) * slack(x, cap)
        tl.store(dst + token, d.to(out.dtype.element_ty), mask=here & (token < V))


@kernel
def sequence_sums_kernel(
    values, mask, count, loss_scale, cu, partial,  # [3, B, T], [B, T], [B] or [], [], [B+1]; out: [B, SUMS] fp64
    mask_b, mask_t, count_b, at_b, B, T, n, w_factor: tl.float32,
):  # fmt: skip
    """One program per sequence: its part of each sum, always in the same order."""
    seq = tl.program_id(0).to(tl.int64)
    start = seq * at_b
    length = T
    if cu is not None:
        start = tl.load(cu + seq).to(tl.int64)
        length = (tl.load(cu + seq + 1) - start).to(tl.int32)
    w = weight(load_or(count, seq * count_b, 1.0), w_factor * load_or(loss_scale, 0, 1.0))
    w = tl.zeros([BLOCK], tl.float32) + w
    lane = tl.arange(0, BLOCK)
    loss = tl.zeros([BLOCK], tl.float64)
    tokens = tl.zeros([BLOCK], tl.float64)
    divergence = tl.zeros([BLOCK], tl.float64)
    entropy = tl.zeros([BLOCK], tl.float64)
    teacher_entropy = tl.zeros([BLOCK], tl.float64)
    for first in range(0, length, BLOCK):
        tok = first + lane
        here = tok < length
        at = values + start + tok
        if mask is not None:
            place_of = seq * mask_b + tok.to(tl.int64) * mask_t
            if cu is not None:
                place_of = (start + tok) * mask_t
            here = here & (tl.load(mask + place_of, mask=here, other=0) != 0)
        D = tl.load(at, mask=here, other=0.0)
        loss += tl.where(here, product(D, w), 0.0).to(tl.float64)
        tokens += tl.where(here, 1.0, 0.0).to(tl.float64)
        divergence += D.to(tl.float64)
        entropy += tl.load(at + n, mask=here, other=0.0).to(tl.float64)
        teacher_entropy += tl.load(at + 2 * n, mask=here, other=0.0).to(tl.float64)
    every = (loss, tokens, divergence, entropy, teacher_entropy)
    for k in tl.static_range(SUMS):
        tl.store(partial + seq * SUMS + k, tl.sum(every[k], axis=0))


@jit
def column(partial, B, at: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, B, BLOCK):
        seq = (first + lane).to(tl.int64)
        total += tl.load(partial + seq * SUMS + at, mask=seq < B, other=0.0)
    return tl.sum(total, axis=0)


@kernel
def batch_sums_kernel(partial, sums, loss, metrics, B):
    """One program: sums [SUMS] fp64 over the sequences, the loss [] and the metrics [METRICS], fp32."""
    tokens = column(partial, B, 1)
    for k in tl.static_range(SUMS):
        total = column(partial, B, k)
        tl.store(sums + k, total)
        if k == 0:
            tl.store(loss, total.to(tl.float32))
        if k > 1:
            tl.store(metrics + k - 2, mean_of(total, tokens).to(tl.float32))
