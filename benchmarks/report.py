"""Rows as text of at most 80 columns, as JSON and as CSV."""

from __future__ import annotations

import csv
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.cases import MODES
from benchmarks.suite import ERROR, MISSING, OK, OOM, WRONG, Row

WIDTH = 80
LEGEND = (
    "x copy: time as a multiple of a copy of the logits, measured in the same rounds; at the copy's "
    "bandwidth forward + backward is 1.0 (1.5 where the ratio is the sequence's and they must be read "
    "twice), log-probs only 0.5, less where rows need not be read. GB/s: bytes that must move (logits of "
    "masked and skipped rows are not read, the gradient is written everywhere), over the time. % copy: "
    "that as a share of the copy's bandwidth. memory: peak above the inputs, as a multiple of the logits, "
    "the gradient included. A=0: sequences without advantage, there with beta = 0 for everyone. Every time "
    "comes from an implementation whose result was checked in this run against float64; ms is the median. "
    "From hidden states: x GEMMs is the time as a multiple of the head's three matrix products alone, in the "
    "same rounds; MiB the peak above the inputs, beyond that without the gradients of hidden states and weight. "
    "distillation: reverse KL from a teacher, whose logits are read too, or made by a fourth product. "
    "quack: cross-entropy, another loss and no GRPO, by the nearest kernel that writes its gradient in one launch."
)
SHORT_STATUS = {MISSING: "-", OOM: "OOM", WRONG: "wrong", ERROR: "error"}
SHORT_MODES = {"loss": "fwd+bwd", "inplace": "inplace", "logprobs": "logp", "entropies": "logp+H", "linear": "head"}


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
    if first.mode == "linear":
        return linear_table(rows)
    lines = [shorten(f"{first.case}{f' ({first.model})' if first.model else ''}: {MODES[first.mode]}", WIDTH)]
    copy_ms = next((row.copy_ms for row in rows if row.copy_ms is not None), None)
    if copy_ms is not None:
        bandwidth = 2 * first.logits_bytes / copy_ms / 1e6
        lines.append(f"  {'copy of logits':<14}{copy_ms:>9.3f}{'':<15}{1:>7.2f}{bandwidth:>8.1f}{'100%':>7}")
    if any(row.status == OK for row in rows):
        titles = f"{'x copy':>7}{'GB/s':>8}{'% copy':>7}{'memory':>8}{'vs eager':>9}"
        lines.insert(1, f"  {'':<14}{'ms':>9}  {'p20-p80':<13}{titles}")
    return "\n".join(lines + [line(row) for row in rows] + second_timer(rows))


def second_timer(rows: Sequence[Row]) -> list[str]:
    """What `triton.testing.do_bench` said, where it was asked."""
    timed = [row for row in rows if row.do_bench_ms is not None]
    if not timed:
        return []
    each = (f"{row.implementation} {row.do_bench_ms:.3f} ms ({row.do_bench_copy_multiple:.2f} x copy)" for row in timed)
    text = f"by triton's do_bench: {', '.join(each)}"
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")


def linear_table(rows: Sequence[Row]) -> str:
    """One case from hidden states."""
    first = rows[0]
    lines = [shorten(f"{first.case}{f' ({first.model})' if first.model else ''}: {MODES[first.mode]}", WIDTH)]
    if any(row.status == OK for row in rows):
        lines.append(f"  {'':<14}{'ms':>9}  {'p20-p80':<13}{'x GEMMs':>8}{'MiB':>10}{'beyond':>9}{'vs eager':>9}")
    products_ms = next((row.products_ms for row in rows if row.products_ms is not None), None)
    if products_ms is not None:
        number = "four" if rows[0].objective == "distillation" else "three"
        lines.append(f"  {f'{number} products':<14}{products_ms:>9.3f}{'':<15}{1:>8.2f}")
    return "\n".join(lines + [linear_line(row) for row in rows])


def linear_line(row: Row) -> str:
    if row.status != OK:
        return line(row)
    sizes = (row.extra_bytes, row.beyond_gradients_bytes)
    memory, beyond = ("n/a" if size is None else f"{size / 2**20:.0f}" for size in sizes)
    speedup = "" if row.speedup_over_eager is None else f"{row.speedup_over_eager:.2f}x"
    return (
        f"  {row.implementation:<14}{row.median_ms:>9.3f}  {spread(row):<13}{row.products_multiple:>8.2f}"
        f"{memory:>10}{beyond:>9}{speedup:>9}"
    )


def spread(row: Row) -> str:
    return "-".join(f"{ms:.0f}" if ms >= 100 else f"{ms:#.3g}" for ms in (row.p20_ms, row.p80_ms))


def summary(rows: Sequence[Row], name: str = "grpo_kernels") -> str:
    """One line per case and mode: what one implementation reached, and its speed against the others'."""
    blocks: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        blocks.setdefault((row.case, row.mode), {})[row.implementation] = row
    tried = [row.implementation for row in rows if row.status != MISSING and row.implementation != name]
    others = list(dict.fromkeys(tried))[:4]
    titles = "".join(f"{other.split()[0].removeprefix('torch.').removesuffix('-Kernel'):>8}" for other in others)
    lines = [f"{f'{name}: times faster than':<35}{'x copy':>6}{'% copy':>7}" + titles]
    for (_, mode), block in blocks.items():
        if name in block:
            lines.append(_summary_line(mode, block, block[name], others))
    return "\n".join(lines)


def _summary_line(mode: str, block: Mapping[str, Row], own: Row, others: Sequence[str]) -> str:
    start = f"{shorten(own.label.replace('masked', 'mask'), 26):<27}{SHORT_MODES[mode]:<8}"
    if own.status != OK:
        return shorten(f"{start}  {own.status}", WIDTH)
    if mode == "linear":
        text = f"{start}{'':>13}"
    else:
        text = f"{start}{own.copy_multiple:>6.2f}{own.share_of_copy_bandwidth:>7.0%}"
    for other in others:
        row = block.get(other)
        if row is None:
            text += f"{'-':>8}"
        elif row.median_ms is None:
            text += f"{SHORT_STATUS[row.status]:>8}"
        else:
            text += f"{row.median_ms / own.median_ms:>7.2f}x"
    return text


def line(row: Row) -> str:
    if row.status != OK:
        reason = f"{row.status}: {row.detail}" if row.detail else row.status
        return shorten(f"  {row.implementation:<14}  {reason}", WIDTH)
    memory = "n/a" if row.extra_per_logits is None else f"{row.extra_per_logits:.2f}x"
    speedup = "" if row.speedup_over_eager is None else f"{row.speedup_over_eager:.2f}x"
    return (
        f"  {row.implementation:<14}{row.median_ms:>9.3f}  {spread(row):<13}{row.copy_multiple:>7.2f}"
        f"{row.gigabytes_per_second:>8.1f}{row.share_of_copy_bandwidth:>7.0%}{memory:>8}{speedup:>9}"
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


def write_rows(path: Path, rows: Sequence[object], environment: dict[str, object]) -> None:
    """A CSV file with a line for each of these dataclasses, and the environment repeated in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *environment], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) | environment for row in rows)
