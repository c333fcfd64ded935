"""`fused_grpo_loss`: a GRPO-family loss from logits, and its gradient, in one pass over the logits."""

from typing import NamedTuple

import torch

from grpo_kernels import checks, metrics, ops
from grpo_kernels.config import LossConfig, resolve_config
from grpo_kernels.inputs import Inputs, pack
from grpo_kernels.variants import LOSS_TYPES, TERMS, Plan
from grpo_kernels.weights import Weight, bonus_weight, policy_weight


class LossOutput(NamedTuple):
    """What `fused_grpo_loss` returns; everything but the loss is detached and stays on the device."""

    loss: torch.Tensor  # () fp32, or (B, T) with reduction="none"
    logps: torch.Tensor  # (B, T) fp32, 0 where masked
    entropy: torch.Tensor | None  # (B, T) fp32, 0 where masked
    metrics: dict[str, torch.Tensor]  # 0-d fp32
    sums: dict[str, torch.Tensor]  # 0-d fp64, see grpo_kernels.metrics.combine


def fused_grpo_loss(
    logits: torch.Tensor,
    completion_ids: torch.Tensor,
    advantages: torch.Tensor | None = None,
    *,
    rewards: torch.Tensor | None = None,
    num_generations: int | None = None,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    completion_mask: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    num_items_in_batch: torch.Tensor | float | None = None,
    loss_scale: torch.Tensor | float = 1.0,
    inplace: bool = False,
    skip_zero_advantage: bool = False,
    return_entropy: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    config: LossConfig | None = None,
    **overrides,
) -> LossOutput:
    """GRPO-family loss (DeepSeekMath, arXiv:2402.03300) of sampled completions, from the policy's logits.

        lp   = log softmax(logits / temperature)[completion_ids],   ρ = exp(lp − old_logps)
        ℓ    = −min(min(ρ, δ)·A, clip(ρ, 1−ε_low, 1+ε_high)·A)·importance_weights + β·KL(lp, ref_logps)
        loss = Σ w·ℓ − loss_scale · entropy_coef · mean H,          w set by loss_type

    When logits require grad, the same pass that reads a row writes its gradient, so that the backward
    has nothing left to do. With on-policy data (``old_logps=None``) the *value* of the loss is near 0
    for group-relative advantages, and says nothing; its gradient is the policy gradient.

    Args:
        logits: (B, T, V), or (B, T+1, V), as causal models return them, whose last position is not read
            and gets gradient 0; fp32, bf16 or fp16; contiguous in V, other strides free.
            ``logits[b, t]`` scores ``completion_ids[b, t]``.
        completion_ids: (B, T) integers; at masked positions anything.
        advantages: (B,) or (B, T), float. Either these or ``rewards``.
        rewards: (B,) float: the group-relative advantage is computed inside the launch, see
            `group_advantages`. NaN rewards get advantage 0.
        num_generations: G, with rewards; rows [k·G, (k+1)·G) share a prompt.
        old_logps: (B, T), log-probabilities under the policy that sampled; None: on-policy, ρ = 1 with
            its gradient.
        ref_logps: (B, T), log-probabilities under the reference policy; needed if ``beta`` is not 0.
        completion_mask: (B, T) of zeros and ones in any pattern; None: all ones. Masked rows are not read.
        importance_weights: (B, T), (B, 1) or (B,): factor of the policy term, not of the KL.
        temperature: divides the logits; the one that the completions were sampled at.
        num_items_in_batch: the tokens of the whole batch, which ``dapo`` divides by; a number or 0-d tensor.
        loss_scale: factor of the loss, e.g. 1/gradient_accumulation_steps; a number or 0-d tensor.
        inplace: write the gradient over the logits' own memory. The logits are gone afterwards; a graph
            that still needs them raises. Has no effect when no gradient is needed.
        skip_zero_advantage: do not even read rows whose gradient is known to be 0 (A = 0 and β = 0).
            Their log-probabilities are NaN, and metrics are over the rows that were read.
        return_entropy: also return the entropies of the distributions.
        reduction: ``"mean"``: the loss type's own; ``"none"``: ℓ per token, (B, T), unweighted
            (neither ``loss_scale`` nor ``num_items_in_batch`` nor the entropy bonus is in it), 0 where masked.
        backend: None (by device), ``"triton"`` or ``"torch"``.
        config: a `LossConfig`; its fields can also be given as keywords: ``loss_type="dapo", beta=0.04``.

    Returns:
        `LossOutput`: ``loss`` (differentiable in the logits, once), ``logps``, ``entropy``, ``metrics``
        under TRL's names and the ``sums`` behind them.

    Raises:
        ValueError: wrong shape, stride, device, value or combination; a tensor other than the logits that
            requires grad; ``inplace`` on a leaf.
        TypeError: wrong dtype or type, an unknown keyword.
        IndexError: on the CPU, an unmasked id outside the vocabulary (on a GPU the row's loss and gradient
            become NaN; GRPO_KERNELS_VALIDATE=1 makes it raise).
        RuntimeError: double backward.
    """
    config = resolve_config(config, overrides)
    B, T = checks.check_logits(logits, completion_ids)
    checks.check_temperature(temperature)
    checks.check_mask("completion_mask", completion_mask, logits, B, T)
    per_token, per_sequence = {"(B, T)": (B, T)}, {"(B,)": (B,)}
    checks.check_float("old_logps", old_logps, logits, per_token)
    checks.check_float("ref_logps", ref_logps, logits, per_token)
    broadcast = {**per_sequence, "(B, 1)": (B, 1), **per_token}
    checks.check_float("importance_weights", importance_weights, logits, broadcast)
    checks.check_float("advantages", advantages, logits, broadcast)
    checks.check_float("rewards", rewards, logits, per_sequence)
    _check_combination(config, advantages, rewards, num_generations, ref_logps, reduction, skip_zero_advantage)
    loss_scale = checks.check_factor("loss_scale", loss_scale, logits)
    if num_items_in_batch is not None:
        num_items_in_batch = checks.check_factor("num_items_in_batch", num_items_in_batch, logits)
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        checks.check_inplace(logits)
    backend = ops.choose_backend(backend, logits)

    variant = LOSS_TYPES[config.loss_type]
    weighted = reduction == "mean"
    plan = Plan(
        term=variant.term,
        kl=config.kl_estimator if config.beta != 0.0 else "",
        scale_rewards=config.scale_rewards,
        unbiased=config.advantage_unbiased,
        skip=skip_zero_advantage and config.beta == 0.0,
        bonus=weighted and config.entropy_coef != 0.0,
    )
    w = policy_weight(config, variant.weighting, completion_mask, B, T, num_items_in_batch)
    w_bonus = bonus_weight(config, completion_mask, B, T) if plan.bonus else Weight(None, 0.0)
    scale_number, scale_tensor = (1.0, loss_scale) if isinstance(loss_scale, torch.Tensor) else (loss_scale, None)
    inputs = Inputs(
        ids=completion_ids,
        mask=completion_mask,
        old=old_logps,
        ref=ref_logps if plan.kl else None,
        adv=_as_columns(advantages),
        rewards=rewards,
        is_weight=_as_columns(importance_weights),
        count=w.count,
        loss_scale=scale_tensor,
        tokens=w_bonus.count,
        num_generations=num_generations if rewards is not None else 1,
    )
    coefs = pack(
        temperature, config.beta, w.factor * scale_number, w_bonus.factor * scale_number, config.advantage_eps,
        *TERMS[variant.term].coefficients(config),
    )  # fmt: skip
    loss, logps, entropy, sums, values = ops.run_loss(
        logits, inputs, coefs, plan, entropy=return_entropy or plan.bonus, backend=backend, inplace=inplace,
        weighted=weighted,
    )  # fmt: skip
    names = metrics.applicable(beta=bool(plan.kl), entropy=return_entropy or plan.bonus, rewards=rewards is not None)
    return LossOutput(
        loss=loss,
        logps=logps,
        entropy=entropy if return_entropy else None,
        metrics={name: value for name, value in zip(metrics.METRIC_NAMES, values.unbind()) if name in names},
        sums=metrics.named_sums(sums, names),
    )


def _as_columns(x: torch.Tensor | None) -> torch.Tensor | None:
    """(B,) as (B, 1), which broadcasts to (B, T)."""
    return x[:, None] if x is not None and x.dim() == 1 else x


def _check_combination(config, advantages, rewards, num_generations, ref_logps, reduction, skip) -> None:
    if (advantages is None) == (rewards is None):
        raise ValueError("pass either advantages or rewards (with num_generations), and not both.")
    if rewards is not None:
        checks.check_rewards(rewards, num_generations, config.scale_rewards)
    elif num_generations is not None:
        raise ValueError("num_generations goes with rewards; advantages are used as they are.")
    if config.beta != 0.0 and ref_logps is None:
        raise ValueError(f"beta={config.beta} needs ref_logps, the reference policy's log-probabilities (B, T).")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}.")
    if skip and config.entropy_coef != 0.0:
        raise ValueError(
            "skip_zero_advantage leaves rows unread, but the entropy bonus needs them all: set entropy_coef=0 or "
            "skip_zero_advantage=False."
        )
