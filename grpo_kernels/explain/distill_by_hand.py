"""Divergences of a student from its teacher, in plain arithmetic; change the numbers here and run it again."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from grpo_kernels.explain.by_hand import softmax

# The scores (logits) that both give to by_hand.TOKENS.
STUDENT = (0.9, 0.1, 0.8, 0.4, 0.0)
TEACHER = (2.2, 1.6, -0.4, -0.3, -1.0)
BETA = 0.3  # of the mixed divergence


class Divergence(NamedTuple):
    """Lists have one entry per token."""

    terms: list[float]  # which add up to the value
    value: float
    gradient: list[float]  # ∂D/∂x, x the student's logits


class Pair(NamedTuple):
    p: list[float]  # the student's probabilities, per token
    q: list[float]  # the teacher's
    m: list[float]  # the mixture (1 − β)·p + β·q
    divergences: dict[float, Divergence]  # by β: 0 forward, 1 reverse, between mixed
    entropy: float  # of the student
    teacher_entropy: float


def terms_of(p: Sequence[float], q: Sequence[float]) -> list[float]:
    """Of KL(p ‖ q) = Σ p·(ln p − ln q)."""
    return [a * (math.log(a) - math.log(b)) for a, b in zip(p, q)]


def distill_by_hand() -> Pair:
    p, q = softmax(STUDENT), softmax(TEACHER)

    terms = terms_of(q, p)
    forward = Divergence(terms, sum(terms), [a - b for a, b in zip(p, q)])

    # Through the softmax: ∂D/∂x = p·(s − Σ p·s) with s = ∂D/∂p. Here s = ln p − ln q, and Σ p·s is D itself.
    terms = terms_of(p, q)
    D = sum(terms)
    reverse = Divergence(terms, D, [a * (math.log(a) - math.log(b) - D) for a, b in zip(p, q)])

    # s = (1 − β)·(ln p − ln m): what comes through m cancels.
    m = [(1 - BETA) * a + BETA * b for a, b in zip(p, q)]
    from_student = terms_of(p, m)
    far = sum(from_student)  # KL(p ‖ m)
    terms = [BETA * t + (1 - BETA) * s for t, s in zip(terms_of(q, m), from_student)]
    gradient = [(1 - BETA) * a * (math.log(a) - math.log(c) - far) for a, c in zip(p, m)]
    mixed = Divergence(terms, sum(terms), gradient)

    entropy, teacher_entropy = (-sum(x * math.log(x) for x in row) for row in (p, q))
    return Pair(p, q, m, {0.0: forward, 1.0: reverse, BETA: mixed}, entropy, teacher_entropy)
