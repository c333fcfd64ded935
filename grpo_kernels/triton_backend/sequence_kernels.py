"""Kernels over the tokens of a sequence, and what they share.

A sequence is a row of [B, T], or of packed input the tokens between two entries of ``cu``. Each lane adds up its
tokens' values in fp64, and the lanes are added up once, after the last token: counts are exact, and two runs give the
same bits.
"""

from grpo_kernels.objective.corrections import mismatch, outside, within
from grpo_kernels.objective.language import jit, tl
from grpo_kernels.objective.token import joined, limited_ratio, log_ratio
from grpo_kernels.triton_backend.row_kernels import kernel

BLOCK = tl.constexpr(256)
SUFFIX_BLOCK = tl.constexpr(128)


@jit
def load_row(pointer, at, where, default):
    if pointer is not None:
        return tl.load(pointer + at, mask=where, other=0.0).to(tl.float32)
    else:
        return default


@jit
def no_sum():
    """A sum per lane, of nothing yet."""
    return tl.zeros([BLOCK], tl.float64)


@jit
def add(sums, where, value):
    """The sums per lane, with ``value`` added ``where`` it counts."""
    return sums + tl.where(where, value, 0.0).to(tl.float64)


@jit
def total_of(sums):
    return tl.sum(sums, axis=0)


@jit
def within_tokens(x, T):
    return tl.minimum(tl.maximum(x, 0), T)


@jit
def bounds(cu, seq, B, T):
    """First token of a sequence, the one after its last, and where what it writes ends.

    Packed tokens after the last sequence belong to none; the last one writes zeros there. Bounds
    outside of the T tokens are never used as addresses.
    """
    end = T.to(tl.int64)
    if cu is not None:
        last = within_tokens(tl.load(cu + seq + 1).to(tl.int64), end)
        return within_tokens(tl.load(cu + seq).to(tl.int64), end), last, tl.where(seq == B - 1, end, last)
    else:
        return tl.zeros([], tl.int64), end, end


@jit
def output_row(cu, seq, T):
    """Where a sequence's row begins in an output [B, T]; packed, the token says it all."""
    if cu is not None:
        return tl.zeros([], tl.int64)
    else:
        return seq * T


@jit
def unmasked(mask, at, inside):
    if mask is not None:
        return inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    else:
        return inside


@kernel
def spread_kernel(
    g, local, spread, share, up, cu,  # out: [B, T]; [B, T] ×3; [B, T], [] or None: upstream gradient; [B+1]
    up_b, up_t, B, T,
):  # fmt: skip
    """One program per sequence: g = up·local + share·Σ up·spread, over the sequence's tokens."""
    seq = tl.program_id(0).to(tl.int64)
    first, _, last = bounds(cu, seq, B, T)
    row = output_row(cu, seq, T)
    sums = no_sum()
    for start in range(first, last, BLOCK):
        tok = start + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(spread + row + tok, mask=tok < last, other=0.0)
        factor = load_row(up, seq * up_b + tok * up_t, tok < last, 1.0)
        sums = add(sums, x != 0.0, x * factor)
    whole = total_of(sums).to(tl.float32)
    for start in range(first, last, BLOCK):
        tok = start + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(local + row + tok, mask=tok < last, other=0.0)
        factor = load_row(up, seq * up_b + tok * up_t, tok < last, 1.0)
        part = tl.load(share + row + tok, mask=tok < last, other=0.0)
        common = tl.where(part == 0.0, 0.0, part * whole)
        tl.store(g + row + tok, tl.where(x == 0.0, 0.0, x * factor) + common, mask=tok < last)


@kernel
def correction_kernel(
    old, sampling, mask, out, cu,  # [B, T] ×3, out: [B, T] or [B, 1], [B+1]
    old_b, old_t, samp_b, samp_t, mask_b, mask_t, B, T, low: tl.float32, high: tl.float32,
    PER_SEQUENCE: tl.constexpr, TRUNCATE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One program per sequence: importance weights from the sampler's log-probabilities."""
    seq = tl.program_id(0).to(tl.int64)
    first, last, end = bounds(cu, seq, B, T)
    keep = 1.0
    if PER_SEQUENCE | GATED:
        sizes = no_sum()
        sums = no_sum()
        for start in range(first, last, BLOCK):
            tok = start + tl.arange(0, BLOCK).to(tl.int64)
            live = unmasked(mask, seq * mask_b + tok * mask_t, tok < last)
            sampled = tl.load(sampling + seq * samp_b + tok * samp_t, mask=live, other=0.0).to(tl.float32)
            d = mismatch(load_row(old, seq * old_b + tok * old_t, live, 0.0), sampled)
            sums = add(sums, live, d)
            sizes = add(sizes, live, 1.0)
        total = total_of(sums)
        if GATED:
            size = total_of(sizes)
            mean = tl.exp((total / tl.where(size < 1.0, 1.0, size)).to(tl.float32))
            keep = tl.where(outside(mean, low, high), 0.0, 1.0)
        else:
            tl.store(out + seq, within(tl.exp(total.to(tl.float32)), low, high, TRUNCATE))
    if not PER_SEQUENCE:
        for start in range(first, end, BLOCK):
            tok = start + tl.arange(0, BLOCK).to(tl.int64)
            live = unmasked(mask, seq * mask_b + tok * mask_t, tok < last)
            sampled = tl.load(sampling + seq * samp_b + tok * samp_t, mask=live, other=0.0).to(tl.float32)
            d = mismatch(load_row(old, seq * old_b + tok * old_t, live, 0.0), sampled)
            ratio = tl.exp(tl.where(live, d, 0.0))
            if GATED:
                ratio = tl.where(keep == 0.0, 0.0, ratio)
            else:
                ratio = within(ratio, low, high, TRUNCATE)
            tl.store(out + output_row(cu, seq, T) + tok, ratio, mask=tok < end)


@kernel
def segments_kernel(mask, cu, segments, lengths, mask_b, mask_t, B, N):
    """One program per packed sequence: its number at each of its tokens, and how many are unmasked.

    Tokens of no sequence get the number B: those before the first one from its program, those after the last one from
    its own. Every token gets a number, whatever the bounds are.
    """
    seq = tl.program_id(0).to(tl.int64)
    first, last, end = bounds(cu, seq, B, N)
    sizes = no_sum()
    for start in range(tl.where(seq == 0, 0, first), end, BLOCK):
        tok = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = (tok >= first) & (tok < last)
        live = unmasked(mask, tok * mask_t, inside)
        sizes = add(sizes, live, 1.0)
        tl.store(segments + tok, tl.where(inside, seq, B).to(tl.int32), mask=tok < end)
    tl.store(lengths + seq, total_of(sizes).to(tl.float32))


@kernel
def suffix_kernel(
    logps, old, mask, places, future, cu,  # [B, T] ×3, [N] or None, out: [B, T], [B+1]
    old_b, old_t, mask_b, mask_t, B, T, limits, c,
    FUNCTION: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """One program per sequence, from its end: ``future`` of a token is Σ γ^k·x of the k-th token after it, k ≥ 0.

    FUNCTION says what x and log₂ γ are. Masked tokens add nothing, and count as a step. ``places`` says how many steps
    lie between packed tokens whose sequences lack some. A block's tokens are joined in a tree, which is always the
    same, and get from the blocks after it what their first token's future is.
    """
    seq = tl.program_id(0).to(tl.int64)
    first, last, _ = bounds(cu, seq, B, T)
    row = output_row(cu, seq, T)
    lane = tl.arange(0, SUFFIX_BLOCK)
    carried = tl.zeros([], tl.float64)
    for start in range(0, last - first, SUFFIX_BLOCK):
        tok = last - 1 - start - lane.to(tl.int64)  # backwards: a scan from the first lane
        inside = tok >= first
        live = unmasked(mask, seq * mask_b + tok * mask_t, inside)
        lp = tl.load(logps + row + tok, mask=live, other=0.0)
        r = log_ratio(lp, load_row(old, seq * old_b + tok * old_t, live, lp))
        x, log2_decay = FUNCTION(limited_ratio(r, limits, LIMITED)[0], c)
        x = tl.where(live, x, 0.0).to(tl.float64)
        steps = tl.zeros([SUFFIX_BLOCK], tl.float64) + 1.0
        if places is not None:
            after = inside & (tok + 1 < last)
            there = tl.load(places + tok + 1, mask=after, other=1)
            steps = (there - tl.load(places + tok, mask=after, other=0)).to(tl.float64)
        decay, within = tl.associative_scan((tl.exp2(steps * log2_decay), x), 0, joined)
        F = joined(1.0, carried, decay, within)[1]
        tl.store(future + row + tok, F.to(tl.float32), mask=inside)
        carried = tl.sum(tl.where(lane == SUFFIX_BLOCK - 1, F, 0.0), axis=0)
