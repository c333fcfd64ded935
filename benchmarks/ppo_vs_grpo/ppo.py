"""What PPO has and GRPO has not: a value network, per-token rewards, GAE, a value loss.

PPO: Schulman et al. 2017, arXiv:1707.06347; GAE: Schulman et al. 2015, arXiv:1506.02438; KL in the reward and the
clipped value loss as in Ziegler et al. 2019, arXiv:1909.08593. A completion's mask is 1 up to its end and 0 behind it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def token_rewards(rewards: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    """(B, T): −β·(log π − log π_ref) at every token, and the completion's reward on top at its last one.

    Args:
        rewards: (B,), one per completion.
        logps, ref_logps: (B, T), of the policy that sampled and of the reference policy.
        mask: (B, T), up to the end of each completion.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = positions == mask.sum(1, keepdim=True) - 1
    return torch.where(mask.bool(), -beta * (logps - ref_logps), 0.0) + torch.where(last, rewards[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (B, T), 0 where masked.

        δ_t = r_t + γ·V_{t+1} − V_t,    A_t = δ_t + γλ·A_{t+1},    V and A are 0 behind the last token

    A completion that was cut off ends like any other: nothing more is sampled, and its reward is final.

    Args:
        rewards, values: (B, T), of each token, and of the state before it.
    """
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])  # A_{t+1}
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t].bool()
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(inside, delta + gamma * lam * following, 0.0)
        next_value = torch.where(inside, values[:, t], 0.0)
        advantages[:, t] = following
    return advantages


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x − mean)/std over the unmasked tokens of the batch, 0 elsewhere."""
    inside, count = mask.bool(), mask.sum()
    mean = torch.where(inside, x, 0.0).sum() / count.clamp(min=1)
    centred = torch.where(inside, x - mean, 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-8)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """½·max((V − R)², (clip(V, V_old ± clip) − R)²), its mean over the unmasked tokens.

    Args:
        values: (B, T), differentiable.
        old_values: (B, T), when the completions were sampled.
        returns: (B, T), A + V_old.
    """
    # Selected before anything is computed: a gradient of 0 times NaN would be NaN.
    values, old_values, returns = (torch.where(mask.bool(), x, 0.0) for x in (values, old_values, returns))
    near = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns).square(), (near - returns).square())
    return 0.5 * error.sum() / mask.sum().clamp(min=1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(R − V)/Var(R): 1 for a perfect value network, 0 for one that knows the mean; 0 without variance."""
    inside = mask.bool()
    target, error = returns[inside], (returns - values)[inside]
    variance = target.var(correction=0)
    return (1 - error.var(correction=0) / variance).item() if variance > 0 else 0.0


class ValueNetwork(nn.Module):
    """The policy's body, with weights of its own, and one number per position in the place of its head.

    It starts from the policy's weights, as is usual, and from 0 everywhere.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.body = copy.deepcopy(policy.base_model)
        self.head = nn.Linear(policy.config.hidden_size, 1).to(policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, length: int, **inputs: Tensor) -> Tensor:
        """(B, T) values of the states in which the last ``length`` tokens were chosen."""
        hidden = self.body(**inputs, use_cache=False).last_hidden_state
        return self.head(hidden[:, -length - 1 : -1])[..., 0].float()
