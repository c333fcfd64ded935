"""Kernels over the tokens of a sequence, one program each, and what they share.

A sequence is a row of [B, T], or of packed input the tokens between two entries of ``cu``. Sums are
taken in a fixed order, in fp32 within a tile and in fp64 across tiles: two runs give the same bits,
and counts stay exact.
"""

from grpo_kernels.objective.corrections import mismatch, outside, within
from grpo_kernels.objective.language import jit, tl
from grpo_kernels.objective.metrics import SUM_NAMES
from grpo_kernels.triton_backend.row_kernels import kernel

BLOCK = tl.constexpr(256)
SUMS = tl.constexpr(len(SUM_NAMES))


@jit
def load_row(pointer, at, where, default):
    if pointer is not None:
        return tl.load(pointer + at, mask=where, other=0.0).to(tl.float32)
    else:
        return default


@jit
def add(total, value):
    return total + tl.sum(value, axis=0).to(tl.float64)


@jit
def nothing():
    return tl.sum(tl.zeros([BLOCK], tl.float32), axis=0).to(tl.float64)


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
def unmasked(mask, at, inside):
    if mask is not None:
        return inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    else:
        return inside


@kernel
def spread_kernel(
    g, local, spread, share, up, cu,  # out: [B, T]; [B, T] ×3; [B, T] or None: upstream gradient; [B+1]
    up_b, up_t, at_b, B, T,
):  # fmt: skip
    """One program per sequence: g = up·local + share·Σ up·spread, over the sequence's tokens."""
    seq = tl.program_id(0).to(tl.int64)
    first, _, last = bounds(cu, seq, B, T)
    total = nothing()
    for start in range(first, last, BLOCK):
        tok = start + tl.arange(0, BLOCK).to(tl.int64)
        at = seq * at_b + tok
        x = tl.load(spread + at, mask=tok < last, other=0.0)
        factor = load_row(up, seq * up_b + tok * up_t, tok < last, 1.0)
        total = add(total, tl.where(x == 0.0, 0.0, x * factor))
    whole = total.to(tl.float32)
    for start in range(first, last, BLOCK):
        tok = start + tl.arange(0, BLOCK).to(tl.int64)
        at = seq * at_b + tok
        x = tl.load(local + at, mask=tok < last, other=0.0)
        factor = load_row(up, seq * up_b + tok * up_t, tok < last, 1.0)
        part = tl.load(share + at, mask=tok < last, other=0.0)
        common = tl.where(part == 0.0, 0.0, part * whole)
        tl.store(g + at, tl.where(x == 0.0, 0.0, x * factor) + common, mask=tok < last)


@kernel
def correction_kernel(
    old, sampling, mask, out, cu,  # [B, T] ×3, out: [B, T] or [B, 1], [B+1]
    old_b, old_t, samp_b, samp_t, mask_b, mask_t, at_b, B, T, low: tl.float32, high: tl.float32,
    PER_SEQUENCE: tl.constexpr, TRUNCATE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One program per sequence: importance weights from the sampler's log-probabilities."""
    seq = tl.program_id(0).to(tl.int64)
    first, last, end = bounds(cu, seq, B, T)
    keep = 1.0
    if PER_SEQUENCE | GATED:
        size = nothing()
        total = nothing()
        for start in range(first, last, BLOCK):
            tok = start + tl.arange(0, BLOCK).to(tl.int64)
            live = unmasked(mask, seq * mask_b + tok * mask_t, tok < last)
            sampled = tl.load(sampling + seq * samp_b + tok * samp_t, mask=live, other=0.0).to(tl.float32)
            d = mismatch(load_row(old, seq * old_b + tok * old_t, live, 0.0), sampled)
            total = add(total, tl.where(live, d, 0.0))
            size = add(size, tl.where(live, 1.0, 0.0))
        if GATED:
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
            tl.store(out + seq * at_b + tok, ratio, mask=tok < end)


@kernel
def segments_kernel(mask, cu, segments, lengths, mask_b, mask_t, B, T):
    """One program per packed sequence: its number at each of its tokens, and how many are unmasked."""
    seq = tl.program_id(0).to(tl.int64)
    first, last, _ = bounds(cu, seq, B, T)
    size = nothing()
    for start in range(first, last, BLOCK):
        tok = start + tl.arange(0, BLOCK).to(tl.int64)
        live = unmasked(mask, seq * mask_b + tok * mask_t, tok < last)
        size = add(size, tl.where(live, 1.0, 0.0))
        tl.store(segments + tok, (seq + tl.zeros([BLOCK], tl.int64)).to(tl.int32), mask=tok < last)
    tl.store(lengths + seq, size.to(tl.float32))
