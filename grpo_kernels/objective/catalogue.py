"""The catalogue: a loss type is a term × a ratio level × an aggregation, with a KL estimator beside it.

To add a loss: write its term in ``terms.py`` (or its aggregation in ``aggregations.py``, its KL estimator
in ``kl.py``) and enter it here. No kernel changes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from grpo_kernels.objective import kl, terms
from grpo_kernels.objective.compiling import log2, traced


class Level(NamedTuple):
    """Whose log ratio a term sees: the token's, or the sequence's mean or sum; and where its gradient goes."""

    how: str  # "", "mean" or "sum" of the tokens' log ratios
    spreads: bool  # ∂ℓ/∂r̂ goes to every token of the sequence, not to its own
    formula: str
    gradient: str
    paper: str


LEVELS = {
    "token": Level(
        how="", spreads=False, formula="r̂ = r", gradient="its own token", paper="PPO, arXiv:1707.06347"
    ),
    "sequence": Level(
        how="mean", spreads=True, formula="r̂ = Σ m·r / max(|y|, 1)",
        gradient="spread over the sequence, m/max(|y|, 1) each", paper="GSPO, arXiv:2507.18071",
    ),
    "sequence_token": Level(
        how="mean", spreads=False, formula="the value of r̂ at level sequence", gradient="its own token",
        paper="GSPO-token, arXiv:2507.18071",
    ),
    "sequence_sum": Level(
        how="sum", spreads=True, formula="r̂ = Σ m·r", gradient="spread over the sequence, m each",
        paper="Kimi k1.5, arXiv:2501.12599",
    ),
}  # fmt: skip


class Statistic(NamedTuple):
    """A term's own number per sequence, which it sees in place of the level's log ratio."""

    function: object  # (r, A, c) -> (x, ∂x/∂r)
    correction: object  # importance weight -> y
    how: str  # "mean" or "sum" of x + y; a weight given once per sequence adds one y to the sum
    spreads: bool  # ∂ℓ/∂x goes to every token of the sequence; else x is detached


class Suffix(NamedTuple):
    """A term's own number per token, of the token and those that follow it; its loss is multiplied by what that says.

    It is detached, and independent of the level. See `grpo_kernels.objective.terms`.
    """

    function: object  # (r, c) -> (x, log₂ γ), the future of a token being Σ γ^k·x of the k-th token after it
    influence: object  # (future, r̂, A, c) -> (W, keep)


class Term(NamedTuple):
    """A policy term: its functions, its coefficients, and what it goes with. An entry says what is not the default."""

    function: object  # see `grpo_kernels.objective.terms`
    formula: str
    gradient: str
    paper: str
    knobs: tuple[str, ...] = ()  # the fields of `LossConfig` that it reads: it gets the values of no others
    kind: type = terms.NoCoefficients  # the NamedTuple of its coefficients
    of_knobs: Callable[..., NamedTuple] | None = None  # makes them of the knobs' values; None: they are those values
    levels: tuple[str, ...] = tuple(LEVELS)
    aggregations: tuple[str, ...] = ()  # the only ones it has a meaning with; (): all
    region: object = terms.no_region
    reports: str = ""  # the metric its region is for: "clip_ratio" (all of them), another's name, or none
    capped: str | bool = False  # whether its region has a cap: always, or where the knob of this name is set
    statistic: Statistic | None = None
    suffix: Suffix | None = None
    acts_without_advantage: bool = False  # A = 0 leaves a gradient, so that no row can be skipped

    @property
    def of_sequence(self) -> bool:
        """Whether a token's loss depends on others of its sequence, at level token too."""
        return self.statistic is not None or self.suffix is not None

    def coefficients(self, config) -> NamedTuple:
        """Its coefficients under a `LossConfig`."""
        return (self.of_knobs or self.kind)(*[getattr(config, knob) for knob in self.knobs])

    def caps(self, config) -> bool:
        """Whether the region's cap can be reached under a `LossConfig`."""
        return self.capped if isinstance(self.capped, bool) else getattr(config, self.capped) is not None


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _clip(epsilon, epsilon_high, delta, dual_clip) -> terms.Clip:
    low, high = traced(epsilon), traced(_or(epsilon_high, epsilon))
    return terms.Clip(1.0 - low, 1.0 + high, _or(delta, math.inf), _or(dual_clip, math.inf))


def _fipo(epsilon, epsilon_high, delta, dual_clip, clip_range, high_only, threshold, rate, gamma) -> terms.Fipo:
    least, most = 0.0, math.inf
    if clip_range:
        least, most = 1.0 if high_only else 1.0 - traced(clip_range), 1.0 + traced(clip_range)
    log2_decay = -1.0 / traced(rate) if gamma is None else log2(gamma)
    clip = _clip(epsilon, epsilon_high, delta, dual_clip)
    return terms.Fipo(*clip, least, most, _or(threshold, math.inf), log2_decay)


def _cispo(cispo_min, cispo_max) -> terms.Cispo:
    return terms.Cispo(_or(cispo_min, 0.0), cispo_max)


def _vespo(k_pos, lambda_pos, k_neg, lambda_neg) -> terms.Vespo:
    return terms.Vespo(k_pos, max(lambda_pos, 1e-4), k_neg, max(lambda_neg, 1e-4))


def _gmpo(epsilon, epsilon_high) -> terms.Gmpo:
    return terms.Gmpo(traced(epsilon), traced(_or(epsilon_high, epsilon)))


def _dppo(epsilon, epsilon_high, dual_clip) -> terms.Dppo:
    return terms.Dppo(traced(epsilon), traced(_or(epsilon_high, epsilon)), _or(dual_clip, 20.0))


TERMS = {
    "clipped": Term(
        function=terms.clipped,
        formula="−min(min(ρ, δ)·A, clip(ρ, 1−ε_low, 1+ε_high)·A); with dual_clip c at most −c·A for A < 0",
        gradient="∂r̂: −ρA where the branch taken is not flat",
        paper="PPO, arXiv:1707.06347",
        knobs=("epsilon", "epsilon_high", "delta", "dual_clip"),
        kind=terms.Clip,
        of_knobs=_clip,
        region=terms.clipped_region,
        reports="clip_ratio",
        capped="dual_clip",
    ),
    "up": Term(
        function=terms.up,
        formula="−A·exp(lp − sg[lp]), of value −A, for A > 0; else as clipped",
        gradient="∂lp: −A for A > 0; else as clipped",
        paper="UP-GRPO, arXiv:2607.06987",
        knobs=("epsilon", "epsilon_high", "delta", "dual_clip"),
        kind=terms.Clip,
        of_knobs=_clip,
        levels=("token",),
        region=terms.up_region,
        reports="clip_ratio",
        capped="dual_clip",
    ),
    "fipo": Term(
        function=terms.clipped,
        formula="sg[W]·clipped, W = clamp(exp F, 1 or 1−fipo_clip_range, 1+fipo_clip_range), F_t = Σ_k "
        "γ^k·m·r·[ρ ≤ δ] of the tokens t+k; W within [0.8, 1] where A < 0 and ρ > fipo_safety_threshold",
        gradient="that of clipped, times W",
        paper="FIPO, arXiv:2603.19835",
        knobs=("epsilon", "epsilon_high", "delta", "dual_clip", "fipo_clip_range", "fipo_clip_high_only",
               "fipo_safety_threshold", "fipo_decay_rate", "fipo_gamma"),
        kind=terms.Fipo,
        of_knobs=_fipo,
        levels=("token",),
        region=terms.clipped_region,
        reports="clip_ratio",
        capped="dual_clip",
        suffix=Suffix(terms.fipo_future, terms.fipo_influence),
    ),
    "cispo": Term(
        function=terms.cispo,
        formula="−sg[clip(ρ, cispo_min, cispo_max)]·A·lp",
        gradient="∂lp: −clip(ρ)·A",
        paper="MiniMax-M1, arXiv:2506.13585",
        knobs=("cispo_min", "cispo_max"),
        kind=terms.Cispo,
        of_knobs=_cispo,
        region=terms.cispo_region,
        reports="cispo_clip_ratio",
    ),
    "sapo": Term(
        function=terms.sapo,
        formula="−A·σ(τ(ρ−1))·4/τ, τ by the sign of A",
        gradient="∂r̂: −4A·ρ·σ'(τ(ρ−1))",
        paper="SAPO, arXiv:2511.20347",
        knobs=("sapo_temperature_pos", "sapo_temperature_neg"),
        kind=terms.Sapo,
    ),
    "vespo": Term(
        function=terms.vespo,
        formula="−sg[φ]·A·lp, φ = exp(λ + k·log w − λ·w), log w = Σ m·(r + log is), clamped",
        gradient="∂lp: −φA",
        paper="VESPO, arXiv:2602.10693",
        knobs=("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        kind=terms.Vespo,
        of_knobs=_vespo,
        region=terms.vespo_region,
        reports="vespo/phi_seq_mean",
        statistic=Statistic(terms.vespo_statistic, terms.vespo_correction, how="sum", spreads=False),
    ),
    "reinforce": Term(
        function=terms.reinforce, formula="−A·lp", gradient="∂lp: −A", paper="REINFORCE; verl's gpg"
    ),
    "gmpo": Term(
        function=terms.gmpo,
        formula="−A·exp(Σ m·(δ + log is)/|y|), δ = r held at ε_high for A > 0, −ε_low for A < 0",
        gradient="∂r of a token that is not held: Σ w·ℓ/|y|",
        paper="GMPO, arXiv:2507.20673",
        knobs=("epsilon", "epsilon_high"),
        kind=terms.Gmpo,
        of_knobs=_gmpo,
        levels=("token",),
        aggregations=("sequence-mean",),
        region=terms.gmpo_region,
        reports="clip_ratio",
        statistic=Statistic(terms.gmpo_statistic, terms.gmpo_correction, how="mean", spreads=True),
    ),
    "dppo_tv": Term(
        function=terms.dppo_tv,
        formula="−A·sg[min(ρ, c)·keep]·lp, keep while p − p_old is within ε on the side A pushes to; c = dual_clip or "
        "20",
        gradient="∂lp: −A·min(ρ, c)·keep",
        paper="DPPO, arXiv:2602.04879",
        knobs=("epsilon", "epsilon_high", "dual_clip"),
        kind=terms.Dppo,
        of_knobs=_dppo,
        levels=("token", "sequence_token"),
        region=terms.dppo_tv_region,
        reports="clip_ratio",
        capped=True,
    ),
    "dppo_kl": Term(
        function=terms.dppo_kl,
        formula="as dppo_tv, keep while the binary KL is within ε or p has moved against A",
        gradient="∂lp: −A·min(ρ, c)·keep",
        paper="DPPO, arXiv:2602.04879",
        knobs=("epsilon", "epsilon_high", "dual_clip"),
        kind=terms.Dppo,
        of_knobs=_dppo,
        levels=("token", "sequence_token"),
        region=terms.dppo_kl_region,
        reports="clip_ratio",
        capped=True,
    ),
    "topr": Term(
        function=terms.topr,
        formula="−A·lp for A > 0, else −sg[min(ρ, 1)]·A·lp",
        gradient="∂lp: −A, or −min(ρ, 1)·A",
        paper="TOPR, arXiv:2503.14286",
        region=terms.topr_region,
        reports="clip_ratio",
    ),
    "dro": Term(
        function=terms.dro,
        formula="−A·lp + ½·dro_beta·r̂²",
        gradient="∂lp: −A; ∂r̂: dro_beta·r̂",
        paper="DRO, arXiv:2405.19107",
        knobs=("dro_beta",),
        kind=terms.Dro,
        acts_without_advantage=True,
    ),
}  # fmt: skip


class Variant(NamedTuple):
    """A loss type: names of a term, a level and an aggregation."""

    term: str
    level: str
    aggregation: str
    paper: str


KL_ESTIMATORS = {
    "k1": kl.k1,
    "abs": kl.absolute,
    "k2": kl.k2,
    "k3": kl.k3,
    "k1+": kl.k1_plus,
    "k3+": kl.k3_plus,
}

LOSS_TYPES = {
    "grpo": Variant("clipped", "token", "sequence-mean", "DeepSeekMath, arXiv:2402.03300"),
    "bnpo": Variant("clipped", "token", "batch-tokens", "TRL"),
    "dapo": Variant("clipped", "token", "global-tokens", "DAPO, arXiv:2503.14476"),
    "dr_grpo": Variant("clipped", "token", "constant", "Dr. GRPO, arXiv:2503.20783"),
    "luspo": Variant("clipped", "token", "sequence-sum", "LUSPO, arXiv:2602.05261; meant for level sequence"),
    "gspo": Variant("clipped", "sequence", "sequence-mean", "GSPO, arXiv:2507.18071"),
    "gspo_token": Variant("clipped", "sequence_token", "sequence-mean", "GSPO-token, arXiv:2507.18071"),
    "up": Variant("up", "token", "global-tokens", "UP-GRPO, arXiv:2607.06987"),
    "fipo": Variant("fipo", "token", "global-tokens", "FIPO, arXiv:2603.19835"),
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
