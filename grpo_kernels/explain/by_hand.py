"""The step in plain arithmetic, top to bottom; change the numbers here and run it again to see what they do."""

import math
from collections.abc import Sequence
from typing import NamedTuple

QUESTION = "2 + 3 = ?"
TOKENS = ("5", "five", "4", "6", "7")  # all that the policy can say; an answer is one of them
REWARDS = {"5": 1.0, "five": 0.5}  # any other answer: 0
ANSWERS = ("5", "4", "five", "5", "7", "4", "5", "6")  # what the old policy sampled
# The scores (logits) that three versions of the policy give to TOKENS.
LOGITS_NOW = (1.4, 0.0, 0.5, 0.5, 0.4)
LOGITS_OLD = (0.9, 0.1, 0.8, 0.4, 0.0)
LOGITS_REFERENCE = (0.6, 0.2, 0.7, 0.5, 0.3)
EPSILON = 0.2
BETA = 0.04
STD_EPSILON = 1e-4
HARD = (10.0, 10, 10, 12, 10, 10, 10, 10)  # points out of 100
EASY = (95.0, 95, 90, 95, 95, 95, 95, 95)


class Step(NamedTuple):
    """Every number of the step; lists have one entry per answer unless they say otherwise."""

    rewards: list[float]
    mean: float
    std: float
    advantages: list[float]
    logps: list[float]  # ln of the answer's probability under the policy now,
    old_logps: list[float]  # under the policy that sampled,
    ref_logps: list[float]  # and under the reference policy
    ratios: list[float]
    free: list[float]  # ρ·A
    bounded: list[float]  # clip(ρ)·A
    is_clipped: list[bool]
    kl: list[float]
    losses: list[float]
    loss: float
    policy_slopes: list[float]  # ∂loss/∂lp by the objective
    kl_slopes: list[float]  # and by the KL
    gradient: list[list[float]]  # ∂loss/∂logit: per answer, one entry per token


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation with n − 1."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def advantages_of(rewards: Sequence[float]) -> list[float]:
    mean, std = mean_and_std(rewards)
    return [(reward - mean) / (std + STD_EPSILON) for reward in rewards]


def softmax(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(x) for x in logits]
    return [power / sum(powers) for power in powers]


def logps_of(logits: Sequence[float]) -> list[float]:
    """Of every answer."""
    probabilities = dict(zip(TOKENS, softmax(logits)))
    return [math.log(probabilities[answer]) for answer in ANSWERS]


def by_hand() -> Step:
    """The step in plain arithmetic."""
    count = len(ANSWERS)
    rewards = [REWARDS.get(answer, 0.0) for answer in ANSWERS]
    mean, std = mean_and_std(rewards)
    advantages = advantages_of(rewards)

    logps, old, ref = logps_of(LOGITS_NOW), logps_of(LOGITS_OLD), logps_of(LOGITS_REFERENCE)
    ratios = [math.exp(now - before) for now, before in zip(logps, old)]
    free = [ratio * A for ratio, A in zip(ratios, advantages)]
    bounded = [min(max(ratio, 1 - EPSILON), 1 + EPSILON) * A for ratio, A in zip(ratios, advantages)]
    is_clipped = [b < f for b, f in zip(bounded, free)]

    u = [r - now for r, now in zip(ref, logps)]
    kl = [math.exp(x) - x - 1 for x in u]
    losses = [-min(f, b) + BETA * k for f, b, k in zip(free, bounded, kl)]

    # d(ρ·A)/d lp = ρ·A, and a bound does not move; d kl/d lp = 1 − eᵘ.
    policy_slopes = [0.0 if clipped else -f / count for clipped, f in zip(is_clipped, free)]
    kl_slopes = [BETA * (1 - math.exp(x)) / count for x in u]
    p = softmax(LOGITS_NOW)
    gradient = [
        [(a + b) * ((token == answer) - p_token) for token, p_token in zip(TOKENS, p)]
        for answer, a, b in zip(ANSWERS, policy_slopes, kl_slopes)
    ]
    return Step(rewards, mean, std, advantages, logps, old, ref, ratios, free, bounded, is_clipped, kl, losses,
                sum(losses) / count, policy_slopes, kl_slopes, gradient)  # fmt: skip
