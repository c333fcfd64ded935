"""LossConfig: every knob of the objectives, with its default, meaning and paper."""

import dataclasses
import math

from grpo_kernels.variants import KL_ESTIMATORS, LEVELS, LOSS_TYPES


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What loss to compute. Fields are named as TRL's ``GRPOConfig`` names them.

    Attributes:
        loss_type: one of `grpo_kernels.variants.LOSS_TYPES`: how tokens are weighted, and the term.
        beta: coefficient of the KL to the reference policy; 0 needs no ``ref_logps``.
        epsilon: ε_low; the ratio is clipped below at 1 − ε_low (PPO, arXiv:1707.06347).
        epsilon_high: ε_high; clipped above at 1 + ε_high; None: ``epsilon`` (DAPO, arXiv:2503.14476).
        delta: upper cap of the unclipped branch; None: no cap (INTELLECT-2, arXiv:2505.07291).
        importance_sampling_level: ``"token"``: a ratio per token.
        kl_estimator: one of `grpo_kernels.variants.KL_ESTIMATORS`.
        max_completion_length: the constant that ``dr_grpo`` divides by; None: T, the padded length
            of the batch (Dr. GRPO, arXiv:2503.20783).
        entropy_coef: coefficient of the entropy bonus, a mean over the unmasked tokens.
        scale_rewards: what ``rewards`` are divided by: ``"group"``, ``"batch"`` or ``"none"``
            (DeepSeekMath, arXiv:2402.03300).
        advantage_eps: added to the standard deviation of rewards (TRL 1e-4, verl 1e-6).
        advantage_unbiased: divide the variance of rewards by n − 1, not n.

    Raises:
        ValueError: a value outside its range, or a name that is not in the catalogue.
        TypeError: an unknown field.
    """

    loss_type: str = "grpo"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str = "token"
    kl_estimator: str = "k3"
    max_completion_length: int | None = None
    entropy_coef: float = 0.0
    scale_rewards: str = "group"
    advantage_eps: float = 1e-4
    advantage_unbiased: bool = True

    def __post_init__(self) -> None:
        _one_of("loss_type", self.loss_type, LOSS_TYPES)
        _one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _one_of("importance_sampling_level", self.importance_sampling_level, LEVELS)
        _one_of("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        _at_least("beta", self.beta, 0.0)
        _at_least("epsilon", self.epsilon, 0.0)
        _at_least("advantage_eps", self.advantage_eps, 0.0)
        if not -math.inf < self.entropy_coef < math.inf:
            raise ValueError(f"entropy_coef must be finite, got {self.entropy_coef}.")
        if self.epsilon_high is not None:
            _at_least("epsilon_high", self.epsilon_high, 0.0)
        if self.delta is not None and not self.delta > 0.0:
            raise ValueError(f"delta must be above 0, or None for no cap, got {self.delta}.")
        if self.max_completion_length is not None and not self.max_completion_length > 0:
            raise ValueError(f"max_completion_length must be above 0, got {self.max_completion_length}.")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))


def resolve_config(config: LossConfig | None, overrides: dict) -> LossConfig:
    """``config`` (or the defaults) with ``overrides``; a TypeError lists the valid names."""
    valid = LossConfig.__dataclass_fields__
    unknown = [name for name in overrides if name not in valid]
    if unknown:
        raise TypeError(
            f"unknown keyword {', '.join(map(repr, unknown))}. Fields of LossConfig: {', '.join(valid)}."
        )
    if config is None:
        return LossConfig(**overrides)
    if not isinstance(config, LossConfig):
        raise TypeError(f"config must be a LossConfig, got {type(config).__name__}.")
    if not overrides:
        return config
    return LossConfig(**{name: overrides.get(name, getattr(config, name)) for name in valid})


def _one_of(name: str, value: object, valid) -> None:
    if value not in valid:
        raise ValueError(f"{name}={value!r} is not available. Choose one of: {', '.join(map(repr, valid))}.")


def _at_least(name: str, value: float, bound: float) -> None:
    if not bound <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least {bound:g}, got {value}.")
