"""How micro-batches add up to the minibatch they are parts of, exactly (docs/objectives/aggregations.md)."""

from typing import NamedTuple

import torch

from grpo_kernels import LossConfig, microbatch


class Whole(NamedTuple):
    """Sizes of the minibatch that an optimizer step is for."""

    sequences: int
    tokens: int

    @classmethod
    def of(cls, mask: torch.Tensor) -> "Whole":
        """Of a mask (B, T)."""
        return cls(mask.shape[0], int(mask.sum()))


def share(config: LossConfig, part: Whole, whole: Whole) -> dict[str, float]:
    """What a micro-batch's loss is called with, so that losses and gradients sum to the minibatch's."""
    return microbatch(config, tokens=part.tokens, total_tokens=whole.tokens, sequences=part.sequences,
                      total_sequences=whole.sequences)  # fmt: skip
