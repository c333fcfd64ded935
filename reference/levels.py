"""Levels: whose ratio ρ is. (lp, old, mask) → r̂ = log ρ, (B, T), 0 where masked.

r = lp − old = log π_θ − log π_old of the sampled token: how much more likely it has become since it was
sampled. lp and old are 0 where masked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reference.tensors import gradient_of, masked_sum, sequence_mean


def level_token(lp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """r̂_t = r_t: every token for itself (PPO, GRPO)."""
    return lp - old


def level_sequence(lp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """r̂_t = s = Σ m·r / |y|: the geometric mean of the sequence's ratios, for all its tokens (GSPO)."""
    return spread(sequence_mean(lp - old, mask), mask)


def level_sequence_token(lp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """r̂_t = lp − sg lp + sg s: the sequence's value, but each token moves by itself (GSPO-token)."""
    return level_sequence(lp, old, mask).detach() + gradient_of(lp)


def level_sequence_sum(lp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """r̂_t = Σ m·r: the log ratio of the whole trajectory (Kimi k1.5, TOPR)."""
    return spread(masked_sum(lp - old, mask), mask)


def spread(s: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, s, 0)


LEVELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": level_token,
    "sequence": level_sequence,
    "sequence_token": level_sequence_token,
    "sequence_sum": level_sequence_sum,
}
ONE_RATIO_PER_SEQUENCE = ("sequence", "sequence_sum")
