"""`python -m benchmarks.ppo_vs_grpo`: memory, time, reward and accuracy of PPO and GRPO on the same task."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks import environment
from benchmarks.ppo_vs_grpo import plot, report
from benchmarks.ppo_vs_grpo.arms import GRPO, PPO, PPOTogether, Settings
from benchmarks.ppo_vs_grpo.memory import measure_arms
from benchmarks.ppo_vs_grpo.runs import StepRow, run_seed, warmed_up
from benchmarks.report import header
from grpo_kernels.trainer.model import tiny_qwen2
from grpo_kernels.trainer.task import addition
from grpo_kernels.trainer.tokenizer import character_tokenizer

QUICK = {"seeds": (0, 1), "steps": 10, "prompts": 16, "eval_every": 5, "warmup_steps": 40}
TRAINED = (GRPO, PPO)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ppo_vs_grpo",
        description="Train the same tiny model on two-digit addition with GRPO and with PPO (a value network of the "
        "policy's size), from the same warmed-up weights and with the same tokens per step, over several seeds.",
    )
    default = Settings()
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="one run of each per seed (default: 0 1 2)")
    parser.add_argument("--steps", type=int, help=f"steps of each run (default: {default.steps})")
    parser.add_argument("--prompts", type=int, help=f"per step, 8 completions each (default: {default.prompts})")
    parser.add_argument(
        "--ppo-generations", type=int, metavar="N",
        help="completions per prompt in PPO's arm, as many in all; 1: another prompt for each (default: 8, as GRPO)",
    )  # fmt: skip
    parser.add_argument("--learning-rate", type=float, help=f"of both policies (default: {default.learning_rate:g})")
    parser.add_argument(
        "--value-learning-rate", type=float, help=f"of the value network (default: {default.value_learning_rate:g})"
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, ten steps of 16 prompts: does it run?")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where to run (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1; the model is tiny)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("bench-results/ppo_vs_grpo"),
        help="write results.json, results.csv, steps.csv and the plot there (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    chosen = dict(QUICK) if arguments.quick else {}
    for name in ("seeds", "steps", "prompts", "ppo_generations", "learning_rate", "value_learning_rate"):
        value = getattr(arguments, name)
        if value is not None:
            chosen[name] = tuple(value) if name == "seeds" else value
    for name, value in (*chosen.items(), ("threads", arguments.threads)):
        if name != "seeds" and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    seeds = chosen.get("seeds", default.seeds)
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        parser.error(f"--seeds must be different numbers, 0 or more, got {' '.join(map(str, seeds))}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    try:
        return arguments, Settings(**chosen)
    except ValueError as error:
        parser.error(str(error))


def show(rows: Sequence[StepRow]) -> None:
    cells = "".join(f"   {row.arm} reward {row.reward:.3f} accuracy {row.accuracy:.3f}" for row in rows)
    print(f"step {rows[0].step:>4}{cells}", flush=True)


def measure(settings: Settings, device: torch.device) -> report.Results:
    """All of it; prints how far it has got."""
    where = environment.describe(device) | {"transformers": environment.version("transformers")}
    print(header(where))
    print(textwrap.fill(", ".join(f"{name} {value}" for name, value in asdict(settings).items()), 80), flush=True)
    task = addition()
    tokenizer = character_tokenizer(task.alphabet)
    steps: list[StepRow] = []
    memory = None
    for seed in settings.seeds:
        torch.manual_seed(seed)
        policy = tiny_qwen2(tokenizer, task.max_completion_length).to(device)
        warm = warmed_up(policy, tokenizer, task, settings, seed)
        print(f"\nseed {seed}: {warm.steps} supervised steps, accuracy {warm.accuracy:.3f}", flush=True)
        if memory is None:
            memory = measure_arms((*TRAINED, PPOTogether), policy, tokenizer, task, settings)
        steps += run_seed(TRAINED, policy, tokenizer, task, settings, seed, show)
    return report.Results(where, settings, steps, memory)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table and the summary, writes the files; returns the exit status."""
    arguments, settings = parse(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results = measure(settings, device)
    print("\n" + report.table(results))
    print("\n" + report.wrapped(report.summary(results)))
    print("\nWritten:", *report.write(arguments.out, results), plot.draw(results, arguments.out), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
