"""Plan: the structure of a call, which is what a kernel is specialised for. Values are not in it."""

from typing import NamedTuple

from grpo_kernels.objective.catalogue import KL_ESTIMATORS, LEVELS, TERMS
from grpo_kernels.objective.compiling import cached


class Plan(NamedTuple):
    """What is computed; ops take it as a string (`key`), which torch.compile can hold."""

    term: str = "reinforce"
    level: str = "token"
    kl: str = ""  # "" without a KL
    bias: bool = False  # the KL is multiplied by ρ
    clamped: bool = False  # the KL is held within bounds
    limited: bool = False  # and so is the log ratio
    scale_rewards: str = "none"
    unbiased: bool = True
    skip: bool = False  # rows of advantage 0 are not read
    bonus: bool = False  # there is an entropy bonus
    quantile: bool = False  # tokens of low entropy are masked out of the policy term
    off_policy: bool = False  # sequences that have drifted are masked out of the policy term
    correction: str = ""  # how importance weights are made of the sampler's log-probabilities
    late_correction: bool = False  # ... which needs this call's own log-probabilities
    weight_once: bool = False  # the term's statistic takes importance weights that are one per sequence
    clip_once: bool = False  # the clip metrics have one value per sequence
    capped: bool = False  # the term's region has a cap that can be reached
    weighted: bool = True  # the loss is one number, its aggregation's; else one per token

    def key(self) -> str:
        return key_of(self)

    @classmethod
    def from_key(cls, key: str) -> "Plan":
        return plan_of(cls, key)

    @property
    def of_sequence(self) -> bool:
        """Whether a token's loss depends on the rest of its sequence."""
        return self.shares or self.suffix is not None

    @property
    def shares(self) -> bool:
        """Whether the tokens of a sequence share a number, which is made of all of them."""
        return self.level != "token" or self.off_policy or self.own is not None

    @property
    def one_launch(self) -> bool:
        """Whether a row's gradient follows from the row alone, given the weights."""
        return self.skips_alone and not self.quantile

    @property
    def skips_alone(self) -> bool:
        """Whether a row of advantage 0 can be skipped by itself, not only with its whole sequence."""
        return not (self.of_sequence or self.late_correction)

    @property
    def own(self):
        """The term's statistic of the sequence, or None."""
        return TERMS[self.term].statistic

    @property
    def suffix(self):
        """The term's number of a token and those that follow it, or None."""
        return TERMS[self.term].suffix

    @property
    def needs_entropy(self) -> bool:
        return self.bonus or self.quantile

    @property
    def spread(self) -> str:
        """Which derivative goes to all tokens of the sequence: the "level"'s, the "term"'s own, or "" none."""
        if self.own is not None and self.own.spreads:
            return "term"
        return "level" if LEVELS[self.level].spreads else ""

    @property
    def kl_function(self):
        return KL_ESTIMATORS[self.kl] if self.kl else None


@cached
def key_of(plan: NamedTuple) -> str:
    """A structure, of flags and strings, as one string."""
    return "/".join(str(int(value)) if isinstance(value, bool) else value for value in plan)


@cached
def plan_of(kind: type, key: str) -> NamedTuple:
    """The structure whose `key_of` it is."""
    values = zip(kind._field_defaults.values(), key.split("/"))
    return kind(*(value == "1" if isinstance(default, bool) else value for default, value in values))
