"""Both arms from the same weights, step by step in turn, over several seeds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.ppo_vs_grpo.arms import Arm, Settings
from grpo_kernels.trainer.loop import batches, evaluate, sample
from grpo_kernels.trainer.options import Options
from grpo_kernels.trainer.task import Task
from grpo_kernels.trainer.warmup import WarmUp, warm_up


@dataclass(frozen=True)
class StepRow:
    """One step of one arm; step 0 is the accuracy before the first."""

    seed: int
    arm: str
    step: int
    reward: float | None = None  # mean over the step's completions
    accuracy: float | None = None  # on the held-out problems, greedily, after the step; where it was measured
    completions: int | None = None
    budget_tokens: int | None = None  # completions × (prompt + the most that a completion may have)
    counted_tokens: int | None = None  # prompts and completions up to their ends
    sampling_ms: float | None = None
    update_ms: float | None = None
    explained_variance: float | None = None  # of the returns, by the value network; PPO only


def random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


class Run:
    """One arm on one seed. Its random numbers are its own, so that arms can take turns."""

    def __init__(self, arm: Arm, tokenizer: PreTrainedTokenizerBase, task: Task, seed: int) -> None:
        self.arm, self.tokenizer, self.task, self.seed = arm, tokenizer, task, seed
        self.device = arm.policy.device
        self.problems = batches(task.train, arm.prompts, seed)
        torch.manual_seed(seed)
        self.random = random_state(self.device)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def step(self, number: int, measure_accuracy: bool) -> StepRow:
        set_random_state(self.random, self.device)
        policy, settings = self.arm.policy, self.arm.settings
        start = self.clock()
        policy.eval()
        problems = next(self.problems)
        rollout = sample(policy, self.tokenizer, self.task, problems, self.arm.generations, settings.temperature)
        policy.train()
        sampled = self.clock()
        logged = self.arm.update(rollout)
        self.arm.finish_step()
        updated = self.clock()
        self.random = random_state(self.device)
        completions, prompt_length = rollout.prompt_ids.shape
        return StepRow(
            seed=self.seed,
            arm=self.arm.name,
            step=number,
            reward=rollout.rewards.double().mean().item(),
            accuracy=self.accuracy() if measure_accuracy else None,
            completions=completions,
            budget_tokens=completions * (prompt_length + self.task.max_completion_length),
            counted_tokens=int(rollout.prompt_mask.sum() + rollout.completion_mask.sum()),
            sampling_ms=1e3 * (sampled - start),
            update_ms=1e3 * (updated - sampled),
            **logged,
        )

    def accuracy(self) -> float:
        return evaluate(self.arm.policy, self.tokenizer, self.task)


def warmed_up(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, settings: Settings, seed: int
) -> WarmUp:
    """The supervised start that both arms share; the policy is trained in place."""
    options = Options(seed=seed, warmup_steps=settings.warmup_steps, warmup_accuracy=settings.warmup_accuracy)
    return warm_up(policy, tokenizer, task, options, lambda step, accuracy: None)


def run_seed(
    arms: Sequence[type[Arm]],
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: Settings,
    seed: int,
    show: Callable[[Sequence[StepRow]], None],
) -> list[StepRow]:
    """Trains every arm from the given weights, which stay as they are.

    The arms take turns, step by step, so that whatever disturbs the machine disturbs all of them.

    Args:
        show: called with one row per arm whenever the accuracy was measured.
    """
    runs = [Run(kind(copy.deepcopy(policy), settings), tokenizer, task, seed) for kind in arms]
    start = runs[0].accuracy()
    rows = [StepRow(seed, kind.name, 0, accuracy=start) for kind in arms]
    for number in range(1, settings.steps + 1):
        measured = number % settings.eval_every == 0 or number == settings.steps
        turn = runs if number % 2 else runs[::-1]
        new = sorted((run.step(number, measured) for run in turn), key=lambda row: row.arm)
        rows += new
        if measured:
            show(new)
    return rows
