"""What the tests know of each KL estimator; a new one gets its entry here.

`facts_of_kl` looks an entry up, and fails by name where there is none.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest


class KlFacts(NamedTuple):
    by_hand: tuple[tuple[float, float, float], ...]  # u = log π_ref − log π_θ, value, slope by log π_θ
    closed: Callable[[float], tuple[float, float]]  # u -> value, slope


KL_TABLE = {
    "k1": KlFacts(((0.5, -0.5, 1.0), (-2.0, 2.0, 1.0)), lambda u: (-u, 1.0)),
    "abs": KlFacts(
        ((0.5, 0.5, -1.0), (-0.5, 0.5, 1.0), (0.0, 0.0, 0.0)), lambda u: (abs(u), -math.copysign(1, u) if u else 0.0)
    ),
    "k2": KlFacts(((0.5, 0.125, -0.5), (-2.0, 2.0, 2.0)), lambda u: (u * u / 2, -u)),
    "k3": KlFacts(
        ((0.5, math.exp(0.5) - 1.5, 1 - math.exp(0.5)), (0.0, 0.0, 0.0), (-1.0, math.exp(-1), 1 - math.exp(-1))),
        lambda u: (math.exp(u) - u - 1, 1 - math.exp(u)),
    ),
    # k1 and k3 with the gradient of k2
    "k1+": KlFacts(((0.5, -0.5, -0.5), (-2.0, 2.0, 2.0)), lambda u: (-u, -u)),
    "k3+": KlFacts(((-1.0, math.exp(-1), 1.0), (0.5, math.exp(0.5) - 1.5, -0.5)), lambda u: (math.exp(u) - u - 1, -u)),
}


def facts_of_kl(estimator: str) -> KlFacts:
    if estimator not in KL_TABLE:
        pytest.fail(
            f"KL_TABLE in tests/helpers/kl_table.py has no entry for the estimator {estimator!r}", pytrace=False
        )
    return KL_TABLE[estimator]
