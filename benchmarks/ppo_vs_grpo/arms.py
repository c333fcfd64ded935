"""One update of each: GRPO and PPO, from the same rollouts, through the same fused loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.ppo_vs_grpo.ppo import ValueNetwork, explained_variance, gae, token_rewards, value_loss, whiten
from grpo_kernels import fused_grpo_loss, token_logprobs
from grpo_kernels.trainer.loop import Rollout


@dataclass(frozen=True)
class Settings:
    """All that both arms share, and what PPO has besides."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    prompts: int = 64  # per step, with num_generations completions each; PPO gets as many completions in all
    num_generations: int = 8
    ppo_generations: int = 8  # PPO needs no group: 1 gives it as many prompts as completions
    iterations: int = 2  # optimizer steps per rollout
    learning_rate: float = 2e-3
    max_grad_norm: float = 1.0
    epsilon: float = 0.2
    beta: float = 0.04  # GRPO: k3 in the loss; PPO: in the rewards
    temperature: float = 1.0
    value_learning_rate: float = 2e-3
    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float = 0.2
    eval_every: int = 10
    warmup_steps: int = 600
    warmup_accuracy: float = 0.38

    def __post_init__(self) -> None:
        if self.completions % self.ppo_generations:
            raise ValueError(
                f"--ppo-generations {self.ppo_generations} must divide the {self.completions} completions of a step "
                f"({self.prompts} prompts × {self.num_generations})."
            )

    @property
    def completions(self) -> int:
        return self.prompts * self.num_generations


def model_inputs(rollout: Rollout) -> dict[str, Tensor]:
    """Prompts and completions, one behind the other; no token attends to what follows it."""
    attention = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.completion_ids)], dim=1)
    return {
        "input_ids": torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
    }


def completion_logits(policy: PreTrainedModel, rollout: Rollout) -> Tensor:
    """(B, T+1, V): ``logits[:, t]`` scores ``completion_ids[:, t]``."""
    return policy(**model_inputs(rollout), logits_to_keep=rollout.completion_ids.shape[1] + 1).logits


class Learner:
    """A network with its optimizer; the rate rises over 10% of the steps and falls to 0."""

    def __init__(self, network: nn.Module, rate: float, settings: Settings) -> None:
        self.network, self.max_grad_norm = network, settings.max_grad_norm
        self.optimizer = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.0)
        rise, steps = max(1, settings.steps // 10), settings.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: max(0.0, min(1.0, (step + 1) / rise) * (1.0 - step / steps))
        )

    def descend(self) -> None:
        """One optimizer step; the gradient's memory is given back."""
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Arm:
    """A policy in training, and all that its training holds between steps."""

    name = ""

    def __init__(self, policy: PreTrainedModel, settings: Settings) -> None:
        self.policy, self.settings = policy, settings
        self.reference = copy.deepcopy(policy).eval().requires_grad_(False)
        self.learners = [Learner(policy, settings.learning_rate, settings)]
        self.generations = settings.num_generations

    @property
    def prompts(self) -> int:
        """Per step."""
        return self.settings.completions // self.generations

    def update(self, rollout: Rollout) -> dict[str, float]:
        """``iterations`` optimizer steps; returns what is to be logged besides the reward."""
        raise NotImplementedError

    def finish_step(self) -> None:
        for learner in self.learners:
            learner.schedule.step()

    @torch.no_grad()
    def logps(self, model: PreTrainedModel, rollout: Rollout) -> Tensor:
        """(B, T), 0 where masked."""
        logits = completion_logits(model, rollout)
        return token_logprobs(
            logits, rollout.completion_ids, mask=rollout.completion_mask, temperature=self.settings.temperature
        ).logps

    def held(self) -> Iterator[Tensor]:
        """The tensors that are there between steps: weights, optimizer state, the reference's weights."""
        for network in (self.reference, *(learner.network for learner in self.learners)):
            yield from network.parameters()
            yield from network.buffers()
        for learner in self.learners:
            for state in learner.optimizer.state.values():
                yield from (x for x in state.values() if isinstance(x, Tensor))


class GRPO(Arm):
    """The baseline of a completion is the mean reward of its group."""

    name = "GRPO"

    def update(self, rollout: Rollout) -> dict[str, float]:
        ref_logps, old_logps = self.logps(self.reference, rollout), None
        for _ in range(self.settings.iterations):
            out = fused_grpo_loss(
                completion_logits(self.policy, rollout),
                rollout.completion_ids,
                rewards=rollout.rewards,
                num_generations=self.generations,
                old_logps=old_logps,
                ref_logps=ref_logps,
                completion_mask=rollout.completion_mask,
                temperature=self.settings.temperature,
                loss_type="grpo",
                epsilon=self.settings.epsilon,
                beta=self.settings.beta,
            )
            if old_logps is None:
                old_logps = out.logps
            out.loss.backward()
            self.learners[0].descend()
        return {}


@dataclass(frozen=True)
class Targets:
    """What the epochs over one rollout aim at, all (B, T)."""

    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor  # whitened
    returns: Tensor


class PPO(Arm):
    """The baseline of a token is what a value network expects in its place."""

    name = "PPO"
    together = False  # policy and value network: one backward pass after the other

    def __init__(self, policy: PreTrainedModel, settings: Settings) -> None:
        super().__init__(policy, settings)
        self.critic = ValueNetwork(policy)
        self.learners.append(Learner(self.critic, settings.value_learning_rate, settings))
        self.generations = settings.ppo_generations

    def values(self, rollout: Rollout) -> Tensor:
        return self.critic(rollout.completion_ids.shape[1], **model_inputs(rollout))

    @torch.no_grad()
    def targets(self, rollout: Rollout) -> Targets:
        s, mask = self.settings, rollout.completion_mask
        old_logps, ref_logps = self.logps(self.policy, rollout), self.logps(self.reference, rollout)
        old_values = self.values(rollout)
        rewards = token_rewards(rollout.rewards, old_logps, ref_logps, mask, s.beta)
        advantages = gae(rewards, old_values, mask, s.gamma, s.lam)
        return Targets(old_logps, old_values, whiten(advantages, mask), advantages + old_values)

    def policy_loss(self, rollout: Rollout, targets: Targets) -> Tensor:
        return fused_grpo_loss(
            completion_logits(self.policy, rollout),
            rollout.completion_ids,
            targets.advantages,  # (B, T)
            old_logps=targets.old_logps,
            completion_mask=rollout.completion_mask,
            temperature=self.settings.temperature,
            loss_type="bnpo",  # the mean over tokens
            epsilon=self.settings.epsilon,
        ).loss

    def value_loss(self, rollout: Rollout, targets: Targets) -> Tensor:
        mask = rollout.completion_mask
        return value_loss(self.values(rollout), targets.old_values, targets.returns, mask, self.settings.value_clip)

    def update(self, rollout: Rollout) -> dict[str, float]:
        targets = self.targets(rollout)
        actor, critic = self.learners
        for _ in range(self.settings.iterations):
            policy_loss = self.policy_loss(rollout, targets)
            if not self.together:
                policy_loss.backward()
                actor.descend()
            loss = self.value_loss(rollout, targets)
            if self.together:
                policy_loss.backward()
            loss.backward()
            critic.descend()
            if self.together:
                actor.descend()
        mask = rollout.completion_mask
        return {"explained_variance": explained_variance(targets.old_values, targets.returns, mask)}


class PPOTogether(PPO):
    """The same steps with both graphs alive at once, as where the two losses are added up."""

    name = "PPO, both graphs at once"
    together = True
