"""KL estimators: what one sample of π_θ says about KL(π_θ ‖ π_ref), with u = log π_ref − log π_θ.

John Schulman, "Approximating KL divergence", 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from reference.tensors import choose, clip, gradient_of


def kl_k1(u: Tensor) -> Tensor:
    """−u: unbiased; of either sign, so noisy."""
    return -u


def kl_abs(u: Tensor) -> Tensor:
    """|u|: a distance, not an estimate."""
    return u.abs()


def kl_k2(u: Tensor) -> Tensor:
    """u²/2: never negative, biased; its expected gradient is the true KL's."""
    return u.square() / 2


def kl_k3(u: Tensor) -> Tensor:
    """e^u − u − 1: unbiased and never negative (GRPO's choice)."""
    return u.exp() - u - 1


class Estimator(NamedTuple):
    value: Callable[[Tensor], Tensor]
    k2_gradient: bool = False  # the value is unbiased, k2's gradient is: take each from where it is


KL_ESTIMATORS: dict[str, Estimator] = {
    "k1": Estimator(kl_k1),
    "abs": Estimator(kl_abs),
    "k2": Estimator(kl_k2),
    "k3": Estimator(kl_k3),
    "k1+": Estimator(kl_k1, k2_gradient=True),
    "k3+": Estimator(kl_k3, k2_gradient=True),
}


def estimate_kl(lp: Tensor, ref: Tensor, estimator: str, clamp: float | None = None) -> Tensor:
    """(B, T). With `clamp`, u is held in ±20 and the value in ±clamp, as verl does; held, it has no gradient.
    The gradient that k1+ and k3+ borrow is not held."""
    chosen = choose(KL_ESTIMATORS, estimator, "kl_estimator")
    u = ref - lp
    if clamp is None:
        kl = chosen.value(u)
    else:
        kl = clip(chosen.value(clip(u, -20, 20)), -clamp, clamp)
    return kl.detach() + gradient_of(kl_k2(u)) if chosen.k2_gradient else kl
