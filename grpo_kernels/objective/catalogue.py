"""The catalogue: a loss type is a term × a ratio level × an aggregation, with a KL estimator beside it.

To add a loss: write its term in ``terms.py`` (or its aggregation in ``aggregations.py``, its KL estimator
in ``kl.py``) and enter it here. No kernel changes.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from grpo_kernels.objective import kl, terms
from grpo_kernels.objective.tracing import traced

if TYPE_CHECKING:
    from grpo_kernels.objective.config import LossConfig


class Level(NamedTuple):
    """Whose log ratio a term sees: the token's, or the sequence's mean or sum; and where its gradient goes."""

    how: str  # "", "mean" or "sum" of the tokens' log ratios
    spreads: bool  # ∂ℓ/∂r̂ goes to every token of the sequence, not to its own
    formula: str
    gradient: str
    paper: str


class Statistic(NamedTuple):
    """A term's own number per sequence, which it sees in place of the level's log ratio."""

    function: object  # (r, A, c) -> (x, ∂x/∂r)
    correction: object  # importance weight -> y
    how: str  # "mean" or "sum" of x + y; a weight given once per sequence adds one y to the sum
    spreads: bool


class Term(NamedTuple):
    """A policy term: its functions, its coefficients and how a config gives them, and what it goes with."""

    function: object
    kind: type  # of its coefficients
    coefficients: "Callable[[LossConfig], NamedTuple]"
    levels: tuple[str, ...]
    knobs: tuple[str, ...]  # the fields of LossConfig it reads
    formula: str
    gradient: str
    paper: str
    region: object = terms.no_region
    reports: str = ""  # the metric its region is for: "clip_ratio" (all of them), another's name, or none
    statistic: Statistic | None = None
    aggregations: tuple[str, ...] = ()  # the only ones it has a meaning with; (): all
    acts_without_advantage: bool = False  # A = 0 leaves a gradient, so that no row can be skipped
    caps: "Callable[[LossConfig], bool]" = lambda config: False  # whether the region's cap can be reached


class Variant(NamedTuple):
    """A loss type: names of a term, a level and an aggregation."""

    term: str
    level: str
    aggregation: str
    paper: str


LEVELS = {
    "token": Level("", False, "r̂ = r", "its own token", "PPO, arXiv:1707.06347"),
    "sequence": Level(
        "mean", True, "r̂ = Σ m·r / max(|y|, 1)", "spread over the sequence, m/max(|y|, 1) each",
        "GSPO, arXiv:2507.18071",
    ),
    "sequence_token": Level(
        "mean", False, "the value of r̂ at level sequence", "its own token", "GSPO-token, arXiv:2507.18071"
    ),
    "sequence_sum": Level(
        "sum", True, "r̂ = Σ m·r", "spread over the sequence, m each", "Kimi k1.5, arXiv:2501.12599"
    ),
}  # fmt: skip
_EVERY = tuple(LEVELS)


def _bounds(config: "LossConfig") -> tuple[float, float]:
    """(ε_low, ε_high)"""
    return traced(config.epsilon), traced(config.epsilon if config.epsilon_high is None else config.epsilon_high)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _clip(config: "LossConfig") -> terms.Clip:
    low, high = _bounds(config)
    return terms.Clip(1.0 - low, 1.0 + high, _or(config.delta, math.inf), _or(config.dual_clip, math.inf))


def _vespo(config: "LossConfig") -> terms.Vespo:
    return terms.Vespo(
        config.vespo_k_pos, max(config.vespo_lambda_pos, 1e-4), config.vespo_k_neg, max(config.vespo_lambda_neg, 1e-4)
    )


def _dppo(config: "LossConfig") -> terms.Dppo:
    return terms.Dppo(*_bounds(config), _or(config.dual_clip, 20.0))


def _none(config: "LossConfig") -> terms.NoCoefficients:
    return terms.NoCoefficients(0.0)


TERMS = {
    "clipped": Term(
        terms.clipped, terms.Clip, _clip, _EVERY, ("epsilon", "epsilon_high", "delta", "dual_clip"),
        "−min(min(ρ, δ)·A, clip(ρ, 1−ε_low, 1+ε_high)·A); with dual_clip c at most −c·A for A < 0",
        "∂r̂: −ρA where the branch taken is not flat", "PPO, arXiv:1707.06347",
        terms.clipped_region, "clip_ratio", caps=lambda config: config.dual_clip is not None,
    ),
    "cispo": Term(
        terms.cispo, terms.Cispo, lambda config: terms.Cispo(_or(config.cispo_min, 0.0), config.cispo_max), _EVERY,
        ("cispo_min", "cispo_max"), "−sg[clip(ρ, cispo_min, cispo_max)]·A·lp", "∂lp: −clip(ρ)·A",
        "MiniMax-M1, arXiv:2506.13585", terms.cispo_region, "cispo_clip_ratio",
    ),
    "sapo": Term(
        terms.sapo, terms.Sapo,
        lambda config: terms.Sapo(config.sapo_temperature_pos, config.sapo_temperature_neg), _EVERY,
        ("sapo_temperature_pos", "sapo_temperature_neg"), "−A·σ(τ(ρ−1))·4/τ, τ by the sign of A",
        "∂r̂: −4A·ρ·σ'(τ(ρ−1))", "SAPO, arXiv:2511.20347",
    ),
    "vespo": Term(
        terms.vespo, terms.Vespo, _vespo, _EVERY,
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        "−sg[φ]·A·lp, φ = exp(λ + k·log w − λ·w), log w = Σ m·(r + log is), clamped", "∂lp: −φA",
        "VESPO, arXiv:2602.10693", terms.vespo_region, "vespo/phi_seq_mean",
        Statistic(terms.vespo_statistic, terms.vespo_correction, "sum", False),
    ),
    "reinforce": Term(
        terms.reinforce, terms.NoCoefficients, _none, _EVERY, (), "−A·lp", "∂lp: −A", "REINFORCE; verl's gpg"
    ),
    "gmpo": Term(
        terms.gmpo, terms.Gmpo, lambda config: terms.Gmpo(*_bounds(config)), ("token",),
        ("epsilon", "epsilon_high"), "−A·exp(Σ m·(δ + log is)/|y|), δ = r held at ε_high for A > 0, −ε_low for A < 0",
        "∂r of a token that is not held: Σ w·ℓ/|y|", "GMPO, arXiv:2507.20673", terms.gmpo_region, "clip_ratio",
        Statistic(terms.gmpo_statistic, terms.gmpo_correction, "mean", True), ("sequence-mean",),
    ),
    "dppo_tv": Term(
        terms.dppo_tv, terms.Dppo, _dppo, ("token", "sequence_token"), ("epsilon", "epsilon_high", "dual_clip"),
        "−A·sg[min(ρ, c)·keep]·lp, keep while p − p_old is within ε on the side A pushes to; c = dual_clip or 20",
        "∂lp: −A·min(ρ, c)·keep", "DPPO, arXiv:2602.04879",
        terms.dppo_tv_region, "clip_ratio", caps=lambda config: True,
    ),
    "dppo_kl": Term(
        terms.dppo_kl, terms.Dppo, _dppo, ("token", "sequence_token"), ("epsilon", "epsilon_high", "dual_clip"),
        "as dppo_tv, keep while the binary KL is within ε or p has moved against A", "∂lp: −A·min(ρ, c)·keep",
        "DPPO, arXiv:2602.04879", terms.dppo_kl_region, "clip_ratio", caps=lambda config: True,
    ),
    "topr": Term(
        terms.topr, terms.NoCoefficients, _none, _EVERY, (), "−A·lp for A > 0, else −sg[min(ρ, 1)]·A·lp",
        "∂lp: −A, or −min(ρ, 1)·A", "TOPR, arXiv:2503.14286", terms.topr_region, "clip_ratio",
    ),
    "dro": Term(
        terms.dro, terms.Dro, lambda config: terms.Dro(config.dro_beta), _EVERY, ("dro_beta",),
        "−A·lp + ½·dro_beta·r̂²", "∂lp: −A; ∂r̂: dro_beta·r̂", "DRO, arXiv:2405.19107",
        acts_without_advantage=True,
    ),
}  # fmt: skip

KL_ESTIMATORS = {
    "k1": kl.k1, "abs": kl.absolute, "k2": kl.k2, "k3": kl.k3, "k1+": kl.k1_plus, "k3+": kl.k3_plus
}  # fmt: skip

LOSS_TYPES = {
    "grpo": Variant("clipped", "token", "sequence-mean", "DeepSeekMath, arXiv:2402.03300"),
    "bnpo": Variant("clipped", "token", "batch-tokens", "TRL"),
    "dapo": Variant("clipped", "token", "global-tokens", "DAPO, arXiv:2503.14476"),
    "dr_grpo": Variant("clipped", "token", "constant", "Dr. GRPO, arXiv:2503.20783"),
    "luspo": Variant("clipped", "token", "sequence-sum", "LUSPO, arXiv:2602.05261; meant for level sequence"),
    "gspo": Variant("clipped", "sequence", "sequence-mean", "GSPO, arXiv:2507.18071"),
    "gspo_token": Variant("clipped", "sequence_token", "sequence-mean", "GSPO-token, arXiv:2507.18071"),
    "cispo": Variant("cispo", "token", "global-tokens", "MiniMax-M1, arXiv:2506.13585"),
    "sapo": Variant("sapo", "token", "sequence-mean", "SAPO, arXiv:2511.20347"),
    "vespo": Variant("vespo", "token", "global-tokens", "VESPO, arXiv:2602.10693"),
    "gmpo": Variant("gmpo", "token", "sequence-mean", "GMPO, arXiv:2507.20673"),
    "reinforce": Variant("reinforce", "token", "global-tokens", "REINFORCE"),
    "dppo_tv": Variant("dppo_tv", "token", "global-tokens", "DPPO, arXiv:2602.04879"),
    "dppo_kl": Variant("dppo_kl", "token", "global-tokens", "DPPO, arXiv:2602.04879"),
    "topr": Variant("topr", "sequence_sum", "sequence-sum", "TOPR, arXiv:2503.14286"),
    "dro": Variant("dro", "token", "global-tokens", "DRO, arXiv:2405.19107"),
    "kimi": Variant("dro", "sequence_sum", "sequence-mean", "Kimi k1.5, arXiv:2501.12599"),
}
