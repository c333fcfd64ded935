"""How far the sequences' log-probabilities are from the sampler's: the sums behind the metrics `sampling/*`."""

from grpo_kernels.objective.corrections import mismatch, outside
from grpo_kernels.objective.language import tl
from grpo_kernels.objective.metrics import SUM_NAMES
from grpo_kernels.triton_backend.row_kernels import kernel
from grpo_kernels.triton_backend.sequence_kernels import BLOCK, SUMS, add, bounds, load_row, nothing, unmasked

FIRST = tl.constexpr(list(SUM_NAMES).index("sampling/sampling_logp_difference"))
_INF = tl.constexpr(float("inf"))


@kernel
def mismatch_kernel(
    logps, mask, old, sampling, is_weight, partial, cu,  # [B, T] ×5 (weights [B, 1] if ONCE), out: [B, SUMS], [B+1]
    mask_b, mask_t, old_b, old_t, samp_b, samp_t, is_b, is_t, at_b, B, T, low: tl.float32, high: tl.float32,
    SKIP: tl.constexpr, CORRECTED: tl.constexpr, ONCE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One program per sequence: the columns of the partial sums that start at FIRST.

    CORRECTED: the ratios are the weights that a correction has made, ONCE per sequence, or GATED by it. SKIP: of
    rows that were not read the log-probability is NaN.
    """
    seq = tl.program_id(0).to(tl.int64)
    first, last, _ = bounds(cu, seq, B, T)
    tokens = nothing()
    s_gap = nothing()
    s_heard = nothing()
    s_drawn = nothing()
    s_corrected = nothing()
    s_d = nothing()
    gap_max = tl.zeros([BLOCK], tl.float32)
    drawn_min = tl.full([BLOCK], _INF, tl.float32)
    drawn_max = tl.full([BLOCK], -_INF, tl.float32)
    for start in range(first, last, BLOCK):
        tok = start + tl.arange(0, BLOCK).to(tl.int64)
        there = unmasked(mask, seq * mask_b + tok * mask_t, tok < last)
        lp = tl.load(logps + seq * at_b + tok, mask=there, other=0.0)
        live = there
        if SKIP:
            live = there & (lp == lp)
        tokens = add(tokens, tl.where(live, 1.0, 0.0))
        sampled = tl.load(sampling + seq * samp_b + tok * samp_t, mask=there, other=0.0).to(tl.float32)
        d = mismatch(load_row(old, seq * old_b + tok * old_t, there, lp), sampled)
        heard = live & (sampled == sampled)
        gap = tl.where(heard, tl.abs(d), 0.0)
        s_gap = add(s_gap, gap)
        s_heard = add(s_heard, tl.where(heard, 1.0, 0.0))
        gap_max = tl.maximum(gap_max, tl.where(gap == gap, gap, 0.0))
        if ONCE:
            s_d = add(s_d, tl.where(there, d, 0.0))
        else:
            drawn = tl.exp(d)
            if CORRECTED:
                corrected = outside(drawn, low, high)
                drawn = load_row(is_weight, seq * is_b + tok * is_t, live, 1.0)
                if GATED:
                    corrected = drawn == 0.0
                s_corrected = add(s_corrected, tl.where(live & corrected, 1.0, 0.0))
            s_drawn = add(s_drawn, tl.where(live, drawn, 0.0))
            ranked = live & (drawn == drawn)
            drawn_min = tl.minimum(drawn_min, tl.where(ranked, drawn, _INF))
            drawn_max = tl.maximum(drawn_max, tl.where(ranked, drawn, -_INF))
    least = tl.min(drawn_min, axis=0)
    most = tl.max(drawn_max, axis=0)
    trust = s_drawn
    draws = tokens
    if ONCE:  # sequences without tokens count too, but not those that were left unread
        weight = tl.load(is_weight + seq * is_b).to(tl.float32)
        draws = nothing() + 1.0
        if SKIP:
            draws = tl.where(tokens > 0.0, draws, 0.0)
        s_corrected = tl.where(outside(tl.exp(s_d.to(tl.float32)), low, high), draws, 0.0)
        s_drawn = tl.where(draws > 0.0, weight.to(tl.float64), 0.0)
        trust = s_drawn * tokens
        known = (draws > 0.0) & (weight == weight)
        least = tl.where(known, weight, least)
        most = tl.where(known, weight, most)
    row = (s_gap, s_heard, s_drawn, draws, s_corrected, trust, tl.max(gap_max, axis=0).to(tl.float64),
           least.to(tl.float64), most.to(tl.float64))  # fmt: skip
    for k in tl.static_range(len(row)):
        tl.store(partial + seq * SUMS + FIRST + k, row[k])
