"""The row kernels: one program per row of logits, on a 1-D grid.

Padded logits have ``rows`` positions per sequence, of which the first ``T`` are scored; the others
are never read and get gradient 0. Packed logits are one long sequence of rows, and ``segments``
says which sequence a row belongs to. Either way a tensor comes with two strides, of the sequence
and of the token (0 broadcasts), and outputs [B, T] are contiguous, ``at_b`` apart. A pointer may be
None where an input does not exist. Scalars that change from call to call are plain fp32 or
unspecialised integers, so that nothing recompiles for a new length, batch size or coefficient.
"""

import inspect

from grpo_kernels.objective.language import jit, tl
from grpo_kernels.objective.softmax import LOG2E, entropy_of, logp_of
from grpo_kernels.objective.token import limited_ratio, log_ratio, token_objective, weight
from grpo_kernels.triton_backend.masks import restriction
from grpo_kernels.triton_backend.rewards import group_advantage
from grpo_kernels.triton_backend.row import read_row, score_row, token_logit, write_slope, write_zeros
from grpo_kernels.triton_backend.scaled_row import scale_row
from grpo_kernels.triton_backend.support_rows import range_of, score_support, write_support


def kernel(fn):
    """``@jit`` that specialises on structure alone: no integer's value or size, no pointer's alignment.

    The exception is V, which a model fixes. Row pointers are declared aligned through ALIGNED.
    Parameters that end in _b or _t are strides, and 64 bits wide.
    """
    strides = [n for n in inspect.signature(fn).parameters if n.endswith(("_b", "_t"))]
    fn.__annotations__.update(dict.fromkeys(strides, tl.int64))
    runtime = [n for n, p in inspect.signature(fn).parameters.items() if p.annotation is not tl.constexpr]
    plain = [n for n in runtime if n not in ("V", "c", "cap", "teacher_cap", "limits")]
    return jit(fn, do_not_specialize=plain, do_not_specialize_on_alignment=plain)


@jit
def place(segments, rows):
    """(sequence, token) of this program's row."""
    row = tl.program_id(0)
    if segments is not None:
        return tl.load(segments + row).to(tl.int64), row.to(tl.int64)
    else:
        return (row // rows).to(tl.int64), (row % rows).to(tl.int64)


@jit
def row_at(base, seq, tok, stride_b, stride_t, ALIGNED: tl.constexpr):
    row = base + seq * stride_b + tok * stride_t
    if ALIGNED:
        row = tl.multiple_of(row, 16)
    return row


@jit
def load_or(pointer, at, default):
    """A scalar, or ``default`` where there is no such input (Triton 3.6 cannot return None)."""
    if pointer is not None:
        return tl.load(pointer + at).to(tl.float32)
    else:
        return default


@jit
def store_values(logps, entropy, at, lp, H, ENTROPY: tl.constexpr):
    tl.store(logps + at, lp)
    if ENTROPY:
        tl.store(entropy + at, H)


@jit
def store_stats(stats, at, top, total, mean):
    tl.store(stats + at * 3, top)
    tl.store(stats + at * 3 + 1, total)
    tl.store(stats + at * 3 + 2, mean)


@jit
def inverse_or(temperature, at, default):
    if temperature is not None:
        return 1.0 / tl.load(temperature + at).to(tl.float32)
    else:
        return default


@jit
def is_masked(mask, at):
    if mask is not None:
        return tl.load(mask + at) == 0
    else:
        return False


@jit
def advantage_of(adv, at, rewards, groups, batch_std, seq, B, G, eps, SCALE: tl.constexpr, UNBIASED: tl.constexpr):
    if adv is not None:
        return tl.load(adv + at).to(tl.float32)
    else:
        return group_advantage(rewards, groups, batch_std, seq, B, G, eps, SCALE, UNBIASED)[0]


@jit
def score(row, token, support, first, last, V, scale, cap, only, ALIGNED: tl.constexpr, K: tl.constexpr,
          N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr, ENTROPY: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """`score_row`, over the ids of a support where the row has any."""
    if support is not None:
        if first < last:
            top, total, mean, x_token, depth = score_support(row, token, support, first, last, V, scale, cap, N,
                                                             ENTROPY, False)  # fmt: skip
            lp = logp_of(depth, total)
        else:
            top, total, mean, x_token, lp = score_row(row, token, V, scale, cap, None, ALIGNED, K, N, W, EDGE, ENTROPY,
                                                      HINT)  # fmt: skip
        return top, total, mean, x_token, lp
    else:
        return score_row(row, token, V, scale, cap, only, ALIGNED, K, N, W, EDGE, ENTROPY, HINT)


@jit
def score_part(row, token, support, first, last, V, scale, cap, only, ALIGNED: tl.constexpr, K: tl.constexpr,
               N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr, ENTROPY: tl.constexpr,
               HINT: tl.constexpr):  # fmt: skip
    """(top, total, mean) of a row that is a part of a whole one, and the token's depth, NaN if it is not in there."""
    if support is not None:
        if first < last:
            top, total, mean, _, depth = score_support(row, token, support, first, last, V, scale, cap, N, ENTROPY,
                                                       True)  # fmt: skip
        else:
            top, total, mean = read_row(row, V, scale, cap, None, ALIGNED, K, N, W, EDGE, ENTROPY, HINT)
            depth = (token_logit(row, token, V, cap) - top) * scale
        return top, total, mean, depth
    else:
        top, total, mean = read_row(row, V, scale, cap, only, ALIGNED, K, N, W, EDGE, ENTROPY, HINT)
        return top, total, mean, (token_logit(row, token, V, cap) - top) * scale


@jit
def write(out, row, token, x_token, support, first, last, scratch, V, scale, cap, only, top, total, mean, g, h,
          ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr,
          ENTROPY: tl.constexpr):  # fmt: skip
    """`write_slope`, of the ids of a support where the row has any."""
    if support is not None:
        if first < last:
            write_support(out, row, token, x_token, support, first, last, scratch, V, scale, cap, top, total, mean, g,
                          h, ALIGNED, K, N, W, EDGE, ENTROPY)  # fmt: skip
        else:
            write_slope(out, row, token, x_token, V, scale, cap, None, top, total, mean, g, h, ALIGNED, K, N, W, EDGE,
                        ENTROPY, "evict_first")  # fmt: skip
    else:
        write_slope(out, row, token, x_token, V, scale, cap, only, top, total, mean, g, h, ALIGNED, K, N, W, EDGE,
                    ENTROPY, "evict_first")  # fmt: skip


@jit
def only_of(keep, seq, tok, keep_b, keep_t, known, at, token, V, N: tl.constexpr, KEEP_ALIGNED: tl.constexpr):
    """What a mask restricts this program's row to, see `masks`."""
    return restriction(row_at(keep, seq, tok, keep_b, keep_t, KEEP_ALIGNED), known, at, token, V, N)


@kernel
def logprob_kernel(
    logits, ids, mask, adv, rewards, temperature,  # [B, rows, V], [B, T], [B, T], [B, T], [B], [B, T]
    groups, batch_std, segments,  # [2, B], [], [N]
    logps, entropy, stats,  # out: [B, T], [B, T], [B·T, 3]
    logits_b, logits_t, ids_b, ids_t, mask_b, mask_t, adv_b, adv_t, temp_b, temp_t,
    B, T, V, G, inv_temperature: tl.float32, cap, adv_eps: tl.float32,
    support, support_first, support_last, keep, M,  # [M], [B, T] ×2; or [B, T, V]
    support_b, support_t, keep_b, keep_t,
    SCALE: tl.constexpr, UNBIASED: tl.constexpr, SKIP: tl.constexpr, ENTROPY: tl.constexpr, PART: tl.constexpr,
    KEEP_ALIGNED: tl.constexpr,
    ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Log-probability (and entropy) of each token; ``stats`` keeps what a gradient needs of the row.

    SKIP leaves rows of advantage 0 unread; the advantages serve nothing else here. Of PART of a
    vocabulary the token's depth takes the place of its log-probability, NaN if it is not in there; no
    entropy is stored, and total −1 where a row is not read. Of a row with a support its entries alone are read.
    """
    ENTROPIES: tl.constexpr = ENTROPY and not PART
    seq, tok = place(segments, T)
    at = tl.program_id(0).to(tl.int64)
    if (seq >= B) | is_masked(mask, seq * mask_b + tok * mask_t):
        store_values(logps, entropy, at, 0.0, 0.0, ENTROPIES)
        if PART:
            store_stats(stats, at, 0.0, -1.0, 0.0)
        return
    if SKIP:
        A = advantage_of(adv, seq * adv_b + tok * adv_t, rewards, groups, batch_std, seq, B, G, adv_eps, SCALE,
                         UNBIASED)  # fmt: skip
        if A == 0.0:
            store_values(logps, entropy, at, float("nan"), float("nan"), ENTROPIES)
            if PART:
                store_stats(stats, at, 0.0, -1.0, 0.0)
            return
    scale = inverse_or(temperature, seq * temp_b + tok * temp_t, inv_temperature) * LOG2E
    token = tl.load(ids + seq * ids_b + tok * ids_t).to(tl.int64)
    row = row_at(logits, seq, tok, logits_b, logits_t, ALIGNED)
    only = None
    listed = seq * support_b + tok * support_t
    if keep is not None:
        only = only_of(keep, seq, tok, keep_b, keep_t, support_last, listed, token, V, N, KEEP_ALIGNED)
    first, last = range_of(support_first, support_last, listed, M)
    if PART:
        top, total, mean, lp = score_part(row, token, support, first, last, V, scale, cap, only, ALIGNED, K, N, W, EDGE,
                                          ENTROPY, "evict_first")  # fmt: skip
    else:
        top, total, mean, _, lp = score(row, token, support, first, last, V, scale, cap, only, ALIGNED, K, N, W, EDGE,
                                        ENTROPY, "evict_first")  # fmt: skip
    store_values(logps, entropy, at, lp, entropy_of(total, mean), ENTROPIES)
    store_stats(stats, at, top, total, mean)


@kernel
def slope_kernel(
    logits, out, ids, mask, temperature, segments, stats,  # [B, rows, V] ×2, [B, T] ×3, [N], [B·T, 3]
    g, h, up,  # [B, T] ∂L/∂lp, [B, T] ∂L/∂H, [B, T], [] or None: upstream gradient, a factor of both
    logits_b, logits_t, out_b, out_t, ids_b, ids_t, mask_b, mask_t, temp_b, temp_t, up_b, up_t, at_b,
    B, T, rows, V, inv_temperature: tl.float32, cap,
    support, support_first, support_last, keep, M, scratch,  # [M], [B, T] ×2; or [B, T, V]; [M] or None
    support_b, support_t, keep_b, keep_t,
    KEEP_ALIGNED: tl.constexpr,
    ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits from two numbers per row; the same for every objective. g = h = 0: not read."""
    seq, tok = place(segments, rows)
    dst = row_at(out, seq, tok, out_b, out_t, ALIGNED)
    if (tok >= T) | (seq >= B):
        write_zeros(dst, V, ALIGNED, K, N, W, EDGE)
        return
    if is_masked(mask, seq * mask_b + tok * mask_t):
        write_zeros(dst, V, ALIGNED, K, N, W, EDGE)
        return
    at = seq * at_b + tok
    slope = tl.load(g + at)
    pull = 0.0
    if h is not None:
        pull = tl.load(h + at)
    if (slope == 0.0) & (pull == 0.0):
        write_zeros(dst, V, ALIGNED, K, N, W, EDGE)
        return
    if up is not None:
        factor = tl.load(up + seq * up_b + tok * up_t).to(tl.float32)
        slope = slope * factor
        pull = pull * factor
    scale = inverse_or(temperature, seq * temp_b + tok * temp_t, inv_temperature) * LOG2E
    row = row_at(logits, seq, tok, logits_b, logits_t, ALIGNED)
    token = tl.load(ids + seq * ids_b + tok * ids_t).to(tl.int64)
    top = tl.load(stats + at * 3)
    total = tl.load(stats + at * 3 + 1)
    mean = tl.load(stats + at * 3 + 2)
    x_token = token_logit(row, token, V, cap)
    only = None
    listed = seq * support_b + tok * support_t
    if keep is not None:
        only = only_of(keep, seq, tok, keep_b, keep_t, support_last, listed, token, V, N, KEEP_ALIGNED)
    first, last = range_of(support_first, support_last, listed, M)
    write(dst, row, token, x_token, support, first, last, scratch, V, scale, cap, only, top, total, mean, slope, pull,
          ALIGNED, K, N, W, EDGE, h is not None)  # fmt: skip


@kernel
def loss_kernel(
    logits, out, ids, mask, old, ref, adv, rewards, is_weight, temperature,  # [B, rows, V] ×2, [B, T] ×5, [B], ×2
    groups, batch_std, segments,  # [2, B], [], [N]
    logps, entropy,  # out: [B, T]
    count, loss_scale,  # the weight's count [B] or [], and its factor []
    tokens, entropy_coef,  # the bonus's count [], and its factor []
    logits_b, logits_t, out_b, out_t, ids_b, ids_t, mask_b, mask_t,
    old_b, old_t, ref_b, ref_t, adv_b, adv_t, is_b, is_t, temp_b, temp_t, count_b, at_b,
    B, T, rows, V, G, inv_temperature: tl.float32, cap, beta: tl.float32,
    w_factor: tl.float32, h_factor: tl.float32, adv_eps: tl.float32, limits, c,
    support, support_first, support_last, keep, M, scratch,  # [M], [B, T] ×2; or [B, T, V]; [M] or None
    support_b, support_t, keep_b, keep_t,
    TERM: tl.constexpr, KL: tl.constexpr, BIAS: tl.constexpr, LIMITED: tl.constexpr, CLAMPED: tl.constexpr,
    SCALE: tl.constexpr, UNBIASED: tl.constexpr, SKIP: tl.constexpr, ENTROPY: tl.constexpr, BONUS: tl.constexpr,
    KEEP_ALIGNED: tl.constexpr,
    ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Token-level objectives in one launch: log-probability, loss derivative and gradient of a row."""
    seq, tok = place(segments, rows)
    dst = row_at(out, seq, tok, out_b, out_t, ALIGNED)
    at = seq * at_b + tok
    if (tok >= T) | (seq >= B):
        if segments is not None:
            store_values(logps, entropy, at, 0.0, 0.0, ENTROPY)
        write_zeros(dst, V, ALIGNED, K, N, W, EDGE)
        return
    if is_masked(mask, seq * mask_b + tok * mask_t):
        store_values(logps, entropy, at, 0.0, 0.0, ENTROPY)
        write_zeros(dst, V, ALIGNED, K, N, W, EDGE)
        return
    A = advantage_of(adv, seq * adv_b + tok * adv_t, rewards, groups, batch_std, seq, B, G, adv_eps, SCALE, UNBIASED)
    if SKIP:
        if A == 0.0:
            store_values(logps, entropy, at, float("nan"), float("nan"), ENTROPY)
            write_zeros(dst, V, ALIGNED, K, N, W, EDGE)
            return

    # The weight comes before the row, which leaves fewer scalars to hold while it streams by; the bonus's after it,
    # whose two numbers are everybody's.
    token = tl.load(ids + seq * ids_b + tok * ids_t).to(tl.int64)
    factor = load_or(loss_scale, 0, 1.0)
    w = weight(load_or(count, seq * count_b, 1.0), w_factor * factor)

    scale = inverse_or(temperature, seq * temp_b + tok * temp_t, inv_temperature) * LOG2E
    row = row_at(logits, seq, tok, logits_b, logits_t, ALIGNED)
    only = None
    listed = seq * support_b + tok * support_t
    if keep is not None:
        only = only_of(keep, seq, tok, keep_b, keep_t, support_last, listed, token, V, N, KEEP_ALIGNED)
    first, last = range_of(support_first, support_last, listed, M)
    top, total, mean, x_token, lp = score(row, token, support, first, last, V, scale, cap, only, ALIGNED, K, N, W, EDGE,
                                          ENTROPY, "evict_last")  # fmt: skip
    store_values(logps, entropy, at, lp, entropy_of(total, mean), ENTROPY)

    lp_old = load_or(old, seq * old_b + tok * old_t, lp)
    lp_ref = load_or(ref, seq * ref_b + tok * ref_t, 0.0)
    trust = load_or(is_weight, seq * is_b + tok * is_t, 1.0)
    r, passes = limited_ratio(log_ratio(lp, lp_old), limits, LIMITED)
    _, _, _, d_ratio, d_lp = token_objective(r, passes, r, lp, lp_old, lp_ref, A, trust, beta, limits, c,
                                             TERM, KL, BIAS, False, is_weight is not None, LIMITED,
                                             CLAMPED)  # fmt: skip
    h = 0.0
    if BONUS:
        h = -weight(load_or(tokens, 0, 1.0), h_factor * load_or(entropy_coef, 0, 1.0) * factor)
    g = w * (d_ratio + d_lp)
    if (g == 0.0) & (h == 0.0):
        tl.debug_barrier()  # in place: x_token was read by every thread before any entry is overwritten
        write_zeros(dst, V, ALIGNED, K, N, W, EDGE)
    else:
        write(dst, row, token, x_token, support, first, last, scratch, V, scale, cap, only, top, total, mean, g, h,
              ALIGNED, K, N, W, EDGE, BONUS)  # fmt: skip


@kernel
def scale_kernel(
    grad, out, up,  # [B, rows, V], [B, rows, V], []
    grad_b, grad_t, out_b, out_t,
    B, rows, V,
    SAME: tl.constexpr, ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """out = grad · up, rows in turns. Where both are one tensor (SAME) and up is 1, nothing is read or written."""
    factor = tl.load(up).to(tl.float32)
    if SAME:
        if factor == 1.0:
            return
    for row in range(tl.program_id(0), B * rows, tl.num_programs(0)):
        seq = (row // rows).to(tl.int64)
        tok = (row % rows).to(tl.int64)
        src = row_at(grad, seq, tok, grad_b, grad_t, ALIGNED)
        dst = row_at(out, seq, tok, out_b, out_t, ALIGNED)
        scale_row(dst, src, V, factor, ALIGNED, K, N, W, EDGE)
