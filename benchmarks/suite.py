"""The loop over cases, modes and implementations: check, then measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines import Implementation
from benchmarks.cases import DTYPE_NAMES, Case, Inputs, make_inputs
from benchmarks.measure import (
    Timed,
    first_line,
    free_memory,
    is_out_of_memory,
    peak_extra_bytes,
    time_all,
    unless_out_of_memory,
)
from benchmarks.oracle import Oracle

# Row.status
OK, WRONG, OOM, MISSING, ERROR = "ok", "wrong result", "out of memory", "not run", "error"


@dataclass
class Row:
    """One implementation on one case in one mode. Times are there only if `status` is "ok"."""

    case: str
    model: str
    batch: int
    length: int
    vocab: int
    dtype: str
    masked: float
    mode: str
    implementation: str
    logits_bytes: int
    minimum_bytes: int  # that must be moved: see Case.minimum_bytes
    status: str = OK
    detail: str = ""  # why, if the status is not "ok"
    error_over_tolerance: float | None = None  # against float64; at most 1 passes
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repetitions: int | None = None
    copy_ms: float | None = None  # median of a copy of the logits, in the same rounds
    copy_multiple: float | None = None  # median_ms / copy_ms
    gigabytes_per_second: float | None = None  # minimum_bytes over median_ms
    share_of_copy_bandwidth: float | None = None
    speedup_over_eager: float | None = None
    extra_bytes: int | None = None  # peak memory above the inputs, gradient included
    extra_per_logits: float | None = None  # the same as a multiple of logits_bytes


def run_suite(
    cases: Iterable[Case],
    modes: Sequence[str],
    implementations: Sequence[Implementation],
    device: torch.device,
    *,
    seconds: float,
    seed: int = 0,
) -> Iterator[list[Row]]:
    """Yields the rows of one case in one mode, as soon as they are there.

    Args:
        seconds: time budget per row, checks not counted.
    """
    for case in cases:
        prepared, problem = unless_out_of_memory(lambda case=case: prepare(case, device, seed))
        for mode in modes:
            if problem is None:
                rows = run_mode(*prepared, mode, implementations, device, seconds)
            else:
                rows = [new_row(case, mode, i.name) for i in implementations if mode in i.calls]
                for row in rows:
                    row.status, row.detail = OOM, f"no room for logits, a copy and the float64 check: {problem}"
            if rows:
                yield rows
        prepared = None  # before the next case allocates its own
        free_memory(device)


def prepare(case: Case, device: torch.device, seed: int) -> tuple[Inputs, Oracle, Tensor]:
    """Inputs, the truth about them, and a buffer as large as the logits that may be overwritten."""
    inputs = make_inputs(case, device, seed)
    return inputs, Oracle(inputs), torch.empty_like(inputs.logits)


def run_mode(
    inputs: Inputs,
    oracle: Oracle,
    scratch: Tensor,
    mode: str,
    implementations: Sequence[Implementation],
    device: torch.device,
    seconds: float,
) -> list[Row]:
    """Rows of one case in one mode; `scratch` is the buffer that may be overwritten."""

    def refill() -> None:
        scratch.copy_(inputs.logits)

    rows: list[Row] = []
    subjects: dict[str, Timed] = {"copy": Timed(refill)}
    for implementation in implementations:
        if mode not in implementation.calls:
            continue
        row = new_row(inputs.case, mode, implementation.name)
        rows.append(row)
        if reason := implementation.missing(device):
            row.status, row.detail = MISSING, reason
            continue
        subject = bind(implementation, mode, inputs, scratch, refill)
        if check(row, subject, oracle, device):
            subjects[implementation.name] = subject

    if len(subjects) == 1:
        return rows
    timings = time_all(subjects, device, seconds)
    copy = timings["copy"]
    if isinstance(copy, str):
        raise RuntimeError(f"a copy between two allocated buffers ran out of memory: {copy}")
    for row in rows:
        timing = timings.get(row.implementation)
        if isinstance(timing, str):
            row.status, row.detail = OOM, timing
        elif timing is not None:
            row.median_ms, row.p20_ms, row.p80_ms = timing.median, timing.p20, timing.p80
            row.repetitions = timing.repetitions
            row.copy_ms, row.copy_multiple = copy.median, timing.median / copy.median
            row.gigabytes_per_second = row.minimum_bytes / timing.median / 1e6
            row.share_of_copy_bandwidth = row.minimum_bytes / (2 * row.logits_bytes) / row.copy_multiple
    eager_ms = next((row.median_ms for row in rows if row.implementation.startswith("eager")), None)
    for row in rows:
        if eager_ms is not None and row.median_ms is not None:
            row.speedup_over_eager = eager_ms / row.median_ms
    return rows


def bind(implementation: Implementation, mode: str, inputs: Inputs, scratch: Tensor, refill: Callable) -> Timed:
    call = implementation.calls[mode]
    if mode == "inplace":
        return Timed(lambda: call(inputs, scratch), prepare=refill)
    return Timed(lambda: call(inputs, inputs.logits))


def check(row: Row, subject: Timed, oracle: Oracle, device: torch.device) -> bool:
    """Compares one call with the truth and measures the memory of another. False: no speed for this row."""
    try:
        if subject.prepare is not None:
            subject.prepare()
        verdict = oracle.check(row.mode, subject.call())
        row.error_over_tolerance = verdict.error
        if not verdict.passed:
            row.status, row.detail = WRONG, f"{verdict.what} off by {verdict.error:.3g} times the tolerance"
            return False
        if subject.prepare is not None:
            subject.prepare()
        row.extra_bytes = peak_extra_bytes(subject.call, device)
    except Exception as error:  # whatever a peer raises is a row, and the run goes on
        row.status = OOM if is_out_of_memory(error) else ERROR
        row.detail = f"{type(error).__name__}: {first_line(error)}"
    if row.status != OK:
        free_memory(device)  # here, where the exception no longer holds the tensors
        return False
    if row.extra_bytes is not None:
        row.extra_per_logits = row.extra_bytes / row.logits_bytes
    return True


def new_row(case: Case, mode: str, implementation: str) -> Row:
    return Row(
        case=case.name,
        model=case.model,
        batch=case.batch,
        length=case.length,
        vocab=case.vocab,
        dtype=DTYPE_NAMES[case.dtype],
        masked=case.masked,
        mode=mode,
        implementation=implementation,
        logits_bytes=case.logits_bytes,
        minimum_bytes=case.minimum_bytes(mode),
    )
