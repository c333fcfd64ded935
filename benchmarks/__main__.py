"""`python -m benchmarks`: grpo_kernels beside what a user would run instead, on a GPU or on the CPU."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import environment, plots, report, warm
from benchmarks.baselines import Implementation
from benchmarks.baselines_peers import COMPILE_WHEN, apart, implementations
from benchmarks.budget import Budget
from benchmarks.cases import DTYPE_NAMES, MODES, OBJECTIVES, Case, parse_shape, suite
from benchmarks.suite import ERROR, MISSING, WRONG, Row, run_suite

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
SUITE_NAMES = ("smoke", "quick", "cpu", "gpu")
SECONDS_PER_ROW = {"cpu": 3.0, "cuda": 1.0}  # at most
MINUTES = {"gpu": 4.0, "quick-gpu": 1.5, "quick-cpu": 1.5}  # of a whole suite
COMPILE_MINUTES = 3.0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and memory of the GRPO loss (forward + backward) and of log-probs alone, as multiples "
        "of a copy of the logits; and of the loss from hidden states and a head, as multiples of the head's three "
        "products. Nothing that differs from float64 gets a time.",
    )
    parser.add_argument("--suite", choices=SUITE_NAMES, help="set of cases (default: gpu; without a GPU that is cpu)")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="BxT[xH]xV", help="these shapes, not a suite")
    parser.add_argument("--masked", type=float, default=0.0, help="with --shapes: share of padding, at most 0.5")
    parser.add_argument(
        "--zero-advantage", type=float, default=0.0, help="with --shapes: share of sequences with A = 0; beta is 0 then"
    )
    parser.add_argument("--objective", choices=OBJECTIVES, default="token", help="with --shapes: whose ratio")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these (default: all; shapes: fp32 bf16)")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="only these (default: all; cpu: all but inplace)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where to run (default: cuda if there is one)")
    parser.add_argument(
        "--compile",
        choices=COMPILE_WHEN,
        default="none",
        help="where torch.compile takes part, after all others: nowhere (default), in marked cases on a GPU, or in all",
    )
    parser.add_argument(
        "--compile-minutes",
        type=float,
        default=COMPILE_MINUTES,
        help=f"for that, beside --minutes (default: {COMPILE_MINUTES:g})",
    )
    parser.add_argument(
        "--seconds", type=float, help="time per row, checks not counted, at most (default: 1 on a GPU, 3 on a CPU)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="for all of it: rows get less time, then the last cases none (default: gpu 4, quick 1.5, else no limit)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data (default: 0)")
    parser.add_argument(
        "--warm-up",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile a suite's kernels beforehand, in processes of their own (on a GPU)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json, results.csv and plots there")
    parser.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True, help="with --out: draw them")
    arguments = parser.parse_args(argv)
    if arguments.suite and arguments.shapes:
        parser.error("--suite and --shapes exclude each other")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    if arguments.threads is not None and arguments.threads < 1:
        parser.error("--threads must be at least 1")
    if arguments.compile_minutes <= 0 or (arguments.minutes is not None and arguments.minutes <= 0):
        parser.error("--minutes and --compile-minutes must be positive")
    if not 0 <= arguments.masked <= 0.5 or not 0 <= arguments.zero_advantage <= 1:
        parser.error("--masked must be in [0, 0.5], --zero-advantage in [0, 1]")
    if not arguments.shapes and (arguments.masked or arguments.zero_advantage or arguments.objective != "token"):
        parser.error("--masked, --zero-advantage and --objective belong to --shapes")
    return arguments


def shape(text: str) -> tuple[int, int, int, int]:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def choose_cases(arguments: argparse.Namespace, device: torch.device) -> tuple[str | None, list[Case]]:
    """(name of the suite, or None with --shapes; the cases)."""
    if arguments.shapes:
        what = {key: getattr(arguments, key) for key in ("masked", "zero_advantage", "objective")}
        names = arguments.dtypes or DTYPES
        return None, [
            Case(*sizes, DTYPES[name], compiled=True, hidden=hidden, **what)
            for *sizes, hidden in arguments.shapes
            for name in names
        ]
    name, cases = suite(arguments.suite or "gpu", device)
    return name, [case for case in cases if not arguments.dtypes or DTYPE_NAMES[case.dtype] in arguments.dtypes]


def main(argv: Sequence[str] | None = None, who: Sequence[Implementation] | None = None) -> int:
    """Runs the benchmarks and prints the report.

    Returns: exit status; 1 if a result of grpo_kernels was wrong or raised.
    """
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    name, cases = choose_cases(arguments, device)
    where = environment.describe(device) | {"suite": name, "seed": arguments.seed, "command": command(argv)}
    print(report.header(where), flush=True)
    if arguments.suite and name != arguments.suite:
        print(f"Suite {arguments.suite!r}, on this device: {name!r}.", flush=True)

    rows: list[Row] = []
    for block in run(arguments, name, cases, who or implementations(arguments.compile), device):
        rows += block
        if arguments.out:  # what is measured is not lost if the run is cut off
            report.write(arguments.out, where, rows)
    print("\n" + textwrap.fill(report.LEGEND, report.WIDTH))
    print("\n" + report.summary(rows), flush=True)
    if dropped := [row.case for row in rows if row.status == MISSING and "are spent" in row.detail]:
        print("\nLeft out, for want of time:", *dict.fromkeys(dropped), sep="\n  ", flush=True)
    if arguments.out:
        print("\nWritten:", *report.write(arguments.out, where, rows), sep="\n  ", flush=True)
        if arguments.plots:
            print("", *draw(arguments.out), sep="\n  ")
    broken = [row for row in rows if row.implementation == "grpo_kernels" and row.status in (WRONG, ERROR)]
    if broken:
        print(f"grpo_kernels failed in {len(broken)} of its rows, see above", file=sys.stderr)
    return 1 if broken else 0


def command(argv: Sequence[str] | None) -> str:
    """As it would be typed, DIR in the place of where results go."""
    given = list(sys.argv[1:] if argv is None else argv)
    if "--out" in given[:-1]:
        given[given.index("--out") + 1] = "DIR"
    return f"python -m benchmarks {shlex.join(given)}".strip()


def run(
    arguments: argparse.Namespace,
    name: str | None,
    cases: Sequence[Case],
    who: Sequence[Implementation],
    device: torch.device,
) -> Iterator[list[Row]]:
    """Measures, and prints each block of rows when it is there, with how far the run has got."""
    start = time.monotonic()
    per_row = SECONDS_PER_ROW[device.type] if arguments.seconds is None else arguments.seconds
    minutes = MINUTES.get(name) if arguments.minutes is None else arguments.minutes
    modes = arguments.modes or (list(MODES) if device.type == "cuda" else ["loss", "logprobs", "linear"])
    if arguments.warm_up and name is not None and device.type == "cuda":
        print("\n" + warm.warm_up(name, modes), flush=True)

    runs = [(cases, who, minutes)]
    if arguments.compile != "none":
        plain, compiled = apart(who)
        marked = [case for case in cases if case.compiled or arguments.compile == "all"]
        runs = [(cases, plain, minutes), (marked, compiled, arguments.compile_minutes)]
    for cases_of_it, who_runs, limit in runs:
        names = [case.name for case in cases_of_it]
        budget = Budget(None if limit is None else 60 * limit, per_row, used=time.monotonic() - start)
        for block in run_suite(cases_of_it, modes, who_runs, device, seconds=budget, seed=arguments.seed):
            print(f"\n[case {names.index(block[0].case) + 1} of {len(names)}, {budget.used:.0f} s]", flush=True)
            print(report.table(block), flush=True)
            yield block
        start = time.monotonic()


def draw(out: Path) -> list[Path | str]:
    """The plots, or why there are none: measurements are not lost for want of a plotting library."""
    try:
        return plots.draw(out)
    except plots.PlotError as error:
        return [f"no plots: {error}"]


if __name__ == "__main__":
    sys.exit(main())
