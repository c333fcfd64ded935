"""Reductions as weights: loss = Σ w·ℓ with w detached and known before the loss.

Every reduction in use is ``w = m · factor · loss_scale / max(count, 1)``, the count a number of
tokens: of the sequence (B,), of the batch (a scalar), or none. The division itself is
`grpo_kernels.objective.weight`, which the kernels and the CPU path share.
"""

from typing import NamedTuple

import torch

from grpo_kernels.config import LossConfig


class Weight(NamedTuple):
    """``factor / max(count, 1)``; count is (B,), a scalar, or None for 1."""

    count: torch.Tensor | None
    factor: float


class Batch(NamedTuple):
    """What a weighting may know of a batch: the mask (B, T) or None, the sizes, and the caller's count."""

    mask: torch.Tensor | None
    B: int
    T: int
    num_items: torch.Tensor | float | None
    max_completion_length: int | None


def sequence_mean(batch: Batch) -> Weight:
    """m / (max(|y_i|, 1)·B)"""
    if batch.mask is None:
        return Weight(None, 1.0 / (batch.T * batch.B))
    return Weight(batch.mask.sum(1, dtype=torch.float32), 1.0 / batch.B)


def batch_tokens(batch: Batch) -> Weight:
    """m / max(Σ m, 1)"""
    if batch.mask is None:
        return Weight(None, 1.0 / (batch.B * batch.T))
    return Weight(batch.mask.sum(dtype=torch.float32), 1.0)


def global_tokens(batch: Batch) -> Weight:
    """m / max(N, 1), N the caller's token count of the whole batch; Σ m without one."""
    if batch.num_items is None:
        return batch_tokens(batch)
    if isinstance(batch.num_items, torch.Tensor):
        return Weight(batch.num_items, 1.0)
    return Weight(None, 1.0 / max(batch.num_items, 1.0))


def constant(batch: Batch) -> Weight:
    """m / (B·max_completion_length)"""
    return Weight(None, 1.0 / (batch.B * (batch.max_completion_length or batch.T)))


WEIGHTINGS = {
    "sequence_mean": sequence_mean,
    "batch_tokens": batch_tokens,
    "global_tokens": global_tokens,
    "constant": constant,
}


def policy_weight(config: LossConfig, weighting: str, mask, B: int, T: int, num_items) -> Weight:
    """The weight of ℓ for a weighting of the catalogue, without ``loss_scale``."""
    return WEIGHTINGS[weighting](Batch(mask, B, T, num_items, config.max_completion_length))


def bonus_weight(config: LossConfig, mask, B: int, T: int) -> Weight:
    """The weight of the entropy bonus, ``entropy_coef / max(Σ m, 1)``, without ``loss_scale``."""
    count, factor = batch_tokens(Batch(mask, B, T, None, None))
    return Weight(count, factor * config.entropy_coef)
