"""LossConfig: every knob of the objectives, with its default, meaning and paper."""

import dataclasses
import difflib
import functools
import math
import warnings
from typing import NamedTuple

import torch

from grpo_kernels.objective.advantages import ESTIMATORS
from grpo_kernels.objective.aggregations import AGGREGATIONS
from grpo_kernels.objective.catalogue import KL_ESTIMATORS, LEVELS, LOSS_TYPES, TERMS
from grpo_kernels.objective.corrections import CORRECTIONS
from grpo_kernels.objective.scalars import check_scalar_tensor, is_number, plain

_CLAMP = "it must be None, a number above 0, or a pair (low, high) with low < high."


class Range(NamedTuple):
    """What a field of numbers may be. An end in quotes does not belong to the range."""

    low: float | str
    high: float | str
    optional: bool  # None as well
    tensor: bool = False  # a 0-d tensor as well, which is never read
    only_if_read: bool = False  # None alone, where the term does not read it


def _number(default: float | None, low: float | str, high: float | str, optional: bool | None = None, **more: bool):
    """A field of `LossConfig` with its `Range`; optional where its default is None, unless told."""
    allowed = Range(low, high, default is None if optional is None else optional, **more)
    return dataclasses.field(default=default, metadata={"range": allowed})


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What loss to compute. Fields are named as TRL's ``GRPOConfig`` names them, where TRL has them.

    Attributes:
        loss_type: a preset of the three parts below, one of `grpo_kernels.objective.catalogue.LOSS_TYPES`.
        policy_term: one of `grpo_kernels.objective.catalogue.TERMS`; None: the loss type's.
        importance_sampling_level: whose ratio the term sees, one of `grpo_kernels.objective.catalogue.LEVELS`;
            None: the loss type's, which is ``"token"`` for most.
        loss_agg_mode: how tokens are averaged, one of `grpo_kernels.objective.aggregations.AGGREGATIONS`; verl's modes
            under verl's names; None: the loss type's.
        beta: coefficient of the KL to the reference policy; 0 needs no ``ref_logps``.
        epsilon: ε_low; the ratio is clipped below at 1 − ε_low (PPO, arXiv:1707.06347).
        epsilon_high: ε_high; clipped above at 1 + ε_high; None: ``epsilon`` (DAPO, arXiv:2503.14476).
            An error with cispo, whose bounds are ``cispo_min`` and ``cispo_max``.
        delta: upper cap of the unclipped branch; None: no cap (INTELLECT-2, arXiv:2505.07291).
        dual_clip: c > 1; for A < 0 the loss is at most −c·A; None: off (arXiv:1912.09729; verl: 3.0). For
            dppo_tv and dppo_kl the cap of ρ, 20 if None.
        fipo_clip_range: W, the influence of the tokens that follow, is held within 1 ± this, a number of at least 0;
            None or 0: not held (FIPO, arXiv:2603.19835).
        fipo_clip_high_only: True: the lower bound of W is 1; False: it is 1 − fipo_clip_range.
        fipo_safety_threshold: where A < 0 and ρ is above this, W is held within [0.8, 1]; None: nowhere.
        fipo_decay_rate: the number of tokens after which a log ratio counts half.
        fipo_gamma: γ, the factor of a log ratio for each token that it is away, in (0, 1]; None:
            2^(−1/fipo_decay_rate).
        cispo_min: lower bound of ρ itself; None: no lower bound (MiniMax-M1, arXiv:2506.13585). verl's is 1 − ε_low.
        cispo_max: upper bound of ρ itself. TRL's ``epsilon_high`` of cispo; verl's is 1 + ε_high.
        sapo_temperature_pos, sapo_temperature_neg: steepness of the gate where A > 0, and where not (SAPO,
            arXiv:2511.20347).
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: shape of φ for A ≥ 0 and A < 0
            (VESPO, arXiv:2602.10693).
        dro_beta: coefficient of ½·r̂² (DRO, arXiv:2405.19107; τ of Kimi k1.5, arXiv:2501.12599).
        kl_estimator: one of `grpo_kernels.objective.catalogue.KL_ESTIMATORS`.
        use_bias_correction_kl: multiply the KL by ρ, and differentiate ρ too (DeepSeek-V3.2, arXiv:2512.02556).
        kl_clamp: the KL's value is held within ±kl_clamp, and u = ref − lp within ±20, with gradient 0
            beyond (k1+ and k3+ keep the gradient they borrow); None: off (verl's k3: 10).
        log_ratio_clamp: bounds of the level's log ratio, a number c for ±c or a pair, with gradient 0
            beyond; None: off (verl: 20; its gspo: (−inf, 10)).
        max_completion_length: the constant that ``dr_grpo`` and seq-mean-token-sum-norm divide by, at least 1;
            a number or 0-d tensor; None: T, the padded length of the batch (Dr. GRPO, arXiv:2503.20783).
        global_batch_size: the number of sequences that verl's seq-mean modes divide by, at least 1; a number or 0-d
            tensor; None: those of this call that have an unmasked token.
        entropy_coef: coefficient of the entropy bonus, the mean entropy of the unmasked tokens; a number or 0-d tensor;
            None: off; 0: no bonus, but metrics and sums have the entropy.
        top_entropy_quantile: the policy term acts on this share of tokens, those of highest entropy; 1: all
            ("Beyond the 80/20 rule", arXiv:2506.01939).
        off_policy_mask_threshold: sequences of negative advantage whose mean log-probability has fallen by
            more than this since they were sampled leave the policy term; None: off (DeepSeek-V3.2,
            arXiv:2512.02556).
        sampling_correction: how importance weights exp(old − sampling_logps) are bounded: None (not made),
            ``"token_truncate"``, ``"token_mask"``, ``"sequence_truncate"``, ``"sequence_mask"`` (TRL's
            modes), or ``"seq_mask_tis"``: token ratios, in sequences whose geometric mean is in bounds.
        sampling_correction_min, sampling_correction_max: those bounds, inclusive; None: no bound.
        advantage_estimator: how ``rewards`` become advantages, one of
            `grpo_kernels.objective.advantages.ESTIMATORS`: group (by ``scale_rewards``, which the others do not read),
            rloo (RLOO, arXiv:2402.14740), maxrl (MaxRL, arXiv:2602.02710), gdpo (GDPO, TRL's normalize_then_sum).
        reward_weights: factors of the K rewards of ``rewards`` (B, K), a list or tuple; None: 1 each.
        scale_rewards: whose standard deviation divides the ``rewards``: the ``"group"``'s, the ``"batch"``'s or
            ``"none"`` (DeepSeekMath, arXiv:2402.03300).
        advantage_eps: added to the standard deviation of rewards (TRL 1e-4, verl 1e-6).
        advantage_unbiased: True: divide the variance of rewards by n − 1; False: by n.

    Fields hold what was given; NumPy's scalars become Python's. `term`, `level` and `aggregation` say which
    parts that makes: ``LossConfig().importance_sampling_level`` is None, and ``LossConfig().level`` is
    ``"token"``. With ``dataclasses.replace(config, loss_type=...)`` the parts that were not chosen follow.

    Raises:
        ValueError: a value outside its range, a name that is not in the catalogue, a combination
            without a meaning.
        TypeError: an unknown field, a value of the wrong type.
    """

    loss_type: str = "grpo"
    policy_term: str | None = None
    importance_sampling_level: str | None = None
    loss_agg_mode: str | None = None
    beta: float = _number(0.0, 0.0, "inf")
    epsilon: float = _number(0.2, 0.0, "inf")
    epsilon_high: float | None = _number(None, 0.0, "inf")
    delta: float | None = _number(None, "0", math.inf, only_if_read=True)
    dual_clip: float | None = _number(None, "1", math.inf, only_if_read=True)
    fipo_clip_range: float | None = _number(0.2, 0.0, "inf", optional=True)
    fipo_clip_high_only: bool = True
    fipo_safety_threshold: float | None = _number(4.0, "0", math.inf, optional=True)
    fipo_decay_rate: float = _number(32.0, "0", "inf")
    fipo_gamma: float | None = _number(None, "0", 1.0, only_if_read=True)
    cispo_min: float | None = _number(None, 0.0, "inf", only_if_read=True)
    cispo_max: float = _number(5.0, "0", math.inf)
    sapo_temperature_pos: float = _number(1.0, "0", "inf")
    sapo_temperature_neg: float = _number(1.05, "0", "inf")
    vespo_k_pos: float = _number(2.0, "-inf", "inf")
    vespo_lambda_pos: float = _number(3.0, "-inf", "inf")
    vespo_k_neg: float = _number(3.0, "-inf", "inf")
    vespo_lambda_neg: float = _number(2.0, "-inf", "inf")
    dro_beta: float = _number(1.0, "0", "inf")
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = False
    kl_clamp: float | None = _number(None, "0", "inf")
    log_ratio_clamp: float | tuple[float, float] | None = None
    max_completion_length: torch.Tensor | float | None = _number(None, 0.0, "inf", tensor=True)  # noqa: RUF009
    global_batch_size: torch.Tensor | float | None = _number(None, 0.0, "inf", tensor=True)  # noqa: RUF009
    entropy_coef: torch.Tensor | float | None = _number(None, "-inf", "inf", tensor=True)  # noqa: RUF009
    top_entropy_quantile: float = _number(1.0, 0.0, 1.0)
    off_policy_mask_threshold: float | None = _number(None, "-inf", math.inf)
    sampling_correction: str | None = None
    sampling_correction_min: float | None = _number(None, 0.0, math.inf)
    sampling_correction_max: float | None = _number(3.0, 0.0, math.inf, optional=True)
    advantage_estimator: str = "group"
    reward_weights: tuple[float, ...] | None = None
    scale_rewards: str = "group"
    advantage_eps: float = _number(1e-4, 0.0, "inf")
    advantage_unbiased: bool = True

    def __post_init__(self) -> None:
        _one_of("loss_type", self.loss_type, LOSS_TYPES)
        _one_of("policy_term", self.term, TERMS)
        _one_of("importance_sampling_level", self.level, LEVELS)
        _one_of("loss_agg_mode", self.aggregation, AGGREGATIONS)
        _one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _one_of("advantage_estimator", self.advantage_estimator, ESTIMATORS)
        object.__setattr__(self, "reward_weights", _factors(self.reward_weights))
        _one_of("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        if self.sampling_correction is not None:
            _one_of("sampling_correction", self.sampling_correction, CORRECTIONS)
        for name in ("use_bias_correction_kl", "advantage_unbiased", "fipo_clip_high_only"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        for name, allowed in _RANGES.items():
            value = getattr(self, name)
            if allowed.tensor and isinstance(value, torch.Tensor):
                check_scalar_tensor(name, value)
            elif value is not None or not allowed.optional:
                number = _in_range(name, value, allowed)
                if type(value) is not type(number):
                    object.__setattr__(self, name, number)
        _rising("cispo_min", self.cispo_min, "cispo_max", self.cispo_max)
        _rising("sampling_correction_min", self.sampling_correction_min,
                "sampling_correction_max", self.sampling_correction_max)  # fmt: skip
        object.__setattr__(self, "log_ratio_clamp", _clamp(self.log_ratio_clamp))
        low, high = self.log_ratio_bounds
        if not low < high:
            raise ValueError(f"log_ratio_clamp={self.log_ratio_clamp} leaves nothing: {_CLAMP}")
        self._check_combination()

    def _check_combination(self) -> None:
        term = TERMS[self.term]
        if self.level not in term.levels:
            raise ValueError(
                f"the term {self.term!r} has no meaning at importance_sampling_level="
                f"{self.level!r}: it is defined at {', '.join(map(repr, term.levels))}."
            )
        if term.aggregations and self.aggregation not in term.aggregations:
            raise ValueError(
                f"{self.term} is defined with loss_agg_mode {' or '.join(map(repr, term.aggregations))} alone: "
                f"leave it at None, got {self.aggregation!r}."
            )
        if self.term == "cispo" and self.epsilon_high is not None:
            raise ValueError(
                "epsilon_high means two things for cispo. Say cispo_max=epsilon_high for TRL's raw bound of the ratio, "
                "or cispo_min=1 - epsilon, cispo_max=1 + epsilon_high for verl's."
            )
        for knob, allowed in _RANGES.items():
            if allowed.only_if_read and getattr(self, knob) is not None and knob not in term.knobs:
                readers = ", ".join(name for name, other in TERMS.items() if knob in other.knobs)
                raise ValueError(f"{knob} is read by {readers}, not by {self.term!r}: leave it None.")
        if self.log_ratio_clamp is not None and term.statistic is not None:
            raise ValueError(f"{self.term} limits its log ratio itself: leave log_ratio_clamp None.")

    @property
    def term(self) -> str:
        """``policy_term``, or the loss type's."""
        return LOSS_TYPES[self.loss_type].term if self.policy_term is None else self.policy_term

    @property
    def level(self) -> str:
        """``importance_sampling_level``, or the loss type's."""
        own = self.importance_sampling_level
        return LOSS_TYPES[self.loss_type].level if own is None else own

    @property
    def aggregation(self) -> str:
        """``loss_agg_mode``, or the loss type's."""
        return LOSS_TYPES[self.loss_type].aggregation if self.loss_agg_mode is None else self.loss_agg_mode

    @property
    def log_ratio_bounds(self) -> tuple[float, float]:
        """``log_ratio_clamp`` as (low, high); infinite without one."""
        clamp = self.log_ratio_clamp
        if clamp is None:
            return -math.inf, math.inf
        return clamp if isinstance(clamp, tuple) else (-clamp, clamp)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_trl(cls, args: object) -> "LossConfig":
        """The loss that TRL's ``GRPOTrainer`` computes with these arguments (a ``GRPOConfig``, TRL 1.16).

        A temperature other than 1 is no part of a loss, and has to be passed beside it: a warning says so.

        Raises:
            ValueError: an argument that cannot be taken over, with what to do instead.
        """
        config = cls(**_trl_fields(args))
        temperature = getattr(args, "temperature", 1.0)
        if temperature != 1.0:
            warnings.warn(
                f"LossConfig does not hold the temperature of these arguments: pass temperature={temperature} to "
                "fused_grpo_loss, or to whatever makes the log-probabilities (token_logprobs).",
                stacklevel=2,
            )
        return config


_RANGES: dict[str, Range] = {
    field.name: field.metadata["range"] for field in dataclasses.fields(LossConfig) if "range" in field.metadata
}


_TRL_ESTIMATORS = {"sum_then_normalize": "group", "normalize_then_sum": "gdpo"}


def _trl_fields(args: object) -> dict:
    kind = type(args)
    if kind.__module__.startswith("trl.") and kind.__name__ != "GRPOConfig":
        raise ValueError(
            f"from_trl takes the GRPOConfig of a GRPOTrainer, got TRL's {kind.__name__}, whose trainer has another "
            "loss. The keywords for the losses of TRL's other trainers are in docs/trl-and-verl.md."
        )
    if getattr(args, "use_adaptive_entropy", False):
        raise ValueError(
            "use_adaptive_entropy changes entropy_coef while training: build the config without it, and pass each "
            "step's coefficient as entropy_coef=..."
        )
    same = ("loss_type", "beta", "epsilon", "epsilon_high", "delta", "importance_sampling_level",
            "use_bias_correction_kl", "max_completion_length", "entropy_coef", "top_entropy_quantile",
            "off_policy_mask_threshold", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos",
            "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "scale_rewards", "reward_weights")  # fmt: skip
    fields = {name: getattr(args, name) for name in same if hasattr(args, name)}
    if not fields.get("entropy_coef"):  # TRL's 0.0 is off
        fields["entropy_coef"] = None
    if "loss_type" not in fields:
        raise ValueError(f"from_trl takes a GRPOConfig of TRL 1.16, got {type(args).__name__} without a loss_type.")
    scale = fields.get("scale_rewards", "group")
    fields["scale_rewards"] = {True: "group", False: "none"}.get(scale, scale)
    how = getattr(args, "multi_objective_aggregation", "sum_then_normalize")
    _one_of("multi_objective_aggregation", how, _TRL_ESTIMATORS)
    fields["advantage_estimator"] = _TRL_ESTIMATORS[how]
    _one_of("loss_type", fields["loss_type"], LOSS_TYPES)
    term = TERMS[LOSS_TYPES[fields["loss_type"]].term]
    if fields["loss_type"] == "cispo":  # TRL: the raw upper bound of the ratio, epsilon where it is unset
        high = fields.pop("epsilon_high", None)
        fields["cispo_max"] = fields["epsilon"] if high is None else high
        name = "epsilon_high (epsilon where that is unset), cispo's bound of the ratio itself,"
        _in_range(name, fields["cispo_max"], _RANGES["cispo_max"])
    if "delta" not in term.knobs:  # TRL reads it in its clipped losses alone
        fields.pop("delta", None)
    if getattr(args, "use_vllm", False) and getattr(args, "vllm_importance_sampling_correction", False):
        fields["sampling_correction"] = args.vllm_importance_sampling_mode
        fields["sampling_correction_min"] = args.vllm_importance_sampling_clip_min
        fields["sampling_correction_max"] = args.vllm_importance_sampling_clip_max
    return fields


# Keywords of every loss that are no field, and that trainers call by other names.
_ARGUMENTS = ("rewards", "num_generations", "completion_mask", "old_logps", "ref_logps", "sampling_logps",
              "num_items_in_batch", "loss_scale")  # fmt: skip


def _near(name: str, names: set[str]) -> list[str]:
    """The names that are spelt alike, or else end as this one does: a mask is a completion_mask."""
    close = difflib.get_close_matches(name, sorted(names), n=2, cutoff=0.6)
    return close or sorted(n for n in names if n.endswith("_" + name))


def resolve_config(config: LossConfig | None, overrides: dict) -> LossConfig:
    """``config`` (or the defaults) with ``overrides``; a TypeError lists the valid names."""
    valid = LossConfig.__dataclass_fields__
    unknown = [name for name in overrides if name not in valid]
    if unknown:
        near = dict.fromkeys(found for name in unknown for found in _near(name, {*_ARGUMENTS, *valid} - {name}))
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise TypeError(
            f"unknown keyword {', '.join(map(repr, unknown))}.{hint} Fields of LossConfig: {', '.join(valid)}."
        )
    if config is None:
        if torch.compiler.is_compiling() or not all(isinstance(value, _PLAIN) for value in overrides.values()):
            return LossConfig(**overrides)
        return _config_of(**overrides)
    if not isinstance(config, LossConfig):
        raise TypeError(f"config must be a LossConfig, got {type(config).__name__}.")
    if not overrides:
        return config
    return LossConfig(**{**{name: getattr(config, name) for name in valid}, **overrides})


_PLAIN = (str, float, int, type(None))


@functools.lru_cache(maxsize=256, typed=True)  # typed: True is not 1, where a flag is asked for
def _config_of(**fields) -> LossConfig:
    return LossConfig(**fields)


def _one_of(name: str, value: object, valid) -> None:
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{name}={value!r} is not available. Choose one of: {', '.join(map(repr, valid))}.")


def _in_range(name: str, value: object, allowed: Range) -> float:
    """A number within its range, as Python's own."""
    low, high, optional = allowed[:3]
    if not is_number(value):
        raise TypeError(f"{name} must be a number{' or None' if optional else ''}, got {value!r}.")
    value = plain(value)
    above = value > float(low) if isinstance(low, str) else value >= low
    below = value < float(high) if isinstance(high, str) else value <= high
    if not (above and below):
        ends = "above " + low if isinstance(low, str) else f"at least {low:g}"
        ends += "" if high == math.inf else " and finite" if high == "inf" else f" and at most {high:g}"
        raise ValueError(f"{name} must be {ends}, got {value}.")
    return value


def _clamp(clamp: object) -> float | tuple[float, float] | None:
    """``log_ratio_clamp`` in Python's numbers; a pair as a tuple, so that the config can be hashed."""
    if clamp is None:
        return None
    ends = clamp if isinstance(clamp, (tuple, list)) else (clamp,)
    if not all(map(is_number, ends)) or (ends is clamp and len(ends) != 2):
        raise TypeError(f"log_ratio_clamp={clamp!r}: {_CLAMP}")
    return tuple(map(plain, ends)) if ends is clamp else plain(clamp)


def _factors(weights: object) -> tuple[float, ...] | None:
    """``reward_weights`` in Python's numbers, as a tuple, so that the config can be hashed."""
    if weights is None:
        return None
    if not isinstance(weights, (tuple, list)) or not weights or not all(map(is_number, weights)):
        raise TypeError(f"reward_weights must be None, or a list or tuple of numbers, got {weights!r}.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"reward_weights must be finite, got {weights!r}.")
    return tuple(map(plain, weights))


def _rising(low_name: str, low: float | None, high_name: str, high: float | None) -> None:
    if low is not None and high is not None and not low <= high:
        raise ValueError(f"{low_name}={low} is above {high_name}={high}.")
