"""verl's own loss as an oracle: its unpatched `ppo_loss`, and the advantages that it is given.

`ppo_loss` is what every engine of verl calls for a micro-batch: a registered policy loss, the entropy
bonus and the KL penalty, aggregated. It asks for an `ActorConfig`, which is verl's here too, and for log-probs of
a model, which are made from logits that the caller gives; so one gets verl's loss and metrics of any
logits, differentiable.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from torch import Tensor

# verl imports Ray at once, but for the loss it is no more than a name in annotations; Ray is ten times the
# size of everything else that is needed.
ray_is_missing = importlib.util.find_spec("ray") is None
if ray_is_missing:
    sys.modules["ray"] = ModuleType("ray")
    sys.modules["ray"].ObjectRef = object
try:
    from verl.trainer.config import RolloutCorrectionConfig
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, compute_grpo_outcome_advantage
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig
    from verl.workers.utils import losses
finally:
    if ray_is_missing:
        del sys.modules["ray"]  # nobody else shall take it for Ray


__all__ = ["POLICY_LOSS_REGISTRY", "RolloutCorrectionConfig", "agg_loss"]


def actor_config(
    loss_mode: str = "vanilla",
    *,
    dro_beta: float | None = None,
    rollout_correction: RolloutCorrectionConfig | None = None,
    **actor: object,
) -> ActorConfig:
    """verl's own, with verl's defaults for what is not given."""
    policy = {} if rollout_correction is None else {"rollout_correction": rollout_correction}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, dro_beta=dro_beta, **policy),
        **actor,
    )


class Batch(dict):
    """As much of a TensorDict as `ppo_loss` needs; what it holds is padded already."""

    def select(self, *names: str) -> Batch:
        return Batch({name: self[name] for name in names})

    def to_padded_tensor(self) -> Batch:
        return self


def verl_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    loss_mode: str = "vanilla",
    dro_beta: float | None = None,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    **actor: object,
) -> tuple[Tensor, dict[str, float]]:
    """verl's loss and metrics.

    Args:
        logits: (B, T, V), any float dtype, computed with as they are, float64 included; temperature 1.
        completion_ids: (B, T); what lies where the mask is 0 may be anything.
        advantages: (B, T); verl has no others.
        completion_mask: (B, T), verl's response_mask.
        old_logps: (B, T); None: those of the logits, detached, as verl does for on-policy batches.
        ref_logps: (B, T), for use_kl_loss.
        rollout_is_weights: (B, T).
        loss_mode: the registered policy loss.
        dro_beta: of `PolicyLossConfig`.
        dp_size, batch_num_tokens, global_batch_size: what verl's engine knows of the global batch.
        **actor: fields of `ActorConfig`; the others have verl's defaults.

    Returns: the 0-d loss, differentiable with respect to logits, and {name: value} of what was logged.
    """
    log_p = logits.log_softmax(dim=-1)
    logps = log_p.gather(-1, completion_ids.masked_fill(completion_mask == 0, 0).unsqueeze(-1)).squeeze(-1)
    output = {"log_probs": logps}
    if actor.get("entropy_coeff", 0) != 0:
        output["entropy"] = -(log_p.exp() * log_p).sum(dim=-1)
    batch = Batch(
        response_mask=completion_mask,
        old_log_probs=logps.detach() if old_logps is None else old_logps,
        advantages=advantages,
        dp_size=dp_size,
        batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
    )
    if ref_logps is not None:
        batch["ref_log_prob"] = ref_logps
    if rollout_is_weights is not None:
        batch["rollout_is_weights"] = rollout_is_weights
    config = actor_config(loss_mode, dro_beta=dro_beta, **actor)
    with mock.patch.object(losses, "no_padding_2_padding", lambda x, data: x):
        loss, metrics = losses.ppo_loss(config, output, batch)
    logged = {name: value.aggregate() for name, value in metrics.items() if hasattr(value, "aggregate")}
    return loss, {name: float(value) for name, value in logged.items()}


def verl_advantages(
    rewards: Tensor, num_generations: int, completion_mask: Tensor, *, norm_adv_by_std_in_grpo: bool = True
) -> Tensor:
    """verl's GRPO advantages (B, T) of outcome rewards (B,), 0 where masked; rows [k·G, (k+1)·G) share a prompt."""
    token_level_rewards = torch.zeros(completion_mask.shape, dtype=rewards.dtype)
    token_level_rewards[:, -1] = rewards
    prompts = np.arange(len(rewards)) // num_generations
    advantages, _ = compute_grpo_outcome_advantage(
        token_level_rewards, completion_mask, prompts, norm_adv_by_std_in_grpo=norm_adv_by_std_in_grpo
    )
    return advantages


def verl_rollout_is_weights(
    old_logps: Tensor, rollout_logps: Tensor, completion_mask: Tensor, *, level: str, threshold: float | str
) -> Tensor:
    """verl's weights (B, T) for a sampler other than the trainer: `rollout_is` and `rollout_is_threshold`."""
    weights, _ = compute_rollout_correction_weights(
        old_logps - rollout_logps, completion_mask, rollout_is=level, rollout_is_threshold=threshold
    )
    return weights
