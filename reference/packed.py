"""Packed input: sequences one after the other, (N,), instead of padded to the same length, (S, T)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where each packed token stands when padded."""

    index: Tensor  # (S, T): the token that stands there
    used: Tensor  # (S, T) bool: one does

    def pad(self, x: Tensor | None) -> Tensor | None:
        """(N,) → (S, T)"""
        return None if x is None else x[self.index]

    def pad_either(self, x: Tensor | None) -> Tensor | None:
        """(S,) stays, one value per sequence; (N,) → (S, T). S = N is read as (S,)."""
        return self.pad(x) if x is not None and x.shape[0] != self.used.shape[0] else x

    def unpad(self, x: Tensor) -> Tensor:
        """(S, T) → (N,)"""
        return x[self.used]


def layout_of(cu_seqlens: Tensor, total: int) -> Layout:
    """cu_seqlens (S+1,): sequence i has the tokens [cu_seqlens[i], cu_seqlens[i+1]) of the N in total."""
    starts, ends = cu_seqlens[:-1].long()[:, None], cu_seqlens[1:].long()[:, None]
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (starts > ends).any():
        raise ValueError(f"cu_seqlens={cu_seqlens.tolist()} must rise from 0 to {total}, the number of packed tokens")
    longest = int((ends - starts).max()) if len(starts) else 0
    index = starts + torch.arange(longest, device=cu_seqlens.device)
    used = index < ends
    return Layout(torch.where(used, index, 0), used)


def sequence_of_token(cu_seqlens: Tensor) -> Tensor:
    """(N,): the sequence that each packed token belongs to."""
    lengths = cu_seqlens.long().diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
