"""Rows held on chip between the two passes: the loss kernel for sm_90 and newer, in Gluon.

Persistent programs take rows in turns. A row's last lines stand in registers and its tiles in shared memory ("slots"),
from the first pass (the sum) to the second (the gradient), so that every logit is read once. The second pass of a row
and the first of the next run as one loop: a slot whose gradient is written is fetched anew, and summed LAG slots later.
So reads, writes and exponentials are always under way together. The numbers of a row are loaded one row ahead, its mask
and token two.

Of a longer row the first tiles have no slot. They pass through registers, loaded four tiles ahead. The first pass takes
them at its end, and asks L2 to keep them. The second takes them at its start, from the last to the first, and tells L2
that they are not needed any more. Four of them stay in registers from one pass to the other.

The sum is anchored at the token's logit: Σ 2^((x − x_token)·scale) needs no maximum. Where it is not below `ANCHORED`
(an improbable token, −inf, +inf or NaN) the row is read again and anchored at its maximum. Entries are words: two bf16
each, or one fp32 (WIDE). Objectives are those of `grpo_kernels.objective.token`; here is only a row's way through the
chip.
"""

import inspect

from grpo_kernels.objective.language import constant, tl
from grpo_kernels.objective.softmax import LN2, LOG2E, entropy_of, logp_of, token_slope
from grpo_kernels.objective.token import limited_ratio, log_ratio, token_objective, weight
from grpo_kernels.triton_backend.gluon_names import barrier, commit_group, gl, gluon, wait_group
from grpo_kernels.triton_backend.onchip_tiles import (
    absorb,
    as_words,
    fetch,
    load_passing,
    load_words,
    sum_at_maximum,
    sum_passing,
    sum_slots,
    words_at,
    write,
    write_either,
    write_passing,
)
from grpo_kernels.triton_backend.row import DEEP
from grpo_kernels.triton_backend.row_kernels import inverse_or, is_masked, load_or, row_at, store_values

# Above it g/Σ may be subnormal; an entropy is what two numbers of the size of log2 Σ leave.
ANCHORED, ANCHORED_ENTROPY = constant(2.0**64), constant(2.0**32)
SMALL = constant(1024.0)  # exponents below it have 13 bits behind the point: more than bf16 keeps
SIGNS = constant(-2147450880)  # 0x80008000: the signs of two entries
NOT_SCORED, MASKED, SKIPPED, LIVE = constant(0), constant(1), constant(2), constant(3)


def gluon_kernel(fn):
    """As `row_kernels.kernel`: specialised on structure alone, strides 64 bits wide."""
    names = inspect.signature(fn).parameters
    fn.__annotations__.update({name: tl.int64 for name in names if name.endswith(("_b", "_t"))})
    plain = [n for n, p in names.items() if p.annotation is not tl.constexpr and n not in ("c", "cap", "limits")]
    return gluon.jit(fn, do_not_specialize=plain, do_not_specialize_on_alignment=plain)


@gluon.jit
def place_of(segments, n, B, T, rows, all_rows):
    """(sequence, token, whether it is scored) of row n, 32 bits; a row of no sequence gets a legal place."""
    row = gl.minimum(n, all_rows - 1)
    if segments is not None:
        seq = gl.load(segments + row)
        tok = row
    else:
        seq = row // rows
        tok = row % rows
    scored = (n < all_rows) & (tok < T) & (seq < B)
    return gl.minimum(seq, B - 1), gl.minimum(tok, T - 1), scored


@gluon.jit
def look_ahead(ids, mask, adv, segments, n, ids_b, ids_t, mask_b, mask_t, adv_b, adv_t, B, T, V, rows, all_rows,
               SKIP: gl.constexpr):  # fmt: skip
    """(state, sequence, token, token id) of row n; the id is −1 where the vocabulary does not have it."""
    seq, tok, scored = place_of(segments, n, B, T, rows, all_rows)
    state = gl.where(scored, LIVE, NOT_SCORED)
    if SKIP:
        A = gl.load(adv + seq * adv_b + tok * adv_t).to(gl.float32)
        state = gl.where(scored & (A == 0.0), SKIPPED, state)
    if mask is not None:
        state = gl.where(scored & is_masked(mask, seq * mask_b + tok * mask_t), MASKED, state)
    token = gl.load(ids + seq * ids_b + tok * ids_t).to(gl.int64)
    return state, seq, tok, gl.where((token >= 0) & (token < V), token, -1).to(gl.int32)


@gluon.jit
def token_logit(row, token, live):
    """NaN for an id outside the vocabulary, never read; nor is a row that is not live."""
    return gl.load(row + token, mask=live & (token >= 0), other=float("nan")).to(gl.float32)


@gluon_kernel
def onchip_kernel(
    logits, out, ids, mask, old, ref, adv, rewards, is_weight, temperature,  # as loss_kernel
    groups, batch_std, segments,
    logps, entropy,
    count, loss_scale,
    tokens, entropy_coef,
    logits_b, logits_t, out_b, out_t, ids_b, ids_t, mask_b, mask_t,
    old_b, old_t, ref_b, ref_t, adv_b, adv_t, is_b, is_t, temp_b, temp_t, count_b, at_b,
    B, T, rows, V, G, inv_temperature: tl.float32, cap, beta: tl.float32,
    w_factor: tl.float32, h_factor: tl.float32, adv_eps: tl.float32, limits, c,
    TERM: tl.constexpr, KL: tl.constexpr, BIAS: tl.constexpr, LIMITED: tl.constexpr, CLAMPED: tl.constexpr,
    SCALE: tl.constexpr, UNBIASED: tl.constexpr, SKIP: tl.constexpr, ENTROPY: tl.constexpr, BONUS: tl.constexpr,
    tickets,
    S: tl.constexpr, K: tl.constexpr, PASSING: tl.constexpr, PK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    D3: tl.constexpr, LAG: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """`loss_kernel`, with its arguments; rewards, groups and a cap are not there. Rows are multiples of 16 bytes.

    PASSING tiles of PK lines (0 or at least 4), S tiles of K lines in slots, then D1 + D2 + D3 lines in registers (D3
    may be 0); a line is 16 bytes a thread. The tiles are full: their lines are less than a row.

    A program's first three rows follow from its number. ``tickets`` is a 0 in memory, from which programs draw their
    further rows, so that one whose rows are masked takes more of them; None: every program takes each P-th row.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    ACC: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, L))
    N: gl.constexpr = 32 * WARPS
    LIMIT: gl.constexpr = ANCHORED_ENTROPY if ENTROPY else ANCHORED
    LINE: gl.constexpr = N * 4
    TILE: gl.constexpr = K * LINE
    WIDE: gl.constexpr = logits.dtype.element_ty == gl.float32
    PASSING_TILE: gl.constexpr = PK * LINE
    BEFORE: gl.constexpr = PASSING * PASSING_TILE  # where the slots' part of a row starts
    END = V // 4 * 4 if WIDE else V // 8 * 4  # so written it is known to be a multiple of 4
    many = S  # as loops know it: where it is no constant they are not unrolled, which would spill
    passing = PASSING
    if WIDE or PASSING > 0:
        many = gl.minimum(END // TILE, S)
        passing = PASSING - S + many
    P = gl.num_programs(0)
    slots = gl.allocate_shared_memory(gl.int32, [S, K, N, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    at0 = words_at(0, PK, N, L)
    at = words_at(BEFORE, K, N, L)
    at1 = words_at(BEFORE + S * TILE, D1, N, L)
    at2 = words_at(BEFORE + S * TILE + D1 * LINE, D2, N, L)
    if D3 > 0:
        at3 = words_at(BEFORE + S * TILE + (D1 + D2) * LINE, D3, N, L)
    zeros = gl.zeros([K, N, 4], gl.int32, L)
    nothing = gl.zeros([N], gl.float32, ACC)
    all_rows = rows
    if segments is None:
        all_rows = B * rows
    factor = load_or(loss_scale, 0, 1.0)
    h = 0.0
    if BONUS:
        h = -weight(load_or(tokens, 0, 1.0), h_factor * load_or(entropy_coef, 0, 1.0) * factor)

    # The first row: its first pass alone.
    n = gl.program_id(0)
    state, seq, tok, token = look_ahead(ids, mask, adv, segments, n, ids_b, ids_t, mask_b, mask_t, adv_b, adv_t, B, T,
                                        V, rows, all_rows, SKIP)  # fmt: skip
    live = state == LIVE
    row = row_at(logits, seq, tok, logits_b, logits_t, True)
    x_token = token_logit(row, token, live)
    scale = inverse_or(temperature, seq * temp_b + tok * temp_t, inv_temperature) * LOG2E
    A = gl.load(adv + seq * adv_b + tok * adv_t).to(gl.float32)
    counted = load_or(count, seq * count_b, 1.0)
    lp_old = load_or(old, seq * old_b + tok * old_t, 0.0)
    lp_ref = load_or(ref, seq * ref_b + tok * ref_t, 0.0)
    trust = load_or(is_weight, seq * is_b + tok * is_t, 1.0)
    n1 = n + P
    state1, seq1, tok1, token1 = look_ahead(ids, mask, adv, segments, n1, ids_b, ids_t, mask_b, mask_t, adv_b,
                                            adv_t, B, T, V, rows, all_rows, SKIP)  # fmt: skip
    n2 = n1 + P
    src = as_words(row)
    end = gl.where(live, END, 0)
    for s in range(many):
        fetch(slots, s, src, at + s * TILE, live)
    part1 = load_words(src, at1, end, WIDE, "evict_first")
    part2 = load_words(src, at2, end, WIDE, "evict_first")
    if D3 > 0:
        part3 = load_words(src, at3, end, WIDE, "evict_first")
    if PASSING > 0:
        w1, w2, w3, w4 = load_passing(src, at0, end, WIDE, PASSING_TILE)
    off1 = x_token * scale
    total, moment = sum_slots(slots, nothing, nothing, scale, off1, many, S, L, ENTROPY, WIDE)
    total, moment = absorb(total, moment, part1, scale, off1, ENTROPY, WIDE)
    total, moment = absorb(total, moment, part2, scale, off1, ENTROPY, WIDE)
    if D3 > 0:
        total, moment = absorb(total, moment, part3, scale, off1, ENTROPY, WIDE)
    if PASSING > 0:
        total, moment, w1, w2, w3, w4 = sum_passing(
            total, moment, w1, w2, w3, w4, src, at0, end, scale, off1, passing, PASSING_TILE, ENTROPY, WIDE,
        )  # fmt: skip

    while n < all_rows:
        # Of the next row all numbers, of the one after it the mask and the token.
        live1 = state1 == LIVE
        row1 = row_at(logits, seq1, tok1, logits_b, logits_t, True)
        x_token1 = token_logit(row1, token1, live1)
        scale1 = inverse_or(temperature, seq1 * temp_b + tok1 * temp_t, inv_temperature) * LOG2E
        A1 = gl.load(adv + seq1 * adv_b + tok1 * adv_t).to(gl.float32)
        counted1 = load_or(count, seq1 * count_b, 1.0)
        lp_old1 = load_or(old, seq1 * old_b + tok1 * old_t, 0.0)
        lp_ref1 = load_or(ref, seq1 * ref_b + tok1 * ref_t, 0.0)
        trust1 = load_or(is_weight, seq1 * is_b + tok1 * is_t, 1.0)
        state2, seq2, tok2, token2 = look_ahead(ids, mask, adv, segments, n2, ids_b, ids_t, mask_b, mask_t, adv_b,
                                                adv_t, B, T, V, rows, all_rows, SKIP)  # fmt: skip
        off1 = x_token1 * scale1
        src1 = as_words(row1)
        end1 = gl.where(live1, END, 0)

        place = n.to(gl.int64)
        if segments is None:
            place = (n % rows).to(gl.int64)
        dst_row = row_at(out, seq, place, out_b, out_t, True)
        dst = as_words(dst_row)
        at_value = seq * at_b + tok
        off = x_token * scale
        g = 0.0
        slope = 0.0
        pull = 0.0
        d_token = 0.0
        idle = state != LIVE
        if state == LIVE:
            row_total = gl.sum(total, axis=0)
            row_moment = gl.sum(moment, axis=0)
            if not (row_total < LIMIT):
                top, row_total, row_moment = sum_at_maximum(as_words(row), words_at(0, K, N, L), END, TILE, scale, L,
                                                            ENTROPY, N, WIDE)  # fmt: skip
                off = top * scale
            depth = gl.fma(x_token, scale, -off)
            lp = logp_of(depth, row_total)
            mean = row_moment / row_total
            store_values(logps, entropy, at_value, lp, entropy_of(row_total, mean), ENTROPY)
            lp_then = lp_old
            if old is None:
                lp_then = lp
            r, passes = limited_ratio(log_ratio(lp, lp_then), limits, LIMITED)
            _, _, _, d_ratio, d_lp = token_objective(r, passes, r, lp, lp_then, lp_ref, A, trust, beta, limits, c,
                                                     TERM, KL, BIAS, False, is_weight is not None, LIMITED,
                                                     CLAMPED)  # fmt: skip
            g = weight(counted, w_factor * factor) * (d_ratio + d_lp)
            idle = (g == 0.0) & (h == 0.0)
            g = g * (scale * LN2)
            slope = -g / row_total
            d_token = token_slope(depth, row_total, g)
            if BONUS:
                pull = -h * (scale * LN2) * LN2 / row_total
                slope = slope - pull * mean
                d_token = d_token + gl.exp2(depth) * pull * (gl.maximum(depth, DEEP) - mean)
        else:
            if state != NOT_SCORED:
                value = gl.where(state == SKIPPED, float("nan"), 0.0)
                store_values(logps, entropy, at_value, value, value, ENTROPY)
            else:
                if segments is not None:
                    store_values(logps, entropy, place, 0.0, 0.0, ENTROPY)

        folded = off - gl.log2(gl.abs(slope))
        signs = gl.where(slope < 0.0, SIGNS, 0)
        regular = not idle
        if not (BONUS or WIDE):
            regular = regular & (gl.abs(folded) < SMALL)
        total = nothing
        moment = nothing
        if regular:
            write_either(dst, at1, END, part1, scale, off, slope, pull, folded, signs, True, BONUS, WIDE)
            part1 = load_words(src1, at1, end1, WIDE, "evict_first")
            write_either(dst, at2, END, part2, scale, off, slope, pull, folded, signs, True, BONUS, WIDE)
            if D3 > 0:
                write_either(dst, at3, END, part3, scale, off, slope, pull, folded, signs, True, BONUS, WIDE)
            part2 = load_words(src1, at2, end1, WIDE, "evict_first")
            if D3 > 0:
                part3 = load_words(src1, at3, end1, WIDE, "evict_first")
            if PASSING > 0:
                write_passing(dst, at0, END, w1, w2, w3, w4, as_words(row), scale, off, slope, pull, folded, signs,
                              passing, PASSING_TILE, BONUS, WIDE)  # fmt: skip
            for s in range(many - S + LAG):
                write_either(dst, at + s * TILE, END, slots.index(s).load(L), scale, off, slope, pull, folded, signs,
                             False, BONUS, WIDE)  # fmt: skip
                fetch(slots, s, src1, at + s * TILE, live1)
            if tickets is not None:
                ticket = gl.atomic_add(tickets, 1, sem="relaxed")
            for s in range(LAG, many):
                write_either(dst, at + s * TILE, END, slots.index(s).load(L), scale, off, slope, pull, folded, signs,
                             False, BONUS, WIDE)  # fmt: skip
                fetch(slots, s, src1, at + s * TILE, live1)
                wait_group(LAG)
                word = slots.index(s - LAG).load(L)
                total, moment = absorb(total, moment, word, scale1, off1, ENTROPY, WIDE)
            if PASSING > 0:
                w1, w2, w3, w4 = load_passing(src1, at0, end1, WIDE, PASSING_TILE)
            for s in range(many - LAG, many):
                commit_group()
                wait_group(LAG)
                word = slots.index(s).load(L)
                total, moment = absorb(total, moment, word, scale1, off1, ENTROPY, WIDE)
            barrier()  # the token's entry is stored by another thread than the line's
            gl.store(dst_row + token, d_token.to(out.dtype.element_ty), mask=token >= 0)
            total, moment = absorb(total, moment, part1, scale1, off1, ENTROPY, WIDE)
            total, moment = absorb(total, moment, part2, scale1, off1, ENTROPY, WIDE)
            if D3 > 0:
                total, moment = absorb(total, moment, part3, scale1, off1, ENTROPY, WIDE)
            if PASSING > 0:
                total, moment, w1, w2, w3, w4 = sum_passing(
                    total, moment, w1, w2, w3, w4, src1, at0, end1, scale1, off1, passing, PASSING_TILE, ENTROPY, WIDE,
                )  # fmt: skip
        else:
            if not idle:  # an exponent or a slope that `write_folded` cannot hold
                write(dst, at1, END, part1, scale, off, slope, pull, True, BONUS, WIDE)
                write(dst, at2, END, part2, scale, off, slope, pull, True, BONUS, WIDE)
                if D3 > 0:
                    write(dst, at3, END, part3, scale, off, slope, pull, True, BONUS, WIDE)
                for s in range(many):
                    word = slots.index(s).load(L)
                    write(dst, at + s * TILE, END, word, scale, off, slope, pull, False, BONUS, WIDE)
                for t in range(passing):
                    word = load_words(as_words(row), at0 + t * PASSING_TILE, END, WIDE, "evict_first")
                    write(dst, at0 + t * PASSING_TILE, END, word, scale, off, slope, pull, False, BONUS, WIDE)
            barrier()  # before the slots are overwritten, and the token's entry is stored
            if live1:
                for s in range(many):
                    fetch(slots, s, src1, at + s * TILE, live1)
                part1 = load_words(src1, at1, end1, WIDE, "evict_first")
                part2 = load_words(src1, at2, end1, WIDE, "evict_first")
                if D3 > 0:
                    part3 = load_words(src1, at3, end1, WIDE, "evict_first")
                if PASSING > 0:
                    w1, w2, w3, w4 = load_passing(src1, at0, end1, WIDE, PASSING_TILE)
            if tickets is not None:
                ticket = gl.atomic_add(tickets, 1, sem="relaxed")
            if idle:
                for start in range(0, END, TILE):
                    gl.store(dst + at + (start - BEFORE), zeros, mask=at + (start - BEFORE) < END)
            else:
                gl.store(dst_row + token, d_token.to(out.dtype.element_ty), mask=token >= 0)
            if live1:
                total, moment = sum_slots(slots, total, moment, scale1, off1, many, S, L, ENTROPY, WIDE)
                total, moment = absorb(total, moment, part1, scale1, off1, ENTROPY, WIDE)
                total, moment = absorb(total, moment, part2, scale1, off1, ENTROPY, WIDE)
                if D3 > 0:
                    total, moment = absorb(total, moment, part3, scale1, off1, ENTROPY, WIDE)
                if PASSING > 0:
                    total, moment, w1, w2, w3, w4 = sum_passing(
                        total, moment, w1, w2, w3, w4, src1, at0, end1, scale1, off1, passing, PASSING_TILE, ENTROPY,
                        WIDE,
                    )  # fmt: skip

        n = n1
        n1 = n2
        if tickets is not None:
            n2 = 3 * P + ticket
        else:
            n2 = n2 + P
        state = state1
        seq = seq1
        tok = tok1
        token = token1
        row = row1
        x_token = x_token1
        scale = scale1
        A = A1
        counted = counted1
        lp_old = lp_old1
        lp_ref = lp_ref1
        trust = trust1
        state1 = state2
        seq1 = seq2
        tok1 = tok2
        token1 = token2
