"""Compiles what a suite will launch, in processes beside each other: `python -m benchmarks.warm --suite gpu`.

`python -m benchmarks` starts these before it measures on a GPU. What they compile lies in Triton's cache on the disk.
Kernels do not depend on the number of rows, so every case is run with few.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.baselines import Implementation
from benchmarks.baselines_peers import apart, implementations
from benchmarks.cases import MODES, SUITES, Case
from benchmarks.measure import first_line
from benchmarks.suite import inputs_of, missing, offers

LENGTH = 16  # tokens of a sequence: as the cases' own lengths, a multiple of 16, which kernels are specialised for
MOST_SECONDS = 30.0  # the first cases are compiled first


def jobs(cases: Sequence[Case], modes: Sequence[str]) -> list[tuple[Case, str]]:
    """(case, mode), each kind once, the first cases' first."""
    kinds: dict[object, tuple[Case, str]] = {}
    for case in cases:
        small = replace(case, batch=min(case.batch, 4), length=LENGTH, second_timer=False, compiled=False)
        for mode in modes:
            if mode in case.modes:
                kinds.setdefault((small, mode), (small, mode))
    return list(kinds.values())


def run_jobs(chosen: Sequence[tuple[Case, str]], who: Sequence[Implementation], device: torch.device) -> list[str]:
    """Runs each once, unchecked and unmeasured.

    Returns: what failed, and why: the benchmark itself will say the same.
    """
    problems = []
    for case, mode in chosen:
        inputs = inputs_of(case, device)
        for each in who:
            if not offers(each, case, mode) or missing(each, case, mode, device):
                continue
            try:
                each.calls[mode](inputs, None if case.hidden else inputs.logits.clone())
            except Exception as error:  # a peer may raise anything
                problems.append(f"{case.name}, {mode}, {each.name}: {type(error).__name__}: {first_line(error)}")
    return problems


def warm_up(suite: str, modes: Sequence[str], processes: int | None = None, seconds: float = MOST_SECONDS) -> str:
    """Starts the processes and waits for them, `seconds` at most.

    Returns: a line for the report.
    """
    start = time.monotonic()
    number = processes or max(1, min((os.cpu_count() or 1) - 1, len(jobs(SUITES[suite], modes)), 14))
    command = [sys.executable, "-m", "benchmarks.warm", "--suite", suite, "--modes", *modes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[1]
    running = [
        subprocess.Popen(
            [*command, "--part", f"{i}/{number}"], cwd=root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(number)
    ]  # fmt: skip
    for each in implementations():
        each.missing(SUITES[suite][0], torch.device("cuda"))  # peers take seconds to import; let it be now
    problems = []
    for i, process in enumerate(running):
        try:
            output, errors = process.communicate(timeout=max(0.1, start + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            problems.append(f"process {i} was not done after {seconds:.0f} s")
            continue
        problems += output.strip().splitlines()
        if process.returncode:
            problems.append((errors.strip().splitlines() or [f"process {i} ended with {process.returncode}"])[-1])
    spent = f"Kernels compiled beforehand by {number} processes in {time.monotonic() - start:.0f} s."
    return "\n".join([spent, *(f"  {problem}" for problem in dict.fromkeys(problems))])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm", description=__doc__.split(":")[0])
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th job from the I-th on (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args(argv)
    part, parts = map(int, arguments.part.split("/"))
    chosen = jobs(SUITES[arguments.suite], arguments.modes)[part::parts]
    who = [each for each in apart(implementations())[0] if not each.name.startswith("eager")]
    for problem in run_jobs(chosen, who, torch.device(arguments.device)):
        print(problem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
