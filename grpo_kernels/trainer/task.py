"""Tasks: problems, and a reward that can be verified. Built in are two that need no data.

**addition**. A prompt is ``37+48=``. The completion is the sum with its last digit first, ``58`` for 85: the
order in which one adds on paper, since each digit then needs no carry that was not worked out before it
(Lee et al. 2023, arXiv:2307.03381). Training from scratch is several times as fast that way.

**countdown**. A prompt is ``3,5,7>22:``. A completion is right if it makes 22 of these numbers, each used
once, with ``+``, ``-``, ``*`` and brackets: ``3*5+7``, or ``7+5*3``. Many answers are right, and the
reward works each of them out.
"""

import ast
import functools
import operator
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations, product
from typing import NamedTuple

from grpo_kernels.trainer.rewards import Reward, Weighted, exact_match

OPERANDS = range(10, 100)
HELD_OUT_PAIRS = 250
HELD_OUT_COUNTDOWNS = 250
# Not the run's seed: every run is measured on the same problems.
_SPLIT_SEED = 20240205


class Problem(NamedTuple):
    prompt: str  # as the policy sees it, chat template applied
    answer: str
    columns: tuple[tuple[str, object], ...] = ()  # the other fields, which rewards get


@dataclass(frozen=True)
class Task:
    """Problems and what a completion of one is worth."""

    name: str
    note: str  # one line on the text format, for whoever reads the samples
    alphabet: str
    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    max_completion_length: int  # tokens, end of sequence included
    reward: Reward  # what accuracy is the mean of; and all that is learned from, without `rewards`
    rewards: tuple[Weighted, ...] = ()
    templated: bool = False  # prompts have their special tokens

    @property
    def weighted_rewards(self) -> tuple[Weighted, ...]:
        """What is learned from."""
        return self.rewards or (Weighted(getattr(self.reward, "__name__", "reward"), self.reward, 1.0),)


def columns_of(problems: Sequence[Problem]) -> dict[str, list]:
    """The answer and every other field under its name, one value per problem; all have the fields of the first."""
    columns = {"answer": [problem.answer for problem in problems]}
    for name in dict(problems[0].columns) if problems else ():
        columns[name] = [dict(problem.columns)[name] for problem in problems]
    return columns


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


# --- countdown ------------------------------------------------------------------------------------

COUNTDOWN_NUMBERS, COUNTDOWN_TARGETS = range(1, 16), range(1, 51)
_SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value_of(expression: str) -> tuple[int, Counter[int]] | None:
    """(its value, the numbers in it); None for what is no expression of numbers, +, -, * and brackets."""
    if not set(expression) <= set("0123456789+-*()"):
        return None
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError):  # 007, deep brackets
        return None
    numbers: Counter[int] = Counter()

    def work_out(node: ast.expr) -> int | None:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers[node.value] += 1
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            left, right = work_out(node.left), work_out(node.right)
            return None if left is None or right is None else _OPERATIONS[type(node.op)](left, right)
        return None  # a sign, ** and the like

    value = work_out(tree)
    return None if value is None else (value, numbers)


def reaches_target(
    prompts: Sequence[str], completions: Sequence[str], problem: Sequence[str] | None = None, **columns
) -> list[float]:
    """1 for an expression that makes the problem's target of its numbers, each used once, else 0.

    Args:
        problem: of each sample, where a chat template is around it; None: the prompts are the problems.
    """
    rewards = []
    for text, completion in zip(prompts if problem is None else problem, completions, strict=True):
        *numbers, target = (int(number) for number in text.rstrip(":").replace(">", ",").split(","))
        rewards.append(float(value_of(completion) == (target, Counter(numbers))))
    return rewards


@functools.cache
def countdown() -> Task:
    """Three numbers from 1 to 15 and a target from 1 to 50, an expression to be found.

    The three numbers of a held-out problem come with its target in no order in training.
    """
    solutions: dict[tuple[tuple[int, ...], int], str] = {}
    for numbers in combinations_with_replacement(COUNTDOWN_NUMBERS, 3):
        for (a, b, c), x, y in product(sorted(set(permutations(numbers))), _SIGNS, _SIGNS):
            # As Python reads a x b y c.
            later = y == "*" and x != "*"
            value = _SIGNS[x](a, _SIGNS[y](b, c)) if later else _SIGNS[y](_SIGNS[x](a, b), c)
            if value in COUNTDOWN_TARGETS:
                solutions.setdefault((numbers, value), f"{a}{x}{b}{y}{c}")
    keys = sorted(solutions)
    held_out = set(random.Random(_SPLIT_SEED).sample(keys, HELD_OUT_COUNTDOWNS))

    def problems(numbers: tuple[int, ...], target: int) -> list[Problem]:
        answer = solutions[numbers, target]
        orders = sorted(set(permutations(numbers)))
        return [Problem(f"{','.join(map(str, order))}>{target}:", answer) for order in orders]

    return Task(
        name="countdown",
        note="make the number behind > of all the others: 3*5+7 is one way",
        alphabet="0123456789+-*(),>:",
        train=tuple(each for key in keys if key not in held_out for each in problems(*key)),
        held_out=tuple(problems(*key)[0] for key in sorted(held_out)),
        max_completion_length=11,  # (10-9)*15, one more, and the end
        reward=reaches_target,
    )
