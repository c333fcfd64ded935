"""The ways of a loss's rows through the chip, side by side in one process: `python -m benchmarks.kernels`.

Each is checked against float64 before it is timed; times are multiples of a copy of the logits in the same rounds. On a
GPU worker processes compile the kernels first. Without one, tiny shapes run in Triton's interpreter, and the on-chip
kernel does not run. `--record` makes the table by which GRPO_KERNELS_ROWS=auto chooses of what such runs have written.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

# Before grpo_kernels is imported: its kernels are compiled on a GPU, and interpreted without one.
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks import counters, environment
from benchmarks.baselines import Implementation, ModelOutput, Outcome
from benchmarks.cases import BF16, FP32, GEMMA, HALF_MASKED, LLAMA, LLAMA2, MODELS, QWEN, Case, Inputs, make_inputs
from benchmarks.interpreter import hasten
from benchmarks.measure import first_line, free_memory
from benchmarks.suite import OK, Row, run_mode, try_to_prepare
from grpo_kernels import fused_grpo_loss
from grpo_kernels.triton_backend import ways

CASES = tuple(
    Case(8, 1024, V, dtype, model=MODELS[V], **what)
    for V, dtype, what in (
        *((V, BF16, {}) for V in (QWEN, LLAMA, LLAMA2)),
        (QWEN, BF16, HALF_MASKED),
        (GEMMA, BF16, {}),
        (QWEN, FP32, {}),
    )
)
TINY = (Case(2, 4, 512, FP32), Case(2, 4, 512, FP32, masked=0.5))
TABLE = Path(ways.__file__).with_name("onchip_record.py")
RESULTS = Path(__file__).parent / "results"
SECONDS, WARM_UP_SECONDS = 1.0, 60
# Other shapes of the on-chip kernel, as `_shape` of onchip_launch takes them; of long rows and of short ones.
VARIANTS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "onchip lag 2": ({"lag": 2}, {"lag": 1}),
    "onchip lag 4": ({"lag": 4}, {"lag": 3}),
    "onchip lines 2": ({"slots": 14, "lines": 2, "lag": 4}, {"slots": 3, "lines": 4}),
    "onchip no tickets": ({"tickets": False}, {"tickets": False}),
    # Of rows longer than a multiprocessor holds.
    "onchip long 4x1": ({"slots": 7, "lines": 4, "lag": 3, "width": 1, "held": 4}, {}),
    "onchip long 4x2": ({"slots": 7, "lines": 4, "lag": 3, "width": 2, "held": 2}, {}),
    "onchip long 2x2": ({"slots": 14, "lines": 2, "lag": 4, "width": 2, "held": 2}, {}),
    "onchip long 2x1": ({"slots": 14, "lines": 2, "lag": 4, "width": 1, "held": 1}, {}),
    "onchip wide": ({"slots": 7, "lines": 2, "warps": 32, "registers": 64}, {"programs": 4, "registers": 64}),
}
DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
FIELDS = (
    "device", "capability", "torch", "triton", "commit", "vocab", "dtype", "rows", "masked", "mode", "crowded",
    "implementation", "status", "detail", "error_over_tolerance", "median_ms", "p20_ms", "p80_ms", "repetitions",
    "host_ms", "copy_ms", "copy_multiple",
)  # fmt: skip


@contextmanager
def way(name: str) -> Iterator[None]:
    """GRPO_KERNELS_ROWS, and the on-chip kernel's shape where the name is that of a variant."""
    saved = os.environ.get(ways.VARIABLE)
    os.environ[ways.VARIABLE] = name.split()[0]
    restore = _reshape(*VARIANTS[name]) if name in VARIANTS else lambda: None
    try:
        yield
    finally:
        restore()
        os.environ.pop(ways.VARIABLE)
        if saved is not None:
            os.environ[ways.VARIABLE] = saved


def _reshape(long: dict[str, int], short: dict[str, int]):
    from grpo_kernels.triton_backend import onchip_launch as module

    shape_of = module._shape

    def reshaped(V: int, **given: int) -> dict[str, int]:
        return shape_of(V, **given | (short if given["programs"] > 1 else long))

    module._shape = reshaped
    return lambda: setattr(module, "_shape", shape_of)


def more_inputs(inputs: Inputs, crowded: int) -> dict:
    """What makes a call so ``crowded``, see `shapes.crowded`, and leaves its loss and its gradient as they are."""
    ones = torch.ones_like(inputs.old_logps)
    numbers = {"importance_weights": ones, "temperature": ones} if crowded == 2 else {}
    return numbers | ({"return_entropy": True} if crowded else {})


def implementation(name: str, crowded: int = 0) -> Implementation:
    def loss(inputs: Inputs, x: torch.Tensor, inplace: bool) -> Outcome:
        with way(name):
            given = inputs.objective() | more_inputs(inputs, crowded)
            out = fused_grpo_loss(x, inputs.completion_ids, **given, inplace=inplace, backend="triton").loss
            return Outcome(out.detach(), torch.autograd.grad(out, x)[0])

    def apart(inputs: Inputs, logits: torch.Tensor) -> Outcome:
        return loss(inputs, logits.detach().requires_grad_(), inplace=False)

    def in_place(inputs: Inputs, logits: torch.Tensor) -> Outcome:
        return loss(inputs, ModelOutput.apply(torch.zeros((), requires_grad=True), logits), inplace=True)

    def missing(case: Case, device: torch.device) -> str | None:
        return None if name == "triton" else ways.device_obstacle(torch.empty(0, device=device))

    return Implementation(name, {"loss": apart, "inplace": in_place}, missing)


def compile_kernels(case: Case, name: str, crowded: int) -> str | None:
    """In a worker process: what the case launches is in Triton's cache afterwards. Returns what went wrong."""
    hasten()
    device = torch.device("cuda")
    try:
        inputs = make_inputs(replace(case, batch=2, length=16), device)
        implementation(name, crowded).calls["inplace"](inputs, inputs.logits.clone())
        torch.cuda.synchronize()
    except Exception as error:  # the run itself will meet it again
        return f"{case.name}, {name}: {type(error).__name__}: {first_line(error)}"
    return None


def warm_up(cases: Sequence[Case], names: Sequence[str], levels: Sequence[int], workers: int) -> str:
    start = time.monotonic()
    kinds = list({case.vocab: case for case in cases}.values())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    todo = itertools.product(kinds, names, levels)
    futures = [pool.submit(compile_kernels, *each) for each in todo]
    done, late = wait(futures, timeout=WARM_UP_SECONDS)
    for worker in multiprocessing.active_children() if late else ():
        worker.kill()
    pool.shutdown(cancel_futures=True)
    problems = [str(future.exception() or future.result()) for future in done if future.exception() or future.result()]
    spent = f"{time.monotonic() - start:.0f} s, {len(problems)} failed, {len(late)} late"
    return "\n".join([f"{len(futures)} kernels compiled by {workers} processes: {spent}", *problems])


def measure(
    cases: Sequence[Case], names: Sequence[str], levels: Sequence[int], device: torch.device, seconds: float
) -> Iterator[tuple[int, list[Row]]]:
    """Of one case in one mode, as soon as they are there: how crowded its calls are (`shapes.crowded`), the rows."""
    for case in cases:
        prepared, status, problem = try_to_prepare(case, device, 0)
        if prepared is None:
            print(f"{case.name}: {status}: {problem}", flush=True)
            continue
        for mode, crowded in itertools.product(("inplace", "loss"), levels):
            who = [implementation(name, crowded) for name in names]
            yield crowded, run_mode(*prepared, mode, who, device, seconds)
        prepared = None
        free_memory(device)


def line(row: Row, crowded: int) -> str:
    what = f"{row.vocab:>7} {'half masked' if row.masked else '':11} {'in place' if row.mode == 'inplace' else '':8}"
    what += ("", " entropies ", " all inputs")[crowded]
    if row.status != OK:
        return f"{what} {row.implementation:15} {row.status}: {row.detail}"
    return (
        f"{what} {row.implementation:15} {row.copy_multiple:6.3f} x copy  {row.median_ms:8.3f} ms "
        f"{row.p20_ms:.3f}-{row.p80_ms:.3f}  host {row.host_ms:.2f}  error {row.error_over_tolerance:.2f}"
    )


def write(out: Path, where: dict, device: torch.device, blocks: Iterable[tuple[int, list[Row]]]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else ""
    path = out / "kernels.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for crowded, rows in blocks:
            for row in rows:
                own = {"capability": capability, "rows": row.batch * row.length, "crowded": crowded, **vars(row)}
                writer.writerow({**{name: where.get(name) for name in FIELDS}, **own})
    return path


def table_of(records: Sequence[Path]) -> str:
    """The text of onchip_record.py: where the on-chip kernel was right and faster in every record, in both modes.

    The times are those of the last record that has them.
    """
    found: dict[tuple, dict[Path, dict[tuple[str, str], float]]] = {}
    for record in sorted(records):
        with record.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["masked"] != "0.0" or row["implementation"] not in ("triton", "onchip"):
                    continue
                dtype, crowded = DTYPE_NAMES.get(row["dtype"], row["dtype"]), int(row.get("crowded") or 0)
                key = (int(row["vocab"]), dtype, row["capability"], crowded)
                multiple = float(row["copy_multiple"]) if row["status"] == OK else float("inf")
                found.setdefault(key, {}).setdefault(record, {})[row["implementation"], row["mode"]] = multiple
    lines = []
    for (V, dtype, capability, crowded), times in sorted(found.items()):
        pairs = [
            [each.get((name, mode), float("inf")) for name in ("triton", "onchip")]
            for each in times.values()
            for mode in ("loss", "inplace")
        ]
        if capability and all(onchip < triton < float("inf") for triton, onchip in pairs):
            place = tuple(map(int, capability.split(".")))
            lines.append(f'    ({V}, "{dtype}", {place}, {crowded}): ({pairs[-1][0]:.3f}, {pairs[-1][1]:.3f}),\n')
    start = TABLE.read_text(encoding="utf-8").split("FASTER", 1)[0]
    body = "{\n" + "".join(lines) + "}" if lines else "{}"
    return f"{start}FASTER: dict[tuple[int, str, tuple[int, int], int], tuple[float, float]] = {body}\n"


def records() -> list[Path]:
    return sorted(RESULTS.glob("*/kernels.csv"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/kernels.csv")
    parser.add_argument("--variants", nargs="?", const="", metavar="REGEX", help="other on-chip shapes, too")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches, as '262144|fp32'")
    levels = "0: the usual call; 1: with entropies; 2: with all numbers per row, too"
    parser.add_argument("--crowded", type=int, choices=(0, 1, 2), nargs="+", default=[0], help=levels)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each row of the table")
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    parser.add_argument("--workers", type=int, default=workers, help=f"processes that compile first ({workers})")
    parser.add_argument("--ncu", action="store_true", help="then count each launch's DRAM bytes by Nsight Compute")
    parser.add_argument("--record", action="store_true", help="from results/*/kernels.csv; measures nothing")
    arguments = parser.parse_args(argv)
    if arguments.record:
        TABLE.write_text(table_of(records()), encoding="utf-8")
        return 0
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hasten()
    cases = [case for case in (CASES if device.type == "cuda" else TINY) if re.search(arguments.only, case.name)]
    chosen = [] if arguments.variants is None else [name for name in VARIANTS if re.search(arguments.variants, name)]
    names = ["triton", "onchip", *chosen]
    where = environment.describe(device)
    print(f"{where['device']}, torch {where['torch']}, Triton {where['triton']}, commit {where['commit']}", flush=True)
    if device.type == "cuda" and arguments.workers:
        print(warm_up(cases, names, arguments.crowded, arguments.workers), flush=True)
    blocks = []
    for crowded, rows in measure(cases, names, arguments.crowded, device, arguments.seconds):
        blocks.append((crowded, rows))
        print("\n".join(line(row, crowded) for row in rows), flush=True)
        if arguments.out:
            write(arguments.out, where, device, blocks)
    if arguments.ncu:
        for each in counters.report(cases, names[:2]):
            print(each, flush=True)
    wrong = [row for _, rows in blocks for row in rows if row.status not in (OK, "not run")]
    print(f"{time.monotonic() - start:.0f} s")
    return int(bool(wrong) or not blocks)


if __name__ == "__main__":
    sys.exit(main())
