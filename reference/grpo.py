"""Group Relative Policy Optimization and its relatives, straight from the papers.

For each prompt the policy π_θ samples G completions, each of which gets a reward. A completion that
did better than its siblings has a positive advantage and its tokens become more likely; one that did
worse becomes less likely. That is all; the rest keeps the steps small:

    ℓ    = −min(ρ·A, clip(ρ, 1−ε_l, 1+ε_h)·A) + β·KL(π_θ ‖ π_ref)     for every token
    loss = Σ w·ℓ,   where the weights w say how the tokens are averaged

with ρ = π_θ(token)/π_old(token), how much more likely a token has become since it was sampled.

Every member of the family is one choice each of a *term* (the min above), a *level* (whose ratio ρ
is: the token's, the sequence's), a *KL estimator* and a *weighting*. Each choice is one small
function in a table: `terms.py`, `levels.py`, `kl.py`, `weights.py`; `knobs.py` says which of them a
loss type stands for. `grpo_loss` turns logits into log-probs, and `policy_loss` puts the rest
together. Reading order: this file, `advantages.py`, `knobs.py`, the four tables; then
`corrections.py` for samplers that disagree with the trainer, `supports.py` for those that truncate,
`targets.py` for several tokens at one position, `packed.py`, `metrics.py`, and `tensors.py` for the helpers.

Autograd makes the gradients. It is given only what it may see: values at masked positions are
replaced *before* any arithmetic touches them, since 0·NaN is NaN in a backward pass too. Everything
is computed in float32, or in float64 if the logits are float64.

The papers stand beside the loss types in `knobs.py`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from reference.advantages import GroupSizes, group_advantages, summed_rewards
from reference.corrections import entropy_mask, off_policy_mask, sampling_weights
from reference.kl import estimate_kl
from reference.knobs import Knobs
from reference.levels import LEVELS
from reference.metrics import TERM_METRICS, ratio_metrics, reward_metrics, sampling_metrics
from reference.packed import Layout, layout_of, sequence_of_token
from reference.supports import Support, restrict
from reference.tensors import as_column, as_mask, clip, compute_dtype, masked_mean, per_token
from reference.terms import Tokens, policy_term
from reference.weights import NEED_LENGTH, WEIGHTS, Sizes


@dataclasses.dataclass(frozen=True)
class LossOutput:
    """What a loss returns. All but `loss` is detached; (B, T) tensors are 0 where masked, (N,) if packed."""

    loss: Tensor  # 0-d; (B, T) with reduction="none"
    logps: Tensor  # (B, T) log π_θ of the sampled token
    entropy: Tensor | None  # (B, T) entropy of π_θ at that position, in nats; None if it was not given
    per_token_loss: Tensor  # (B, T) ℓ, unweighted
    kl: Tensor | None  # (B, T) KL(π_θ ‖ π_ref), bias-corrected if asked for, without β; None without ref_logps
    advantages: Tensor  # (B, T) A
    weights: Tensor  # (B, T) w, loss_scale included
    importance_weights: Tensor | None  # (B, T) as given, or made from sampling_logps; None without either
    metrics: dict[str, Tensor]  # 0-d each


def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    completion_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    cu_seqlens: Tensor | None = None,
    **arguments: object,
) -> LossOutput:
    """`policy_loss` of the log-probs and entropies that logits stand for.

    Args:
        logits: (B, T, V), or (B, T+1, V) whose last position is ignored, as causal models return it;
            (N, V) if packed.
        completion_ids: (B, T) or (N,); logits[b, t] is the distribution that token [b, t] was drawn from.
        completion_mask: (B, T) or (N,), 1 for the tokens that count. What lies elsewhere may be anything.
        temperature: that the completions were sampled at; a number, (B,), (B, T); packed: (S,) or (N,).
        support: the set that each token was drawn from, over which log-probs and entropies are: bool (B, T, V) or
            (N, V), or a list of token ids for each of the B·T or N tokens; see `supports.py`. None: the vocabulary.
        advantages, cu_seqlens, **arguments: as in `policy_loss`.

    Raises: as `policy_loss`.
    """
    if (logits.dim() == 2) != (cu_seqlens is not None):
        raise ValueError("packed logits (N, V) need cu_seqlens, and padded ones (B, T, V) must not have it")
    if cu_seqlens is None:
        lp, entropy = token_logprobs(logits, completion_ids, temperature, completion_mask, support)
    else:
        layout_of(cu_seqlens, logits.shape[0])  # raises for bad bounds
        if isinstance(temperature, Tensor) and temperature.dim() == 1:
            if temperature.shape[0] == len(cu_seqlens) - 1:
                temperature = temperature[sequence_of_token(cu_seqlens)]
            temperature = temperature[None]
        mask = as_mask(completion_mask, completion_ids)
        support = support[None] if isinstance(support, Tensor) else support
        found = token_logprobs(logits[None], completion_ids[None], temperature, mask[None], support)
        lp, entropy = (x[0] for x in found)
    return policy_loss(
        lp, advantages, entropy=entropy, completion_mask=completion_mask, cu_seqlens=cu_seqlens, **arguments
    )


def policy_loss(
    logps: Tensor,
    advantages: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    rewards: Tensor | None = None,
    num_generations: GroupSizes | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    completion_mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    **knobs: object,
) -> LossOutput:
    """loss = Σ w·ℓ − loss_scale · entropy_coef · mean H,  ℓ = term(ρ, A)·masks·is_weight + β·kl

    Args:
        logps: (B, T), log π_θ of the sampled tokens; (N,) if packed.
        advantages: (B,), or (B, T) to give every token its own; packed: (S,) or (N,). Instead of it:
        rewards, num_generations: (B,), and G or the sizes of the groups; see `group_advantages`.
        entropy: (B, T), of π_θ; needed for the entropy bonus and for top_entropy_quantile.
        old_logps: (B, T), log-probs under the policy that sampled. None: the current one, so that
            ρ = 1. Its gradient is not zero: the loss then has the gradient of −A·log π_θ.
        ref_logps: (B, T), log-probs under the reference policy; needed if beta is not 0, else only watched.
        completion_mask: (B, T), 1 for the tokens that count. What lies elsewhere may be anything.
        importance_weights: (B, T), (B, 1) or (B,); packed: (S,) or (N,). Multiplies the policy term, not
            the KL; vespo and gmpo take it into their statistic.
        sampling_logps: (B, T), log-probs that the sampler itself reported, NaN where it did not; for
            sampling_correction and off_policy_mask_threshold.
        num_items_in_batch: tokens in the whole batch, if this call sees only a part of it; 0 counts as 1.
        loss_scale: factor on w and so on the loss, e.g. 1 / gradient_accumulation_steps.
        cu_seqlens: (S+1,), bounds of the sequences of packed input: all that is (B, T) above is (N,) then.
        reduction: "mean" for the weighted sum above, "none" for ℓ itself.
        **knobs: the fields of `Knobs`.

    Raises:
        TypeError: a keyword that is not a field of `Knobs`.
        ValueError: an unknown choice, a missing or superfluous argument, a combination without a
            meaning, or rewards that do not divide into groups.
    """
    k = Knobs(**knobs)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose 'mean' or 'none'")
    layout = None if cu_seqlens is None else layout_of(cu_seqlens, logps.shape[0])
    if layout is not None:
        if k.aggregation in NEED_LENGTH and k.max_completion_length is None:
            raise ValueError(f"loss_agg_mode={k.aggregation!r} on packed input needs max_completion_length")
        completion_mask = layout.used & layout.pad(as_mask(completion_mask, logps))
        logps, entropy, old_logps, ref_logps, sampling_logps = (
            layout.pad(x) for x in (logps, entropy, old_logps, ref_logps, sampling_logps)
        )
        advantages, importance_weights = layout.pad_either(advantages), layout.pad_either(importance_weights)
    dtype = compute_dtype(logps)
    mask = as_mask(completion_mask, logps)

    # What the policy says now, what it said when it sampled, and how good the outcome was.
    lp = torch.where(mask, logps.to(dtype), 0)
    old = lp.detach() if old_logps is None else per_token(old_logps, mask, dtype)
    if (advantages is None) == (rewards is None):
        raise ValueError("give either advantages, or rewards and num_generations")
    if advantages is None:
        if num_generations is None:
            raise ValueError("rewards need num_generations, the number of completions per prompt")
        advantages = group_advantages(
            rewards.to(dtype),
            num_generations,
            advantage_estimator=k.advantage_estimator,
            reward_weights=k.reward_weights,
            scale_rewards=k.scale_rewards,
            unbiased=k.advantage_unbiased,
            eps=k.advantage_eps,
        )
    A = per_token(advantages, mask, dtype)

    # Which tokens the policy term is for, and how much each counts.
    if k.sampling_correction is not None:
        if importance_weights is not None:
            raise ValueError("give importance_weights, or a sampling_correction that makes them; not both")
        if sampling_logps is None:
            raise ValueError("a sampling_correction needs sampling_logps")
        importance_weights = sampling_weights(old, per_token(sampling_logps, mask, dtype), mask, k)
    if importance_weights is not None:
        importance_weights = as_column(importance_weights.detach().to(dtype))
    keep = mask
    if k.off_policy_mask_threshold is not None:
        samp = old if sampling_logps is None else per_token(sampling_logps, mask, dtype)
        keep = keep & off_policy_mask(lp, samp, A, mask, k.off_policy_mask_threshold)
    if entropy is None and (k.entropy_coef is not None or k.top_entropy_quantile < 1):
        raise ValueError("entropy_coef and top_entropy_quantile need entropy")
    H = None if entropy is None else torch.where(mask, entropy.to(dtype), 0)
    undecided = mask if k.top_entropy_quantile == 1 else entropy_mask(H, mask, k.top_entropy_quantile)

    # The policy term.
    r = clip(LEVELS[k.level](lp, old, mask), *k.log_ratio_bounds)
    tokens = Tokens(r, lp, old, A, mask, importance_weights)
    loss_t = policy_term(tokens, k, keep & undecided)

    # The pull towards the reference policy.
    kl = None
    if k.beta != 0 and ref_logps is None:
        raise ValueError("beta is not 0: give ref_logps, the log-probs under the reference policy")
    if ref_logps is not None:
        kl = estimate_kl(lp, per_token(ref_logps, mask, dtype), k.kl_estimator, k.kl_clamp)
        if k.use_bias_correction_kl:
            kl = kl * r.exp()
        kl = torch.where(mask, kl, 0)
        if k.beta != 0:  # else it is only watched: 0·inf is NaN
            loss_t = loss_t + k.beta * kl

    # From tokens to one number.
    m = mask.to(dtype)
    sizes = Sizes(
        tokens=m.sum() if num_items_in_batch is None else m.new_tensor(float(num_items_in_batch)),
        sequences=m.new_tensor(float(mask.any(dim=1).sum() if k.global_batch_size is None else k.global_batch_size)),
        length=max(float(mask.shape[1] if k.max_completion_length is None else k.max_completion_length), 1.0),
    )
    weights = loss_scale * WEIGHTS[k.aggregation](m, sizes)
    weighted_sum = (weights * loss_t).sum()
    loss = weighted_sum if reduction == "mean" else loss_t
    if reduction == "mean" and k.entropy_coef is not None:
        loss = loss - loss_scale * k.entropy_coef * masked_mean(H, undecided)

    with torch.no_grad():
        metrics = {"policy_loss": weighted_sum.detach()} | ratio_metrics(r, mask)
        if k.term in TERM_METRICS:
            metrics |= TERM_METRICS[k.term](tokens, advantages, k)
        if H is not None:
            metrics["entropy"] = masked_mean(H, mask)
        if sampling_logps is not None:
            made = None if k.sampling_correction is None else importance_weights
            metrics |= sampling_metrics(old, per_token(sampling_logps, mask, dtype), mask, made, k)
        if kl is not None:
            metrics["kl"] = masked_mean(kl, mask)
        if rewards is not None:
            total = summed_rewards(rewards.to(dtype), k.reward_weights)
            compared = k.scale_rewards if k.advantage_estimator == "group" else "group"
            metrics |= reward_metrics(total, num_generations, compared)
    out = LossOutput(
        loss=loss,
        logps=lp.detach(),
        entropy=None if H is None else H.detach(),
        per_token_loss=loss_t.detach(),
        kl=None if kl is None else kl.detach(),
        advantages=A,
        weights=weights,
        importance_weights=None if importance_weights is None else per_token(importance_weights, mask, dtype),
        metrics={name: value.detach() for name, value in metrics.items()},
    )
    return out if layout is None else unpadded(out, layout)


def unpadded(out: LossOutput, layout: Layout) -> LossOutput:
    """(B, T) → (N,), whatever has that shape."""
    fields = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
    tensors = {name: x for name, x in fields.items() if isinstance(x, Tensor) and x.dim() == 2}
    return dataclasses.replace(out, **{name: layout.unpad(x) for name, x in tensors.items()})


# --- Log-probabilities ------------------------------------------------------------------------------


class TokenLogprobs(NamedTuple):
    logps: Tensor  # (B, T)
    entropy: Tensor  # (B, T)


def token_logprobs(
    logits: Tensor,
    completion_ids: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    support: Support | None = None,
) -> TokenLogprobs:
    """log π(token) and H = −Σ_v p_v·log p_v of π = softmax(logits / temperature); 0 where masked.

    Shapes and support as in `grpo_loss`. A banned token (logit −∞) has p = 0 and adds nothing to H: p·log p → 0.
    """
    mask = as_mask(mask, completion_ids)
    ids = torch.where(mask, completion_ids, 0)  # padding is often −100
    x = logits[:, : ids.shape[1]].to(compute_dtype(logits))
    x = torch.where(mask[..., None], x, 0)
    if support is not None:
        x = restrict(x, ids, mask, support)
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = per_token(temperature, mask, x.dtype, fill=1.0)[..., None]
    log_p = torch.log_softmax(x / temperature, dim=-1)
    logps = log_p.gather(-1, ids[..., None])[..., 0]
    entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)
    return TokenLogprobs(torch.where(mask, logps, 0), torch.where(mask, entropy, 0))
