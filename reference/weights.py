"""Weights: (m, sizes) → w, so that Σ w·ℓ is the average that the loss type asks for.

m (B, T) is the mask as numbers. Denominators are at least 1, so that an empty sequence or batch counts 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Sizes(NamedTuple):
    tokens: Tensor  # N, in the whole batch, of which this call may see a part
    sequences: Tensor  # B', that have an unmasked token, likewise
    length: float  # the constant that stands for a sequence's length


def tokens_of(m: Tensor) -> Tensor:
    """|y|, (B, 1)."""
    return m.sum(dim=1, keepdim=True)


def sequence_mean(m: Tensor, sizes: Sizes) -> Tensor:
    """Mean over each sequence's tokens, then over sequences: a token of a long answer counts less (GRPO)."""
    return m / (tokens_of(m).clamp(min=1) * m.shape[0])


def batch_tokens(m: Tensor, sizes: Sizes) -> Tensor:
    """Mean over the tokens of this call (BNPO)."""
    return m / m.sum().clamp(min=1)


def global_tokens(m: Tensor, sizes: Sizes) -> Tensor:
    """Mean over the tokens of the whole batch (DAPO; verl's token-mean)."""
    return m / sizes.tokens.clamp(min=1)


def constant(m: Tensor, sizes: Sizes) -> Tensor:
    """Sum over tokens, divided by a constant: length has no say at all (Dr. GRPO)."""
    return m / (m.shape[0] * sizes.length)


def sequence_sum(m: Tensor, sizes: Sizes) -> Tensor:
    """Sum over each sequence's tokens, mean over sequences: undoes the mean in a sequence's ratio (LUSPO)."""
    return m / m.shape[0]


def token_sum(m: Tensor, sizes: Sizes) -> Tensor:
    """Sum over all tokens."""
    return m


def nonempty_sequence_sum(m: Tensor, sizes: Sizes) -> Tensor:
    """Sum over each sequence's tokens, mean over the sequences that have any."""
    return m / sizes.sequences.clamp(min=1)


def nonempty_sequence_mean(m: Tensor, sizes: Sizes) -> Tensor:
    """Mean over each sequence's tokens, then over the sequences that have any."""
    return m / ((tokens_of(m) + 1e-8) * sizes.sequences.clamp(min=1))


def nonempty_sequence_constant(m: Tensor, sizes: Sizes) -> Tensor:
    """Sum over each sequence's tokens, divided by a constant, mean over the sequences that have any."""
    return m / (sizes.sequences.clamp(min=1) * sizes.length)


WEIGHTS: dict[str, Callable[[Tensor, Sizes], Tensor]] = {
    "sequence-mean": sequence_mean,
    "batch-tokens": batch_tokens,
    "global-tokens": global_tokens,
    "constant": constant,
    "sequence-sum": sequence_sum,
    # verl's names
    "token-mean": global_tokens,
    "token-sum": token_sum,
    "seq-mean-token-sum": nonempty_sequence_sum,
    "seq-mean-token-mean": nonempty_sequence_mean,
    "seq-mean-token-sum-norm": nonempty_sequence_constant,
}
NEED_LENGTH = ("constant", "seq-mean-token-sum-norm")
