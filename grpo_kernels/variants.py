"""The catalogue: a loss type is a term × a ratio level × a weighting, with a KL estimator beside it.

To add a loss: write its term in ``terms.py`` (and its weighting in ``weights.py``, if that is new),
and enter it here. No kernel changes.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from grpo_kernels import kl, terms

if TYPE_CHECKING:
    from grpo_kernels.config import LossConfig


class Term(NamedTuple):
    """A policy term: its function, the clip region for the metrics, its coefficients and how a config gives them."""

    function: object
    region: object
    kind: type
    coefficients: "Callable[[LossConfig], NamedTuple]"
    formula: str
    paper: str


class Variant(NamedTuple):
    """A loss type: names of a term and of a weighting."""

    term: str
    weighting: str
    formula: str
    paper: str


def _clip(config: "LossConfig") -> terms.Clip:
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    return terms.Clip(1.0 - config.epsilon, 1.0 + high, math.inf if config.delta is None else config.delta)


TERMS = {
    "clipped": Term(
        terms.clipped, terms.clipped_region, terms.Clip, _clip,
        "−min(min(ρ, δ)·A, clip(ρ, 1−ε_low, 1+ε_high)·A)", "PPO, arXiv:1707.06347",
    ),
}  # fmt: skip

KL_ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}

LEVELS = ("token",)

LOSS_TYPES = {
    "grpo": Variant(
        "clipped", "sequence_mean", "mean over sequences of the mean over tokens", "DeepSeekMath, arXiv:2402.03300"
    ),
    "bnpo": Variant("clipped", "batch_tokens", "mean over the tokens of this batch", "TRL"),
    "dapo": Variant(
        "clipped", "global_tokens", "sum over tokens / num_items_in_batch", "DAPO, arXiv:2503.14476"
    ),
    "dr_grpo": Variant(
        "clipped", "constant", "sum over tokens / (B · max_completion_length)", "Dr. GRPO, arXiv:2503.20783"
    ),
}


class Plan(NamedTuple):
    """The structure of a call: what a kernel is specialised for. Values (coefficients) are not in it."""

    term: str
    kl: str  # "" without a KL
    scale_rewards: str
    unbiased: bool
    skip: bool  # rows of advantage 0 are not read
    bonus: bool  # there is an entropy bonus

    def key(self) -> str:
        """The plan as a string, which is how an op takes it."""
        flags = (str(int(flag)) for flag in (self.unbiased, self.skip, self.bonus))
        return "/".join((self.term, self.kl, self.scale_rewards, *flags))

    @classmethod
    def from_key(cls, key: str) -> "Plan":
        term, estimator, scale, *flags = key.split("/")
        return cls(term, estimator, scale, *(flag == "1" for flag in flags))

    @property
    def kl_function(self):
        return KL_ESTIMATORS[self.kl] if self.kl else None
