"""Probabilities over the set that a sampler kept, in plain arithmetic; change the numbers here and run it again."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from grpo_kernels.explain.by_hand import EPSILON, LOGITS_OLD, TOKENS, softmax

TOP_K = 3  # how many of TOKENS the sampler keeps
ANSWERS = ("5", "4")  # sampled from these
ADVANTAGES = (1.0, -1.0)
LOGITS_NOW = (1.0, 0.2, 0.7, 0.4, 0.1)


class Kept(NamedTuple):
    """Lists have one entry per answer, or per token where they say so."""

    kept: list[str]  # the set S
    share: float  # Z, the old policy's probability of S
    p_old: list[float]  # per token, over all tokens,
    p_old_kept: list[float]  # and over S, 0 outside
    p_now: list[float]
    p_now_kept: list[float]
    logps: list[float]  # over S
    old_logps: list[float]  # over S: what the sampler drew with
    entropy: float  # of the policy now, over S
    ratios: list[float]
    biased_ratios: list[float]  # with the probability now over all tokens
    losses: list[float]
    loss: float
    slopes: list[float]  # g = ∂loss/∂lp
    gradient: list[list[float]]  # ∂loss/∂logit: per answer, one entry per token
    biased_gradient: list[list[float]]  # with p over all tokens, for the same g


def over(kept: Sequence[str], logits: Sequence[float]) -> list[float]:
    """Probabilities over the kept tokens, 0 for the others."""
    powers = [math.exp(x) if token in kept else 0.0 for token, x in zip(TOKENS, logits)]
    return [power / sum(powers) for power in powers]


def support_by_hand() -> Kept:
    likeliest_first = sorted(TOKENS, key=lambda token: -LOGITS_OLD[TOKENS.index(token)])
    kept = [token for token in TOKENS if token in likeliest_first[:TOP_K]]
    p_old, p_now = softmax(LOGITS_OLD), softmax(LOGITS_NOW)
    p_old_kept, p_now_kept = over(kept, LOGITS_OLD), over(kept, LOGITS_NOW)
    share = sum(p for token, p in zip(TOKENS, p_old) if token in kept)

    at = [TOKENS.index(answer) for answer in ANSWERS]
    logps, old_logps = [math.log(p_now_kept[i]) for i in at], [math.log(p_old_kept[i]) for i in at]
    entropy = -sum(p * math.log(p) for p in p_now_kept if p > 0)
    ratios = [math.exp(now - old) for now, old in zip(logps, old_logps)]
    biased = [p_now[i] / p_old_kept[i] for i in at]

    free = [ratio * A for ratio, A in zip(ratios, ADVANTAGES)]
    bounded = [min(max(ratio, 1 - EPSILON), 1 + EPSILON) * A for ratio, A in zip(ratios, ADVANTAGES)]
    losses = [-min(f, b) for f, b in zip(free, bounded)]
    slopes = [0.0 if b < f else -f / len(ANSWERS) for f, b in zip(free, bounded)]
    gradient, biased_gradient = (
        [[g * ((token == answer) - each) for token, each in zip(TOKENS, p)] for answer, g in zip(ANSWERS, slopes)]
        for p in (p_now_kept, p_now)
    )
    return Kept(kept, share, p_old, p_old_kept, p_now, p_now_kept, logps, old_logps, entropy, ratios, biased, losses,
                sum(losses) / len(ANSWERS), slopes, gradient, biased_gradient)  # fmt: skip
