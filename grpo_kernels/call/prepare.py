"""From the arguments of a public function to what the ops take: inputs, coefficients and plan."""

import dataclasses
import numbers
from collections.abc import Sequence

import torch

from grpo_kernels.call import checks, ops
from grpo_kernels.call.checks import Layout
from grpo_kernels.objective.advantages import batch_spread, group_sizes
from grpo_kernels.objective.aggregations import AGGREGATIONS, Batch, Weight, batch_tokens
from grpo_kernels.objective.catalogue import LEVELS, TERMS
from grpo_kernels.objective.config import LossConfig
from grpo_kernels.objective.corrections import CORRECTIONS
from grpo_kernels.objective.inputs import Coefs, Inputs
from grpo_kernels.objective.metrics import METRIC_NAMES, SUM_NAMES, Names, named, names_of
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.tracing import call, traced


@dataclasses.dataclass
class Arguments:
    """The arguments that every loss function shares, as the caller gave them; see `fused_grpo_loss`."""

    advantages: torch.Tensor | None
    rewards: torch.Tensor | None
    num_generations: int | Sequence[int] | torch.Tensor | None
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    completion_mask: torch.Tensor | None
    importance_weights: torch.Tensor | None
    sampling_logps: torch.Tensor | None
    num_items_in_batch: torch.Tensor | float | None
    loss_scale: torch.Tensor | float
    cu_seqlens: torch.Tensor | None
    reduction: str
    data_group: object
    skip_zero_advantage: bool = False
    temperature: torch.Tensor | float = 1.0
    softcap: float = torch.inf
    logit_scale: float = 1.0


@dataclasses.dataclass
class Call:
    """What the ops take, and the names of what they return."""

    inputs: Inputs
    coefs: torch.Tensor
    plan: Plan
    weighted: bool
    names: Names

    @property
    def needs_entropy(self) -> bool:
        return self.plan.bonus or self.plan.quantile

    def metrics(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return named(values, METRIC_NAMES, self.names.metrics)

    def sums(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return named(values, SUM_NAMES, self.names.sums)


def prepare(
    args: Arguments, config: LossConfig, layout: Layout, ids: torch.Tensor, backend: str, has_entropy: bool
) -> Call:
    """Check the arguments and put them together.

    Args:
        args: the caller's.
        config: what loss.
        layout: of the batch.
        ids: token ids, or anything of their shape and device.
        backend: ``"triton"`` or ``"torch"``.
        has_entropy: entropies are made, or given, whether or not the loss needs them.
    """
    _check(args, config, layout, ids)
    plan = _plan(args, config, layout)
    mask, cu = layout.tokens(args.completion_mask), _in_a_row(args.cu_seqlens)
    segments = lengths = None
    if layout.packed:
        segments, lengths = call(ops.segments_op, mask, cu, layout.T, backend)
    num_items = checks.check_count("num_items_in_batch", args.num_items_in_batch, ids)
    horizon = checks.check_count("max_completion_length", config.max_completion_length, ids)
    sequences = checks.check_count("global_batch_size", config.global_batch_size, ids)
    batch = Batch(mask, lengths, layout.B, layout.T, num_items, _or(horizon, layout.T), sequences)
    w = AGGREGATIONS[config.aggregation].function(batch)
    w_bonus = Weight(None, 1.0)
    if plan.bonus and not plan.quantile:  # else its count follows from the entropies
        w_bonus = batch_tokens(batch)
    loss_scale = checks.check_factor("loss_scale", args.loss_scale, ids)
    scale_number, scale_tensor = _apart(loss_scale)
    bonus, bonus_tensor = _apart(checks.check_factor("entropy_coef", config.entropy_coef, ids) if plan.bonus else 0.0)
    coefs = _coefficients(args, config, plan, w.factor * scale_number, w_bonus.factor * scale_number * bonus)
    inputs = Inputs(
        ids=layout.tokens(ids),
        mask=mask,
        old=layout.tokens(args.old_logps),
        ref=layout.tokens(args.ref_logps) if plan.kl else None,
        sampling=layout.tokens(args.sampling_logps),
        adv=layout.rows(args.advantages),
        rewards=_in_a_row(args.rewards),
        gate=_gate(args, plan, layout, backend),
        is_weight=layout.rows(args.importance_weights),
        temperature=layout.rows(args.temperature) if isinstance(args.temperature, torch.Tensor) else None,
        count=w.count,
        loss_scale=scale_tensor,
        tokens=w_bonus.count,
        entropy_coef=bonus_tensor,
        batch_std=_batch_std(args, config, backend),
        cu=cu,
        segments=segments,
        groups=_groups(args, layout, ids, backend),
    )
    if plan.correction and not plan.late_correction:
        weights = call(ops.correct_op, inputs.old, tuple(inputs), coefs, plan.correction, backend)
        inputs = inputs._replace(is_weight=weights)
    term = TERMS[config.term]
    names = names_of(
        beta=bool(plan.kl), entropy=has_entropy or plan.bonus or plan.quantile, rewards=args.rewards is not None,
        reports=term.reports, dual=term.caps(config), sampling=args.sampling_logps is not None,
        corrected=bool(plan.correction),
    )  # fmt: skip
    return Call(inputs, coefs, plan, args.reduction == "mean", names)


def _plan(args: Arguments, config: LossConfig, layout: Layout) -> Plan:
    level, own = LEVELS[config.level], TERMS[config.term].statistic
    correction = config.sampling_correction
    if args.importance_weights is not None:
        one_weight = _is_per_sequence(args.importance_weights, layout)
    else:
        one_weight = correction is not None and CORRECTIONS[correction].per_sequence
    one_ratio = level.spreads or (own is not None and not own.spreads)  # of what the region is about
    return Plan(
        term=config.term,
        level=config.level,
        kl=config.kl_estimator if args.ref_logps is not None else "",
        bias=config.use_bias_correction_kl and args.ref_logps is not None,
        clamped=config.kl_clamp is not None,
        limited=config.log_ratio_clamp is not None,
        scale_rewards=config.scale_rewards,
        unbiased=config.advantage_unbiased,
        skip=args.skip_zero_advantage and config.beta == 0.0,
        bonus=args.reduction == "mean" and config.entropy_coef is not None,
        quantile=config.top_entropy_quantile < 1.0,
        off_policy=config.off_policy_mask_threshold is not None,
        correction=correction or "",
        late_correction=correction is not None and args.old_logps is None,
        weight_once=one_weight and own is not None,
        clip_once=one_ratio and _is_per_sequence(args.advantages, layout),
    )


def _coefficients(args: Arguments, config: LossConfig, plan: Plan, w: float, h: float) -> torch.Tensor:
    low, high = config.log_ratio_bounds
    return Coefs(
        temperature=1.0 if isinstance(args.temperature, torch.Tensor) else args.temperature,
        beta=config.beta,
        w_factor=w,
        h_factor=h,
        adv_eps=config.advantage_eps,
        r_low=low,
        r_high=high,
        kl_u=torch.inf if config.kl_clamp is None else 20.0,
        kl_value=_or(config.kl_clamp, torch.inf),
        drift=_or(config.off_policy_mask_threshold, torch.inf),
        correction_low=_or(config.sampling_correction_min, -torch.inf),
        correction_high=_or(config.sampling_correction_max, torch.inf),
        quantile=1.0 - traced(config.top_entropy_quantile),
        num_generations=float(args.num_generations) if isinstance(args.num_generations, numbers.Integral) else 1.0,
        softcap=args.softcap,
        logit_scale=args.logit_scale,
        term=tuple(TERMS[config.term].coefficients(config)),
    ).pack()


def _apart(value: torch.Tensor | float) -> tuple[float, torch.Tensor | None]:
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


def _groups(args: Arguments, layout: Layout, like: torch.Tensor, backend: str) -> torch.Tensor | None:
    sizes = group_sizes(args.num_generations, like)
    return None if sizes is None else call(ops.groups_op, sizes, layout.B, backend)


def _batch_std(args: Arguments, config: LossConfig, backend: str) -> torch.Tensor | None:
    if args.rewards is None or config.scale_rewards != "batch":
        return None
    if args.data_group is None:
        return call(ops.batch_std_op, _in_a_row(args.rewards), config.advantage_unbiased, backend)
    return batch_spread(args.rewards.float(), config.advantage_unbiased, args.data_group)


def _gate(args: Arguments, plan: Plan, layout: Layout, backend: str) -> torch.Tensor | None:
    """(B, 1), 0 for a sequence whose unmasked tokens all have advantage 0.

    None where no row is skipped, where a row is skipped for its own advantage, and where there is one per sequence.
    """
    if not plan.skip or plan.row_gate or _is_per_sequence(args.advantages, layout):
        return None
    adv, mask = layout.rows(args.advantages), layout.tokens(args.completion_mask)
    if mask is not None:
        adv = torch.where(mask if mask.dtype == torch.bool else mask != 0, adv, 0.0)
    if not layout.packed:
        return torch.count_nonzero(adv, dim=1)[:, None]
    return call(ops.segments_op, adv, _in_a_row(args.cu_seqlens), layout.T, backend)[1][:, None]


def _check(args: Arguments, config: LossConfig, layout: Layout, like: torch.Tensor) -> None:
    """Shapes, types, and what goes together."""
    if layout.packed and args.cu_seqlens is None:
        raise ValueError("packed input needs cu_seqlens, (S+1,): the bounds of its sequences, from 0 to N.")
    either = {**layout.per_sequence, **layout.per_token}
    checks.check_mask("completion_mask", args.completion_mask, like, layout)
    checks.check_float("old_logps", args.old_logps, like, layout.per_token)
    checks.check_float("ref_logps", args.ref_logps, like, layout.per_token)
    checks.check_float("sampling_logps", args.sampling_logps, like, layout.per_token)
    checks.check_float("importance_weights", args.importance_weights, like, either)
    checks.check_float("advantages", args.advantages, like, either)
    checks.check_float("rewards", args.rewards, like, {"(S,)" if layout.packed else "(B,)": (layout.B,)})
    if (args.advantages is None) == (args.rewards is None):
        raise ValueError("pass either advantages or rewards (with num_generations), and not both.")
    if args.rewards is not None:
        checks.check_rewards(args.rewards, args.num_generations, config.scale_rewards)
    elif args.num_generations is not None:
        raise ValueError("num_generations goes with rewards; advantages are used as they are.")
    if config.beta != 0.0 and args.ref_logps is None:
        raise ValueError(f"beta={config.beta} needs ref_logps, the reference policy's log-probabilities.")
    if config.sampling_correction is not None:
        if args.sampling_logps is None:
            raise ValueError(f"sampling_correction={config.sampling_correction!r} needs sampling_logps.")
        if args.importance_weights is not None:
            raise ValueError(
                "importance_weights are made from sampling_logps when sampling_correction is set: pass one of the two."
            )
    if args.reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {args.reduction!r}.")
    if layout.packed and AGGREGATIONS[config.aggregation].needs_horizon and config.max_completion_length is None:
        raise ValueError(f"loss_agg_mode={config.aggregation!r} on packed input needs max_completion_length.")
    if args.skip_zero_advantage:
        reads = {"entropy_coef": config.entropy_coef is not None,
                 "top_entropy_quantile": config.top_entropy_quantile < 1.0,
                 f"policy_term={config.term!r}": TERMS[config.term].acts_without_advantage}  # fmt: skip
        for name, reads_all in reads.items():
            if reads_all:
                raise ValueError(
                    f"skip_zero_advantage leaves rows unread, but {name} needs them all: use skip_zero_advantage=False."
                )
