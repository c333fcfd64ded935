"""Whole training steps of TRL's GRPOTrainer and of FusedGRPOTrainer, side by side: `python -m benchmarks.end_to_end`.

verl's engine with its own losses and with the fused ones comes along where verl is installed (--hosts). All get the
same random weights, completions of random ids and random rewards: nothing is sampled or downloaded. One more trainer,
whose loss is a mean of the hidden states, shows what the model takes by itself. Without a GPU the policy is tiny.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

# Before transformers and TRL are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # of rollout_func
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)

try:
    from benchmarks import training_steps
except ImportError as problem:  # of TRL, or of what it needs
    raise SystemExit(f"benchmarks.end_to_end needs TRL: pip install '.[trainer,bench]' ({problem})") from None
from benchmarks import environment, plots, report
from benchmarks.budget import Budget
from benchmarks.longest import longest
from benchmarks.measure import Failed
from benchmarks.step_rows import Row, compare, draw, row_of, table, write
from benchmarks.suite import ERROR, OK, OOM
from benchmarks.training_steps import FUSED, MODEL_ALONE, SHAPES, STOCK, VERL, VERL_FUSED, Setting

GPU, CPU = (("qwen2.5-0.5b",), 8, (1024, 4000)), (("tiny",), 4, (16,))  # shapes, B, T
CHECKPOINTED = 2048  # tokens of a completion, above which gradients are checkpointed if nothing is said
HOSTS = {"trl": (STOCK, FUSED), "verl": (VERL, VERL_FUSED)}
LEGEND = (
    "ms/step: median of the steps after the first, from the first pass to the logged numbers, the optimiser included, "
    "the making of completions not. peak: of the memory that tensors held, weights and optimiser included, which are "
    "in bf16 on a GPU, AdamW's two moments too. loss: how far the peak of passes and backward is above that of the "
    "model alone, whose loss is a mean of the hidden states. The last columns: the change from the host's own trainer. "
    "difference: relative, the largest of the steps; a loss is a sum of terms of about size one that nearly cancel, so "
    "its is relative to 1 at least. A step of verl's has a pass for the old log-probabilities, too; TRL's needs none."
)


def measure(
    setting: Setting, device: torch.device, search: bool, spent: Callable[[], bool], waits: bool = False,
    hosts: Sequence[str] = ("trl",), keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:  # fmt: skip
    """The rows of one setting.

    Args:
        search: the longest T, too.
        spent: has the time run out? Then no further run begins, but the first.
        waits: how often the host waits, too.
        hosts: of `HOSTS`.
        keep: called with the rows so far, whenever there is something new.
    """
    rows: list[Row] = []
    for trainer in (MODEL_ALONE, *(name for host in hosts for name in HOSTS[host])):
        if rows and spent():
            return rows
        rows.append(row_of(setting, trainer, training_steps.attempt(setting, trainer, device)))
        compare(rows)
        keep(rows)
    for row in rows[1:] if waits else ():
        if spent():
            return rows
        row.host_waits = training_steps.host_waits(setting, row.trainer, device)
        keep(rows)
    for row in rows[1:] if search else ():
        if row.status in (OK, OOM) and not spent():
            find_longest(setting, row, device, spent)
            keep(rows)
    return rows


def find_longest(setting: Setting, row: Row, device: torch.device, spent: Callable[[], bool]) -> None:
    def peak(T: int) -> int | None:  # two steps: the optimiser's state is there in the second
        found = training_steps.attempt(replace(setting, length=T, steps=2), row.trainer, device)
        if not isinstance(found, Failed):
            return found.peak_bytes
        if found.status != OOM:
            row.status, row.detail = found.status, f"T = {T}: {found.reason}"
        return None

    start = row.peak_bytes if row.status == OK else None
    room = training_steps.room(device)
    row.longest, row.too_long = longest(peak, setting.length, start, room, lambda: row.status == ERROR or spent())


# --- the command ----------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="of the policy (default: qwen2.5-0.5b; cpu: tiny)")
    parser.add_argument("--batch", type=int, metavar="B", help="completions of a step (default: 8; cpu: 4)")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="T", help="tokens (default: 1024 4000; cpu: 16)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                        help=f"of gradients (default: where T is above {CHECKPOINTED})")  # fmt: skip
    parser.add_argument("--beta", nargs="+", type=float, default=(0.0,), help="with a reference, if not 0 (default: 0)")
    parser.add_argument("--steps", type=int, default=5, help="of the optimiser (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="(default: %(default)s)")
    parser.add_argument("--longest", action="store_true", help="the longest T that fits, too, to 5%% (GPU)")
    parser.add_argument("--waits", action="store_true", help="how often the host waits, too, in runs of its own (GPU)")
    parser.add_argument("--hosts", nargs="+", choices=HOSTS,
                        help="whose trainers (default: trl, and verl where it is installed)")  # fmt: skip
    parser.add_argument("--minutes", type=float, help="begin no run after these (default: no limit)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where to run (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write end_to_end.json, .csv and .png there")
    given = parser.parse_args(argv)
    given.device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    if given.longest and given.device.type == "cpu":
        parser.error("--longest needs a GPU: on a CPU a policy that is too long ends the process, not the run")
    if given.waits and given.device.type == "cpu":
        parser.error("--waits needs a GPU: on a CPU the host waits for nothing")
    shapes, batch, lengths = GPU if given.device.type == "cuda" else CPU
    given.shapes, given.lengths = given.shapes or shapes, given.lengths or lengths
    given.batch = batch if given.batch is None else given.batch
    if given.batch < 2:
        parser.error("--batch must be at least 2: it is one group")
    if given.steps < 1 or min(given.lengths) < 1:
        parser.error("--steps and --lengths must be at least 1")
    if given.minutes is not None and given.minutes <= 0:
        parser.error("--minutes must be positive")
    if given.hosts is None:
        given.hosts = ["trl"] if training_steps.missing_for_verl() or any(given.beta) else ["trl", "verl"]
    elif "verl" in given.hosts:
        if missing := training_steps.missing_for_verl():
            parser.error(f"--hosts verl needs {', '.join(missing)}, not installed here: pip install --no-deps "
                         "verl==0.9.1 tensordict pyvers cloudpickle omegaconf codetiming orjson peft")  # fmt: skip
        if any(given.beta):
            parser.error("--hosts verl runs without a reference model: --beta must be 0")
    return given


def settings(given: argparse.Namespace) -> list[Setting]:
    return [
        Setting(shape, given.batch, T, T > CHECKPOINTED if given.checkpointing is None else given.checkpointing, beta,
                given.steps, given.learning_rate)
        for shape, T, beta in product(given.shapes, given.lengths, given.beta)
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_arguments(argv)
    budget = Budget(given.minutes and given.minutes * 60, per_row=0.0)
    quiet()
    where = environment.describe(given.device) | {"transformers": environment.version("transformers")}
    print(report.header(where) + f"\nTRL {where['trl']}, transformers {where['transformers']}\n", flush=True)
    training_steps.take_workspaces(given.device)
    rows: list[Row] = []
    for setting in settings(given):
        if budget.spent:
            print(f"left out, --minutes {given.minutes:g} are over: {setting.name}", flush=True)
            continue

        def keep(block: list[Row], earlier: tuple[Row, ...] = tuple(rows)) -> None:
            if given.out:
                write(given.out, where, [*earlier, *block])

        block = measure(setting, given.device, given.longest, lambda: budget.spent, given.waits, given.hosts, keep)
        rows += block
        print(table(block) + "\n", flush=True)
    if budget.spent:
        print(f"--minutes {given.minutes:g} are over: what is missing was left out")
    print(textwrap.fill(LEGEND, report.WIDTH))
    if given.out and rows:
        try:
            print(draw(where, rows, given.out / "end_to_end.png"))
        except plots.PlotError as error:
            print(f"end_to_end.png was not drawn: {error}")
    print(f"{budget.used:.0f} s")
    return int(not rows or any(row.status == ERROR for row in rows))


def quiet() -> None:
    """Neither bars nor what transformers and TRL say of each other; this package's warnings stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
