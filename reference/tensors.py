"""Small helpers on tensors."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_mask(mask: Tensor | None, completion_ids: Tensor) -> Tensor:
    """The mask as bool; all ones if there is none."""
    return torch.ones_like(completion_ids, dtype=torch.bool) if mask is None else mask != 0


def per_token(x: Tensor, mask: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """(B,), (B, 1) or (B, T) → (B, T), detached, with `fill` where masked."""
    x = x.detach().to(dtype)
    x = x[:, None] if x.dim() == 1 else x
    return torch.where(mask, x.expand(mask.shape), fill)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def nan_min(x: Tensor) -> Tensor:
    """Smallest entry that is not NaN; NaN if there is none."""
    valid = x[~x.isnan()]
    return valid.min() if valid.numel() else x.new_tensor(torch.nan)


def choose(table: dict[str, T], name: str, argument: str) -> T:
    if name not in table:
        raise ValueError(f"{argument}={name!r} is unknown; choose one of {', '.join(map(repr, table))}")
    return table[name]
