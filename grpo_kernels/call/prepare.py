"""From the arguments of a public function to what the ops take: a batch and a plan."""

import numbers
from collections.abc import Sequence

import torch

from grpo_kernels.call import checks, ops
from grpo_kernels.call.checks import Layout
from grpo_kernels.call.combinations import check_arguments
from grpo_kernels.objective.advantages import batch_spread, divisor_name, group_sizes, normalised_sum, weighted_sum
from grpo_kernels.objective.aggregations import AGGREGATIONS, Sizes, batch_tokens
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.catalogue import LEVELS, TERMS
from grpo_kernels.objective.compiling import traced
from grpo_kernels.objective.config import LossConfig
from grpo_kernels.objective.corrections import CORRECTIONS
from grpo_kernels.objective.plan import Plan


def prepare(
    config: LossConfig,
    layout: Layout,
    ids: torch.Tensor,
    backend: str,
    *,
    advantages: torch.Tensor | None,
    rewards: torch.Tensor | None,
    num_generations: int | Sequence[int] | torch.Tensor | None,
    old_logps: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    completion_mask: torch.Tensor | None,
    importance_weights: torch.Tensor | None,
    sampling_logps: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | float | None,
    loss_scale: torch.Tensor | float,
    cu_seqlens: torch.Tensor | None,
    reduction: str,
    data_group: object,
    skip_zero_advantage: bool = False,
    temperature: torch.Tensor | float = 1.0,
    softcap: float = torch.inf,
    logit_scale: float = 1.0,
) -> tuple[Batch, Plan]:
    """Check the arguments that every loss function shares, and put them together; see `fused_grpo_loss` for them.

    ``ids`` are token ids, or anything of their shape and device; ``backend`` is ``"triton"`` or ``"torch"``.
    """
    checks.check_group("data_group", data_group, "dp")
    check_arguments(
        config, layout, ids, advantages=advantages, rewards=rewards, num_generations=num_generations,
        old_logps=old_logps, ref_logps=ref_logps, completion_mask=completion_mask,
        importance_weights=importance_weights, sampling_logps=sampling_logps, cu_seqlens=cu_seqlens,
        reduction=reduction, skip_zero_advantage=skip_zero_advantage,
    )  # fmt: skip
    one_advantage = _is_per_sequence(advantages, layout)
    plan = _plan(
        config, reduction == "mean", ref=ref_logps is not None, old=old_logps is not None,
        one_weight=importance_weights is not None and _is_per_sequence(importance_weights, layout),
        one_advantage=one_advantage, skip=skip_zero_advantage,
    )  # fmt: skip

    mask, cu, segments, sizes = count_tokens(
        layout, ids, completion_mask, cu_seqlens, backend, num_items_in_batch=num_items_in_batch,
        max_completion_length=config.max_completion_length, global_batch_size=config.global_batch_size,
    )  # fmt: skip
    count, w_factor = AGGREGATIONS[config.aggregation].function(sizes)
    # Where the bonus goes to tokens of high entropy alone, their number follows from the entropies.
    tokens, h_factor = batch_tokens(sizes) if plan.bonus and not plan.quantile else (None, 1.0)
    scale_number, scale_tensor = apart(checks.check_factor("loss_scale", loss_scale, ids))
    bonus, bonus_tensor = apart(checks.check_factor("entropy_coef", config.entropy_coef, ids) if plan.bonus else 0.0)
    per_token_temperature, low_high = isinstance(temperature, torch.Tensor), config.log_ratio_bounds
    sizes_of_groups = group_sizes(num_generations, ids)
    groups = None if sizes_of_groups is None else ops.groups_op(sizes_of_groups, layout.B, backend)
    if rewards is not None:
        rewards, advantages = _estimated(rewards, num_generations, groups, config, data_group)
    adv = layout.rows(advantages)
    batch = Batch(
        ids=layout.tokens(ids),
        mask=mask,
        old=layout.tokens(old_logps),
        ref=layout.tokens(ref_logps),
        sampling=layout.tokens(sampling_logps),
        adv=adv,
        rewards=_in_a_row(rewards),
        # A row is skipped for its own advantage, or where one decides for all of a sequence for that; else:
        wanted=None if not plan.skip or plan.skips_alone or one_advantage else _wanted(adv, mask, cu, layout, backend),
        is_weight=layout.rows(importance_weights),
        temperature=layout.rows(temperature) if per_token_temperature else None,
        count=count,
        loss_scale=scale_tensor,
        tokens=tokens,
        entropy_coef=bonus_tensor,
        batch_std=None if rewards is None else _batch_std(rewards, plan, data_group, backend),
        cu=cu,
        segments=segments,
        groups=groups,
        one_temperature=1.0 if per_token_temperature else temperature,
        beta=config.beta,
        w_factor=w_factor * scale_number,
        h_factor=h_factor * scale_number * bonus,
        adv_eps=config.advantage_eps,
        r_low=low_high[0],
        r_high=low_high[1],
        kl_u=torch.inf if config.kl_clamp is None else 20.0,
        kl_value=_or(config.kl_clamp, torch.inf),
        drift=_or(config.off_policy_mask_threshold, torch.inf),
        correction_low=_or(config.sampling_correction_min, -torch.inf),
        correction_high=_or(config.sampling_correction_max, torch.inf),
        quantile=1.0 - traced(config.top_entropy_quantile),
        num_generations=float(_equal_size(num_generations)),
        softcap=softcap,
        logit_scale=logit_scale,
        term=tuple(TERMS[config.term].coefficients(config)),
    )
    if plan.correction and not plan.late_correction:
        batch = batch._replace(is_weight=ops.correct_op(batch.old, *batch.pack(), plan.correction, backend))
    return batch, plan


def count_tokens(
    layout: Layout, like: torch.Tensor, completion_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    backend: str, *, num_items_in_batch, max_completion_length, global_batch_size,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Sizes]:  # fmt: skip
    """Mask, bounds and segments as a batch has them, and what an aggregation divides by; counts are checked."""
    mask, cu = layout.tokens(completion_mask), _in_a_row(cu_seqlens)
    segments = lengths = None
    if layout.packed:
        segments, lengths = ops.segments_op(mask, cu, layout.T, backend)
    sizes = Sizes(
        mask, lengths, layout.B, layout.T,
        num_items=checks.check_count("num_items_in_batch", num_items_in_batch, like),
        horizon=_or(checks.check_count("max_completion_length", max_completion_length, like), layout.T),
        global_batch_size=checks.check_count("global_batch_size", global_batch_size, like),
    )  # fmt: skip
    return mask, cu, segments, sizes


def prepare_logprobs(
    layout: Layout, ids: torch.Tensor, mask: torch.Tensor | None, temperature: torch.Tensor | float, **numbers: float
) -> Batch:
    """The batch of log-probabilities alone; ``numbers``: fields of the batch."""
    ids, mask = layout.tokens(ids), layout.tokens(mask)
    if isinstance(temperature, torch.Tensor):
        return Batch(ids, mask, temperature=layout.rows(temperature), **numbers)
    return Batch(ids, mask, one_temperature=temperature, **numbers)


def _plan(
    config: LossConfig, weighted: bool, *, ref: bool, old: bool, one_weight: bool, one_advantage: bool, skip: bool
) -> Plan:
    """The structure of a call.

    ``weighted``: the loss is one number. ``ref``, ``old``: there are such log-probabilities. ``one_weight``,
    ``one_advantage``: there is one per sequence. ``skip``: the caller allows to skip rows.
    """
    term, level, correction = TERMS[config.term], LEVELS[config.level], config.sampling_correction
    own = term.statistic
    if correction is not None:
        one_weight = CORRECTIONS[correction].per_sequence
    one_ratio = level.spreads or (own is not None and not own.spreads)  # of what the region is about
    return Plan(
        term=config.term,
        level=config.level,
        kl=config.kl_estimator if ref else "",
        bias=config.use_bias_correction_kl and ref,
        clamped=config.kl_clamp is not None,
        limited=config.log_ratio_clamp is not None,
        scale_rewards=divisor_name(config.advantage_estimator, config.scale_rewards),
        unbiased=config.advantage_unbiased,
        skip=skip and config.beta == 0.0,
        bonus=weighted and config.entropy_coef is not None,
        quantile=config.top_entropy_quantile < 1.0,
        off_policy=config.off_policy_mask_threshold is not None,
        correction=correction or "",
        late_correction=correction is not None and not old,
        weight_once=one_weight and own is not None,
        clip_once=one_ratio and one_advantage,
        capped=term.caps(config),
        weighted=weighted,
    )


def apart(value: torch.Tensor | float) -> tuple[float, torch.Tensor | None]:
    """A factor as a number times a tensor, where it is one."""
    return (1.0, value) if isinstance(value, torch.Tensor) else (traced(value), None)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _in_a_row(x: torch.Tensor | None) -> torch.Tensor | None:
    """The few tensors that kernels read without a stride."""
    return None if x is None else x.contiguous()


def _is_per_sequence(x: torch.Tensor | None, layout: Layout) -> bool:
    """Whether there is one value per sequence; None stands for advantages from rewards.

    Where T = 1, (B, 1) is (B, T), or what is given per token would change its structure with the length.
    """
    if x is None:
        return True
    if layout.packed:
        return tuple(x.shape) == (layout.B,)
    return tuple(x.shape) != (layout.B, layout.T)


def _equal_size(num_generations: object) -> int:
    """The size of every group; 1 where they are given one by one, or there is none."""
    return int(num_generations) if isinstance(num_generations, numbers.Integral) else 1


def _estimated(
    rewards: torch.Tensor, num_generations: object, groups: torch.Tensor | None, config: LossConfig, data_group: object
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(one reward of each sequence, advantages (B,) that span the batch; None: they are a group's own business)."""
    weights, given = config.reward_weights, rewards
    if rewards.dim() == 2:
        given = rewards.float()
        rewards = weighted_sum(given, weights)
    if config.advantage_estimator == "maxrl":
        checks.check_not_negative(rewards)
    if config.advantage_estimator != "gdpo":
        return rewards, None
    given = given.float().reshape(rewards.shape[0], given.shape[1] if given.dim() == 2 else 1)
    weights = (1.0,) * given.shape[1] if weights is None else weights
    how = (_equal_size(num_generations), groups, config.advantage_unbiased, config.advantage_eps)
    if data_group is None:
        return rewards, ops.normalised_sum_op(given, weights, *how)
    return rewards, normalised_sum(given, weights, *how, data_group)


def _batch_std(rewards: torch.Tensor, plan: Plan, data_group: object, backend: str) -> torch.Tensor | None:
    if plan.scale_rewards != "batch":
        return None
    if data_group is None:
        return ops.batch_std_op(rewards.contiguous(), plan.unbiased, backend)
    return batch_spread(rewards, plan.unbiased, data_group)


def _wanted(
    adv: torch.Tensor, mask: torch.Tensor | None, cu: torch.Tensor | None, layout: Layout, backend: str
) -> torch.Tensor:
    """(B, 1), 0 for a sequence whose unmasked tokens all have advantage 0."""
    if mask is not None:
        adv = torch.where(mask if mask.dtype == torch.bool else mask != 0, adv, 0.0)
    if not layout.packed:
        return torch.count_nonzero(adv, dim=1)[:, None]
    return ops.segments_op(adv, cu, layout.T, backend)[1][:, None]
