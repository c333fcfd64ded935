"""Time and memory of a call, on a CUDA device or on the CPU."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
HOLD_CYCLES, MOST_CYCLES = 4_000_000, 256_000_000  # about 2 and 130 ms: the host's time for the calls of a round
SHORT_MS, CALLS_PER_ROUND = 8.0, 4  # what is longer is called once a round


@dataclass(frozen=True)
class Timed:
    call: Callable[[], object]
    prepare: Callable[[], object] | None = None  # before every call, its time not counted


@dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    median: float
    p20: float
    p80: float
    repetitions: int
    host: float  # median time until the call returned; on a CPU that is all of its time


class Round(NamedTuple):
    """One subject's calls in one round."""

    ms: list[float]
    host_ms: list[float]
    late: bool = False  # the GPU began before the host had queued all: `ms` may be the host's


class Failed(NamedTuple):
    """Why a subject has no time."""

    status: str
    reason: str


def time_all(
    subjects: Mapping[str, Timed], device: torch.device, seconds: float, *, min_rounds: int = 5, max_rounds: int = 200
) -> dict[str, Timing | Failed]:
    """Median, 20th and 80th percentile of each subject's time.

    The subjects take turns, so that whatever disturbs the machine disturbs all of them. A subject that
    runs out of memory drops out and gets the allocator's message instead of a time. A short one is called
    several times in a round. On a GPU a round in which the host was late is not counted, and the subject's next
    rounds hold the GPU up for four times as long, up to `MOST_CYCLES`.

    Args:
        subjects: name → what to time.
        seconds: time budget per subject; at least `min_rounds` rounds are made however long they take.
    """
    measure = _cuda_round if device.type == "cuda" else _cpu_round
    calls, hold = dict.fromkeys(subjects, 1), dict.fromkeys(subjects, HOLD_CYCLES)
    rounds: dict[str, list[Round]] = {name: [] for name in subjects}
    failed: dict[str, Failed] = {}
    deadline = float("inf")
    for round_ in range(-1, max_rounds):  # round −1 warms up: compilation, allocator, page faults
        for name, subject in subjects.items():
            if name in failed:
                continue
            found, problem = unless_out_of_memory(
                lambda s=subject, n=calls[name], cycles=hold[name]: measure(s, device, n, cycles)
            )
            if problem is not None:
                failed[name] = Failed("out of memory", problem)
            elif round_ < 0:
                if device.type == "cuda" and found.ms[0] < SHORT_MS:
                    calls[name] = CALLS_PER_ROUND
            elif found.late and hold[name] < MOST_CYCLES:
                hold[name] *= 4
            else:
                rounds[name].append(found)
        done = min(len(rounds[name]) for name in subjects if name not in failed) if len(failed) < len(subjects) else 0
        if round_ < 0:
            deadline = time.perf_counter() + seconds * len(subjects)
        elif done >= min_rounds and time.perf_counter() > deadline:
            break
    return {name: failed[name] if name in failed else _summary(rounds[name]) for name in subjects}


def _cuda_round(subject: Timed, device: torch.device, calls: int, cycles: int) -> Round:
    """The GPU's time, as of a call in the middle of a training step.

    The GPU is held up while the calls are queued, so that a short one is not charged for its launch, and
    reads a buffer larger than its L2 cache before each, so that none finds there what another left.
    """
    events, host_ms = [], []
    torch.cuda._sleep(cycles)
    held = torch.cuda.Event(enable_timing=True)
    held.record()
    for _ in range(calls):
        if subject.prepare is not None:
            subject.prepare()
        _sweep_l2(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        subject.call()
        host_ms.append((time.perf_counter() - began) * 1e3)
        end.record()
        events.append((start, end))
    late = held.query()
    torch.cuda.synchronize(device)
    return Round([start.elapsed_time(end) for start, end in events], host_ms, late)


def _sweep_l2(device: torch.device) -> None:
    """By reading: written lines would have to leave the cache during the call."""
    _l2_buffer(device).sum()


@lru_cache(maxsize=1)
def _l2_buffer(device: torch.device) -> torch.Tensor:
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.zeros(2 * l2 // 4, device=device)


def _cpu_round(subject: Timed, device: torch.device, calls: int, cycles: int) -> Round:
    times = []
    for _ in range(calls):
        if subject.prepare is not None:
            subject.prepare()
        start = time.perf_counter()
        subject.call()
        times.append((time.perf_counter() - start) * 1e3)
    return Round(times, times)


def do_bench_ms(call: Callable[[], object], device: torch.device) -> float | None:
    """The median by Triton's own timer, whose numbers others quote; None off a GPU, or if memory runs out.

    It clears L2 by writing, and does not hold the GPU up while calls are queued.
    """
    if device.type != "cuda":
        return None
    from triton.testing import do_bench

    return unless_out_of_memory(lambda: do_bench(call, warmup=10, rep=60, return_mode="median"))[0]


def _summary(rounds: Sequence[Round]) -> Timing:
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    times = [ms for each in rounds for ms in each.ms]
    p20, median, p80 = torch.tensor(times, dtype=torch.float64).quantile(at).tolist()
    return Timing(median, p20, p80, len(times), statistics.median(ms for each in rounds for ms in each.host_ms))


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """How far memory rises above its level before the call, the call's result included.

    On CUDA: memory that tensors held. On the CPU: resident memory, read from /proc; None without it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back_freed_memory()
    before = _reset_resident_peak()
    call()
    after = _resident_peak()
    return None if before is None or after is None else max(after - before, 0)


def _give_back_freed_memory() -> None:
    """What malloc keeps for later would hide what the call allocates."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc has it
    if trim is not None:
        trim(0)


def _reset_resident_peak() -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    except OSError:
        return None
    return _resident_peak()


def _resident_peak() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def unless_out_of_memory(function: Callable[[], T]) -> tuple[T | None, str | None]:
    """(result, None), or (None, message) if memory ran out. The exception is not kept: its frames would
    hold on to the tensors that filled the memory."""
    try:
        return function(), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, first_line(error)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
