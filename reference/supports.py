"""The set that a truncating sampler (top-k, top-p, min-p) drew a token from: the support S.

Such a sampler's probabilities are normalised over S, and so must the trainer's be, or their ratio is biased even
where both have the same weights (DeepSeek-V3.2, arXiv:2512.02556 §3.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Support = Tensor | Sequence[Sequence[int]]


def restrict(x: Tensor, ids: Tensor, mask: Tensor, support: Support) -> Tensor:
    """Logits (B, T, V) → −∞ outside of S ∪ {y}; a row whose S is empty stays whole.

    Args:
        ids: (B, T), the sampled tokens y; inside of the vocabulary.
        mask: (B, T) bool; what the support says of the other rows is not read.
        support: bool, shaped as x; or B·T lists of token ids, in row-major order, in any order, repeated or not.
    """
    kept = support if isinstance(support, Tensor) else of_lists(support, x.shape, mask)
    kept = kept & mask[..., None]
    open_rows = ~kept.any(-1, keepdim=True)
    token = torch.zeros_like(kept).scatter_(-1, ids[..., None], True)
    return torch.where(kept | token | open_rows, x, -torch.inf)


def of_lists(rows: Sequence[Sequence[int]], shape: tuple[int, ...], mask: Tensor) -> Tensor:
    if len(rows) != mask.numel():
        raise ValueError(f"support has {len(rows)} lists for {mask.numel()} tokens")
    kept = torch.zeros(mask.numel(), shape[-1], dtype=torch.bool, device=mask.device)
    for row, token_ids, counts in zip(kept, rows, mask.flatten().tolist()):
        if counts and len(token_ids):
            row[torch.as_tensor(token_ids, device=mask.device)] = True
    return kept.view(shape)
