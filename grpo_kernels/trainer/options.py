"""Every knob of the trainer, with its default and meaning; `parse` reads them from a command line."""

import argparse
import dataclasses
import math
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_kernels import LossConfig
from grpo_kernels.variants import KL_ESTIMATORS, LOSS_TYPES


class OptionError(ValueError):
    """An option's value is unusable; the message names the flag, what came, and the remedy."""


# Without --steps a run goes on until sampled completions earn this on average, over so many steps.
SOLVED_REWARD = 0.8
REWARD_WINDOW = 10
MOST_STEPS = 300


def _option(default, help: str, choices: Sequence[str] | None = None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
    """Options of one run, checked on construction.

    Raises:
        OptionError: a value outside its range; the message is one line that names the flag.
    """

    seed: int = _option(0, "seeds everything: weights, problems, samples; same seed, same metrics on a CPU")
    output_dir: str = _option("output", "where metrics, curves and model go; a previous run's files are replaced")
    device: str = _option("auto", "torch device, e.g. cpu or cuda:1; auto: cuda if there is one, else cpu")
    dtype: str = _option("float32", "bfloat16: autocast, the weights stay float32", ("float32", "bfloat16"))
    threads: int = _option(1, "CPU threads of torch; so small a model gains little from more")

    steps: int | None = _option(
        None,
        f"GRPO steps (default: until {REWARD_WINDOW} steps have a mean reward of {SOLVED_REWARD}, {MOST_STEPS} max)",
    )
    batch_size: int = _option(64, "prompts per step; each gets a group of completions")
    num_generations: int = _option(8, "G, completions per prompt: the group whose mean reward is the baseline")
    num_iterations: int = _option(2, "optimizer steps per batch; from the second on, ratios leave 1 and clipping acts")
    temperature: float = _option(1.0, "sampling temperature, which the loss uses as well")
    learning_rate: float = _option(2e-3, "AdamW's peak rate: linear warm-up over 10%% of the steps, linear decay to 0")
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm")
    eval_every: int = _option(10, "steps between measurements of the held-out accuracy")

    loss_type: str = _option("grpo", "the objective", tuple(LOSS_TYPES))
    beta: float = _option(0.04, "coefficient of the KL to the policy that GRPO starts from; 0: no reference policy")
    kl_estimator: str = _option("k3", "estimator of that KL", tuple(KL_ESTIMATORS))
    epsilon: float = _option(0.2, "the ratio is clipped to [1 - epsilon, 1 + epsilon]")
    epsilon_high: float | None = _option(None, "upper clip distance (default: epsilon)")
    scale_rewards: str = _option("group", "what centred rewards are divided by", ("group", "batch", "none"))

    loss_path: str = _option(
        "auto",
        "what the loss takes; linear: hidden states and head, so that logits are never held whole; "
        "auto: linear where they would not fit their budget",
        ("auto", "logits", "linear"),
    )
    logits_budget_gib: float = _option(4.0, "GiB that the logits of a step and their gradient may take, for auto")

    warmup_steps: int = _option(600, "supervised steps before GRPO, at most; 0: start from random weights")
    warmup_accuracy: float = _option(0.38, "the warm-up ends when the held-out accuracy reaches this")

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")
        for name in ("steps", "batch_size", "num_iterations", "eval_every", "threads"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, value, "at least 1")
        _check(self.num_generations >= 2, "num_generations", self.num_generations,
               "at least 2: an advantage compares completions of one prompt")  # fmt: skip
        for name in ("temperature", "learning_rate", "max_grad_norm", "logits_budget_gib"):
            value = getattr(self, name)
            _check(0 < value < math.inf, name, value, "a finite number above 0")
        _check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        _check(0 < self.warmup_accuracy < 1, "warmup_accuracy", self.warmup_accuracy, "between 0 and 1")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            value = getattr(self, field.name)
            _check(not choices or value in choices, field.name, value, f"one of {', '.join(choices or ())}")
        for name in ("beta", "epsilon", "epsilon_high"):
            value = getattr(self, name)
            _check(value is None or 0 <= value < math.inf, name, value, "a finite number, 0 or more")
        try:
            self.loss_config(max_completion_length=1)
        except ValueError as error:  # options that are fine by themselves and have no meaning together
            raise OptionError(str(error)) from None

    @property
    def max_steps(self) -> int:
        """The most GRPO steps there can be."""
        return MOST_STEPS if self.steps is None else self.steps

    def solved(self, rewards: Sequence[float]) -> bool:
        """Whether the rewards of the steps so far end the run; never with a given number of steps."""
        window = rewards[-REWARD_WINDOW:]
        return self.steps is None and len(window) == REWARD_WINDOW and sum(window) / REWARD_WINDOW >= SOLVED_REWARD

    def takes_hidden_states(self, max_completion_length: int, vocabulary: int) -> bool:
        """Whether the loss is that of hidden states and head."""
        positions = self.batch_size * self.num_generations * (max_completion_length + 1)
        size = 2 if self.dtype == "bfloat16" else 4
        fits = 2 * positions * vocabulary * size <= self.logits_budget_gib * 2**30
        return self.loss_path == "linear" or (self.loss_path == "auto" and not fits)

    def loss_config(self, max_completion_length: int) -> LossConfig:
        """The loss's part of the options."""
        return LossConfig(
            loss_type=self.loss_type,
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            scale_rewards=self.scale_rewards,
            max_completion_length=max_completion_length,
        )

    def torch_device(self) -> torch.device:
        """The device to train on.

        Raises:
            OptionError: torch does not know the device or cannot use it.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
            raise OptionError(f"--device {self.device} is not usable: {reason}. Try --device cpu.") from error

    def metrics_dir(self) -> Path:
        return Path(self.output_dir) / "grpo_metrics"

    def model_dir(self) -> Path:
        return Path(self.output_dir) / "model"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise OptionError(f"{flag(name)} must be {wanted}, got {value}.")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of twenty options is for --help."""

    def error(self, message: str) -> typing.NoReturn:
        print(f"error: {message.rstrip('.')}. See --help.", file=sys.stderr)
        raise SystemExit(2)


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from a command line; exits with status 2 and one line on stderr if they are unusable."""
    parser = _Parser(
        prog="python -m grpo_kernels.trainer",
        usage="%(prog)s [options]",
        description="Train a tiny model on two-digit addition with GRPO: a short supervised warm-up, then "
        "reinforcement learning from an exact-match reward alone. Needs no download.",
        allow_abbrev=False,
    )
    types = typing.get_type_hints(Options)
    for field in dataclasses.fields(Options):
        kind = next(t for t in (*typing.get_args(types[field.name]), types[field.name]) if t is not type(None))
        parser.add_argument(
            flag(field.name),
            type=kind,
            default=field.default,
            choices=field.metadata["choices"],
            metavar=None if field.metadata["choices"] else {int: "N", float: "X", str: "TEXT"}[kind],
            help=field.metadata["help"] + ("" if field.default is None else " (default: %(default)s)"),
        )
    arguments = parser.parse_args(argv)
    try:
        return Options(**vars(arguments))
    except OptionError as error:
        parser.error(str(error))
