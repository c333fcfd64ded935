"""Rows as text of at most 80 columns, as JSON and as CSV."""

from __future__ import annotations

import csv
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.cases import MODES
from benchmarks.suite import OK, Row

WIDTH = 80
LEGEND = (
    "x copy: time as a multiple of a copy of the logits, measured in the same rounds; at the copy's "
    "bandwidth forward + backward is 1.0, log-probs only 0.5 (less where tokens are masked). GB/s: bytes "
    "that must move, over the time. memory: peak above the inputs, as a multiple of the logits, the "
    "gradient included. Every time comes from an implementation whose result was checked in this run "
    "against float64; ms is the median."
)


def header(environment: dict[str, object]) -> str:
    e = environment
    where = f"{e['device']}" + (f", driver {e['driver']}" if e["driver"] else f", CPU threads: {e['threads']}")
    commit, _, changes = str(e["commit"]).partition("+")
    what = (
        f"torch {e['torch']}, triton {e['triton']}, grpo_kernels {e['grpo_kernels']}, "
        f"commit {commit[:10]}{' + changes' if changes else ''}"
    )
    text = [where, what]
    if e["device_type"] == "cpu":
        text.append(
            "No GPU is used: this measures grpo_kernels' CPU path, not its kernels. "
            f"Load average at the start: {e['load_average']:.1f} on {e['cpu_count']} cores."
        )
    return "\n".join(textwrap.fill(line, WIDTH) for line in text)


def table(rows: Sequence[Row]) -> str:
    """One case in one mode."""
    first = rows[0]
    title = f"{first.case}{f' ({first.model})' if first.model else ''}: {MODES[first.mode]}"
    copy_ms = next((row.copy_ms for row in rows if row.copy_ms is not None), None)
    lines = [title]
    if copy_ms is not None:
        bandwidth = 2 * first.logits_bytes / copy_ms / 1e6
        lines.append(f"  {'copy of the logits':<18}{copy_ms:>10.3f} ms {bandwidth:>8.1f} GB/s")
    lines.append(f"  {'':<14}{'ms':>9}  {'p20 to p80':<20}{'x copy':>8}{'GB/s':>8}{'memory':>8}{'vs eager':>9}")
    lines += [line(row) for row in rows]
    return "\n".join(lines)


def summary(rows: Sequence[Row], name: str = "grpo_kernels") -> str:
    """One line per case and mode: what one implementation reached, and its speed against the others'."""
    blocks: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        blocks.setdefault((row.case, row.mode), {})[row.implementation] = row
    others = list(dict.fromkeys(row.implementation for row in rows if row.implementation != name))
    lines = [f"{f'{name}: times faster than':<42}{'x copy':>8}" + "".join(f"{other:>15}" for other in others)]
    for (case, mode), block in blocks.items():
        own = block.get(name)
        if own is None:
            continue
        text = f"{own.copy_multiple:>8.2f}" if own.status == OK else f"  {own.status}"
        for other in others if own.status == OK else ():
            ms = block[other].median_ms if other in block else None
            text += f"{'-' if ms is None else f'{ms / own.median_ms:.2f}x':>15}"
        lines.append(f"  {shorten(case, 29):<30}{mode:<10}{text}")
    return "\n".join(lines)


def line(row: Row) -> str:
    if row.status != OK:
        reason = f"{row.status}: {row.detail}" if row.detail else row.status
        return shorten(f"  {row.implementation:<14}  {reason}", WIDTH)
    spread = f"{row.p20_ms:.3f} to {row.p80_ms:.3f}"
    memory = "n/a" if row.extra_per_logits is None else f"{row.extra_per_logits:.2f}x"
    speedup = "" if row.speedup_over_eager is None else f"{row.speedup_over_eager:.2f}x"
    return (
        f"  {row.implementation:<14}{row.median_ms:>9.3f}  {spread:<20}{row.copy_multiple:>8.2f}"
        f"{row.gigabytes_per_second:>8.1f}{memory:>8}{speedup:>9}"
    )


def finite(value: object) -> object:
    """JSON has no NaN and no infinity: None stands for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def write(out: Path, environment: dict[str, object], rows: Sequence[Row]) -> tuple[Path, Path]:
    """`results.json` with both, `results.csv` with one line per row and the environment repeated in it."""
    out.mkdir(parents=True, exist_ok=True)
    records = [{key: finite(value) for key, value in asdict(row).items()} for row in rows]
    json_path, csv_path = out / "results.json", out / "results.csv"
    json_path.write_text(json.dumps({"environment": environment, "rows": records}, indent=2, allow_nan=False) + "\n")
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*records[0], *environment] if records else list(environment))
        writer.writeheader()
        writer.writerows(record | environment for record in records)
    return json_path, csv_path
