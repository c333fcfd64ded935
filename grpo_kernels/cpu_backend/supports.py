"""Rows that are restricted to a support, on torch tensors."""

import torch
from torch import Tensor

from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.supports import REPEATED


def left_out(
    batch: Batch, tokens: Tensor | slice, ids: Tensor, known: Tensor | None, V: int
) -> tuple[Tensor | None, Tensor | None]:
    """What n rows are without: [n, V] bool, or None where no row is restricted; and [n, 1], rows with an unknown id.

    ``tokens``: which of the B·T they are; ``ids`` [n, 1]: of the sampled tokens, whose entries stay. Where ``known``
    [n, 1] is False these logits have no such entry; None: they have all.
    """
    n, wrong = len(ids), None
    if batch.support_mask is not None:
        numbers, T = torch.arange(batch.ids.numel(), device=ids.device)[tokens], batch.ids.shape[1]
        out = ~batch.support_mask[numbers // T, numbers % T]
        if batch.support_last is None:
            whole = out.all(-1, keepdim=True)
        else:
            whole = batch.support_last.reshape(-1)[tokens][:, None] == 0
    elif batch.support is not None:
        first, last = (x.reshape(-1)[tokens].long() for x in (batch.support_first, batch.support_last))
        counts = last - first
        rows = torch.repeat_interleave(torch.arange(n, device=ids.device), counts)
        ends = counts.cumsum(0)
        j = batch.support[torch.arange(len(rows), device=ids.device) + (last - ends)[rows]].long()
        there = (j >= 0) & (j < V)
        out = torch.ones(n, V, dtype=torch.bool, device=ids.device)
        out[rows[there], j[there]] = False
        wrong = torch.zeros(n, 1, dtype=torch.bool, device=ids.device)
        wrong[rows[~there & (j != REPEATED)]] = True
        whole = (counts == 0)[:, None]
    else:
        return None, None
    out.masked_fill_(whole, False)
    return out.scatter_(1, ids, False if known is None else out.gather(1, ids) & ~known), wrong
