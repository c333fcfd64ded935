"""Rows of logits that lie in parts, one per rank, on torch tensors: what the ranks exchange, see `call.sharded`."""

import math

import torch
from torch import Tensor

from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.sequences import counted_rows, expand
from grpo_kernels.objective.softmax import entropy_of, fold, logp_of

LN2, LOWEST = math.log(2.0), torch.finfo(torch.float32).min


def absent_part(batch: Batch, plan: Plan) -> Tensor:
    """What a rank without an entry of the vocabulary has to say, [4·B·T], as ``shard`` of the backends."""
    read, unread = counted_rows(batch, plan)
    read = torch.ones_like(batch.ids, dtype=torch.bool) if read is None else read
    zeros = torch.zeros(read.shape, dtype=torch.float32, device=read.device)
    top, total = torch.where(read, LOWEST, zeros), torch.where(read, zeros, -1.0)
    depths = torch.where(read if unread is None else read | unread, torch.nan, zeros)
    return torch.cat([torch.stack([top, total, zeros], dim=-1).view(-1), depths.view(-1)])


def unite(parts, batch: Batch, entropy: bool) -> tuple[Tensor, ...]:
    """(logps, entropies, stats) as `logprobs`, from what `shard` gave on every rank, [ranks, 4·B·T]."""
    shape, n = batch.ids.shape, batch.ids.numel()
    unread, left = parts[0, 1 : 3 * n : 3] < 0.0, parts[0, 3 * n :]
    temperature = batch.one_temperature
    if batch.temperature is not None:  # anything may stand at unread rows
        temperature = torch.where(unread, 1.0, expand(batch.temperature.float(), batch).reshape(-1))
    row = [parts.new_full((n,), x) for x in (LOWEST, 0.0, 0.0, torch.nan)]  # without an entry
    for part in parts:
        row = on_torch(fold)(*row, *part[: 3 * n].view(n, 3).unbind(1), part[3 * n :], 1.0 / (LN2 * temperature))
    top, total, mean, depth = row
    logps = torch.where(unread, left, on_torch(logp_of)(depth, total)).view(shape)
    entropies = torch.where(unread, left, on_torch(entropy_of)(total, mean)).view(shape)
    return logps, entropies if entropy else logps.new_empty(0), torch.stack([top, total, mean], dim=1)
