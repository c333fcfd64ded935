"""Every kernel in the forms that users meet, against float64, within a minute: `python -m benchmarks.smoke`.

On a GPU worker processes first run every case once, which compiles the kernels into Triton's cache, while this process
works out the truths; then each case is run twice, compared entry by entry and bit by bit, and timed. Without a GPU a
small part runs in Triton's interpreter. Where the on-chip kernel cannot run, its cases say "not run", and why. Exit
status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait

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

WARM_UP_SECONDS = 150  # after which checks begin anyway, and compile what is missing
WIDTH = 80


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def job_of(case: Case) -> Job:
    kind = DistillationJob if case.kind.endswith("distil") else SupportJob if case.kept else Job
    return kind(case, device())


def compile_kernels(index: int, with_compile: bool) -> None:
    """In a worker process: whatever the case launches is in Triton's cache afterwards."""
    hasten()
    job = job_of(all_cases(with_compile)[index])
    if job.case.how != "compile":
        job._run(job.fresh())
    if job.device.type == "cuda":
        torch.cuda.synchronize()


def start_workers(count: int, indices: Sequence[int], with_compile: bool) -> tuple[ProcessPoolExecutor, list]:
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
    return pool, [pool.submit(compile_kernels, index, with_compile) for index in indices]


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


def check(case: Case, found: tuple[Job, dict] | Exception) -> tuple[str, list[str]]:
    """(the case's line, what was wrong)"""
    try:
        if isinstance(found, Exception):
            raise found
        job, truth = found
        first = job.run(job.fresh())
        error, what = max(errors(first, truth))
        runs = [timed(job) for _ in range(5 if job.device.type == "cuda" else 1)]
        wrong = [f"{what} is off by {error:.3g} times the tolerance"] if error > 1 else []
        wrong += [] if all(same_bits(first, each) for each, _ in runs) else ["two runs do not give the same bits"]
        ms = statistics.median(ms for _, ms in runs)
    except Exception as error:  # see `prepared`
        return f"{case.name} {'-':>8} {'-':>9} ERROR", [f"{type(error).__name__}: {error}".splitlines()[0]]
    span = f"{ms:.1f} ms" if ms >= 10 else f"{ms * 1e3:.0f} us"
    return f"{case.name} {error:8.3f} {span:>9} {'WRONG' if wrong else 'ok'}", wrong


def gpu_is_lost() -> bool:
    """Whether an illegal access has left this process without a GPU."""
    if device().type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() != 1)
    except RuntimeError:
        return True


def continue_in_a_new_process(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "benchmarks.smoke", *arguments], check=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True) too, which takes longer")
    parser.add_argument("--small", action="store_true", help="the few cases that also run without a GPU")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose line begins so")
    workers = max(1, min(8, (os.cpu_count() or 1) - 2))
    how_many = f"processes that compile kernels first ({workers}); 0: this one compiles them"
    parser.add_argument("--workers", type=int, metavar="N", default=workers, help=how_many)
    parser.add_argument("--resume", metavar="N,FAULTS,SECONDS", default="0,0,0", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    resumed, faults, seconds_before = arguments.resume.split(",")
    resumed, faults, began = int(resumed), int(faults), began - float(seconds_before)
    on_gpu = device().type == "cuda"
    hasten()
    everything = all_cases(arguments.compile)
    chosen = [case for case in everything if case.small] if arguments.small or not on_gpu else everything

    def fits(case: Case) -> bool:
        return re.match(arguments.only, " ".join(case.name.split())) is not None

    chosen = [case for case in chosen if fits(case)]
    reasons = {case.name: reason for case in everything if (reason := obstacle(case, device()))}
    skipped = [case for case in everything if case.name in reasons and fits(case)]
    chosen = [case for case in chosen if case.name not in reasons]
    if not chosen and not skipped:
        parser.error(f"no case begins with {arguments.only!r}")

    where = environment.describe(device())
    if not resumed:
        print(f"{'GPU' if on_gpu else 'No GPU: a small part, interpreted, on'} {where['device']}")
        print(f"{len(chosen)} cases; error over tolerance against float64; time of one call")
    cases = chosen[resumed:]
    pool, futures = None, []
    if on_gpu and arguments.workers and not resumed:
        places = [everything.index(case) for case in cases]
        pool, futures = start_workers(arguments.workers, places, arguments.compile)
    ready = [prepared(case) for case in cases]
    if pool is not None:
        late = wait(futures, timeout=WARM_UP_SECONDS).not_done
        for worker in multiprocessing.active_children() if late else ():
            worker.kill()
        pool.shutdown(cancel_futures=True)
        failed = sum(future.done() and future.exception() is not None for future in futures)
        spent = f"{time.perf_counter() - began:.1f} s"
        print(f"compiled by {arguments.workers} processes: {spent}, {failed} failed, {len(late)} late", flush=True)
    for number, case in enumerate(cases, resumed + 1):
        line, wrong = check(case, ready[number - resumed - 1])
        ready[number - resumed - 1] = None  # its memory
        print(line, *(f"    {what}"[:WIDTH] for what in wrong), sep="\n", flush=True)
        faults += bool(wrong)
        if wrong and number < len(chosen) and gpu_is_lost():
            print("    the GPU is lost to this process: the rest runs in a new one", flush=True)
            given = list(sys.argv[1:] if argv is None else argv)
            given += ["--resume", f"{number},{faults},{time.perf_counter() - began}"]
            continue_in_a_new_process(given)
            return 1
    for case in skipped:
        print(f"{case.name} {'-':>8} {'-':>9} not run", f"    {reasons[case.name]}"[:WIDTH], sep="\n")
    commit, plus, changes = str(where["commit"]).partition("+")
    print(f"{where['device']}, torch {where['torch']}, Triton {where['triton']}, commit {commit[:9]}{plus}{changes}")
    left_out = f", {len(skipped)} not run" if skipped else ""
    print(f"{len(chosen)} cases, {faults or 'no'} faults{left_out}, {time.perf_counter() - began:.1f} s", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
