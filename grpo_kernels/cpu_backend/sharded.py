"""Rows of logits of which other ranks hold the rest of the vocabulary, on torch tensors; see `call.sharded`."""

import math

import torch

from grpo_kernels.cpu_backend.rows import CHUNK_ELEMENTS, FLOOR, Row, chunks, clear, dot, heat_of, scratch, write_slope
from grpo_kernels.cpu_backend.sequences import counted_rows
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.softmax import entropy_of, fold, logp_of

_LN2, _LOG2E, _LOWEST = math.log(2.0), 1.0 / math.log(2.0), torch.finfo(torch.float32).min


def row_statistics(
    logits: torch.Tensor, ids: torch.Tensor, read: torch.Tensor | None, temperature: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(top, total, mean) [B·T, 3], see `objective.softmax`, and the token's depth [B·T], NaN outside [0, V).

    Rows that are not read have total −1 and depth 0.
    """
    V = logits.shape[2]
    if ids.numel() == 0:
        return torch.zeros(0, 3, device=logits.device), torch.zeros(0, device=logits.device)
    stats = torch.tensor([0.0, -1.0, 0.0], device=logits.device).repeat(ids.numel(), 1)
    depths = torch.zeros(ids.numel(), device=logits.device)
    flat_ids = ids.reshape(-1, 1)
    height = max(1, CHUNK_ELEMENTS // V)
    for source, _, at, tokens in chunks(logits, None, read, ids.shape[1], height):  # [n, V] and, per row, [n, 1]
        x = source[at]
        token = flat_ids[tokens]
        known = (token >= 0) & (token < V)
        x_token = x.gather(1, torch.where(known, token, 0)).float()
        top = x.amax(-1, keepdim=True).float().clamp(min=_LOWEST)
        scale = _LOG2E / heat_of(temperature, tokens)
        depth, power = _powers(x, top, scale)
        total = power.sum(-1, keepdim=True)
        mean = dot(power, depth.clamp_(min=FLOOR)) / total
        stats[tokens] = torch.cat([top, total, mean], dim=1)
        depths[tokens] = torch.where(known, (x_token - top) * scale, torch.nan)[:, 0]
    return stats, depths


def absent_part(batch: Batch, plan: Plan) -> torch.Tensor:
    """What a rank without an entry of the vocabulary has to say, [4·B·T], as ``shard`` of the backends."""
    read, unread = counted_rows(batch, plan)
    shape = batch.ids.shape
    if read is None:
        read = torch.ones(shape, dtype=torch.bool, device=batch.ids.device)
    zeros = torch.zeros(shape, device=read.device)
    top, total = torch.where(read, _LOWEST, zeros), torch.where(read, zeros, -1.0)
    depths = torch.where(read if unread is None else read | unread, torch.nan, zeros)
    return torch.cat([torch.stack([top, total, zeros], dim=-1).view(-1), depths.view(-1)])


def _powers(
    x: torch.Tensor, top: torch.Tensor, scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d, 2^d) [n, V] fp32, in scratch buffers: d = (x − top)·scale."""
    depth = scratch("x", *x.shape, x.device).copy_(x).sub_(top).mul_(scale)
    return depth, torch.exp2(depth, out=scratch("p", *x.shape, x.device))


def unite_parts(
    parts: torch.Tensor, temperature: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logps [n], entropies [n], stats [n, 3]) from the `row_statistics` of every rank, [ranks, 4·n]."""
    n = parts.shape[1] // 4
    unread, left = parts[0, 1 : 3 * n : 3] < 0.0, parts[0, 3 * n :]
    if isinstance(temperature, torch.Tensor):
        temperature = torch.where(unread, 1.0, temperature)  # where anything may stand
    scale = _LOG2E / temperature
    top, total, mean, depth = (parts.new_full((n,), x) for x in (_LOWEST, 0.0, 0.0, torch.nan))
    for part in parts:
        stats, depths = part[: 3 * n].view(n, 3), part[3 * n :]
        top, total, mean, depth = on_torch(fold)(top, total, mean, depth, *stats.unbind(1), depths, scale)
    logps = torch.where(unread, left, on_torch(logp_of)(depth, total))
    entropies = torch.where(unread, left, on_torch(entropy_of)(total, mean))
    return logps, entropies, torch.stack([top, total, mean], dim=1)


def write_part(
    logits: torch.Tensor, ids: torch.Tensor, read: torch.Tensor | None, temperature: float | torch.Tensor,
    stats: torch.Tensor, g: torch.Tensor, h: torch.Tensor | None, out: torch.Tensor,
) -> None:  # fmt: skip
    """The gradient of these entries, from g = ∂L/∂lp and h = ∂L/∂H, [B·T, 1] each, and the stats of the whole rows."""
    V = logits.shape[2]
    if ids.numel() == 0:
        out.zero_()
        return
    clear(out, read, ids.shape[1])
    flat_ids = ids.reshape(-1, 1)
    height = max(1, CHUNK_ELEMENTS // V)
    for source, target, at, tokens in chunks(logits, out, read, ids.shape[1], height):
        top, mass, mean = stats[tokens].split(1, dim=1)  # [n, 1] each
        heat = heat_of(temperature, tokens)
        depth, p = _powers(source[at], top, _LOG2E / heat)
        token = flat_ids[tokens]
        known = (token >= 0) & (token < V)
        token = torch.where(known, token, 0)
        depth = None if h is None else depth.mul_(_LN2).clamp_(min=FLOOR)
        row = Row(p, p.gather(1, token) / mass, mass, depth, mean * _LN2, token, known)
        write_slope(target, at, row, g[tokens], None if h is None else h[tokens], heat)
