"""The present kernel's two passes with a choice of eviction hints; everything else as in `rows.loss_kernel`.

One program per row. What the hints are worth is the difference between the settings of this file.
"""

import torch

from benchmarks.experiments.common import WAVE, Job, arguments, is_live, on, row_numbers, slope_of, tile
from grpo_kernels.jit import tl
from grpo_kernels.kernels.row import read_row, score_token, write_slope, write_zeros
from grpo_kernels.kernels.rows import kernel, row_at
from grpo_kernels.softmax import LOG2E


@kernel
def hints_kernel(
    logits, out, ids, mask, old, adv, count, logps,  # [B, rows, V] ×2, [B, T] ×3, [B] ×2, out: [B, T]
    logits_b, logits_t, out_b, out_t,
    all_rows, T, rows, V, inv_temperature: tl.float32, w_factor: tl.float32, limits, c,
    TERM: tl.constexpr, ALIGNED: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """FIRST and SECOND are the hints of the two reads, "" for none."""
    seq = (tl.program_id(0) // rows).to(tl.int64)
    tok = (tl.program_id(0) % rows).to(tl.int64)
    dst = row_at(out, seq, tok, out_b, out_t, ALIGNED)
    if not is_live(mask, seq, tok, T):
        tl.store(logps + seq * T + tok, 0.0, mask=tok < T)
        write_zeros(dst, V, ALIGNED, K, N, W)
        return
    scale = inv_temperature * LOG2E
    token = tl.load(ids + seq * T + tok)
    lp_old, A, w = row_numbers(old, adv, count, seq, tok, T, w_factor)
    row = row_at(logits, seq, tok, logits_b, logits_t, ALIGNED)
    top, total, mean = read_row(row, V, scale, None, ALIGNED, K, N, W, False, FIRST)
    lp, x_token = score_token(row, token, V, top, total, scale, None)
    tl.store(logps + seq * T + tok, lp)
    g = slope_of(lp, lp_old, A, w, limits, c, TERM)
    if g == 0.0:
        tl.debug_barrier()  # in place: x_token was read by every thread before any entry is overwritten
        write_zeros(dst, V, ALIGNED, K, N, W)
    else:
        write_slope(dst, row, token, x_token, V, scale, None, top, total, mean, g, 0.0,
                    ALIGNED, K, N, W, False, SECOND)  # fmt: skip


def launch(
    job: Job, out: torch.Tensor, *, K: int = 4, warps: int = 32, registers: int = 64, first: str = "",
    second: str = "", wave: int = WAVE,
) -> torch.Tensor:  # fmt: skip
    """The gradient goes to ``out``, which may be the logits; returns the log-probabilities (B, T)."""
    logps = job.old.new_empty(job.old.shape)
    values, constants = arguments(job, out, logps)
    with on(job.logits):
        hints_kernel[(job.rows,)](
            *values, **constants, FIRST=first, SECOND=second, **tile(job, out, K, warps, registers, wave),
        )  # fmt: skip
    return logps
