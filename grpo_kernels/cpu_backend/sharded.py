"""Rows of logits of which other ranks hold the rest of the vocabulary, on torch tensors; see `call.sharded`."""

import math

import torch

from grpo_kernels.cpu_backend.rows import read_rows
from grpo_kernels.cpu_backend.sequences import counted_rows, rows_to_read
from grpo_kernels.cpu_backend.tokens import expand
from grpo_kernels.objective.inputs import Coefs, Inputs
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.softmax import entropy_of, fold, logp_of

_LOG2E, _LOWEST = 1.0 / math.log(2.0), torch.finfo(torch.float32).min


def absent_part(inputs: Inputs, coefs: Coefs, plan: Plan) -> torch.Tensor:
    """What a rank without an entry of the vocabulary has to say, [4·B·T]: see `shard`."""
    read, unread = counted_rows(inputs, coefs, plan)
    shape = inputs.ids.shape
    if read is None:
        read = torch.ones(shape, dtype=torch.bool, device=inputs.ids.device)
    zeros = torch.zeros(shape, device=read.device)
    top, total = torch.where(read, _LOWEST, zeros), torch.where(read, zeros, -1.0)
    depths = torch.where(read if unread is None else read | unread, torch.nan, zeros)
    return torch.cat([torch.stack([top, total, zeros], dim=-1).view(-1), depths.view(-1)])


def shard(logits, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> torch.Tensor:
    """[4·B·T] of logits that hold a part of the vocabulary, ids counted from its start, for `unite`.

    (top, total, mean) of each row, see `objective.softmax`, and then the token's depth, NaN outside [0, V).
    Rows that are not read have total −1 and depth 0, or NaN if they are unmasked.
    """
    part, n = absent_part(inputs, coefs, plan), inputs.ids.numel()
    stats, depths = part[: 3 * n].view(n, 3), part[3 * n :]
    read, _ = rows_to_read(inputs, coefs, plan)
    for rows in read_rows(logits, inputs, coefs, read, entropy=True, part=True):
        stats[rows.tokens] = torch.cat([rows.top, rows.mass, rows.mean * _LOG2E], dim=1)
        depths[rows.tokens] = torch.where(rows.known, rows.x_token * _LOG2E, torch.nan)[:, 0]
    return part


def unite(parts, inputs: Inputs, coefs: Coefs, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, stats) as `logprobs`, from what `shard` gave on every rank, [ranks, 4·B·T]."""
    shape, n = inputs.ids.shape, inputs.ids.numel()
    unread, left = parts[0, 1 : 3 * n : 3] < 0.0, parts[0, 3 * n :]
    scale = _LOG2E / coefs.temperature
    if inputs.temperature is not None:  # anything may stand at unread rows
        scale = _LOG2E / torch.where(unread, 1.0, expand(inputs.temperature.float(), inputs).reshape(-1))
    whole = [parts.new_full((n,), x) for x in (_LOWEST, 0.0, 0.0, torch.nan)]
    for part in parts:
        whole = on_torch(fold)(*whole, *part[: 3 * n].view(n, 3).unbind(1), part[3 * n :], scale)
    top, total, mean, depth = whole
    logps = torch.where(unread, left, on_torch(logp_of)(depth, total)).view(shape)
    entropies = torch.where(unread, left, on_torch(entropy_of)(total, mean)).view(shape)
    return logps, entropies if entropy else logps.new_empty(0), torch.stack([top, total, mean], dim=1)
