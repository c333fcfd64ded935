"""`microbatch`: the keywords for the loss of a part of a batch, so that the parts sum to the whole."""

import torch

from grpo_kernels.objective.aggregations import AGGREGATIONS, Part, quotient
from grpo_kernels.objective.config import LossConfig
from grpo_kernels.objective.scalars import is_number


def microbatch(
    config: LossConfig,
    *,
    tokens: torch.Tensor | float,
    total_tokens: torch.Tensor | float,
    sequences: torch.Tensor | float,
    total_sequences: torch.Tensor | float,
) -> dict:
    """Keywords of the loss of one part of a batch, so that losses and gradients of the parts sum to the batch's.

        sum(fused_grpo_loss(..., config=config, **microbatch(config, tokens=..., ...)).loss for each part)

    The parts hold whole sequences. Advantages come from the whole batch (`group_advantages`). An entropy quantile is
    computed per call, so with one the parts differ from the whole. ``constant`` and ``seq-mean-token-sum-norm`` need
    ``max_completion_length`` in the config, unless all parts are padded to the length of the whole.

    Args:
        config: the loss of the whole batch.
        tokens, total_tokens: unmasked tokens of the part, and of the batch.
        sequences, total_sequences: sequences of the part, and of the batch; in verl's ``seq-mean-*`` modes
            those that have an unmasked token.

    Each is a number or a 0-d tensor; tensors are not read, and the keywords then hold tensors. All may be 0:
    a part without a token, or without a sequence, adds nothing.

    Returns:
        A dict of some of ``loss_scale``, ``num_items_in_batch``, ``global_batch_size`` and, where the config
        has a bonus, ``entropy_coef``. For data-parallel wrappers that average gradients multiply
        ``loss_scale`` (1 where it is not there) by the number of ranks.

    Raises:
        ValueError: a negative number, or a part that is larger than the whole.
        TypeError: a value that is not a number.
    """
    part = Part(tokens, total_tokens, sequences, total_sequences)
    for name, value in part._asdict().items():
        if not (isinstance(value, torch.Tensor) or is_number(value)):
            raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(value).__name__}.")
        if not isinstance(value, torch.Tensor) and not value >= 0:
            raise ValueError(f"{name} must be 0 or more, got {value}.")
    for name in ("tokens", "sequences"):
        some, whole = getattr(part, name), getattr(part, f"total_{name}")
        if not isinstance(some, torch.Tensor) and not isinstance(whole, torch.Tensor) and some > whole:
            raise ValueError(f"{name}={some} of a part are more than total_{name}={whole} of the whole batch.")
    keywords = AGGREGATIONS[config.aggregation].micro(part)
    if config.entropy_coef is not None:  # a mean over tokens whatever the aggregation, and times loss_scale
        share = quotient(quotient(tokens, total_tokens), keywords.get("loss_scale", 1.0))
        keywords["entropy_coef"] = config.entropy_coef * share
    return keywords
