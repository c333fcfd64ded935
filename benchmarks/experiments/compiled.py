"""What the compiler makes of every candidate, for GPUs that need not be there; as `benchmarks.compile_report` does.

Instructions and exponentials per element: of the loops over whole tiles, and of all of a row, which is an upper bound.
The counter's and the cluster's programs hold what they read and have no such loop: theirs are those of the shortest way
through the whole program that loads and stores, once per row or not, over the elements of a row that a thread holds.
(Exponentials: of all ways.)
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
    _row_cost,
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
FIGURES = ("ex2_per_element", "instructions_per_element", "row_per_element")  # None: not found, or there is no loop


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
    try:
        if candidate.module in (counter, cluster):
            found = machine_code_of(launch, target)
            held = _held(candidate, launch, TARGETS[target].warp_size)
            found["ex2_per_element"] = found["ex2"] / held
            found["row_per_element"] = found["path"] and found["path"] / held
        elif candidate.module is interleaved:
            found = machine_code_of(launch, target)
            found |= _trade(found, V, DTYPES[dtype].itemsize, TARGETS[target].warp_size)
        else:
            found = compile_launch(launch, target)
    except Exception as error:  # whatever a compiler raises is a row, and the report goes on
        return row | {"failed": f"{type(error).__name__}: {first_line(error)}"}
    found.pop("loops", None)
    if cubins and candidate.module is cluster and target == "sm_90":
        save_cubin(candidate, V, dtype, cubins)
    return row | dict.fromkeys(FIGURES) | found


def _held(candidate: Candidate, launch: Launch, wave: int) -> float:
    """Elements of a row per thread, those of the last part or piece that are past its end left out."""
    a, threads = launch.arguments, launch.options["num_warps"] * wave
    if candidate.module is counter:
        return a["V"] / a["PARTS"] / threads
    return a["V"] / (launch.options["num_ctas"] * threads)


def _trade(found: dict, V: int, itemsize: int, wave: int) -> dict:
    """The figures of the loops that read one row and write another, so with two exponentials per entry and more."""
    trades = []
    for loop in found["loops"]:
        loop["elements"] = loop["wide_stores"] * 16 // itemsize
        if loop["elements"] and loop["ex2"] > 2 * loop["elements"]:
            trades.append(loop)
    if not trades:
        return {}
    tiles, *rest = sorted(trades, key=lambda loop: loop["instructions"] / loop["elements"])
    outside = found["instructions"] - sum(loop["instructions"] for loop in found["loops"])
    cost = _row_cost(V, found["num_warps"] * wave, {"trade": tiles}, {"trade": rest[0]} if rest else {}, outside)
    parts = (tiles["ex2"] / tiles["elements"], tiles["instructions"] / tiles["elements"], cost)
    return dict(zip(FIGURES, parts))


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
    "ins: exponentials and instructions per element, of the loops over whole tiles; row: instructions per element of "
    "all of a row, at most; prog: programs resident on a multiprocessor by registers. "
    "K: lines of 16 bytes per thread; w: warps of 32; r: registers at most; p: programs per multiprocessor; s: stages; "
    "c: programs of a cluster. !: spills, or more per element than an H200 has time for beside a copy."
)
TITLES = f"{'candidate':30}{'reg':>4}{'stk':>4}{'spl':>4}{'smem':>7}{'ld':>7}{'ex2':>5}{'ins':>6}{'row':>6}{'prog':>5}"


def hopeless(row: dict) -> bool:
    """Whether the machine code alone says that this comes nowhere near a copy."""
    if row["failed"]:
        return False
    over = [(row[f"{what}_per_element"] or 0.0) > most for what, most in zip(("row", "ex2"), BUDGET[row["dtype"]])]
    return bool(row["spills"] or row["stack"] or (any(over) and row["target"] == "sm_90"))


def line(row: dict) -> str:
    """At most 80 columns."""
    if row["failed"]:
        return f"{row['candidate']:30} {row['failed']}"[:80]
    per_element = "".join(
        f"{'-':>{width}}" if row[what] is None else f"{row[what]:{width}.{digits}f}"
        for what, width, digits in zip(FIGURES, (5, 6, 6), (2, 1, 1))
    )
    loads = f"{row['wide_loads']}/{row['loads']}"
    return (f"{row['candidate']:30}{row['registers']:4}{row['stack']:4}{row['spills']:4}{row['shared']:7}{loads:>7}"
            f"{per_element}{row['resident_programs']:5}{' !' if hopeless(row) else ''}")  # fmt: skip
