"""DRAM bytes of one launch, counted by Nsight Compute, over the bytes of the logits: `benchmarks.kernels --ncu`.

ncu runs this module in a process of its own, one launch each: `python -m benchmarks.counters WAY VOCAB DTYPE`.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

from benchmarks.cases import DTYPE_NAMES, Case

COUNTERS = {"read": "dram__bytes_read.sum", "written": "dram__bytes_write.sum"}
KERNELS = "regex:^(loss_kernel|onchip_kernel)"
UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
SECONDS = 120


def command(ncu: str, way: str, case: Case) -> list[str]:
    """One launch, the second of its kernel: the first warms up."""
    return [
        ncu, "--csv", "--metrics", ",".join(COUNTERS.values()), "--kernel-name", KERNELS, "--launch-skip", "1",
        "--launch-count", "1", sys.executable, "-m", "benchmarks.counters",
        way, str(case.vocab), DTYPE_NAMES[case.dtype],
    ]  # fmt: skip


def bytes_of(output: str) -> dict[str, float]:
    """Bytes by counter, from ncu's CSV; lines before its header are the program's own."""
    lines = output.splitlines()
    start = next((k for k, each in enumerate(lines) if each.startswith('"ID"')), None)
    if start is None:
        raise ValueError("ncu wrote no table: " + (lines[-1] if lines else "no output"))
    found = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        for name, counter in COUNTERS.items():
            if row["Metric Name"] == counter:
                found[name] = float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
    if found.keys() != COUNTERS.keys():
        raise ValueError(f"ncu counted {sorted(found) or 'nothing'}, not {sorted(COUNTERS)}.")
    return found


def report(cases: Sequence[Case], ways: Sequence[str]) -> Iterator[str]:
    """A line for each case and way: bytes read and written over the logits' own, which is 1 each at best."""
    ncu = shutil.which("ncu")
    if ncu is None:
        yield "--ncu: Nsight Compute (ncu) is not installed, or not on PATH. No counters."
        return
    for case in cases:
        if case.masked:
            continue
        for way in ways:
            run = subprocess.run(command(ncu, way, case), capture_output=True, text=True, timeout=SECONDS)
            try:
                found = bytes_of(run.stdout)
            except ValueError as error:
                yield f"{case.vocab:>7} {way:8} {error}"
                continue
            parts = "  ".join(f"{name} {count / case.logits_bytes:.3f}" for name, count in found.items())
            yield f"{case.vocab:>7} {way:8} DRAM bytes over the logits: {parts}"


def main(argv: Sequence[str] | None = None) -> int:
    way, vocab, dtype = sys.argv[1:] if argv is None else argv
    import torch

    from benchmarks.cases import make_inputs
    from benchmarks.kernels import implementation  # which asks for a GPU's kernels as it is imported

    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    inputs = make_inputs(Case(8, 1024, int(vocab), dtypes[dtype]), torch.device("cuda"))
    for _ in range(2):
        implementation(way).calls["loss"](inputs, inputs.logits)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
