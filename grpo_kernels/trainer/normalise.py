"""How micro-batches add up to the minibatch they are parts of, exactly (docs/objectives/aggregations.md)."""

from typing import NamedTuple

import torch

from grpo_kernels import LossConfig, microbatch


class Whole(NamedTuple):
    """Sizes of the minibatch that an optimizer step is for."""

    sequences: int
    tokens: int
    nonempty: int = 0  # sequences that have a token

    @classmethod
    def of(cls, mask: torch.Tensor) -> "Whole":
        """Of a mask (B, T)."""
        return cls(mask.shape[0], int(mask.sum()), int((mask != 0).any(1).sum()))

    def counted(self, config: LossConfig) -> int:
        """The sequences that this loss averages over."""
        return self.nonempty if config.aggregation.startswith("seq-mean") else self.sequences


def share(config: LossConfig, part: Whole, whole: Whole) -> dict[str, float]:
    """What a micro-batch's loss is called with, so that losses and gradients sum to the minibatch's."""
    return microbatch(config, tokens=part.tokens, total_tokens=whole.tokens,
                      sequences=part.counted(config), total_sequences=whole.counted(config))  # fmt: skip
