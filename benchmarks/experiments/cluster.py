"""Candidate 3: a row split over the programs of a thread-block cluster, which reduces on chip.

With ``num_ctas`` the tensors of a plain ``@triton.jit`` function are spread over a cluster, and its reductions cross
it through distributed shared memory. A cluster so holds a whole row in registers: one read, one exponential per
element, no cache to hope for, and nothing in global memory to wait at. Tensors have power-of-two sizes, so a row is cut
into two pieces: 151936 as 131072 + 32768, of which the second is 64% full.

Needs sm_90 or later, and Triton 3.8 or later to compile it; to run it, what a later one has compiled will do
(`precompiled`).
"""

from pathlib import Path

import torch

from benchmarks.experiments import precompiled
from benchmarks.experiments.common import (
    Job,
    arguments,
    is_live,
    on,
    options,
    row_numbers,
    slope_of,
)
from grpo_kernels.jit import jit, tl, triton
from grpo_kernels.kernels.row import load_tile, tile_at
from grpo_kernels.kernels.rows import kernel, row_at
from grpo_kernels.softmax import LOG2E, LOWEST, logp_of, token_slope

OLDEST_TRITON = (3, 8)
cubins: Path | None = None  # the folder of kernels that another Triton has compiled


@jit
def write_piece(out, at, kept, factor, token, d_token, V):
    """The token's entry is chosen by a test: a barrier does not order the stores of two programs."""
    d = tl.where(at == token, d_token, kept * factor)
    tl.store(out + at, d.to(out.dtype.element_ty), mask=at < V)


@jit
def zero_piece(out, at, V):
    tl.store(out + at, tl.zeros(at.shape, out.dtype.element_ty), mask=at < V)


@kernel
def cluster_kernel(
    logits, out, ids, mask, old, adv, count, logps,  # [B, rows, V] ×2, [B, T] ×3, [B] ×2, out: [B, T]
    logits_b, logits_t, out_b, out_t,
    all_rows, T, rows, V, inv_temperature: tl.float32, w_factor: tl.float32, limits, c,
    TERM: tl.constexpr, ALIGNED: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """One cluster per row. FIRST and SECOND are the sizes of its pieces."""
    seq = (tl.program_id(0) // rows).to(tl.int64)
    tok = (tl.program_id(0) % rows).to(tl.int64)
    dst = row_at(out, seq, tok, out_b, out_t, ALIGNED)
    at, at_2 = tile_at(0, 1, FIRST, 1), tile_at(FIRST, 1, SECOND, 1)  # [1, FIRST], [1, SECOND]
    if not is_live(mask, seq, tok, T):
        tl.store(logps + seq * T + tok, 0.0, mask=tok < T)
        zero_piece(dst, at, V)
        zero_piece(dst, at_2, V)
        return
    scale = inv_temperature * LOG2E
    token = tl.load(ids + seq * T + tok)
    lp_old, A, w = row_numbers(old, adv, count, seq, tok, T, w_factor)
    row = row_at(logits, seq, tok, logits_b, logits_t, ALIGNED)
    # In place: before the reductions, at which all programs of the cluster meet, and before any store.
    x_token = tl.load(row + token, mask=(token >= 0) & (token < V), other=float("nan")).to(tl.float32)
    x, x_2 = load_tile(row, at, V, True, "evict_first"), load_tile(row, at_2, V, True, "evict_first")
    top = tl.maximum(tl.max(tl.max(x, axis=0), axis=0), tl.max(tl.max(x_2, axis=0), axis=0))
    top = tl.maximum(top, LOWEST)
    kept = tl.exp2((x - top) * scale)
    kept_2 = tl.exp2((x_2 - top) * scale)
    total = tl.sum(tl.sum(kept, axis=0), axis=0) + tl.sum(tl.sum(kept_2, axis=0), axis=0)
    lp = logp_of((x_token - top) * scale, total)
    tl.store(logps + seq * T + tok, lp)
    g = slope_of(lp, lp_old, A, w, limits, c, TERM) * inv_temperature
    if g == 0.0:
        zero_piece(dst, at, V)
        zero_piece(dst, at_2, V)
    else:
        factor = -g / total
        d_token = token_slope((x_token - top) * scale, total, g)
        write_piece(dst, at, kept, factor, token, d_token, V)
        write_piece(dst, at_2, kept_2, factor, token, d_token, V)


def pieces(V: int) -> tuple[int, int]:
    """Two powers of two that cover V: the largest one below it, and what then remains, rounded up."""
    first = 1 << (V - 1).bit_length() - 1 if V > 1 else 1
    return first, triton.next_power_of_2(max(V - first, 1))


def unavailable(device: torch.device, V: int, dtype: torch.dtype, **setting: int) -> str | None:
    """Why this GPU or this Triton cannot run it, or None."""
    if torch.cuda.get_device_capability(device) < (9, 0) or torch.version.hip:
        return "clusters need sm_90 or later"
    if (why := too_old()) and cubins is not None:
        path = precompiled.path_of(cubins, V, dtype, setting)
        return None if path.exists() else f"there is no {path.name}"
    return why


def too_old() -> str | None:
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"needs Triton {'.'.join(map(str, OLDEST_TRITON))} or later, this is {triton.__version__}"
    return None


def launch(
    job: Job, out: torch.Tensor, *, ctas: int = 8, warps: int = 16, registers: int = 64, wave: int = 32
) -> torch.Tensor:
    """The gradient goes to ``out``, which may be the logits; returns the log-probabilities (B, T)."""
    logps = job.old.new_empty(job.old.shape)
    values, constants = arguments(job, out, logps)
    first, second = pieces(job.V)
    with on(job.logits):
        if job.logits.is_cuda and cubins is not None and too_old():
            setting = {"ctas": ctas, "warps": warps, "registers": registers}
            path = precompiled.path_of(cubins, job.V, job.logits.dtype, setting)
            precompiled.launch(path, job.rows, values)
        else:
            cluster_kernel[(job.rows,)](
                *values, **constants, FIRST=first, SECOND=second, num_ctas=ctas, **options(warps, registers, wave)
            )
    return logps
