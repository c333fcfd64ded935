"""The hyper-parameters of an objective, and what a loss type stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from reference.tensors import choose


class LossType(NamedTuple):
    """A preset: one choice each of the three parts that a loss type has its own of."""

    term: str  # a key of terms.TERMS
    level: str  # a key of levels.LEVELS
    aggregation: str  # a key of weights.WEIGHTS


LOSS_TYPES: dict[str, LossType] = {
    "grpo": LossType("clipped", "token", "sequence-mean"),  # arXiv:2402.03300
    "bnpo": LossType("clipped", "token", "batch-tokens"),
    "dapo": LossType("clipped", "token", "global-tokens"),  # arXiv:2503.14476
    "dr_grpo": LossType("clipped", "token", "constant"),  # arXiv:2503.20783
    "luspo": LossType("clipped", "token", "sequence-sum"),  # arXiv:2602.05261
    "gspo": LossType("clipped", "sequence", "sequence-mean"),  # arXiv:2507.18071
    "gspo_token": LossType("clipped", "sequence_token", "sequence-mean"),
    "up": LossType("up", "token", "global-tokens"),  # arXiv:2607.06987
    "fipo": LossType("fipo", "token", "global-tokens"),  # arXiv:2603.19835
    "cispo": LossType("cispo", "token", "global-tokens"),  # arXiv:2506.13585
    "sapo": LossType("sapo", "token", "sequence-mean"),  # arXiv:2511.20347
    "vespo": LossType("vespo", "token", "global-tokens"),  # arXiv:2602.10693
    "gmpo": LossType("gmpo", "token", "sequence-mean"),  # arXiv:2507.20673
    "reinforce": LossType("reinforce", "token", "global-tokens"),
    "dppo_tv": LossType("dppo_tv", "token", "global-tokens"),  # arXiv:2602.04879
    "dppo_kl": LossType("dppo_kl", "token", "global-tokens"),
    "topr": LossType("topr", "sequence_sum", "sequence-sum"),  # arXiv:2503.14286
    "dro": LossType("dro", "token", "global-tokens"),  # arXiv:2405.19107
    "kimi": LossType("dro", "sequence_sum", "sequence-mean"),  # arXiv:2501.12599
}

ALL_LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
TERM_LEVELS: dict[str, tuple[str, ...]] = {
    "clipped": ALL_LEVELS,
    "up": ("token",),  # it drops a token's ratio where the token is good
    "fipo": ("token",),  # its weight looks at tokens, one after the other
    "cispo": ALL_LEVELS,
    "sapo": ALL_LEVELS,
    "vespo": ALL_LEVELS,
    "reinforce": ALL_LEVELS,
    "gmpo": ("token",),  # its exponent is the sequence's already
    "dppo_tv": ("token", "sequence_token"),  # its trust region is a token's
    "dppo_kl": ("token", "sequence_token"),
    "topr": ALL_LEVELS,
    "dro": ALL_LEVELS,
}
AGGREGATIONS = (
    *("sequence-mean", "batch-tokens", "global-tokens", "constant", "sequence-sum"),
    *("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
)
KL_ESTIMATORS = ("k1", "abs", "k2", "k3", "k1+", "k3+")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "seq_mask_tis")
NONE_MEANS_DEFAULT = ("policy_term", "importance_sampling_level", "loss_agg_mode", "sampling_correction")


@dataclass(frozen=True)
class Knobs:
    """The hyper-parameters of the objective.

    Raises:
        ValueError: a value out of its range, or a combination without a meaning.
        TypeError: a name that is not a field.
    """

    loss_type: str = "grpo"  # a key of LOSS_TYPES, which says what the next three are if they are None
    policy_term: str | None = None  # a key of TERM_LEVELS
    importance_sampling_level: str | None = None  # whose ratio ρ is: one of ALL_LEVELS
    loss_agg_mode: str | None = None  # one of AGGREGATIONS: how tokens are averaged
    # The policy term.
    epsilon: float = 0.2  # ε_l: the ratio is clipped from below at 1 − ε_l
    epsilon_high: float | None = None  # ε_h: and from above at 1 + ε_h ("clip higher", DAPO); None: ε_l
    delta: float | None = None  # δ: cap on the ratio where the minimum leaves it unbounded (INTELLECT-2)
    dual_clip: float | None = None  # c: bound on what a token of negative advantage can cost; dppo's cap on ρ
    fipo_clip_range: float | None = 0.2  # bounds FIPO's influence weight to 1 ± this; None or 0: no bounds
    fipo_clip_high_only: bool = True  # the lower bound is 1
    fipo_safety_threshold: float | None = 4.0  # ρ above which a bad token's influence is at most 1; None: no such ρ
    fipo_decay_rate: float = 32.0  # half-life of FIPO's look ahead, in tokens
    fipo_gamma: float | None = None  # its discount itself; None: by the half-life
    cispo_min: float | None = None  # raw bounds of CISPO's ratio; None: no bound
    cispo_max: float | None = 5.0
    sapo_temperature_pos: float = 1.0  # τ for A > 0: how sharply SAPO's gate closes
    sapo_temperature_neg: float = 1.05  # τ otherwise
    vespo_k_pos: float = 2.0  # k and λ of VESPO's weight, for A ≥ 0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0  # and for A < 0
    vespo_lambda_neg: float = 2.0
    dro_beta: float = 1.0  # strength of DRO's square
    log_ratio_clamp: float | tuple[float, float] | None = None  # bounds of r̂; a number c means (−c, c)
    # The pull towards the reference policy.
    beta: float = 0.0  # β: its strength
    kl_estimator: str = "k3"  # a key of kl.KL_ESTIMATORS
    use_bias_correction_kl: bool = False  # multiply the estimate by ρ (DeepSeek-V3.2)
    kl_clamp: float | None = None  # bound on the estimate's absolute value, verl's 10
    # From tokens to one number.
    max_completion_length: float | None = None  # the constant to divide by, at least 1; None: T
    global_batch_size: float | None = None  # sequences to average over in verl's seq-mean-*; None: those with tokens
    entropy_coef: float | None = None  # reward for staying undecided; None: no such term
    top_entropy_quantile: float = 1.0  # share of the tokens, the most undecided ones, that the policy term is for
    # Mismatch between the sampler and the trainer.
    off_policy_mask_threshold: float | None = None  # bound on a bad sequence's mean drift (DeepSeek-V3.2)
    sampling_correction: str | None = None  # one of CORRECTIONS
    sampling_correction_min: float | None = None  # bounds of the ratio π_old/π_sampler; None: no bound
    sampling_correction_max: float | None = 3.0
    # Advantages from rewards: see group_advantages.
    advantage_estimator: str = "group"  # "group", "rloo", "maxrl" or "gdpo"
    reward_weights: tuple[float, ...] | None = None  # of rewards (B, K); None: 1 each
    scale_rewards: str = "group"  # "group", "batch" or "none"
    advantage_eps: float = 1e-4
    advantage_unbiased: bool = True

    def __post_init__(self) -> None:
        choices = {
            "loss_type": LOSS_TYPES,
            "policy_term": TERM_LEVELS,
            "importance_sampling_level": dict.fromkeys(ALL_LEVELS),
            "loss_agg_mode": dict.fromkeys(AGGREGATIONS),
            "kl_estimator": dict.fromkeys(KL_ESTIMATORS),
            "sampling_correction": dict.fromkeys(CORRECTIONS),
            "advantage_estimator": dict.fromkeys(("group", "rloo", "maxrl", "gdpo")),
            "scale_rewards": dict.fromkeys(("group", "batch", "none")),
        }
        for name, table in choices.items():
            if getattr(self, name) is not None or name not in NONE_MEANS_DEFAULT:
                choose(table, getattr(self, name), name)
        self._check_combinations()
        self._check_values()

    @property
    def term(self) -> str:
        return self.policy_term or LOSS_TYPES[self.loss_type].term

    @property
    def level(self) -> str:
        return self.importance_sampling_level or LOSS_TYPES[self.loss_type].level

    @property
    def aggregation(self) -> str:
        return self.loss_agg_mode or LOSS_TYPES[self.loss_type].aggregation

    @property
    def log_ratio_bounds(self) -> tuple[float, float]:
        clamp = self.log_ratio_clamp
        if clamp is None:
            return -math.inf, math.inf
        return clamp if isinstance(clamp, (tuple, list)) else (-clamp, clamp)

    def _check_combinations(self) -> None:
        term, level = self.term, self.level
        if level not in TERM_LEVELS[term]:
            raise ValueError(
                f"importance_sampling_level={level!r} has no meaning for the term {term!r}; "
                f"choose one of {', '.join(map(repr, TERM_LEVELS[term]))}"
            )
        if term == "gmpo" and self.aggregation != "sequence-mean":
            raise ValueError(f"loss_agg_mode={self.aggregation!r}: gmpo is the mean over its sequences")
        if term == "cispo" and self.epsilon_high is not None:
            raise ValueError("epsilon_high is not cispo's bound; cispo_max bounds its ratio itself")
        if self.log_ratio_clamp is not None and term in ("vespo", "gmpo"):
            raise ValueError(f"log_ratio_clamp: {term} limits its ratio itself")
        if self.delta is not None and term not in ("clipped", "up", "fipo"):
            raise ValueError(f"delta caps the ratio of the terms 'clipped', 'up' and 'fipo'; {term!r} has no such cap")
        if self.dual_clip is not None and term not in ("clipped", "up", "fipo", "dppo_tv", "dppo_kl"):
            raise ValueError(f"dual_clip belongs to 'clipped', 'up', 'fipo', 'dppo_tv' and 'dppo_kl', not to {term!r}")
        if self.fipo_gamma is not None and term != "fipo":
            raise ValueError(f"fipo_gamma belongs to 'fipo', not to {term!r}")

    def _check_values(self) -> None:
        def check(right: bool, name: str, wanted: str) -> None:
            if not right:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {wanted}")

        for name in ("delta", "kl_clamp"):
            check(getattr(self, name) is None or getattr(self, name) > 0, name, "above 0")
        for name in ("max_completion_length", "global_batch_size"):
            check(getattr(self, name) is None or getattr(self, name) >= 0, name, "at least 0")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            check(getattr(self, name) > 0, name, "above 0")
        check((self.fipo_clip_range or 0) >= 0, "fipo_clip_range", "at least 0")
        for name in ("fipo_decay_rate", "fipo_safety_threshold"):
            check(getattr(self, name) is None or getattr(self, name) > 0, name, "above 0")
        check(self.fipo_gamma is None or 0 < self.fipo_gamma <= 1, "fipo_gamma", "in (0, 1]")
        check(self.dual_clip is None or self.dual_clip > 1, "dual_clip", "above 1")
        check(0 <= self.top_entropy_quantile <= 1, "top_entropy_quantile", "in [0, 1]")
        lo, hi = self.log_ratio_bounds
        check(lo <= hi, "log_ratio_clamp", "a bound of at least 0, or a pair (low, high)")
        for low, high in (("cispo_min", "cispo_max"), ("sampling_correction_min", "sampling_correction_max")):
            bounds = getattr(self, low), getattr(self, high)
            check(None in bounds or bounds[0] <= bounds[1], low, f"at most {high}={bounds[1]!r}")
