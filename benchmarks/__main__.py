"""`python -m benchmarks`: grpo_kernels beside eager PyTorch and Liger-Kernel, on a GPU or on the CPU."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import environment, report
from benchmarks.baselines import IMPLEMENTATIONS, Implementation
from benchmarks.cases import DTYPE_NAMES, MODES, SUITES, Case, parse_shape
from benchmarks.suite import ERROR, WRONG, Row, run_suite

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
DEFAULT_SECONDS = {"cpu": 3.0, "cuda": 0.5}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and memory of the GRPO loss (forward + backward) and of log-probs alone, as multiples "
        "of a copy of the logits. Nothing that differs from float64 gets a time.",
    )
    parser.add_argument("--suite", choices=SUITES, help="set of cases (default: gpu if there is one, else cpu)")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="BxTxV", help="these shapes instead of a suite")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these (default: all; shapes: fp32 bf16)")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="only these (default: all; cpu: loss logprobs)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where to run (default: cuda if there is one)")
    parser.add_argument(
        "--seconds", type=float, help="time budget per row, checks not counted (default: 0.5 on a GPU, 3 on a CPU)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json and results.csv there")
    arguments = parser.parse_args(argv)
    if arguments.suite and arguments.shapes:
        parser.error("--suite and --shapes exclude each other")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    if arguments.threads is not None and arguments.threads < 1:
        parser.error("--threads must be at least 1")
    return arguments


def shape(text: str) -> tuple[int, int, int]:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def choose_cases(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    if arguments.shapes:
        names = arguments.dtypes or DTYPES
        return [Case(*shape_, DTYPES[name]) for shape_ in arguments.shapes for name in names]
    suite = SUITES[arguments.suite or ("gpu" if device.type == "cuda" else "cpu")]
    return [case for case in suite if not arguments.dtypes or DTYPE_NAMES[case.dtype] in arguments.dtypes]


def main(argv: Sequence[str] | None = None, implementations: Sequence[Implementation] = IMPLEMENTATIONS) -> int:
    """Runs the benchmarks and prints the report.

    Returns: exit status; 1 if a result of grpo_kernels was wrong or raised.
    """
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    seconds = DEFAULT_SECONDS[device.type] if arguments.seconds is None else arguments.seconds
    modes = arguments.modes or (list(MODES) if device.type == "cuda" else ["loss", "logprobs"])
    where = environment.describe(device)

    print(report.header(where), flush=True)
    rows: list[Row] = []
    for block in run_suite(
        choose_cases(arguments, device), modes, implementations, device, seconds=seconds, seed=arguments.seed
    ):
        rows += block
        print("\n" + report.table(block), flush=True)
    print("\n" + textwrap.fill(report.LEGEND, report.WIDTH))
    print("\n" + report.summary(rows), flush=True)
    if arguments.out:
        print("\nWritten:", *report.write(arguments.out, where, rows), sep="\n  ")
    broken = [row for row in rows if row.implementation == "grpo_kernels" and row.status in (WRONG, ERROR)]
    if broken:
        print(f"grpo_kernels failed in {len(broken)} of its rows, see above", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
