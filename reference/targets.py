"""Several targets per row: the log-probabilities of any number of tokens at one position.

Prefix trees (several continuations of one position), score centering (arXiv:2609.20807) and top-k teachers ask for
them. Each is what it would be alone; a gradient is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reference.grpo import TokenLogprobs, token_logprobs
from reference.tensors import as_mask


def target_logprobs(
    logits: Tensor,
    targets: Tensor | Sequence[Sequence[int]],
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> TokenLogprobs:
    """log π(token) of each target, and H of each row, both 0 where masked; of logits (B, T, V) or (B, T+1, V).

    Args:
        targets: (B, T, K); a negative id is absent and has log-probability 0. Or B·T lists, in row-major order, whose
            log-probabilities come one behind the other, (M,); then ``mask`` must say what B and T are.
        temperature: as in `token_logprobs`.
        mask: (B, T), 1 for the rows that count. The targets of the others may be anything.
    """
    if not isinstance(targets, Tensor):
        if mask is None or mask.numel() != len(targets):
            raise ValueError(f"{len(targets)} lists of targets need a mask (B, T) of as many rows")
        return _of_lists(logits, targets, temperature, mask)
    mask = as_mask(mask, targets[..., 0])
    none = torch.zeros_like(mask, dtype=torch.int64)
    logps = [
        token_logprobs(logits, torch.where(ids >= 0, ids, 0), temperature, mask & (ids >= 0)).logps
        for ids in targets.unbind(-1)
    ]
    return TokenLogprobs(torch.stack(logps, dim=-1), token_logprobs(logits, none, temperature, mask).entropy)


def _of_lists(logits, rows, temperature, mask) -> TokenLogprobs:
    longest = max(1, *map(len, rows)) if rows else 1
    padded = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], device=logits.device)
    lengths = torch.tensor([len(row) for row in rows], device=logits.device)
    there = torch.arange(longest, device=logits.device) < lengths[:, None]
    logps, entropy = target_logprobs(logits, padded.view(*mask.shape, longest), temperature, mask)
    return TokenLogprobs(logps.flatten(0, 1)[there], entropy)
