"""The task: two-digit addition, with a reward that can be verified.

A prompt is ``37+48=``. The completion is the sum with its last digit first, ``58`` for 85: the order
in which one adds on paper, since each digit then needs no carry that was not worked out before it
(Lee et al. 2023, arXiv:2307.03381). Training from scratch is several times as fast that way.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

OPERANDS = range(10, 100)
HELD_OUT_PAIRS = 250
# Not the run's seed: every run is measured on the same problems.
_SPLIT_SEED = 20240205


class Problem(NamedTuple):
    prompt: str
    answer: str


# reward(prompts, completions, answers) -> one number per completion
Reward = Callable[[Sequence[str], Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Task:
    """Problems and what a completion of one is worth."""

    name: str
    note: str  # one line on the text format, for whoever reads the samples
    alphabet: str
    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    max_completion_length: int  # tokens, end of sequence included
    reward: Reward


def exact_match(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 for a completion that is the answer, character by character, and 0 for any other.

    Args:
        prompts, completions, answers: texts, one of each per completion.

    Raises:
        ValueError: the lengths differ.
    """
    return [float(completion == answer) for _, completion, answer in zip(prompts, completions, answers, strict=True)]


def problem(a: int, b: int) -> Problem:
    return Problem(f"{a}+{b}=", str(a + b)[::-1])


def addition() -> Task:
    """Two-digit addition: 7600 training problems and 500 held-out ones.

    A pair is held out in both orders, so that no held-out problem is a training problem turned round.
    """
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS if a < b]
    held_out = random.Random(_SPLIT_SEED).sample(pairs, HELD_OUT_PAIRS)
    held_out += [(b, a) for a, b in held_out]
    excluded = set(held_out)
    train = [(a, b) for a in OPERANDS for b in OPERANDS if (a, b) not in excluded]
    return Task(
        name="two-digit addition",
        note="answers are written last digit first: 37+48=58 says 85",
        alphabet="0123456789+=",
        train=tuple(problem(a, b) for a, b in train),
        held_out=tuple(problem(a, b) for a, b in held_out),
        max_completion_length=4,  # three digits and the end
        reward=exact_match,
    )
