"""What the compiler makes of every candidate, for GPUs that need not be there; as `benchmarks.compile_report` does.

Instructions and exponentials per element: of the loops over a row where there are any. The counter's and the cluster's
programs hold what they read and have no such loop: theirs are those of the shortest way through the whole program that
loads and stores, once per row or not, over the elements of a row that a thread holds. (Exponentials: of all ways.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks.compile_report import (
    DTYPES,
    TARGETS,
    Launch,
    Recorder,
    compile_launch,
    compiled_for,
    machine_code_of,
    recording,
    signature,
)
from benchmarks.experiments import cluster, counter, interleaved, precompiled, present
from benchmarks.experiments.candidates import Candidate, candidates
from benchmarks.experiments.common import make_job
from benchmarks.measure import first_line

# On an H200 at 1.755 GHz, beside a copy at 4.3 TB/s: see docs/performance.md.
BUDGET = {"bf16": (27.6, 3.4), "fp32": (55.2, 6.9)}  # instructions and exponentials per element


def record(candidate: Candidate, V: int, dtype: str, wave: int) -> Launch:
    """What the candidate launches on a GPU."""
    launches: list[Launch] = []
    B, T = 2, 2
    logits = torch.zeros(B, T, V, dtype=DTYPES[dtype])
    ids, token = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T)
    job = make_job(logits, ids, token, token, torch.zeros(B), epsilon=0.2)
    with contextlib.ExitStack() as patches:
        if candidate.module is present:
            patches.enter_context(recording(launches, dtype, wave))
        else:
            name = f"{candidate.name}_kernel"
            recorder = Recorder(getattr(candidate.module, name), launches, dtype)
            patches.enter_context(mock.patch.object(candidate.module, name, recorder))
        more = {"together": True} if candidate.module is counter else {}
        candidate.launch(job, logits, wave=wave, **more)
    return launches[0]


def save_cubin(candidate: Candidate, V: int, dtype: str, folder: Path) -> None:
    """Of a cluster, for sm_90."""
    launch = record(candidate, V, dtype, 32)
    path = precompiled.path_of(folder, V, DTYPES[dtype], candidate.setting)
    precompiled.save(path, compiled_for(launch, "sm_90"), signature(launch)[0])


def compile_candidate(candidate: Candidate, V: int, dtype: str, target: str, cubins: Path | None = None) -> dict:
    """A flat dict of what was found, or of why there is nothing: "failed"."""
    row = {"candidate": candidate.label, "V": V, "dtype": dtype, "target": target, "failed": ""}
    if candidate.module is cluster:
        if target not in ("sm_90", "sm_100"):
            return row | {"failed": "no clusters there"}
        if why := cluster.too_old():
            return row | {"failed": why}
    launch = record(candidate, V, dtype, TARGETS[target].warp_size)
    itemsize = DTYPES[dtype].itemsize
    try:
        if candidate.module in (counter, cluster):
            found = machine_code_of(launch, target)
            held = _held(candidate, launch, TARGETS[target].warp_size)
            part = {"elements": held, "ex2": found["ex2"], "instructions": found["path"]}
        elif candidate.module is interleaved:
            found = machine_code_of(launch, target)
            part = _trade(found["loops"], itemsize)
        else:
            found = compile_launch(launch, target)
            part = {"elements": 1, "ex2": found["ex2_per_element"], "instructions": found["instructions_per_element"]}
    except Exception as error:  # whatever a compiler raises is a row, and the report goes on
        return row | {"failed": f"{type(error).__name__}: {first_line(error)}"}
    found.pop("loops", None)
    if cubins and candidate.module is cluster and target == "sm_90":
        save_cubin(candidate, V, dtype, cubins)
    for what in ("ex2", "instructions"):
        row[f"{what}_per_element"] = None if part is None or part[what] is None else part[what] / part["elements"]
    return row | found


def _held(candidate: Candidate, launch: Launch, wave: int) -> float:
    """Elements of a row per thread, those of the last part or piece that are past its end left out."""
    a, threads = launch.arguments, launch.options["num_warps"] * wave
    if candidate.module is counter:
        return a["V"] / a["PARTS"] / threads
    return a["V"] / (launch.options["num_ctas"] * threads)


def _trade(loops: list[dict], itemsize: int) -> dict | None:
    """The loop that reads one row and writes another: of those that store, the one with most exponentials."""
    storing = [loop for loop in loops if loop["stores"] and loop["ex2"]]
    if not storing:
        return None
    elements = lambda loop: loop["loaded"] / itemsize / 2 or loop["wide_stores"] * 16 / itemsize  # noqa: E731
    loop = max(storing, key=lambda loop: loop["ex2"] / max(elements(loop), 1))
    return loop | {"elements": elements(loop)} if elements(loop) else None


def report(
    vocabularies: list[int], dtypes: list[str], targets: list[str], names: list[str], cubins: Path | None = None
) -> Iterator[dict]:
    for target in targets:
        for V in vocabularies:
            for dtype in dtypes:
                for candidate in candidates(DTYPES[dtype]):
                    if candidate.name in names:
                        yield compile_candidate(candidate, V, dtype, target, cubins)


LEGEND = (
    "reg: registers per thread; stk: stack, bytes; spl: spills; smem: shared memory, bytes; ld: wide/all loads; ex2, "
    "ins: exponentials and instructions per element; prog: programs resident on a multiprocessor by registers. "
    "K: lines of 16 bytes per thread; w: warps of 32; r: registers at most; p: programs per multiprocessor; s: stages; "
    "c: programs of a cluster. !: spills, or more per element than an H200 has time for beside a copy."
)
TITLES = f"{'candidate':33}{'reg':>4}{'stk':>4}{'spl':>4}{'smem':>7}{'ld':>7}{'ex2':>6}{'ins':>6}{'prog':>5}"


def hopeless(row: dict) -> bool:
    """Whether the machine code alone says that this comes nowhere near a copy."""
    if row["failed"]:
        return False
    over = [(row[f"{what}_per_element"] or 0.0) > most
            for what, most in zip(("instructions", "ex2"), BUDGET[row["dtype"]])]  # fmt: skip
    return bool(row["spills"] or row["stack"] or (any(over) and row["target"] == "sm_90"))


def line(row: dict) -> str:
    """At most 80 columns."""
    if row["failed"]:
        return f"{row['candidate']:33} {row['failed']}"[:80]
    per_element = "".join(
        f"{'-':>6}" if row[f"{what}_per_element"] is None else f"{row[f'{what}_per_element']:6.{digits}f}"
        for what, digits in (("ex2", 2), ("instructions", 1))
    )
    loads = f"{row['wide_loads']}/{row['loads']}"
    return (f"{row['candidate']:33}{row['registers']:4}{row['stack']:4}{row['spills']:4}{row['shared']:7}{loads:>7}"
            f"{per_element}{row['resident_programs']:5}{' !' if hopeless(row) else ''}")  # fmt: skip
