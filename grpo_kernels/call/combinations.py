"""Checks of the arguments that every loss function shares: their shapes, and what goes together."""

import torch

from grpo_kernels.call import checks
from grpo_kernels.call.checks import Layout
from grpo_kernels.objective.aggregations import AGGREGATIONS
from grpo_kernels.objective.catalogue import TERMS
from grpo_kernels.objective.config import LossConfig


def check_arguments(
    config: LossConfig, layout: Layout, like: torch.Tensor, *, advantages, rewards, num_generations, old_logps,
    ref_logps, completion_mask, importance_weights, sampling_logps, cu_seqlens, reduction, skip_zero_advantage,
) -> None:  # fmt: skip
    """Raise unless the loss is defined; ``like`` has the ids' shape and device."""
    if layout.packed and cu_seqlens is None:
        raise ValueError("packed input needs cu_seqlens, (S+1,): the bounds of its sequences, from 0 to N.")
    per_token = layout.per_token
    either = {**layout.per_sequence, **per_token}
    checks.check_mask("completion_mask", completion_mask, like, layout)
    checks.check_float("old_logps", old_logps, like, per_token)
    checks.check_float("ref_logps", ref_logps, like, per_token)
    checks.check_float("sampling_logps", sampling_logps, like, per_token)
    checks.check_float("importance_weights", importance_weights, like, either)
    checks.check_float("advantages", advantages, like, either)
    checks.check_float("rewards", rewards, like, _reward_shapes(rewards, layout))
    if (advantages is None) == (rewards is None):
        raise ValueError("pass either advantages or rewards (with num_generations), and not both.")
    if rewards is not None:
        checks.check_rewards(
            rewards, num_generations, config.scale_rewards, config.advantage_estimator, config.reward_weights
        )
    elif num_generations is not None:
        raise ValueError("num_generations goes with rewards; advantages are used as they are.")
    if config.beta != 0.0 and ref_logps is None:
        raise ValueError(f"beta={config.beta} needs ref_logps, the reference policy's log-probabilities.")
    if config.sampling_correction is not None:
        if sampling_logps is None:
            raise ValueError(f"sampling_correction={config.sampling_correction!r} needs sampling_logps.")
        if importance_weights is not None:
            raise ValueError(
                "importance_weights are made from sampling_logps when sampling_correction is set: pass one of the two."
            )
    check_reduction(reduction)
    check_horizon(layout, config.aggregation, config.max_completion_length)
    if skip_zero_advantage:
        _check_skipping(config)


def _reward_shapes(rewards: object, layout: Layout) -> dict[str, tuple]:
    B, K = "S" if layout.packed else "B", rewards.shape[1:2] if isinstance(rewards, torch.Tensor) else ()
    shapes = {f"({B},)": (layout.B,)}
    return {**shapes, f"({B}, K)": (layout.B, *K)} if K else shapes


def check_reduction(reduction: str) -> None:
    if not isinstance(reduction, str) or reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}.")


def check_horizon(layout: Layout, loss_agg_mode: str, max_completion_length: object) -> None:
    if layout.packed and AGGREGATIONS[loss_agg_mode].needs_horizon and max_completion_length is None:
        raise ValueError(f"loss_agg_mode={loss_agg_mode!r} on packed input needs max_completion_length.")


def _check_skipping(config: LossConfig) -> None:
    reads = {"entropy_coef": config.entropy_coef is not None,
             "top_entropy_quantile": config.top_entropy_quantile < 1.0,
             f"policy_term={config.term!r}": TERMS[config.term].acts_without_advantage}  # fmt: skip
    for name, reads_all in reads.items():
        if reads_all:
            raise ValueError(
                f"skip_zero_advantage leaves rows unread, but {name} needs them all: use skip_zero_advantage=False."
            )
