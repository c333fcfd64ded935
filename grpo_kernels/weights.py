"""Reductions as weights: loss = Σ w·ℓ with w detached and known before the loss.

Every reduction in use is ``w = m · factor · loss_scale / max(count, 1)``, the count a number of
tokens: of the sequence (B,), of the batch (a scalar), or none. The division itself is
`grpo_kernels.objective.weight`, which the kernels and the CPU path share.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Weight(NamedTuple):
    """``factor / max(count, 1)``; count is (B,), a scalar, or None for 1."""

    count: torch.Tensor | None
    factor: float


class Batch(NamedTuple):
    """What an aggregation may know of a batch."""

    mask: torch.Tensor | None  # (B, T)
    packed_lengths: torch.Tensor | None  # (B,) unmasked tokens of each sequence, where they are packed
    B: int
    T: int
    num_items: torch.Tensor | float | None  # the caller's token count
    horizon: int | None  # the constant that stands for a sequence's length
    global_batch_size: int | None  # the caller's count of sequences

    def lengths(self) -> torch.Tensor | None:
        """(B,) unmasked tokens of each sequence; None: T each."""
        if self.packed_lengths is not None or self.mask is None:
            return self.packed_lengths
        return self.mask.sum(1, dtype=torch.float32)


def sequence_mean(batch: Batch) -> Weight:
    lengths = batch.lengths()
    if lengths is None:
        return Weight(None, 1.0 / (batch.T * batch.B))
    return Weight(lengths, 1.0 / batch.B)


def sequence_sum(batch: Batch) -> Weight:
    return Weight(None, 1.0 / batch.B)


def batch_tokens(batch: Batch) -> Weight:
    if batch.packed_lengths is not None:
        return Weight(batch.packed_lengths.sum(), 1.0)
    if batch.mask is not None:
        return Weight(batch.mask.sum(dtype=torch.float32), 1.0)
    return Weight(None, 1.0 / (batch.B * batch.T))


def global_tokens(batch: Batch) -> Weight:
    if batch.num_items is None:
        return batch_tokens(batch)
    if isinstance(batch.num_items, torch.Tensor):
        return Weight(batch.num_items, 1.0)
    return Weight(None, 1.0 / max(batch.num_items, 1.0))


def constant(batch: Batch) -> Weight:
    return Weight(None, 1.0 / (batch.B * batch.horizon))


def token_sum(batch: Batch) -> Weight:
    return Weight(None, 1.0)


def nonempty_sequence_sum(batch: Batch) -> Weight:
    if batch.global_batch_size is not None:
        return Weight(None, 1.0 / batch.global_batch_size)
    lengths = batch.lengths()
    if lengths is None:
        return Weight(None, 1.0 / batch.B)
    return Weight((lengths > 0).sum(dtype=torch.float32), 1.0)


def nonempty_sequence_mean(batch: Batch) -> Weight:
    count, factor = nonempty_sequence_sum(batch)
    lengths = batch.lengths()
    if lengths is None:
        return Weight(None, factor / batch.T)
    return Weight(lengths if count is None else lengths * count, factor)


def nonempty_sequence_constant(batch: Batch) -> Weight:
    count, factor = nonempty_sequence_sum(batch)
    return Weight(count, factor / batch.horizon)


class Aggregation(NamedTuple):
    """``loss_agg_mode``: its weight as a function of the batch, and as a formula."""

    function: Callable[[Batch], Weight]
    formula: str
    needs_horizon: bool = False


AGGREGATIONS = {
    "sequence-mean": Aggregation(sequence_mean, "m / (max(|y|, 1)·B)"),
    "sequence-sum": Aggregation(sequence_sum, "m / B"),
    "batch-tokens": Aggregation(batch_tokens, "m / max(Σ m, 1)"),
    "global-tokens": Aggregation(global_tokens, "m / max(num_items_in_batch, 1)"),
    "constant": Aggregation(constant, "m / (B·max_completion_length)", True),
    "token-mean": Aggregation(global_tokens, "m / max(num_items_in_batch, 1)"),
    "token-sum": Aggregation(token_sum, "m"),
    "seq-mean-token-sum": Aggregation(nonempty_sequence_sum, "m / B'"),
    "seq-mean-token-mean": Aggregation(nonempty_sequence_mean, "m / (|y|·B')"),
    "seq-mean-token-sum-norm": Aggregation(nonempty_sequence_constant, "m / (B'·max_completion_length)", True),
}
