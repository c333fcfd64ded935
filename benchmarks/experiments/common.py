"""The job that every candidate does, and the device functions they share beyond the package's own.

A job is the token-level clipped objective with a mask, old log-probabilities and advantages: from logits
[B, rows, V], of which the first T rows of a sequence are scored, to their gradient and the log-probabilities [B, T].
Row n is row n % rows of sequence n // rows. Of every kernel here holds: rows that are masked or not scored are not
read, rows whose slope is 0 only get zeros, and NaN is passed on.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from grpo_kernels.jit import jit, tl
from grpo_kernels.kernels.launch import _tile
from grpo_kernels.objective import Limits, limited_ratio, log_ratio, token_objective, weight
from grpo_kernels.terms import Clip, clipped

WAVE = 64 if torch.version.hip else 32
INF = float("inf")


class Job(NamedTuple):
    logits: torch.Tensor  # (B, rows, V), entries side by side
    ids: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) int64
    old: torch.Tensor  # (B, T) fp32
    adv: torch.Tensor  # (B,) fp32
    count: torch.Tensor  # (B,) fp32: tokens of the sequence
    clip: Clip
    temperature: float = 1.0

    @property
    def rows(self) -> int:
        return self.logits.shape[0] * self.logits.shape[1]

    @property
    def V(self) -> int:
        return self.logits.shape[2]


def make_job(logits, ids, mask, old, adv, epsilon: float, temperature: float = 1.0) -> Job:
    """grpo: the mean over a sequence's tokens, and over the sequences."""
    mask = mask.to(torch.int64).contiguous()
    clip = Clip(1.0 - epsilon, 1.0 + epsilon, INF, INF)
    return Job(logits, ids.contiguous(), mask, old.contiguous(), adv, mask.sum(1).float(), clip, temperature)


def arguments(job: Job, out: torch.Tensor, logps: torch.Tensor) -> tuple[tuple, dict]:
    """What every kernel takes first, and the constants they have in common."""
    B, rows, V = job.logits.shape
    values = (
        job.logits, out, job.ids, job.mask, job.old, job.adv, job.count, logps, *job.logits.stride()[:2],
        *out.stride()[:2], B * rows, job.ids.shape[1], rows, V, 1.0 / job.temperature, 1.0 / B,
        Limits(-INF, INF, INF, INF), job.clip,
    )  # fmt: skip
    return values, {"TERM": clipped, "ALIGNED": _tile(V, job.logits, out)["ALIGNED"]}


def tile(job: Job, out: torch.Tensor, K: int, warps: int, registers: int, wave: int) -> dict[str, int]:
    """K, N, W and launch options, for K lines of 16 bytes a thread."""
    return tile_shape(job.logits.element_size(), _tile(job.V, job.logits, out)["W"], K, warps, registers, wave)


def tile_shape(itemsize: int, vector: int, K: int, warps: int, registers: int, wave: int) -> dict[str, int]:
    """The same where a thread moves ``vector`` entries at once, and so takes as many more lines."""
    lines = K * 16 // (itemsize * vector)
    return {"K": lines, "N": 32 * warps, "W": vector, **options(warps, registers, wave)}


def options(warps: int, registers: int, wave: int) -> dict[str, int]:
    """Launch options of 32·warps threads; AMD's compiler takes no limit of registers."""
    return {"num_warps": max(1, warps * 32 // wave), **({"maxnreg": registers} if wave == 32 else {})}


def processors(x: torch.Tensor) -> int:
    """Multiprocessors of the device; off a GPU a few, so that persistent programs still loop."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@jit
def is_live(mask, seq, tok, T):
    """Whether the row is scored and not masked."""
    scored = tok < T
    return tl.load(mask + seq * T + tok, mask=scored, other=0) != 0


@jit
def row_numbers(old, adv, count, seq, tok, T, w_factor):
    """(log π_old, advantage, weight) of a row."""
    w = weight(tl.load(count + seq), w_factor, 1.0)
    return tl.load(old + seq * T + tok), tl.load(adv + seq), w


@jit
def slope_of(lp, lp_old, A, w, limits, c, TERM: tl.constexpr):
    """∂loss/∂lp of a row."""
    r, passes = limited_ratio(log_ratio(lp, lp_old), limits, False)
    _, _, _, d_ratio, d_lp = token_objective(r, passes, r, lp, lp_old, 0.0, A, 1.0, 0.0, limits, c, TERM,
                                             None, False, False, False, False, False)  # fmt: skip
    return w * (d_ratio + d_lp)


@jit
def join(top, total, scale):
    """(top, total) of several (top, Σ 2^d) [n], in an order that does not change."""
    highest = tl.max(top, axis=0)
    return highest, tl.sum(total * tl.exp2((top - highest) * scale), axis=0)
