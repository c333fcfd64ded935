"""Small helpers on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask as bool; all ones if there is none."""
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask != 0


def as_column(x: Tensor) -> Tensor:
    """(B,) → (B, 1); what has two dimensions stays."""
    return x[:, None] if x.dim() == 1 else x


def per_token(x: Tensor, mask: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """(B,), (B, 1) or (B, T) → (B, T), detached, with `fill` where masked."""
    return torch.where(mask, as_column(x.detach().to(dtype)).expand(mask.shape), fill)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T) → (B, 1)."""
    return torch.where(mask, x, 0).sum(dim=1, keepdim=True)


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T) → (B, 1): mean over each sequence's tokens; 0 for a sequence without tokens."""
    return masked_sum(x, mask) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """0-d: mean over all tokens; 0 if there is none."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def clip(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """x between bounds. On a bound x keeps its gradient, as in torch.clamp up to torch 2.13."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def gradient_of(x: Tensor) -> Tensor:
    """0 with the gradient of x: added to a value that is detached, it makes a straight-through estimator."""
    return torch.where(x.detach().isfinite(), x - x.detach(), 0)


def nan_min(x: Tensor) -> Tensor:
    """Smallest entry that is not NaN; NaN if there is none."""
    valid = x[~x.isnan()]
    return valid.min() if valid.numel() else x.new_tensor(torch.nan)


def choose(table: Mapping[str, T], name: str, argument: str) -> T:
    if name not in table:
        raise ValueError(f"{argument}={name!r} is unknown; choose one of {', '.join(map(repr, table))}")
    return table[name]
