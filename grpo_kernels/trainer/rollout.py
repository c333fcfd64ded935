"""What one step learns from: completions, what they earned, and their tensors."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from grpo_kernels import Support

Row = dict[str, float]  # one line of metrics.jsonl


@dataclass(frozen=True)
class Rollout:
    """B completions and what they earned; rows [k·G, (k+1)·G) share a prompt."""

    prompt_ids: torch.Tensor  # (B, P), padded on the left
    prompt_mask: torch.Tensor  # (B, P), 0 at padding
    completion_ids: torch.Tensor  # (B, T), padded on the right
    completion_mask: torch.Tensor  # (B, T) bool, up to the end of sequence, which counts
    ended: torch.Tensor  # (B,) bool, False: cut off at the maximum length
    rewards: torch.Tensor  # (B,) fp32; NaN: nobody has rewarded it
    support: Support | None = None  # of each of the B·T tokens, the set that a truncating sampler drew it from
    sampling_logps: torch.Tensor | None = None  # (B, T), of a truncating sampler, over these sets
    reward_parts: Mapping[str, torch.Tensor] = field(default_factory=dict)  # (B,) each, by the function's name
    prompts: tuple[str, ...] = ()
    completions: tuple[str, ...] = ()
    reward_time: float = 0.0  # seconds spent in the reward functions

    def rows(self, index: torch.Tensor) -> "Rollout":
        """The completions with these numbers (b,), tensors only."""
        tensors = {name: getattr(self, name)[index] for name in self.__dataclass_fields__
                   if isinstance(getattr(self, name), torch.Tensor)}  # fmt: skip
        if self.support is not None:
            length = self.completion_ids.shape[1]
            tokens = index[:, None] * length + torch.arange(length, device=index.device)
            tensors["support"] = self.support[tokens.reshape(-1).to(self.completion_ids.device)]
        return dataclasses.replace(self, **tensors, reward_parts={}, prompts=(), completions=())


def mask_after_eos(completion_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """(B, T) bool: True up to the first end of sequence, which the policy chose too, False behind it."""
    is_eos = (completion_ids == eos_token_id).int()
    return is_eos.cumsum(1) - is_eos == 0


def model_inputs(rollout: Rollout) -> dict[str, torch.Tensor]:
    """Prompts and completions, one behind the other."""
    # Nothing attends forward, so that what follows the end of sequence needs no attention mask.
    attention = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.completion_ids)], dim=1)
    return {
        "input_ids": torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
    }


def length_metrics(rollout: Rollout) -> Row:
    lengths = rollout.completion_mask.sum(1).float()
    terminated = lengths[rollout.ended]
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/mean_terminated_length": terminated.mean().item() if terminated.numel() else 0.0,
        "completions/clipped_ratio": 1.0 - rollout.ended.float().mean().item(),
    }


def reward_metrics(rollout: Rollout, advantages: torch.Tensor, num_generations: int) -> Row:
    """Of the raw rewards, in sum and per function, and of what the groups make of them.

    A reward that is None is left out. ``frac_reward_zero_std`` is the share of groups that teach nothing.
    """
    rewards = rollout.rewards
    row = {"reward": _mean(rewards), "reward_std": _std(rewards)}
    flat = [_std(group) == 0.0 for group in rewards.reshape(-1, num_generations)]
    row["frac_reward_zero_std"] = sum(flat) / len(flat)
    for name, part in rollout.reward_parts.items():
        row |= {f"rewards/{name}/mean": _mean(part), f"rewards/{name}/std": _std(part)}
    return row | {
        "advantage/mean_abs": advantages.abs().mean().item(),
        "advantage/min": advantages.min().item(),
        "advantage/max": advantages.max().item(),
    }


def sampling_metrics(differences: list[torch.Tensor]) -> Row:
    """How far the loss's log-probabilities are from the sampler's, at the first update, before anything has moved.

    Args:
        differences: of the tokens that count, the loss's log-probability less the sampler's; none: no metrics.
    """
    d = torch.cat(differences) if differences else torch.empty(0)
    if not d.numel():
        return {}
    ratio = d.exp()
    return {
        "sampling/sampling_logp_difference/mean": d.abs().mean().item(),
        "sampling/sampling_logp_difference/max": d.abs().max().item(),
        "sampling/importance_sampling_ratio/min": ratio.min().item(),
        "sampling/importance_sampling_ratio/mean": ratio.mean().item(),
        "sampling/importance_sampling_ratio/max": ratio.max().item(),
    }


def _mean(x: torch.Tensor) -> float:
    known = x[~x.isnan()]
    return known.mean().item() if known.numel() else float("nan")


def _std(x: torch.Tensor) -> float:
    """Unbiased, and exactly 0 where all known values are the same."""
    known = x[~x.isnan()].double()
    return known.std().item() if known.numel() > 1 and known.min() < known.max() else 0.0
