"""Group Relative Policy Optimization, straight from the papers.

For each prompt the policy π_θ samples G completions, each of which gets a reward. A completion that
did better than its siblings has a positive advantage and its tokens become more likely; one that did
worse becomes less likely. That is all; the rest keeps the steps small:

    ℓ    = −min(ρ·A, clip(ρ, 1−ε_l, 1+ε_h)·A) + β·KL(π_θ ‖ π_ref)     for every token
    loss = Σ w·ℓ,   where the weights w say how the tokens are averaged

with ρ = π_θ(token)/π_old(token), how much more likely a token has become since it was sampled.

Every member of the family is one choice each of a *term* (the min above), a *level* (whose ratio ρ
is: the token's, the sequence's), a *KL estimator* and a *weighting*. Each choice is one small
function in a table of `objective.py`. `grpo_loss` puts them together. Reading order: this file,
`advantages.py`, `objective.py`; then `metrics.py`, and `tensors.py` for the helpers.

Autograd makes the gradients. It is given only what it may see: values at masked positions are
replaced *before* any arithmetic touches them, since 0·NaN is NaN in a backward pass too. Everything
is computed in float32, or in float64 if the logits are float64.

Papers: PPO arXiv:1707.06347, GRPO (DeepSeekMath) arXiv:2402.03300, DAPO arXiv:2503.14476,
Dr. GRPO arXiv:2503.20783, INTELLECT-2 arXiv:2505.07291.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reference.advantages import group_advantages
from reference.metrics import TERM_METRICS, ratio_metrics, reward_metrics
from reference.objective import KL_ESTIMATORS, LEVELS, LOSS_TYPES, TERMS, WEIGHTS, Knobs
from reference.tensors import as_mask, choose, compute_dtype, masked_mean, per_token


@dataclass(frozen=True)
class LossOutput:
    """What `grpo_loss` returns. All but `loss` is detached; (B, T) tensors are 0 where masked."""

    loss: Tensor  # 0-d; (B, T) with reduction="none"
    logps: Tensor  # (B, T) log π_θ of the sampled token
    entropy: Tensor  # (B, T) entropy of π_θ at that position, in nats
    per_token_loss: Tensor  # (B, T) ℓ, unweighted
    kl: Tensor | None  # (B, T) estimate of KL(π_θ ‖ π_ref), without β; None if β = 0
    advantages: Tensor  # (B, T) A
    weights: Tensor  # (B, T) w, loss_scale included
    metrics: dict[str, Tensor]  # 0-d each


def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    rewards: Tensor | None = None,
    num_generations: int | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    completion_mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    num_items_in_batch: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    reduction: str = "mean",
    **knobs: object,
) -> LossOutput:
    """loss = Σ w·ℓ − loss_scale · entropy_coef · mean H,  ℓ = term(ρ, A)·is_weight + β·kl

    Args:
        logits: (B, T, V), or (B, T+1, V) whose last position is ignored, as causal models return it.
        completion_ids: (B, T); logits[b, t] is the distribution that token [b, t] was drawn from.
        advantages: (B,), or (B, T) to give every token its own. Instead of it:
        rewards, num_generations: (B,) and G; see `group_advantages`.
        old_logps: (B, T), log-probs under the policy that sampled. None: the current one, so that
            ρ = 1. Its gradient is not zero: the loss then has the gradient of −A·log π_θ.
        ref_logps: (B, T), log-probs under the reference policy; needed if beta is not 0.
        completion_mask: (B, T), 1 for the tokens that count. What lies elsewhere may be anything.
        importance_weights: (B, T), (B, 1) or (B,); multiplies the policy term, not the KL.
        temperature: that the completions were sampled at; a number, (B,) or (B, T).
        num_items_in_batch: tokens in the whole batch, if this call sees only a part of it.
        loss_scale: factor on w and so on the loss, e.g. 1 / gradient_accumulation_steps.
        reduction: "mean" for the weighted sum above, "none" for ℓ itself.
        **knobs: the fields of `Knobs`.

    Raises:
        TypeError: a keyword that is not a field of `Knobs`.
        ValueError: an unknown choice, a missing or superfluous argument, or rewards that do not
            divide into groups.
    """
    k = Knobs(**knobs)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose 'mean' or 'none'")
    dtype = compute_dtype(logits)
    mask = as_mask(completion_mask, completion_ids)

    # What the policy says now, what it said when it sampled, and how good the outcome was.
    lp, entropy = token_logprobs(logits, completion_ids, temperature, mask)
    old = lp.detach() if old_logps is None else per_token(old_logps, mask, dtype)
    if (advantages is None) == (rewards is None):
        raise ValueError("give either advantages, or rewards and num_generations")
    if advantages is None:
        if num_generations is None:
            raise ValueError("rewards need num_generations, the number of completions per prompt")
        advantages = group_advantages(
            rewards.to(dtype),
            num_generations,
            scale_rewards=k.scale_rewards,
            unbiased=k.advantage_unbiased,
            eps=k.advantage_eps,
        )
    A = per_token(advantages, mask, dtype)

    # The policy term.
    parts = choose(LOSS_TYPES, k.loss_type, "loss_type")
    r = choose(LEVELS, k.importance_sampling_level, "importance_sampling_level")(lp - old, mask)
    loss_t = TERMS[parts.term](r, lp, A, k)
    loss_t = torch.where(r.isnan(), r, loss_t)  # broken log-probs must show, even where A = 0
    if importance_weights is not None:
        loss_t = loss_t * per_token(importance_weights, mask, dtype)

    # The pull towards the reference policy.
    estimate_kl = choose(KL_ESTIMATORS, k.kl_estimator, "kl_estimator")
    kl = None
    if k.beta != 0:
        if ref_logps is None:
            raise ValueError("beta is not 0: give ref_logps, the log-probs under the reference policy")
        kl = estimate_kl(lp, per_token(ref_logps, mask, dtype))
        loss_t = loss_t + k.beta * kl
    loss_t = torch.where(mask, loss_t, 0)

    # From tokens to one number.
    m = mask.to(dtype)
    num_items = m.sum() if num_items_in_batch is None else m.new_tensor(float(num_items_in_batch))
    max_length = mask.shape[1] if k.max_completion_length is None else k.max_completion_length
    weights = loss_scale * WEIGHTS[parts.weights](m, num_items, max_length)
    policy_loss = (weights * loss_t).sum()
    loss = policy_loss if reduction == "mean" else loss_t
    if reduction == "mean" and k.entropy_coef != 0:
        loss = loss - loss_scale * k.entropy_coef * masked_mean(entropy, mask)

    with torch.no_grad():
        metrics = {"policy_loss": policy_loss.detach(), "entropy": masked_mean(entropy, mask)}
        metrics |= ratio_metrics(r, mask) | TERM_METRICS[parts.term](r, A, mask, k)
        if kl is not None:
            metrics["kl"] = masked_mean(kl, mask)
        if rewards is not None:
            metrics |= reward_metrics(rewards.to(dtype), num_generations, k.scale_rewards)
    return LossOutput(
        loss=loss,
        logps=lp.detach(),
        entropy=entropy.detach(),
        per_token_loss=loss_t.detach(),
        kl=None if kl is None else kl.detach(),
        advantages=A,
        weights=weights,
        metrics=metrics,
    )


# --- Log-probabilities ------------------------------------------------------------------------------


class TokenLogprobs(NamedTuple):
    logps: Tensor  # (B, T)
    entropy: Tensor  # (B, T)


def token_logprobs(
    logits: Tensor, completion_ids: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> TokenLogprobs:
    """log π(token) and H = −Σ_v p_v·log p_v of π = softmax(logits / temperature); 0 where masked.

    Shapes as in `grpo_loss`. A banned token (logit −∞) has p = 0 and adds nothing to H: p·log p → 0.
    """
    mask = as_mask(mask, completion_ids)
    ids = torch.where(mask, completion_ids, 0)  # padding is often −100
    x = logits[:, : ids.shape[1]].to(compute_dtype(logits))
    x = torch.where(mask[..., None], x, 0)
    if isinstance(temperature, Tensor):
        temperature = per_token(temperature, mask, x.dtype, fill=1.0)[..., None]
    log_p = torch.log_softmax(x / temperature, dim=-1)
    logps = log_p.gather(-1, ids[..., None])[..., 0]
    entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)
    return TokenLogprobs(torch.where(mask, logps, 0), torch.where(mask, entropy, 0))
