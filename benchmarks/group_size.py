"""Accuracy and step time of GRPO against the size of the group, on the trainer's addition task.

    python -m benchmarks.group_size [--hold completions] [--out DIR]

A policy is warmed up once per seed; each group size goes on from the same weights, with the same number
of steps. ``--hold prompts`` keeps the prompts of a step, so that a larger group costs more; ``--hold
completions`` keeps prompts × group, so that all cost about the same, and see fewer prompts.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import describe
from grpo_kernels.trainer.build import build
from grpo_kernels.trainer.loop import train
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.plots import COLOURS
from grpo_kernels.trainer.records import Rows
from grpo_kernels.trainer.warmup import warm_up

GROUP_SIZES = (2, 4, 8, 16, 32)
WINDOW = 10  # steps whose rewards are averaged at the end


@dataclass(frozen=True)
class Row:
    """What one run came to."""

    seed: int
    num_generations: int
    prompts: int  # per step
    completions: int  # per step
    steps: int
    accuracy_before: float  # held-out, greedy
    accuracy_after: float
    reward: float  # sampled, mean of the last steps
    groups_without_spread: float  # share, mean over the steps: they teach nothing
    step_seconds: float  # median
    sampling_seconds: float
    loss_seconds: float  # and the update


def prompts_of(size: int, prompts: int, hold: str) -> int:
    """Prompts per step; with ``completions`` held it is as many as 8 to a group would make of ``prompts``."""
    return prompts if hold == "prompts" else max(1, prompts * 8 // size)


def measured(options: Options, rows: Rows) -> Row:
    """One run's row of the table."""
    accuracy, reward = rows.series("eval/accuracy")[1], rows.series("reward")[1]

    def median(name: str) -> float:
        return statistics.median(rows.series(name)[1])

    return Row(
        seed=options.seed,
        num_generations=options.num_generations,
        prompts=options.batch_size,
        completions=options.batch_size * options.num_generations,
        steps=len(reward),
        accuracy_before=accuracy[0],
        accuracy_after=accuracy[-1],
        reward=statistics.fmean(reward[-WINDOW:]),
        groups_without_spread=statistics.fmean(rows.series("frac_reward_zero_std")[1]),
        step_seconds=median("step_time"),
        sampling_seconds=median("sampling_time"),
        loss_seconds=median("loss_time"),
    )


def study(
    sizes: Sequence[int], seeds: Sequence[int], base: Options, hold: str, say: Callable[[Row], None]
) -> list[Row]:
    """A run per seed and group size; ``say`` gets each row as it is there."""
    made = []
    for seed in seeds:
        first = options_of(base, seed=seed)
        task, tokenizer, policy, *_ = build(first, first.torch_device())
        warm_up(policy, tokenizer, task, first, lambda step, accuracy: None)
        for size in sizes:
            options = options_of(base, seed=seed, num_generations=size,
                                 batch_size=prompts_of(size, base.batch_size, hold))  # fmt: skip
            torch.manual_seed(seed)
            rows = Rows([])
            train(copy.deepcopy(policy), tokenizer, task, options, rows.rows.append)
            made.append(measured(options, rows))
            say(made[-1])
    return made


def options_of(base: Options, **changes) -> Options:
    return Options(**{**asdict(base), **changes})


# --- what comes out -------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Means over the seeds, with the least and the greatest accuracy."""
    made = Table(show_edge=False, pad_edge=False, header_style="bold")
    for title in ("G", "prompts", "accuracy", "(range)", "reward", "no spread", "s/step", "sampling", "loss"):
        made.add_column(title, justify="right")
    for size in dict.fromkeys(row.num_generations for row in rows):
        own = [row for row in rows if row.num_generations == size]
        after = [row.accuracy_after for row in own]
        made.add_row(
            str(size), str(own[0].prompts), f"{statistics.fmean(after):.3f}", f"{min(after):.3f}-{max(after):.3f}",
            *(f"{statistics.fmean(getattr(row, name) for row in own):{how}}"
              for name, how in (("reward", ".3f"), ("groups_without_spread", ".2f"), ("step_seconds", ".3f"),
                                ("sampling_seconds", ".3f"), ("loss_seconds", ".3f"))),
        )  # fmt: skip
    text = io.StringIO()
    Console(file=text, width=100).print(made)
    return text.getvalue()


def write(rows: Sequence[Row], out: Path) -> list[Path]:
    """group_size.csv, a line per run, and group_size.png."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "group_size.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return [path, draw(rows, out / "group_size.png")]


def draw(rows: Sequence[Row], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = sorted({row.num_generations for row in rows})

    def mean(name: str) -> list[float]:
        return [statistics.fmean(getattr(row, name) for row in rows if row.num_generations == size) for size in sizes]

    figure = Figure(figsize=(12, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, spread, seconds = figure.subplots(1, 3)
    seeds = len({row.seed for row in rows})
    figure.suptitle(f"GRPO on two-digit addition, {rows[0].steps} steps, {seeds} seeds; line: mean, dots: each seed")
    accuracy.plot(sizes, mean("accuracy_after"), color=COLOURS[0], linewidth=1.8, label="after GRPO")
    accuracy.plot(sizes, mean("accuracy_before"), color="#666666", linestyle="--", label="before")
    spread.plot(sizes, mean("groups_without_spread"), color=COLOURS[1], linewidth=1.8)
    for axes, name, colour in ((accuracy, "accuracy_after", 0), (spread, "groups_without_spread", 1)):
        axes.scatter([row.num_generations for row in rows], [getattr(row, name) for row in rows], s=14,
                     color=COLOURS[colour])  # fmt: skip
    seconds.plot(sizes, mean("step_seconds"), color=COLOURS[6], linewidth=1.8, label="step")
    seconds.plot(sizes, mean("loss_seconds"), color=COLOURS[1], label="loss and update")
    seconds.plot(sizes, mean("sampling_seconds"), color=COLOURS[0], label="sampling")
    titles = ("Held-out accuracy, greedy", "Share of groups without spread", "Seconds of a step (median)")
    for axes, title in zip((accuracy, spread, seconds), titles):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("num_generations")
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.legend(fontsize=8, frameon=False)
    seconds.legend(fontsize=8, frameon=False)
    figure.savefig(path)
    return path


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.group_size", description=__doc__.splitlines()[0])
    parser.add_argument("--group-sizes", nargs="+", type=int, default=GROUP_SIZES, metavar="G")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1), metavar="N")
    parser.add_argument("--steps", type=int, default=80, help="GRPO steps per run (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32,
                        help="per step; with --hold completions at G = 8 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--hold", choices=("prompts", "completions"), default="prompts", help="(default: %(default)s)")
    parser.add_argument("--warmup-steps", type=int, default=600,
                        help="supervised steps before, at most (default: %(default)s)")  # fmt: skip
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write group_size.csv and group_size.png there")
    given = parser.parse_args(argv)
    try:
        for size in given.group_sizes:
            base = Options(steps=given.steps, batch_size=given.prompts, warmup_steps=given.warmup_steps,
                           num_generations=size, eval_every=given.steps, device=given.device,
                           learning_rate=given.learning_rate)  # fmt: skip
        base.torch_device()
    except OptionError as error:
        parser.error(str(error).replace("--num-generations", "--group-sizes").replace("--batch-size", "--prompts"))
    return given, base


def main(argv: Sequence[str] | None = None) -> int:
    given, base = parse_arguments(argv)
    torch.set_num_threads(1)
    where = describe(base.torch_device())
    print(f"{where['device']}, torch {where['torch']}, {where['date']}, load {where['load_average']}", flush=True)

    def say(row: Row) -> None:
        print(f"seed {row.seed}  G {row.num_generations:>2}  accuracy {row.accuracy_before:.3f} -> "
              f"{row.accuracy_after:.3f}  {row.step_seconds:.3f} s/step", flush=True)  # fmt: skip

    rows = study(given.group_sizes, given.seeds, base, given.hold, say)
    print("\n" + table(rows))
    if given.out:
        print(*write(rows, given.out), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
