"""Rewards: plain Python functions ``reward(prompts, completions, **columns) -> list[float | None]``.

A function gets texts, one of each per completion, and every field of the data set under its name, as a
list in the same order; ``answer`` is always among them. It returns one number per completion, or None
where it has no opinion. The sum over functions, each times its weight, is what a completion earns.
"""

import functools
import importlib
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from grpo_kernels import group_advantages
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.rollout import Rollout

Reward = Callable[..., Sequence[float | None]]


class RewardError(RuntimeError):
    """A reward function raises, or returns what is no list of rewards; names the function and the sample."""


class Weighted(NamedTuple):
    name: str
    function: Reward
    weight: float


# --- built in -------------------------------------------------------------------------------------


def exact_match(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns) -> list[float]:
    """1 for a completion that is the answer, character by character, and 0 for any other.

    Args:
        prompts, completions, answer: texts, one of each per completion.

    Raises:
        ValueError: the lengths differ.
    """
    return [float(completion == wanted) for _, completion, wanted in zip(prompts, completions, answer, strict=True)]


_MARKED = (r"<answer>(.*?)</answer>", r"\\boxed\{([^{}]*)\}", r"####\s*([^\n]*)")


def final_answer(text: str) -> str:
    """What stands last in <answer></answer>, in \\boxed{} or behind ####; without any of them the whole text.

    Numbers are written one way: ``$1,234.50.`` is ``1234.5``.
    """
    for pattern in _MARKED:
        if found := re.findall(pattern, text, re.DOTALL):
            text = found[-1]
            break
    text = text.strip()
    number = re.fullmatch(r"\$?\s*([+-]?[\d,]*\.?\d+)\.?\s*", text)
    if number is None or not number[1].strip("+-,"):
        return text
    digits = number[1].replace(",", "").removeprefix("+")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) or "0"


def exact_answer(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns) -> list[float]:
    """1 where completion and answer have the same `final_answer`, else 0."""
    return [float(final_answer(text) == final_answer(wanted)) for text, wanted in zip(completions, answer, strict=True)]


def format(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """1 for ``<think>...</think><answer>...</answer>`` and nothing else, each once, else 0 (arXiv:2501.12948)."""
    once = r"\s*<think>((?!</?think>|</?answer>).)*</think>\s*<answer>((?!</?think>|</?answer>).)*</answer>\s*"
    return [float(re.fullmatch(once, text, re.DOTALL) is not None) for text in completions]


def target_length(
    prompts: Sequence[str], completions: Sequence[str], target_length: Sequence[int], **columns
) -> list[float | None]:
    """1 − |words − target| / target, at least 0; None where there is no target."""
    counts = [len(text.split()) for text in completions]
    return [None if not target else max(0.0, 1.0 - abs(count - target) / target)
            for count, target in zip(counts, target_length, strict=True)]  # fmt: skip


def keyword_coherence(
    prompts: Sequence[str], completions: Sequence[str], keywords: Sequence[Sequence[str]] | None = None, **columns
) -> list[float | None]:
    """The share of keywords that a completion takes up, each counted once; None where there are none.

    Args:
        keywords: of each sample; without that field the words of the prompt that have four letters or more.
    """
    wanted = [re.findall(r"\w{4,}", prompt) for prompt in prompts] if keywords is None else keywords
    shares: list[float | None] = []
    for text, words in zip(completions, wanted, strict=True):
        unique = {word.lower() for word in words}
        said = set(re.findall(r"\w+", text.lower()))
        shares.append(len(unique & said) / len(unique) if unique else None)
    return shares


BUILT_IN = {"exact_answer": exact_answer, "format": format, "target_length": target_length,
            "keyword_coherence": keyword_coherence}  # fmt: skip


# --- from the command line ------------------------------------------------------------------------


def named(spec: str) -> tuple[str, Reward]:
    """(name, function) of what ``--reward`` says.

    Raises:
        OptionError: there is no such function.
    """
    name, _, value = spec.partition("=")
    if name == "target_length" and value:
        if not value.isdigit() or int(value) == 0:
            raise OptionError(f"--reward {spec}: the target is a number of words above 0, e.g. target_length=80.")
        return name, functools.partial(_constant_target, int(value))
    if spec in BUILT_IN:
        return spec, BUILT_IN[spec]
    module, _, function = spec.partition(":")
    if not (module and function):
        raise OptionError(
            f"--reward {spec} is not built in. Choose from {', '.join(BUILT_IN)}, or name your own as MODULE:FUNCTION."
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of the user's may raise whatever it likes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OptionError(
            f"--reward {spec} cannot be imported: {reason}. Start in the module's folder, or set PYTHONPATH."
        ) from error
    if not callable(found):
        raise OptionError(f"--reward {spec} is a {type(found).__name__}. Name a function.")
    return function, found


def _constant_target(words: int, prompts, completions, **columns) -> list[float | None]:
    return target_length(prompts, completions, [words] * len(completions))


def chosen(options: Options) -> tuple[Weighted, ...]:
    """The functions that ``--reward`` and ``--reward-weights`` name; none: the task's own is meant.

    Raises:
        OptionError: a function is not there, or two have one name.
    """
    weights = options.reward_weights or [1.0] * len(options.reward)
    made = tuple(Weighted(*named(spec), weight) for spec, weight in zip(options.reward, weights))
    names = [each.name for each in made]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"--reward {name} comes twice, and metrics are by name. Give it once, with a weight.")
    return made


# --- a step's rewards -----------------------------------------------------------------------------


def score(
    functions: Sequence[Weighted], prompts: Sequence[str], completions: Sequence[str], columns: dict[str, list]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(weighted sum (B,), each function's own rewards by name (B,)), fp32; NaN for None.

    The sum leaves out who has no opinion, and is NaN where nobody has one.

    Args:
        columns: the problems' fields under their names, one value per completion; see `task.columns_of`.

    Raises:
        RewardError: a function raises, or returns something else than a number or None per completion.
    """
    parts = {each.name: _rewards(each, prompts, completions, columns) for each in functions}
    stacked = torch.stack([each.weight * parts[each.name] for each in functions])  # [functions, B]
    unknown = stacked.isnan().all(0)
    return stacked.nansum(0).masked_fill(unknown, float("nan")), parts


def advantages_of(rollout: Rollout, options: Options) -> torch.Tensor:
    """(B,): each completion compared with its group; gdpo is given each function's own rewards."""
    rewards, weights = rollout.rewards, None
    if options.advantage_estimator == "gdpo" and rollout.reward_parts:
        rewards = torch.stack(list(rollout.reward_parts.values()), 1).to(rewards)
        weights = options.reward_weights or None
    return group_advantages(
        rewards, options.num_generations, advantage_estimator=options.advantage_estimator, reward_weights=weights,
        scale_rewards=options.scale_rewards, unbiased=options.advantage_unbiased, eps=options.advantage_eps,
    )  # fmt: skip


def _rewards(reward: Weighted, prompts, completions, columns: dict[str, list]) -> torch.Tensor:
    try:
        # Copies: a function that changes its lists must not change what the others see.
        values = reward.function(list(prompts), list(completions), **{name: list(x) for name, x in columns.items()})
    except Exception as error:  # the user's code: whatever it raises
        raise RewardError(_culprit(reward, prompts, completions, columns, error)) from error
    try:
        values = list(values)
    except TypeError:
        raise RewardError(
            f"reward {reward.name!r} returned a {type(values).__name__}, not a list of one number or None per "
            f"completion; first {_sample(prompts, completions, 0)}."
        ) from None
    if len(values) != len(completions):
        at = min(len(values), len(completions) - 1)
        raise RewardError(
            f"reward {reward.name!r} returned {len(values)} values for {len(completions)} completions; the first "
            f"without one of its own is {_sample(prompts, completions, at)}."
        )
    for i, value in enumerate(values):
        try:
            # isfinite takes no text, which float() would read; rewards are fp32.
            known = value is None or (math.isfinite(value) and abs(float(value)) <= torch.finfo(torch.float32).max)
        except (TypeError, ValueError, OverflowError):
            known = False
        if not known:
            raise RewardError(
                f"reward {reward.name!r} returned {value!r} for {_sample(prompts, completions, i)}. Return a finite "
                "number, or None for no opinion; rewards are fp32."
            )
    return torch.tensor([float("nan") if value is None else float(value) for value in values])


def _sample(prompts: Sequence[str], completions: Sequence[str], i: int) -> str:
    return f"sample {i} (prompt {prompts[i][-60:]!r}, completion {completions[i][:60]!r})"


def _culprit(reward: Weighted, prompts, completions, columns, error: Exception) -> str:
    """Tries one sample at a time, to name the first that fails."""
    for i in range(len(completions)):
        try:
            reward.function(prompts[i : i + 1], completions[i : i + 1], **{k: v[i : i + 1] for k, v in columns.items()})
        except Exception as alone:  # as above
            reason = f"{type(alone).__name__}: {alone}"
            return f"reward {reward.name!r} raised {reason}, for {_sample(prompts, completions, i)}."
    reason = f"{type(error).__name__}: {error}"
    return (
        f"reward {reward.name!r} raised {reason}, for the whole step and for no sample alone; its first is "
        f"{_sample(prompts, completions, 0)}."
    )
