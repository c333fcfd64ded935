"""What the tests know of each policy term; a new one gets its entry here.

`facts` looks an entry up, and fails by name where there is none. The tests hold an entry to be strong
enough: its numbers by hand, and its settings on the data of the tests, must notice two knobs that are swapped, a knob
that is dropped, and a derivative of the wrong sign (`unnoticed`).
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from term_slopes import (
    clipped_slopes,
    dppo_kl_slopes,
    dppo_tv_slopes,
    fipo_influences,
    gmpo_slopes,
    sapo_slopes,
    up_slopes,
    vespo_slopes,
)
from variation import SEED_OFFSET

INF, E = math.inf, math.e
LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
REGION = {f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
CAPPED = REGION | {"clip_ratio/dual_mean"}


class Row(NamedTuple):
    """Numbers by hand: a term at one token, the first of its sequence, whose log ratio is lp − old."""

    lp: float
    old: float
    A: float
    knobs: dict
    want: tuple[float, float, float]  # ℓ, ∂ℓ/∂r, ∂ℓ/∂lp
    after: tuple[float, ...] = ()  # log ratios of the tokens that follow


def ratio(rho: float, A: float, loss: float, slope: float, by_lp=0.0, lp=-1.0, after=(), **knobs) -> Row:
    """ℓ and ∂ℓ/∂r at a ratio."""
    return Row(lp, lp - math.log(rho), A, knobs, (loss, slope, by_lp), after)


def weighted(rho: float, A: float, factor: float, **knobs) -> Row:
    """ℓ = −factor·A·lp, lp = −1, whose gradient is by lp alone."""
    return ratio(rho, A, factor * A, 0.0, -factor * A, **knobs)


def moved(p: float, p_old: float, A: float, factor: float, **knobs) -> Row:
    """The same, by probabilities."""
    return Row(math.log(p), math.log(p_old), A, knobs, (-factor * A * math.log(p), 0.0, -factor * A))


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of a term.

    Args:
        by_hand: both sides of every branch, its boundary, A = 0.
        settings: knobs that make the term bite where ratios lie around 1 and probabilities around 0.005; each knob is
            in one of them, and no two have the same value.
        slopes: (k, ρ, A, p, p_old) -> (∂ℓ/∂r̂, ∂ℓ/∂lp), the closed form, with the knobs k, for A ≠ 0; or
        of_sequence: (k, w, r, A, importance weights) -> ∂Σ w·ℓ/∂lp of each token, of lists, for a statistic.
        influences: (k, r, A, places) -> W of each token, of lists, which multiplies what the slopes say, for a suffix.
        metrics: its own, with the first of the settings.
        levels: where it has a meaning.
        sees_level: its loss depends on the level.
        gentle: knobs under which no token loses its gradient.
    """

    by_hand: tuple[Row, ...]
    settings: tuple[dict, ...] = ({},)
    slopes: Callable | None = None
    of_sequence: Callable | None = None
    influences: Callable | None = None
    metrics: frozenset[str] | set[str] = frozenset()
    levels: tuple[str, ...] = LEVELS
    sees_level: bool = True
    gentle: dict = dataclasses.field(default_factory=dict)

    @property
    def knobs(self) -> dict[str, tuple]:
        """Each knob with its values in the settings."""
        names = dict.fromkeys(name for setting in self.settings for name in setting)
        return {name: tuple(each[name] for each in self.settings if name in each) for name in names}


# --- the terms --------------------------------------------------------------------------------------------------

WIDE = {"epsilon": 0.1, "epsilon_high": 0.2}
NARROW = {"epsilon": 0.02, "epsilon_high": 0.05}

TERM_TABLE = {
    "clipped": Facts(
        by_hand=(
            # inside the interval: ℓ = −ρA, ∂ℓ/∂r = −ρA
            ratio(1.0, 2.0, -2.0, -2.0),
            ratio(1.1, 2.0, -2.2, -2.2),
            ratio(0.9, -1.0, 0.9, 0.9),
            # above, A > 0: min(3.0, 1.2·2) = 2.4, flat
            ratio(1.5, 2.0, -2.4, 0.0),
            # above, A < 0: min(−1.5, −1.2) = −1.5, free
            ratio(1.5, -1.0, 1.5, 1.5),
            # below, A > 0: min(0.5·2, 0.8·2) = 1.0, free
            ratio(0.5, 2.0, -1.0, -1.0),
            # below, A < 0: min(−0.5, −0.8) = −0.8, flat
            ratio(0.5, -1.0, 0.8, 0.0),
            # clip-higher: the upper bound alone moves; each bound has a width of its own
            ratio(1.25, 1.0, -1.25, -1.25, epsilon_high=0.28),
            ratio(0.75, -1.0, 0.75, 0.75, epsilon=0.3, epsilon_high=0.1),
            # δ caps the free branch: A < 0, ρ = 5 > δ = 3: min(−3, −1.2) = −3, flat
            ratio(5.0, -1.0, 3.0, 0.0, delta=3.0),
            # δ below the upper bound, A < 0, ρ = 1.15: min(−1.1, −1.15) = −1.15: the clip branch, and it is not flat
            ratio(1.15, -1.0, 1.15, 1.15, delta=1.1),
            # ... and beyond the upper bound it is: min(−1.1, −1.2) = −1.2
            ratio(1.3, -1.0, 1.2, 0.0, delta=1.1),
            # dual clip: A = −2, ρ = 5: −ρA = 10, held at −cA = 6
            ratio(5.0, -2.0, 6.0, 0.0, dual_clip=3.0),
            # ... not below c, and not for A > 0
            ratio(2.0, -2.0, 4.0, 4.0, dual_clip=3.0),
            ratio(5.0, 2.0, -2.4, 0.0, dual_clip=3.0),
            # δ = 4 comes first: min(ρ, 4)·2 = 8, then 6
            ratio(5.0, -2.0, 6.0, 0.0, dual_clip=3.0, delta=4.0),
            # advantage 0: nothing
            ratio(1.3, 0.0, 0.0, 0.0),
        ),
        settings=({**WIDE, "delta": 1.15}, {**WIDE, "delta": 1.4, "dual_clip": 1.3}),
        slopes=clipped_slopes,
        metrics=REGION,
    ),
    "up": Facts(
        by_hand=(
            # A > 0: ℓ = −A whatever ρ, by lp −A: no clip, no δ
            ratio(1.0, 2.0, -2.0, 0.0, -2.0),
            ratio(5.0, 2.0, -2.0, 0.0, -2.0, delta=3.0, dual_clip=2.0),
            ratio(0.1, 2.0, -2.0, 0.0, -2.0, lp=-3.0),
            # A < 0: clipped. Inside −ρA; below 0.8 it is held; above it is free
            ratio(1.1, -1.0, 1.1, 1.1),
            ratio(0.5, -1.0, 0.8, 0.0),
            ratio(1.5, -2.0, 3.0, 3.0),
            ratio(0.75, -1.0, 0.75, 0.75, epsilon=0.3, epsilon_high=0.1),
            # ... up to δ = 3; with δ = 1.1 up to the upper bound, here 1.5, or 1.2 by ε = 0.2
            ratio(5.0, -1.0, 3.0, 0.0, delta=3.0),
            ratio(1.3, -1.0, 1.3, 1.3, delta=1.1, epsilon_high=0.5),
            ratio(1.3, -1.0, 1.2, 0.0, delta=1.1),
            # ... and up to c: −cA = 6; δ = 4 comes first, c = 3 then
            ratio(5.0, -2.0, 6.0, 0.0, dual_clip=3.0),
            ratio(5.0, -2.0, 6.0, 0.0, dual_clip=3.0, delta=4.0),
            ratio(1.3, 0.0, 0.0, 0.0),
        ),
        settings=({**NARROW, "delta": 1.01}, {**NARROW, "delta": 1.09, "dual_clip": 1.03}),  # above 1 A < 0 alone tells
        slopes=up_slopes,
        metrics=REGION,
        levels=("token",),
    ),
    "fipo": Facts(
        by_hand=(
            # alone in its sequence, F = r and W = ρ, within [1, 1.2]: ℓ = −W·ρ·A
            ratio(1.1, 2.0, -2.42, -2.42),
            ratio(1.0, -1.0, 1.0, 1.0),
            ratio(0.9, -1.0, 0.9, 0.9),
            ratio(1.5, -1.0, 1.8, 1.8),
            # clipped at 1.2, W = 1.2; the upper bound at 1.6; held at 0.8, or 0.7 and W = 1
            ratio(1.5, 2.0, -2.88, 0.0),
            ratio(1.5, 2.0, -3.6, -3.6, epsilon_high=0.6),
            ratio(0.5, -1.0, 0.8, 0.0),
            ratio(0.75, -1.0, 0.75, 0.75, epsilon=0.3, epsilon_high=0.1),
            # W within [0.8, 1.2], within [0.6, 1.4], within [1, 1.6], and free
            ratio(0.9, -1.0, 0.81, 0.81, fipo_clip_high_only=False),
            ratio(0.5, 2.0, -0.8, -0.8, fipo_clip_high_only=False),
            ratio(0.5, 2.0, -0.6, -0.6, fipo_clip_high_only=False, fipo_clip_range=0.4),
            ratio(1.5, -1.0, 2.25, 2.25, fipo_clip_range=0.6),
            ratio(1.5, -1.0, 2.25, 2.25, fipo_clip_range=None),
            ratio(0.5, 2.0, -0.5, -0.5, fipo_clip_range=0.0),
            # A < 0 and ρ above the threshold: W ≤ 1; A > 0 is free of it, and so is what lies below
            ratio(5.0, -1.0, 5.0, 5.0),
            ratio(5.0, -1.0, 6.0, 6.0, fipo_safety_threshold=None),
            ratio(1.5, -1.0, 1.5, 1.5, fipo_safety_threshold=1.4),
            ratio(1.5, 2.0, -2.88, 0.0, fipo_safety_threshold=1.4),
            ratio(1.3, -1.0, 1.56, 1.56, fipo_safety_threshold=1.4),
            # δ caps ρ, and takes what is above it out of F
            ratio(1.5, -1.0, 1.3, 0.0, delta=1.3),
            ratio(1.25, -1.0, 1.5, 1.5, delta=1.3),
            # at most −cA, times W
            ratio(2.0, -1.0, 1.8, 0.0, dual_clip=1.5),
            # half of what follows, a quarter of what follows that: F = log 1.1. γ = ¼: the same
            ratio(1.0, 2.0, -2.2, -2.2, after=(2 * math.log(1.1),), fipo_decay_rate=1.0),
            ratio(1.0, 2.0, -2.2, -2.2, after=(0.0, 4 * math.log(1.1)), fipo_decay_rate=1.0),
            ratio(1.0, 2.0, -2.2, -2.2, after=(4 * math.log(1.1),), fipo_gamma=0.25),
            ratio(1.0, 2.0, -2.2, -2.2, after=(2.0, 2 * math.log(1.1)), fipo_decay_rate=2.0, delta=1.5),
            # 1.5·½ = 0.75, within [0.6, 1.4]; unsafe, and so within [0.8, 1]
            ratio(1.5, -1.0, 1.125, 1.125, after=(math.log(0.5),), fipo_gamma=1.0, fipo_clip_high_only=False,
                  fipo_clip_range=0.4),
            ratio(1.5, -1.0, 1.2, 1.2, after=(math.log(0.5),), fipo_gamma=1.0, fipo_clip_high_only=False,
                  fipo_clip_range=0.4, fipo_safety_threshold=1.4),
            ratio(1.3, 0.0, 0.0, 0.0),
        ),
        settings=(
            {**WIDE, "delta": 1.6, "fipo_clip_range": 0.3, "fipo_clip_high_only": False, "fipo_safety_threshold": 1.12,
             "fipo_decay_rate": 2.0},
            {**WIDE, "delta": 1.4, "dual_clip": 1.3, "fipo_clip_range": 0.7, "fipo_gamma": 0.6},
        ),
        slopes=clipped_slopes,
        influences=fipo_influences,
        metrics=REGION | {"fipo/future_kl", "fipo/influence_weight", "fipo/safety_keep"},
        levels=("token",),
    ),
    "cispo": Facts(
        by_hand=(
            # ℓ = −clip(ρ)·A·lp
            weighted(1.5, 2.0, 1.5, cispo_max=5.0),
            weighted(7.0, 2.0, 5.0, cispo_max=5.0),
            weighted(0.5, -1.0, 0.8, cispo_min=0.8, cispo_max=1.2),
            weighted(1.5, -1.0, 1.2, cispo_min=0.8, cispo_max=1.2),
            weighted(0.5, -1.0, 0.5, cispo_max=1.2),
            weighted(7.0, 0.0, 0.0),
        ),
        settings=({"cispo_min": 0.8, "cispo_max": 1.2},),
        slopes=lambda k, rho, A, p, old: (0.0, -min(max(rho, k.cispo_min), k.cispo_max) * A),
        metrics={"cispo_clip_ratio"},
    ),
    "sapo": Facts(
        by_hand=(
            # ρ = 1: σ(0)·4/τ = 2/τ; slope 4A·σ(0)² = A
            ratio(1.0, 3.0, -3.0, -3.0, sapo_temperature_pos=2.0),
            ratio(1.0, -3.0, 12.0, 3.0, sapo_temperature_neg=0.5),
            # ρ = 2, τ = 1: σ(1) = 0.7310585786, σ' = 0.1966119332
            ratio(2.0, 1.0, -4 * 0.7310585786300049, -8 * 0.19661193324148185),
            ratio(2.0, 0.0, 0.0, 0.0),
        ),
        settings=({"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.3},),
        slopes=sapo_slopes,
    ),
    "vespo": Facts(
        by_hand=(
            # w = 2: A ≥ 0 has k = 2, λ = 3: φ = e³·2²·e⁻⁶; A < 0 has k = 3, λ = 2: φ = e²·2³·e⁻⁴
            weighted(2.0, 1.0, 4 * math.exp(-3)),
            weighted(2.0, -1.0, 8 * math.exp(-2)),
            weighted(1.0, 1.0, 1.0),
            # k alone: 2¹ for 2²; λ alone: e^(λ − 2λ)·2²
            weighted(2.0, 1.0, 2 * math.exp(-3), vespo_k_pos=1.0),
            weighted(2.0, 1.0, 4 * math.exp(-0.5), vespo_lambda_pos=0.5),
            weighted(2.0, -1.0, 2 * math.exp(-2), vespo_k_neg=1.0),
            weighted(2.0, -1.0, 8 * math.exp(-0.5), vespo_lambda_neg=0.5),
            # λ is at least 10⁻⁴
            weighted(2.0, 1.0, 4 * math.exp(-1e-4), vespo_lambda_pos=-1.0),
            weighted(2.0, -1.0, 8 * math.exp(-1e-4), vespo_lambda_neg=0.0),
            weighted(2.0, 0.0, 0.0),
        ),
        settings=({"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.0},),
        of_sequence=vespo_slopes,
        metrics={"vespo/phi_seq_mean"},
        sees_level=False,
    ),
    "reinforce": Facts(
        by_hand=(weighted(3.0, -2.0, 1.0), weighted(0.2, 1.0, 1.0), weighted(0.2, 0.0, 0.0)),
        slopes=lambda k, rho, A, p, old: (0.0, -A),
        sees_level=False,
    ),
    "gmpo": Facts(
        by_hand=(
            # a ratio whose logarithm is inside: ρA; the log ratio is held at 0.2 or −0.2
            ratio(math.exp(0.1), -2.0, 2 * math.exp(0.1), 2 * math.exp(0.1)),
            ratio(math.exp(0.3), 2.0, -2 * math.exp(0.2), 0.0),
            ratio(math.exp(-0.3), -1.0, math.exp(-0.2), 0.0),
            # A < 0 does not hold what is above, nor A > 0 what is below
            ratio(math.exp(0.3), -1.0, math.exp(0.3), math.exp(0.3)),
            ratio(math.exp(-0.3), 1.0, -math.exp(-0.3), -math.exp(-0.3)),
            # each side has a width of its own
            ratio(math.exp(0.3), 1.0, -math.exp(0.3), -math.exp(0.3), epsilon_high=0.4),
            ratio(math.exp(-0.3), -1.0, math.exp(-0.3), math.exp(-0.3), epsilon=0.4, epsilon_high=0.1),
            ratio(math.exp(0.3), 0.0, 0.0, 0.0),
        ),
        settings=(WIDE,),
        of_sequence=gmpo_slopes,
        metrics=REGION,
        levels=("token",),
    ),
    "dppo_tv": Facts(
        by_hand=(
            # within ±0.2 of where it was: ρ itself
            moved(0.5, 0.4, 1.0, 1.25),
            moved(0.7, 0.4, 1.0, 0.0),  # moved by 0.3 the way A pushes
            moved(0.7, 0.4, -1.0, 1.75),  # against A: kept
            moved(0.1, 0.4, -1.0, 0.0),
            moved(0.1, 0.4, 1.0, 0.25),
            moved(0.7, 0.4, 1.0, 1.75, epsilon_high=0.35),
            moved(0.1, 0.4, -1.0, 0.25, epsilon=0.35, epsilon_high=0.1),
            moved(0.21, 0.01, 1.0, 20.0),  # ρ = 21, capped at 20, or at the dual clip
            moved(0.21, 0.01, 1.0, 3.0, dual_clip=3.0),
            moved(0.7, 0.4, 0.0, 0.0),
        ),
        settings=({"epsilon": 0.0002, "epsilon_high": 0.002, "dual_clip": 1.15},),
        slopes=dppo_tv_slopes,
        metrics=CAPPED,
        levels=("token", "sequence_token"),
        gentle={"epsilon": 1.0},
    ),
    "dppo_kl": Facts(
        by_hand=(
            # binary KL of (0.4, 0.6) from (0.7, 0.3): 0.4·ln(4/7) + 0.6·ln 2 = 0.19204 ≤ 0.2
            moved(0.7, 0.4, 1.0, 1.75),
            # from (0.72, 0.28): 0.4·ln(0.5556) + 0.6·ln(2.142857) = 0.22217 > 0.2
            moved(0.72, 0.4, 1.0, 0.0),
            moved(0.72, 0.4, -1.0, 1.8),
            moved(0.72, 0.4, 1.0, 1.8, epsilon_high=0.23),
            # from (0.1, 0.9): 0.4·ln 4 + 0.6·ln(2/3) = 0.31124
            moved(0.1, 0.4, -1.0, 0.0),
            moved(0.1, 0.4, 1.0, 0.25),
            moved(0.1, 0.4, -1.0, 0.25, epsilon=0.32, epsilon_high=0.1),
            # from (0.15, 0.85), of (0.005, 0.995): −0.005·ln 30 + 0.995·ln(0.995/0.85) = 0.140
            moved(0.15, 0.005, 1.0, 20.0),
            moved(0.15, 0.005, 1.0, 4.0, dual_clip=4.0),
            moved(0.72, 0.4, 0.0, 0.0),
        ),
        settings=({"epsilon": 0.0003, "epsilon_high": 0.001, "dual_clip": 1.15},),
        slopes=dppo_kl_slopes,
        metrics=CAPPED,
        levels=("token", "sequence_token"),
        gentle={"epsilon": 9.0},
    ),
    "topr": Facts(
        by_hand=(
            # A > 0: reinforce; A < 0: ρ held at 1
            weighted(3.0, 2.0, 1.0),
            weighted(3.0, -2.0, 1.0),
            weighted(0.25, 2.0, 1.0),
            weighted(0.25, -2.0, 0.25),
            weighted(0.25, 0.0, 0.0),
        ),
        slopes=lambda k, rho, A, p, old: (0.0, -A if A > 0 else -min(rho, 1) * A),
        metrics=REGION,
    ),
    "dro": Facts(
        by_hand=(
            # −A·lp + ½β·r² with r = 1: 2 + ½·0.6·1; by r: 0.6
            ratio(E, 2.0, 2.3, 0.6, -2.0, dro_beta=0.6),
            ratio(1 / E, -2.0, -1.5, -1.0, 2.0),
            ratio(E, 0.0, 0.3, 0.6, 0.0, dro_beta=0.6),
        ),
        settings=({"dro_beta": 0.7},),
        slopes=lambda k, rho, A, p, old: (k.dro_beta * math.log(rho), -A),
    ),
}


# --- looking them up --------------------------------------------------------------------------------------------


def facts(term: str) -> Facts:
    if term not in TERM_TABLE:
        pytest.fail(f"TERM_TABLE in tests/helpers/term_table.py has no entry for the term {term!r}", pytrace=False)
    return TERM_TABLE[term]


def rows_by_hand() -> list:
    """(term, row) of the whole table, for `pytest.mark.parametrize`."""
    rows = [(term, i, row) for term, known in TERM_TABLE.items() for i, row in enumerate(known.by_hand)]
    return [pytest.param(term, row, id=f"{term}-{i}") for term, i, row in rows]


def mutants(known: Facts) -> Iterator[tuple[str, Callable[[dict], dict]]]:
    """(what is wrong, settings with it) of each knob that is dropped, and of each two that are swapped."""
    for name in known.knobs:
        yield f"{name} dropped", lambda knobs, name=name: {k: v for k, v in knobs.items() if k != name}
    for a, b in itertools.combinations(known.knobs, 2):
        other = {a: b, b: a}
        yield f"{a} and {b} swapped", lambda knobs, other=other: {other.get(k, k): v for k, v in knobs.items()}


def unnoticed(term: str, evaluate: Callable[[dict], list[float]]) -> list[str]:
    """The mutants that change no number of evaluate(knobs), with any of the term's settings.

    Values that a knob may not have are noticed, as the call raises. With --seed-offset the data are not those that the
    settings were chosen for, and the test is skipped.
    """
    if os.environ[SEED_OFFSET] != "0":
        pytest.skip("the settings were chosen for the data without --seed-offset")

    def differs(knobs: dict, wrong: dict) -> bool:
        right = pytest.approx(evaluate(knobs), rel=1e-6, abs=1e-12, nan_ok=True)
        try:
            return wrong != knobs and evaluate(wrong) != right
        except ValueError:
            return True

    known = facts(term)
    return [what for what, wrong in mutants(known) if not any(differs(k, wrong(k)) for k in known.settings)]
