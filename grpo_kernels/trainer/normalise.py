"""How micro-batches add up to the minibatch they are parts of, exactly (docs/objectives/aggregations.md)."""

from typing import NamedTuple

import torch

from grpo_kernels import LossConfig


class Whole(NamedTuple):
    """Sizes of the minibatch that an optimizer step is for."""

    sequences: int
    tokens: int

    @classmethod
    def of(cls, mask: torch.Tensor) -> "Whole":
        """Of a mask (B, T)."""
        return cls(mask.shape[0], int(mask.sum()))


def share(config: LossConfig, part: Whole, whole: Whole) -> dict[str, float]:
    """What a micro-batch's loss is called with, so that losses and gradients sum to the minibatch's.

    Raises:
        ValueError: the aggregation has no rule here; those of the loss types all have.
    """
    tokens, sequences = part.tokens / max(whole.tokens, 1), part.sequences / whole.sequences
    match config.loss_agg_mode:
        case "sequence-mean" | "sequence-sum" | "constant":
            how = {"loss_scale": sequences}
        case "batch-tokens":
            how = {"loss_scale": tokens}
        case "global-tokens":
            how = {"num_items_in_batch": float(whole.tokens)}
        case other:
            raise ValueError(f"loss_agg_mode={other!r} has no rule for micro-batches here.")
    if config.entropy_coef:
        # The bonus is a mean over tokens whatever the aggregation, and loss_scale is a factor of it.
        scale = how.get("loss_scale", 1.0)
        how["entropy_coef"] = config.entropy_coef * tokens / scale if scale else 0.0
    return how
