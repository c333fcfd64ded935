"""Candidate 1: persistent programs that read row i+1 while they write the gradient of row i, tile by tile.

    for every row of this program
        for every tile
            fold a tile of the new row into its maximum and sum      first read, from memory
            write a tile of the old row's gradient                   second read, from L2
        the new row's log-probability and slope; it is the old row now

Reads and writes are always in flight together, and the reduction between the passes stalls a program once per row, not
twice. The price is cache: a row is read for the second time one whole row later, see docs/candidates.md. The new
row's tile is loaded first, since no load may be moved up over a store that might hit the same address.
"""

import torch

from benchmarks.experiments.common import (
    WAVE,
    Job,
    arguments,
    is_live,
    join,
    on,
    processors,
    row_numbers,
    slope_of,
    tile,
)
from grpo_kernels.jit import jit, tl
from grpo_kernels.kernels.row import (
    absorb_edges,
    absorb_tile,
    edges_at,
    load_edges,
    read_row,
    score_token,
    slope_at,
    slope_tile,
    split,
    write_slope,
    write_zeros,
)
from grpo_kernels.kernels.rows import kernel, row_at
from grpo_kernels.softmax import LN2, LOG2E, LOWEST, token_slope


@jit
def trade_tile(top, total, new_row, new_length, out, old_row, old_length, old_top, slope, start, scale,
               K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    top, total, _ = absorb_tile(top, total, 0.0, new_row, start, new_length, scale, None, K, N, W, MASKED, False,
                                "evict_last")  # fmt: skip
    slope_tile(out, old_row, start, old_length, scale, None, old_top, slope, 0.0, K, N, W, MASKED, False,
               "evict_first")  # fmt: skip
    return top, total


@jit
def trade_rows(out, old_row, old_token, old_x, old_top, old_total, g, new_row, V, scale, ALIGNED: tl.constexpr,
               K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """`write_slope` of the old row and `read_row` of the new one, in one loop: (top, total) of the new row."""
    TILE: tl.constexpr = K * N * W
    REST: tl.constexpr = 1 if W > 1 else K
    g = g * scale * LN2  # scale·ln 2 = 1/temperature
    slope = -g / old_total
    old_body, old_head, old_length = split(old_row, V, ALIGNED, W)
    new_body, new_head, new_length = split(new_row, V, ALIGNED, W)
    dst = split(out, V, ALIGNED, W)[0]
    if ALIGNED:
        top = tl.full([N], LOWEST, tl.float32)
        total = tl.zeros([N], tl.float32)
    else:
        top, total, _ = absorb_edges(new_row, new_head, new_length, V, scale, None, N, W, False)
    tl.debug_barrier()  # in place: old_x was read by every thread before any entry is overwritten
    whole = tl.minimum(old_length, new_length) // TILE * TILE
    for at in tl.range(0, whole, TILE, num_stages=STAGES):
        top, total = trade_tile(top, total, new_body, new_length, dst, old_body, old_length, old_top, slope, at, scale,
                                K, N, W, False)  # fmt: skip
    for at in range(whole, tl.maximum(old_length, new_length), REST * N * W):
        top, total = trade_tile(top, total, new_body, new_length, dst, old_body, old_length, old_top, slope, at, scale,
                                REST, N, W, True)  # fmt: skip
    if not ALIGNED:
        at, mask = edges_at(old_head, old_length, V, W)
        d = slope_at(load_edges(old_row, at, mask), old_top, scale, None, slope, 0.0, False)
        tl.store(out + at, d.to(out.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # the token's entry is stored by another thread than the tile's
    d = token_slope((old_x - old_top) * scale, old_total, g)
    tl.store(out + old_token, d.to(out.dtype.element_ty), mask=(old_token >= 0) & (old_token < V))
    return join(top, total, scale)


@kernel
def interleaved_kernel(
    logits, out, ids, mask, old, adv, count, logps,  # [B, rows, V] ×2, [B, T] ×3, [B] ×2, out: [B, T]
    logits_b, logits_t, out_b, out_t,
    all_rows, T, rows, V, inv_temperature: tl.float32, w_factor: tl.float32, limits, c,
    TERM: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Rows p, p + P, … of program p of P. Rows that only get zeros take no part in the trade."""
    scale = inv_temperature * LOG2E
    held = -1  # the row whose gradient is still to be written, and what that takes
    held_token = tl.program_id(0).to(tl.int64)
    held_x, held_top, held_total, held_g = 0.0, 0.0, 1.0, 0.0
    for n in range(tl.program_id(0), all_rows, tl.num_programs(0)):
        seq = (n // rows).to(tl.int64)
        tok = (n % rows).to(tl.int64)
        dst = row_at(out, seq, tok, out_b, out_t, ALIGNED)
        g = 0.0
        if is_live(mask, seq, tok, T):
            token = tl.load(ids + seq * T + tok)
            lp_old, A, w = row_numbers(old, adv, count, seq, tok, T, w_factor)
            row = row_at(logits, seq, tok, logits_b, logits_t, ALIGNED)
            if held >= 0:
                held_seq, held_tok = (held // rows).to(tl.int64), (held % rows).to(tl.int64)
                top, total = trade_rows(
                    row_at(out, held_seq, held_tok, out_b, out_t, ALIGNED),
                    row_at(logits, held_seq, held_tok, logits_b, logits_t, ALIGNED),
                    held_token, held_x, held_top, held_total, held_g, row, V, scale, ALIGNED, K, N, W, STAGES,
                )  # fmt: skip
                held = -1
            else:
                top, total, _ = read_row(row, V, scale, None, ALIGNED, K, N, W, False, "evict_last")
            lp, x_token = score_token(row, token, V, top, total, scale, None)
            tl.store(logps + seq * T + tok, lp)
            g = slope_of(lp, lp_old, A, w, limits, c, TERM)
            if g != 0.0:  # NaN too
                held = n
                held_token, held_x, held_top, held_total, held_g = token, x_token, top, total, g
        else:
            tl.store(logps + seq * T + tok, 0.0, mask=tok < T)
        if g == 0.0:
            tl.debug_barrier()  # in place: x_token was read by every thread before any entry is overwritten
            write_zeros(dst, V, ALIGNED, K, N, W)
    if held >= 0:
        held_seq, held_tok = (held // rows).to(tl.int64), (held % rows).to(tl.int64)
        dst = row_at(out, held_seq, held_tok, out_b, out_t, ALIGNED)
        row = row_at(logits, held_seq, held_tok, logits_b, logits_t, ALIGNED)
        write_slope(dst, row, held_token, held_x, V, scale, None, held_top, held_total, 0.0, held_g, 0.0,
                    ALIGNED, K, N, W, False, "evict_first")  # fmt: skip


def launch(
    job: Job, out: torch.Tensor, *, K: int = 1, warps: int = 32, registers: int = 64, per_processor: int = 1,
    stages: int = 1, wave: int = WAVE,
) -> torch.Tensor:  # fmt: skip
    """The gradient goes to ``out``, which may be the logits; returns the log-probabilities (B, T)."""
    logps = job.old.new_empty(job.old.shape)
    values, constants = arguments(job, out, logps)
    programs = min(job.rows, per_processor * processors(job.logits))
    with on(job.logits):
        interleaved_kernel[(programs,)](
            *values, **constants, STAGES=stages, **tile(job, out, K, warps, registers, wave),
        )  # fmt: skip
    return logps
