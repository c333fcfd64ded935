"""Reductions as weights: loss = Σ w·ℓ with w detached and known before the loss.

Every reduction in use is ``w = m · factor · loss_scale / max(count, 1)``, the count a number of
tokens: of the sequence (B,), of the batch (a scalar), or none. The division itself is
`grpo_kernels.objective.token.weight`, which the kernels and the CPU path share.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

Weight = tuple[torch.Tensor | None, float]  # (count, factor): factor / max(count, 1); count (B,), (), or None for 1


class Sizes(NamedTuple):
    """What an aggregation may know of a batch. A count that the caller gives is a number or a 0-d tensor."""

    mask: torch.Tensor | None  # (B, T)
    packed_lengths: torch.Tensor | None  # (B,) unmasked tokens of each sequence, where they are packed
    B: int
    T: int
    num_items: torch.Tensor | float | None  # the caller's token count
    horizon: torch.Tensor | float  # the constant that stands for a sequence's length
    global_batch_size: torch.Tensor | float | None  # the caller's count of sequences

    def lengths(self) -> torch.Tensor | None:
        """(B,) unmasked tokens of each sequence; None: T each."""
        if self.packed_lengths is not None or self.mask is None:
            return self.packed_lengths
        return self.mask.sum(1, dtype=torch.float32)

    def one_sequence(self) -> float:
        """1/B, of an empty batch 1."""
        return 1.0 / max(self.B, 1)


def divided(weight: Weight, count: torch.Tensor | float) -> Weight:
    """A weight divided by a number or tensor, which counts as 1 at least."""
    present, factor = weight
    if not isinstance(count, torch.Tensor):
        return present, factor / max(count, 1.0)
    if present is None:
        return count, factor
    return present.clamp(min=1.0) * count.clamp(min=1.0), factor


def sequence_mean(sizes: Sizes) -> Weight:
    lengths = sizes.lengths()
    if lengths is None:
        return None, sizes.one_sequence() / max(sizes.T, 1)
    return lengths, sizes.one_sequence()


def sequence_sum(sizes: Sizes) -> Weight:
    return None, sizes.one_sequence()


def batch_tokens(sizes: Sizes) -> Weight:
    if sizes.packed_lengths is not None:
        return sizes.packed_lengths.sum(), 1.0
    if sizes.mask is not None:
        return sizes.mask.sum(dtype=torch.float32), 1.0
    return None, 1.0 / max(sizes.B * sizes.T, 1)


def global_tokens(sizes: Sizes) -> Weight:
    return batch_tokens(sizes) if sizes.num_items is None else divided(token_sum(sizes), sizes.num_items)


def constant(sizes: Sizes) -> Weight:
    return divided(sequence_sum(sizes), sizes.horizon)


def token_sum(sizes: Sizes) -> Weight:
    return None, 1.0


def nonempty_sequence_sum(sizes: Sizes) -> Weight:
    if sizes.global_batch_size is not None:
        return divided(token_sum(sizes), sizes.global_batch_size)
    lengths = sizes.lengths()
    if lengths is None:
        return sequence_sum(sizes)
    return torch.linalg.vector_norm(lengths, 0), 1.0  # how many are not 0, in one launch


def nonempty_sequence_mean(sizes: Sizes) -> Weight:
    (count, factor), lengths = nonempty_sequence_sum(sizes), sizes.lengths()
    if lengths is None:
        return divided((count, factor), sizes.T)
    if count is None:
        return lengths, factor
    if sizes.global_batch_size is not None:
        return divided((lengths, factor), count)
    return lengths * count, factor  # where no sequence has a token, none has a length


def nonempty_sequence_constant(sizes: Sizes) -> Weight:
    return divided(nonempty_sequence_sum(sizes), sizes.horizon)


class Part(NamedTuple):
    """Sizes of a micro-batch and of the batch that it is a part of, each a number or a 0-d tensor."""

    tokens: torch.Tensor | float
    total_tokens: torch.Tensor | float
    sequences: torch.Tensor | float
    total_sequences: torch.Tensor | float


def share_of_sequences(part: Part) -> dict:
    return {"loss_scale": quotient(part.sequences, part.total_sequences)}


def share_of_tokens(part: Part) -> dict:
    return {"loss_scale": quotient(part.tokens, part.total_tokens)}


def whole_tokens(part: Part) -> dict:
    return {"num_items_in_batch": part.total_tokens}


def whole_sequences(part: Part) -> dict:
    return {"global_batch_size": part.total_sequences}


def nothing(part: Part) -> dict:
    return {}


def quotient(part: torch.Tensor | float, whole: torch.Tensor | float) -> torch.Tensor | float:
    """part/whole, 0 where the whole is 0."""
    if not isinstance(whole, torch.Tensor):
        return part / whole if whole else part * 0.0
    some = whole > 0
    return torch.where(some, part / torch.where(some, whole, 1), 0.0)


class Aggregation(NamedTuple):
    """``loss_agg_mode``: its weight as a function of the batch, and as a formula."""

    function: Callable[[Sizes], Weight]
    formula: str
    micro: Callable[[Part], dict]  # keywords that make a part's weights those of the whole batch
    needs_horizon: bool = False


AGGREGATIONS = {
    "sequence-mean": Aggregation(sequence_mean, "m / (max(|y|, 1)·B)", share_of_sequences),
    "sequence-sum": Aggregation(sequence_sum, "m / B", share_of_sequences),
    "batch-tokens": Aggregation(batch_tokens, "m / max(Σ m, 1)", share_of_tokens),
    "global-tokens": Aggregation(global_tokens, "m / max(num_items_in_batch, 1)", whole_tokens),
    "constant": Aggregation(constant, "m / (B·max_completion_length)", share_of_sequences, True),
    "token-mean": Aggregation(global_tokens, "m / max(num_items_in_batch, 1)", whole_tokens),
    "token-sum": Aggregation(token_sum, "m", nothing),
    "seq-mean-token-sum": Aggregation(nonempty_sequence_sum, "m / B'", whole_sequences),
    "seq-mean-token-mean": Aggregation(nonempty_sequence_mean, "m / (|y|·B')", whole_sequences),
    "seq-mean-token-sum-norm": Aggregation(
        nonempty_sequence_constant, "m / (B'·max_completion_length)", whole_sequences, True
    ),
}
