"""On a GPU: each candidate is checked against float64, then timed as a multiple of a copy of the logits.

The first case of a dtype goes through all launch parameters in place, and the best of each candidate out of place; the
other cases take the best alone. Candidates are timed in groups, each in the same rounds as a copy; what a group found
is written before the next one starts, so that it is not lost if that one takes the GPU down.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import environment, report
from benchmarks.baselines import Outcome
from benchmarks.cases import BF16, DTYPE_NAMES, EPSILON, FP32, GEMMA, GPT2, LLAMA, QWEN, Case, Inputs, make_inputs
from benchmarks.experiments.candidates import Candidate, candidates
from benchmarks.experiments.common import Job, make_job
from benchmarks.measure import Timed, first_line, free_memory, time_all
from benchmarks.oracle import Oracle
from benchmarks.suite import ERROR, MISSING, OK, OOM, WRONG, Budget

SECONDS = 0.4  # per row, at most, checks and compilation not counted


class PlainCase(Case):
    """Without a KL: the candidates have none."""

    beta = 0.0


CASES = (
    PlainCase(8, 1024, QWEN, BF16),
    PlainCase(8, 1024, QWEN, BF16, masked=0.5),
    PlainCase(8, 1024, LLAMA, BF16),
    PlainCase(8, 1024, QWEN, FP32),
    PlainCase(8, 1024, GEMMA, BF16),
    PlainCase(8, 1024, GPT2, BF16),
    PlainCase(8, 1024, LLAMA, FP32),
    PlainCase(8, 1024, QWEN, FP32, masked=0.5),
)


@dataclass
class Row:
    """One candidate on one case. Times are there only if `status` is "ok"."""

    case: str
    vocab: int
    dtype: str
    masked: float
    name: str
    candidate: str
    inplace: bool
    status: str = OK
    detail: str = ""
    error_over_tolerance: float | None = None  # of gradient and log-probs against float64; at most 1 passes
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repetitions: int | None = None
    copy_ms: float | None = None
    copy_multiple: float | None = None


class Bench:
    """One case: its data, its float64 truth, and a buffer as large as the logits that may be overwritten."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.inputs: Inputs = make_inputs(case, device, seed)
        self.oracle = Oracle(self.inputs)
        self.scratch: Tensor = torch.empty_like(self.inputs.logits)
        i = self.inputs
        self.job: Job = make_job(i.logits, i.completion_ids, i.mask, i.old_logps, i.advantages, EPSILON)

    def refill(self) -> None:
        self.scratch.copy_(self.inputs.logits)

    def subject(self, candidate: Candidate, inplace: bool) -> Timed:
        job = self.job._replace(logits=self.scratch) if inplace else self.job
        return Timed(lambda: candidate.launch(job, self.scratch), prepare=self.refill if inplace else None)

    def check(self, row: Row, candidate: Candidate) -> bool:
        """Whether it runs and is right; the row says what is wrong otherwise."""
        try:
            if why := self.scratch.is_cuda and candidate.unavailable(self.job):
                row.status, row.detail = MISSING, why
                return False
            self.refill() if row.inplace else self.scratch.fill_(float("nan"))
            logps = self.subject(candidate, row.inplace).call()
            errors = [
                self.oracle.check("loss", Outcome(loss=self.oracle.loss, grad=self.scratch)),
                self.oracle.check("logprobs", Outcome(logps=logps)),
            ]
        except Exception as error:  # whatever a candidate raises is a row, and the run goes on
            row.status, row.detail = ERROR, f"{type(error).__name__}: {first_line(error)}"
            return False
        worst = max(errors, key=lambda v: float("inf") if v.error != v.error else v.error)
        row.error_over_tolerance = worst.error
        if not worst.passed:
            row.status, row.detail = WRONG, f"{worst.what} off by {worst.error:.3g} times the tolerance"
        return worst.passed

    def run(self, which: Iterable[tuple[Candidate, bool]], budget: Budget) -> list[Row]:
        """A group: all are checked, then those that are right are timed."""
        rows, subjects = [], {"copy": Timed(self.refill)}
        case = self.inputs.case
        of_case = case.name, case.vocab, DTYPE_NAMES[case.dtype], case.masked
        for candidate, inplace in which:
            row = Row(*of_case, candidate.name, candidate.label, inplace)
            rows.append(row)
            if budget.spent:
                row.status, row.detail = MISSING, "no time left; --minutes"
            elif self.check(row, candidate):
                subjects[f"{candidate.label} {inplace}"] = self.subject(candidate, inplace)
        if len(subjects) == 1:
            return rows
        timings = time_all(subjects, self.scratch.device, budget.per_row)
        copy = timings["copy"]
        for row in rows:
            timing = timings.get(f"{row.candidate} {row.inplace}")
            if isinstance(timing, str) or isinstance(copy, str):
                row.status, row.detail = OOM, str(timing)
            elif timing is not None:
                row.median_ms, row.p20_ms, row.p80_ms = timing.median, timing.p20, timing.p80
                row.repetitions, row.copy_ms = timing.repetitions, copy.median
                row.copy_multiple = timing.median / copy.median
        return rows


def best(rows: Iterable[Row], dtype: str) -> list[str]:
    """The fastest setting of each candidate, fastest first; of all cases of this dtype the first that has any."""
    found: dict[str, Row] = {}
    timed = [row for row in rows if row.dtype == dtype and row.copy_multiple is not None]
    for row in sorted((r for r in timed if r.case == timed[0].case), key=lambda row: row.copy_multiple):
        found.setdefault(row.name, row)
    return [row.candidate for row in found.values()]


def measure(cases: Sequence[Case], names: Sequence[str], device: torch.device, budget: Budget, *, seed: int = 0,
            all_candidates=candidates):  # fmt: skip
    """Yields rows, group by group."""
    rows: list[Row] = []
    for case in cases:
        everyone = [each for each in all_candidates(case.dtype) if each.name in names]
        dtype = DTYPE_NAMES[case.dtype]
        if budget.spent:
            return
        bench = Bench(case, device, seed)
        first = not best(rows, dtype)
        if first:  # all settings, candidate by candidate
            for name in dict.fromkeys(each.name for each in everyone):
                group = [(each, True) for each in everyone if each.name == name]
                rows += (block := bench.run(group, budget))
                yield block
        chosen = [each for label in best(rows, dtype) for each in everyone if each.label == label]
        if group := [(each, inplace) for each in chosen for inplace in ((False,) if first else (True, False))]:
            rows += (block := bench.run(group, budget))
            yield block
        bench = None  # before the next case allocates its own
        free_memory(device)


LEGEND = (
    "x copy: time as a multiple of a copy of the logits, measured in the same rounds; ms: median. Times only of what "
    "was right against float64. K: lines of 16 bytes per thread; w: warps of 32; r: registers at most; p: programs per "
    "multiprocessor; s: stages; c: programs of a cluster."
)


def table(rows: Sequence[Row]) -> str:
    """Case by case, the fastest first, what has no time last."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case]
        copies = [row.copy_ms for row in mine if row.copy_ms is not None]
        lines += ["", f"{case}: copy {min(copies):.3f} ms" if copies else case]
        lines.append(f"  {'':33}{'in place':>9}{'ms':>9}{'p20-p80':>16}{'x copy':>9}")
        lines += map(line, sorted(mine, key=lambda row: row.copy_multiple or float("inf")))
    return "\n".join(lines)


def line(row: Row) -> str:
    start = f"  {row.candidate:33}{'yes' if row.inplace else 'no':>9}"
    if row.copy_multiple is None:
        return report.shorten(f"{start}  {row.status}: {row.detail}", 80)
    spread = f"{row.p20_ms:.3f}-{row.p80_ms:.3f}"
    return f"{start}{row.median_ms:9.3f}{spread:>16}{row.copy_multiple:9.3f}"


def main(arguments: argparse.Namespace) -> int:
    device = torch.device("cuda")
    where = environment.describe(device) | {"seed": arguments.seed}
    print(report.header(where), flush=True)
    budget = Budget(60 * arguments.minutes, SECONDS)
    cases = [case for case in CASES if DTYPE_NAMES[case.dtype] in arguments.dtype]
    rows: list[Row] = []
    for block in measure(cases, arguments.only, device, budget, seed=arguments.seed):
        rows += block
        names = ", ".join(dict.fromkeys(row.name for row in block))
        print(f"[{budget.used:.0f} s] {block[0].case}: {names}", flush=True)
        if arguments.out:
            report.write(arguments.out, where, rows)
    print("\n" + textwrap.fill(LEGEND, 80) + "\n" + table(rows), flush=True)
    return int(any(row.status in (WRONG, ERROR) for row in rows))
