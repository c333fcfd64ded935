"""The loop over cases, modes and implementations: check, then measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import distillation
from benchmarks.baselines import Implementation
from benchmarks.budget import Budget
from benchmarks.cases import DTYPE_NAMES, Case, Inputs, make_inputs
from benchmarks.linear_data import LinearOracle, Products, make_linear_inputs
from benchmarks.measure import (
    Failed,
    Timed,
    Timing,
    do_bench_ms,
    first_line,
    free_memory,
    is_out_of_memory,
    peak_extra_bytes,
    time_all,
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
    hidden: int  # 0: logits are given
    dtype: str
    masked: float
    zero_advantage: float
    objective: str
    label: str
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
    host_ms: float | None = None  # median time until a call returned, the GPU held up meanwhile
    copy_ms: float | None = None  # median of a copy of the logits, in the same rounds
    copy_multiple: float | None = None  # median_ms / copy_ms
    gigabytes_per_second: float | None = None  # minimum_bytes over median_ms
    share_of_copy_bandwidth: float | None = None
    speedup_over_eager: float | None = None
    extra_bytes: int | None = None  # peak memory above the inputs, gradient included
    extra_per_logits: float | None = None  # the same as a multiple of logits_bytes
    products_ms: float | None = None  # mode "linear": median of the head's three products alone, in the same rounds
    products_multiple: float | None = None  # median_ms / products_ms
    beyond_gradients_bytes: int | None = None  # extra_bytes without the gradients of hidden states and weight
    do_bench_ms: float | None = None  # median by triton.testing.do_bench, where a case asks for it
    do_bench_copy_multiple: float | None = None  # the same as a multiple of a copy by the same timer


def run_suite(
    cases: Sequence[Case],
    modes: Sequence[str],
    implementations: Sequence[Implementation],
    device: torch.device,
    *,
    seconds: float | Budget,
    seed: int = 0,
) -> Iterator[list[Row]]:
    """Yields the rows of one case in one mode, as soon as they are there.

    Args:
        seconds: time budget per row, checks not counted; or the budget of the whole run.
    """
    budget = seconds if isinstance(seconds, Budget) else Budget(None, seconds)
    rows_left = sum(len(new_rows(c, m, implementations)) + 1 for c in cases for m in modes)
    for number, case in enumerate(cases, 1):
        blocks = {mode: rows for mode in modes if (rows := new_rows(case, mode, implementations))}
        absent = [missing(i, case, mode, device) for mode in blocks for i in implementations if offers(i, case, mode)]
        prepared, status, problem = None, OK, ""
        if all(absent):  # no data for nobody; each row has its own reason
            status = MISSING
        elif not budget.start_case():
            status, problem = MISSING, f"the run's {budget.seconds:.0f} s are spent; --minutes"
        else:
            prepared, status, problem = try_to_prepare(case, device, seed)
        for mode, rows in blocks.items():
            seconds_per_row = budget.for_a_row(rows_left, len(cases) - number)
            rows_left -= len(rows) + 1  # and the copy
            if prepared is not None and budget.spent:
                prepared, status, problem = None, MISSING, f"the run's {budget.seconds:.0f} s are spent; --minutes"
            if prepared is not None:
                rows = run_mode(*prepared, mode, implementations, device, seconds_per_row, budget)
            else:
                reasons = [missing(i, case, mode, device) for i in implementations if offers(i, case, mode)]
                for row, reason in zip(rows, reasons):
                    row.status, row.detail = (MISSING, reason) if reason else (status, problem)
            yield rows
        prepared = None  # before the next case allocates its own
        free_memory(device)


def offers(implementation: Implementation, case: Case, mode: str) -> bool:
    return mode in case.modes and mode in implementation.calls and case.objective in implementation.objectives


def missing(implementation: Implementation, case: Case, mode: str, device: torch.device) -> str | None:
    """Why it cannot run there, or None."""
    return (implementation.missing_linear if mode == "linear" else implementation.missing)(case, device)


def try_to_prepare(case: Case, device: torch.device, seed: int) -> tuple[tuple | None, str, str]:
    """(what `prepare` gives or None, status, why there is nothing): the run goes on without a case."""
    try:
        return prepare(case, device, seed), OK, ""
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if is_out_of_memory(error):
            return None, OOM, f"no room for logits, a copy and the float64 check: {reason}"
        return None, ERROR, f"no data: {reason}"


def new_rows(case: Case, mode: str, implementations: Sequence[Implementation]) -> list[Row]:
    return [new_row(case, mode, i.name) for i in implementations if offers(i, case, mode)]


def prepare(
    case: Case, device: torch.device, seed: int
) -> tuple[Inputs, Oracle, Tensor] | tuple[Inputs, LinearOracle, Products]:
    """Inputs, the truth about them, and a buffer as large as the logits that may be overwritten.

    With hidden states in its place the head's products alone.
    """
    inputs = inputs_of(case, device, seed)
    distils = case.objective == distillation.OBJECTIVE
    if case.hidden:
        oracle = distillation.LinearDistillationOracle if distils else LinearOracle
        return inputs, oracle(inputs), Products(inputs)
    oracle = distillation.DistillationOracle if distils else Oracle
    return inputs, oracle(inputs), torch.empty_like(inputs.logits)


def inputs_of(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    inputs = (make_linear_inputs if case.hidden else make_inputs)(case, device, seed)
    return distillation.with_teacher(inputs, seed) if case.objective == distillation.OBJECTIVE else inputs


def run_mode(
    inputs: Inputs,
    oracle: Oracle | LinearOracle,
    scratch: Tensor | Products,
    mode: str,
    implementations: Sequence[Implementation],
    device: torch.device,
    seconds: float,
    budget: Budget | None = None,
) -> list[Row]:
    """Rows of one case in one mode; `scratch` is the third of what `prepare` gives."""

    def refill() -> None:
        scratch.copy_(inputs.logits)

    rows: list[Row] = []
    yardstick = "products" if mode == "linear" else "copy"
    subjects: dict[str, Timed] = {yardstick: Timed(scratch if mode == "linear" else refill)}
    for implementation in implementations:
        if not offers(implementation, inputs.case, mode):
            continue
        row = new_row(inputs.case, mode, implementation.name)
        rows.append(row)
        if reason := missing(implementation, inputs.case, mode, device):
            row.status, row.detail = MISSING, reason
            continue
        subject = bind(implementation, mode, inputs, scratch, refill)
        if check(row, subject, oracle, device):
            subjects[implementation.name] = subject

    if len(subjects) == 1:
        return rows
    start = time.monotonic()
    try:
        timings = time_all(subjects, device, seconds)
    except Exception as error:  # whatever a peer raises is a row, and the run goes on
        timings = dict.fromkeys(subjects, Failed(ERROR, f"while timed, {type(error).__name__}: {first_line(error)}"))
    if budget is not None:
        budget.timed(time.monotonic() - start)
    yard = timings[yardstick]
    for row in rows:
        timing = timings.get(row.implementation)
        if timing is None:
            continue
        if isinstance(yard, Failed):
            timing = Failed(yard.status, f"{yardstick}, with everything allocated: {yard.reason}")
        if isinstance(timing, Failed):
            row.status, row.detail = timing
        else:
            fill(row, timing, yard)
    eager_ms = next((row.median_ms for row in rows if row.implementation.startswith("eager")), None)
    for row in rows:
        if eager_ms is not None and row.median_ms is not None:
            row.speedup_over_eager = eager_ms / row.median_ms
    if inputs.case.second_timer and mode == "loss":
        use_second_timer([row for row in rows if row.status == OK], subjects, device)
    return rows


def fill(row: Row, timing: Timing, yard: Timing) -> None:
    row.median_ms, row.p20_ms, row.p80_ms = timing.median, timing.p20, timing.p80
    row.repetitions, row.host_ms = timing.repetitions, timing.host
    if row.mode == "linear":
        row.products_ms, row.products_multiple = yard.median, timing.median / yard.median
        return
    row.copy_ms, row.copy_multiple = yard.median, timing.median / yard.median
    row.gigabytes_per_second = row.minimum_bytes / timing.median / 1e6
    row.share_of_copy_bandwidth = row.minimum_bytes / (2 * row.logits_bytes) / row.copy_multiple


def use_second_timer(rows: Sequence[Row], subjects: Mapping[str, Timed], device: torch.device) -> None:
    """Times once more by `triton.testing.do_bench`, in which others quote their kernels."""
    copy_ms = do_bench_ms(subjects["copy"].call, device)
    for row in rows:
        ms = do_bench_ms(subjects[row.implementation].call, device)
        if copy_ms is not None and ms is not None:
            row.do_bench_ms, row.do_bench_copy_multiple = ms, ms / copy_ms


def bind(implementation: Implementation, mode: str, inputs: Inputs, scratch: object, refill: Callable) -> Timed:
    call = implementation.calls[mode]
    if mode == "inplace":
        return Timed(lambda: call(inputs, scratch), prepare=refill)
    return Timed(lambda: call(inputs, inputs.logits))


def check(row: Row, subject: Timed, oracle: Oracle | LinearOracle, device: torch.device) -> bool:
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
        if row.mode == "linear":
            row.beyond_gradients_bytes = max(row.extra_bytes - oracle.inputs.case.gradient_bytes, 0)
    return True


def new_row(case: Case, mode: str, implementation: str) -> Row:
    return Row(
        case=case.name,
        model=case.model,
        batch=case.batch,
        length=case.length,
        vocab=case.vocab,
        hidden=case.hidden,
        dtype=DTYPE_NAMES[case.dtype],
        masked=case.masked,
        zero_advantage=case.zero_advantage,
        objective=case.objective,
        label=case.label,
        mode=mode,
        implementation=implementation,
        logits_bytes=case.logits_bytes,
        minimum_bytes=case.minimum_bytes(mode),
    )
