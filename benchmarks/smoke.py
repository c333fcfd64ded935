"""Every kernel in the forms that users meet, against float64, within a minute: `python -m benchmarks.smoke`.

Each case is compared entry by entry, run again and compared bit by bit, and timed. On a GPU processes beside each other
do so, and compile the kernels on their way: times are those of a GPU that others use too. Without a GPU a small part
runs in Triton's interpreter. Where the on-chip kernel cannot run, its cases say "not run", and why. Exit status 1 if
anything was wrong.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

# Before grpo_kernels is imported: its kernels are compiled on a GPU, and interpreted without one.
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks import environment
from benchmarks.interpreter import hasten
from benchmarks.smoke_cases import Case, all_cases
from benchmarks.smoke_distillation import DistillationJob
from benchmarks.smoke_job import Job, Truth, obstacle
from benchmarks.smoke_support import SupportJob

WIDTH = 80
Verdict = tuple[str, list[str]]  # a case's line, and what was wrong
_gpu = {"lost": False}  # to this process


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def job_of(case: Case) -> Job:
    kind = DistillationJob if case.kind.endswith("distil") else SupportJob if case.kept else Job
    return kind(case, device())


def check_in_worker(index: int, with_compile: bool) -> Verdict | None:
    """`check` of one of all cases; None where an illegal access in an earlier case has left this process no GPU."""
    if _gpu["lost"]:
        return None
    hasten()
    case = all_cases(with_compile)[index]
    verdict = check(case, prepared(case))
    _gpu["lost"] = bool(verdict[1]) and gpu_is_lost()
    return verdict


def checked_by_workers(count: int, indices: Sequence[int], with_compile: bool) -> Iterator[Verdict]:
    """The verdicts, in order. What a lost process leaves over goes to new ones, and comes last.

    If one ends, all do: then one process at a time takes the rest, and a case that ends it is at fault.
    """
    left = list(indices)
    while left:
        again = []
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(check_in_worker, index, with_compile) for index in left]
            for at, (index, future) in enumerate(zip(left, futures)):
                try:
                    verdict = future.result()
                except BrokenProcessPool:
                    if count == 1:
                        yield _row(all_cases(with_compile)[index], "-", "-", "ERROR"), ["its process ended"]
                        at += 1
                    again += left[at:]
                    count = 1
                    break
                if verdict is None:
                    again.append(index)
                else:
                    yield verdict
        left = again


def prepared(case: Case) -> tuple[Job, dict] | Exception:
    try:
        job = job_of(case)
        return job, job.truth()
    except Exception as error:  # one bad case must not stop the rest: it becomes this case's line
        return error


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().reshape(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(torch.equal(raw(a[name]), raw(b[name])) for name in a)


def errors(results: dict[str, torch.Tensor], truth: Truth) -> Iterator[tuple[float, str]]:
    """(error as a multiple of what is tolerated, of what); NaN where it is wanted is right, elsewhere wrong."""
    for name, got in results.items():
        want, allowed = truth[name]
        if got.shape != want.shape:
            raise ValueError(f"{name} has shape {tuple(got.shape)}, wanted {tuple(want.shape)}")
        got = got.double()
        error = (got - want).abs() / allowed
        error = torch.where(want.isnan(), torch.where(got.isnan(), 0.0, math.inf), error)
        yield error.nan_to_num(nan=math.inf, posinf=math.inf).amax().item() if error.numel() else 0.0, name


def timed(job: Job) -> tuple[dict[str, torch.Tensor], float]:
    """(results, milliseconds) of a call, forward and backward, the host's work included."""
    leaves = job.fresh()
    if job.device.type != "cuda":
        began = time.perf_counter()
        return job.run(leaves), 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    results = job.run(leaves)
    end.record()
    torch.cuda.synchronize()
    return results, start.elapsed_time(end)


def _row(case: Case, error: str, span: str, word: str) -> str:
    return f"{case.name} {error:>8} {span:>9} {word}"


def check(case: Case, found: tuple[Job, dict] | Exception) -> Verdict:
    try:
        if isinstance(found, Exception):
            raise found
        job, truth = found
        first = job.run(job.fresh())
        error, what = max(errors(first, truth))
        runs = [timed(job) for _ in range(5 if job.device.type == "cuda" else 1)]
        wrong = [f"{what} is off by {error:.3g} times the tolerance"] if error > 1 else []
        wrong += [] if all(same_bits(first, each) for each, _ in runs) else ["two runs do not give the same bits"]
        ms = min(ms for _, ms in runs)
    except Exception as error:  # see `prepared`
        return _row(case, "-", "-", "ERROR"), [f"{type(error).__name__}: {error}".splitlines()[0]]
    span = f"{ms:.1f} ms" if ms >= 10 else f"{ms * 1e3:.0f} us"
    return _row(case, f"{error:.3f}", span, "WRONG" if wrong else "ok"), wrong


def gpu_is_lost() -> bool:
    """Whether an illegal access has left this process without a GPU."""
    if device().type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() != 1)
    except RuntimeError:
        return True


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True) too, which takes longer")
    parser.add_argument("--small", action="store_true", help="the few cases that also run without a GPU")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose line begins so")
    workers = max(1, min(14, (os.cpu_count() or 1) - 2)) if device().type == "cuda" else 0
    how_many = f"processes beside each other (default here: {workers}); 0: this one does all"
    parser.add_argument("--workers", type=int, metavar="N", default=workers, help=how_many)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    began, faults = time.perf_counter(), 0
    on_gpu = device().type == "cuda"
    hasten()
    everything = all_cases(arguments.compile)
    fits = [re.match(arguments.only, " ".join(case.name.split())) is not None for case in everything]
    reasons = {case.name: reason for case in everything if (reason := obstacle(case, device()))}
    all_sizes = on_gpu and not arguments.small
    chosen = [index for index, case in enumerate(everything)
              if fits[index] and case.name not in reasons and (case.small or all_sizes)]  # fmt: skip
    skipped = [case for index, case in enumerate(everything) if fits[index] and case.name in reasons]
    if not chosen and not skipped:
        raise SystemExit(f"python -m benchmarks.smoke: no case begins with {arguments.only!r}")

    where = environment.describe(device())
    print(f"{'GPU' if on_gpu else 'No GPU: a small part, interpreted, on'} {where['device']}")
    print(f"{len(chosen)} cases; error over tolerance against float64; least time of a call", flush=True)
    if arguments.workers:
        verdicts = checked_by_workers(arguments.workers, chosen, arguments.compile)
    else:
        verdicts = (check(everything[index], prepared(everything[index])) for index in chosen)
    for line, wrong in verdicts:
        print(line, *(f"    {what}"[:WIDTH] for what in wrong), sep="\n", flush=True)
        faults += bool(wrong)
    for case in skipped:
        print(_row(case, "-", "-", "not run"), f"    {reasons[case.name]}"[:WIDTH], sep="\n")
    commit, plus, changes = str(where["commit"]).partition("+")
    print(f"{where['device']}, torch {where['torch']}, Triton {where['triton']}, commit {commit[:9]}{plus}{changes}")
    left_out = f", {len(skipped)} not run" if skipped else ""
    print(f"{len(chosen)} cases, {faults or 'no'} faults{left_out}, {time.perf_counter() - began:.1f} s", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
