"""The rows of `benchmarks.end_to_end`: what is kept of a run, and the table, the files and the plot made of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import plots, report
from benchmarks.measure import Failed
from benchmarks.suite import OK
from benchmarks.training_steps import FUSED, MODEL_ALONE, STOCK, VERL, VERL_FUSED, Run, Setting

GIB = 2**30
YARDSTICK = {FUSED: STOCK, VERL_FUSED: VERL}  # what a row is compared with
COLOURS = {MODEL_ALONE: plots.GREY, STOCK: plots.STYLES["TRL kernel"][0], FUSED: plots.STYLES["grpo_kernels"][0],
           VERL: plots.STYLES["Liger-Kernel"][0], VERL_FUSED: plots.OTHER_STYLE[0]}  # fmt: skip


@dataclass
class Row:
    """One trainer in one setting. Numbers are there only if `status` is "ok"; bytes only on a GPU."""

    shape: str
    batch: int
    length: int
    checkpointing: bool
    beta: float
    steps: int
    learning_rate: float
    trainer: str
    status: str = OK
    detail: str = ""  # why, if the status is not "ok"
    step_ms: float | None = None  # median of the steps after the first
    least_ms: float | None = None
    most_ms: float | None = None
    rollout_ms: float | None = None  # of one step: the making of completions, which is in no other number
    peak_bytes: int | None = None
    pass_bytes: int | None = None  # peak while passes, loss and backward ran
    loss_bytes: int | None = None  # how far that is above the model alone's
    longest: int | None = None  # T, the greatest that was seen to fit
    too_long: int | None = None  # T, the least that was seen not to
    host_waits: float | None = None  # for the GPU, per step
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    loss_difference: float | None = None  # from its yardstick's, relative to 1 at least; the largest of the steps
    grad_norm_difference: float | None = None
    entropy_difference: float | None = None


SERIES = {"losses": ("loss", 1.0), "grad_norms": ("grad norm", 0.0), "entropies": ("entropy", 0.0)}  # name, least scale


def relative_difference(ours: Sequence[float], theirs: Sequence[float], least: float) -> float | None:
    """The largest, relative to the larger of two numbers and `least`. NaN if one is not finite, or missing."""
    if len(ours) != len(theirs):
        return math.nan
    if not ours:
        return None
    pairs = [(a - b, max(abs(a), abs(b), least)) for a, b in zip(ours, theirs)]
    found = [abs(off) / scale if scale else 0.0 for off, scale in pairs]
    return math.nan if any(map(math.isnan, found)) else max(found)


def row_of(setting: Setting, trainer: str, found: Run | Failed) -> Row:
    row = Row(**asdict(setting), trainer=trainer)
    if isinstance(found, Failed):
        row.status, row.detail = found
        return row
    counted = found.counted_ms
    row.step_ms, row.least_ms, row.most_ms = found.median_ms, min(counted), max(counted)
    row.rollout_ms = found.rollout_ms / len(found.step_ms)
    row.peak_bytes, row.pass_bytes = found.peak_bytes, found.pass_bytes
    if trainer != MODEL_ALONE:  # its loss is another
        row.losses, row.grad_norms, row.entropies = found.losses, found.grad_norms, found.entropies
    return row



def table(rows: Sequence[Row]) -> str:
    """One setting's, at 80 columns."""
    named = {row.trainer: row for row in rows}
    lines = [setting_of(rows[0]).name]
    if any(row.status == OK for row in rows):
        titles = f"{'peak GiB':>9}{'loss GiB':>9}{'time':>9}{'peak':>8}"
        lines.append(f"  {'':<13}{'ms/step':>9}  {'least-most':<16}{titles}")
    lines += [line(row, named.get(YARDSTICK.get(row.trainer))) for row in rows]
    for row in rows:
        if row.longest or row.too_long:
            beyond = "" if row.too_long is None else f" ({row.too_long} does not)"
            lines.append(f"  longest T that fits, {row.trainer}: {row.longest or 'none'}{beyond}")
    waits = ", ".join(f"{row.trainer} {row.host_waits:.1f}" for row in rows if row.host_waits is not None)
    if waits:
        lines.append(f"  times per step that the host waits for the GPU: {waits}")
    for ours, theirs in YARDSTICK.items():
        shown = [named[name] for name in (theirs, ours) if name in named]
        if any(row.losses for row in shown):
            lines += series(shown)
    for row in rows:
        if row.grad_norm_difference is not None:
            off = ", ".join(f"{title} {getattr(row, difference(title)):.1e}" for title, _ in SERIES.values())
            lines.append(f"  difference, {row.trainer}: {off}")
    return "\n".join(lines)


def difference(title: str) -> str:
    """The field of `Row` for a title of `SERIES`."""
    return f"{title.replace(' ', '_')}_difference"


def compare(rows: Sequence[Row]) -> None:
    """Fills in what a row has beside other rows of its setting: memory of the loss alone, differences of numbers."""
    named = {row.trainer: row for row in rows}
    alone = named.get(MODEL_ALONE)
    for row in rows:
        if row is not alone and alone is not None and None not in (row.pass_bytes, alone.pass_bytes):
            row.loss_bytes = row.pass_bytes - alone.pass_bytes
        beside = named.get(YARDSTICK.get(row.trainer))
        if beside is not None and row.status == beside.status == OK:
            for name, (title, least) in SERIES.items():
                setattr(row, difference(title), relative_difference(getattr(row, name), getattr(beside, name), least))


def line(row: Row, beside: Row | None) -> str:
    if row.status != OK:
        return report.shorten(f"  {row.trainer:<13}  {row.status}: {row.detail}", report.WIDTH)
    spread = f"{row.least_ms:.1f}-{row.most_ms:.1f}"
    peak, loss = ("n/a" if n is None else f"{n / GIB:.2f}" for n in (row.peak_bytes, row.loss_bytes))
    time = memory = ""
    if beside is not None:
        time, memory = change(row.step_ms, beside.step_ms), change(row.peak_bytes, beside.peak_bytes)
    if row.trainer == MODEL_ALONE:
        loss = ""
    text = f"  {row.trainer:<13}{row.step_ms:>9.1f}  {spread:<16}{peak:>9}{loss:>9}{time:>9}{memory:>8}"
    return text.rstrip()


def change(ours: float | None, theirs: float | None) -> str:
    return f"{100 * (ours / theirs - 1):+.1f}%" if ours and theirs else ""


def series(rows: Sequence[Row]) -> Iterator[str]:
    """Losses, norms and entropies of every step, a pair of columns each."""
    yield "  step" + "".join(f"{title:>24}" for title, _ in SERIES.values())
    yield "      " + "".join(f"{row.trainer:>12}" for _ in SERIES for row in rows)
    for i in range(max(len(row.losses) for row in rows)):
        values = (getattr(row, name)[i : i + 1] for name in SERIES for row in rows)
        yield f"  {i + 1:>4}" + "".join(f"{value[0]:>12.5g}" if value else f"{'-':>12}" for value in values)


def setting_of(row: Row) -> Setting:
    return Setting(row.shape, row.batch, row.length, row.checkpointing, row.beta, row.steps, row.learning_rate)


def write(out: Path, where: dict[str, object], rows: Sequence[Row]) -> list[Path]:
    """`end_to_end.json` with both, `end_to_end.csv` with a line per row and the environment repeated in it."""
    out.mkdir(parents=True, exist_ok=True)
    records = [
        {name: list(map(report.finite, value)) if isinstance(value, list) else report.finite(value)
         for name, value in asdict(row).items()} for row in rows
    ]  # fmt: skip
    made = [out / "end_to_end.json", out / "end_to_end.csv"]
    text = json.dumps({"environment": where, "rows": records}, indent=2, allow_nan=False)
    made[0].write_text(text + "\n", encoding="utf-8")
    with made[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*records[0], *where], lineterminator="\n")
        writer.writeheader()
        for record in records:
            flat = {name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in record.items()}
            writer.writerow(flat | where)
    return made


def draw(where: dict[str, object], rows: Sequence[Row], path: Path) -> Path:
    """Bars: time of a step, and where they are known peaks of memory and the longest T.

    Raises:
        PlotError: no matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise plots.PlotError("matplotlib is not installed: pip install matplotlib") from None
    panels = {"step_ms": ("Time of a training step", "ms, median", 1.0, "%.1f")}
    if any(row.peak_bytes for row in rows):
        panels["peak_bytes"] = ("Peak of memory", "GiB that tensors held", GIB, "%.2f")
    if any(row.loss_bytes for row in rows):
        panels["loss_bytes"] = ("Of the loss alone", "GiB above the model's", GIB, "%.2f")
    if any(row.longest for row in rows):
        panels["longest"] = ("Longest that fits", "T, tokens", 1.0, "%d")
    settings = list(dict.fromkeys(map(setting_of, rows)))
    trainers = [name for name in COLOURS if any(row.trainer == name for row in rows)]
    height = 0.8 / len(trainers)
    with matplotlib.rc_context({"font.size": plots.FONT_SIZE}):
        size = (13.3, 3.6 + 0.43 * len(settings) * len(trainers))
        fig, axes = plots.figure(where, "Whole training steps, random policy", size, len(panels))
        for ax, (name, (title, unit, scale, form)) in zip(axes, panels.items()):
            for i, trainer in enumerate(trainers):
                down = height * (i - (len(trainers) - 1) / 2)
                own = [(settings.index(setting_of(row)), row) for row in rows if row.trainer == trainer]
                known = [(at + down, getattr(row, name) / scale) for at, row in own if getattr(row, name)]
                if known:
                    bars = ax.barh(*zip(*known), 0.92 * height, color=COLOURS[trainer], label=trainer)
                    ax.bar_label(bars, fmt=form, padding=3, fontsize=plots.FONT_SIZE - 3)
                for at, row in own:
                    if row.status != OK and not getattr(row, name):
                        ax.text(0, at + down, f" {row.status}", va="center", fontsize=plots.FONT_SIZE - 3)
            ax.set_yticks(range(len(settings)), list(map(label, settings))) if ax is axes[0] else ax.set_yticks([])
            ax.set_ylim(len(settings) - 0.5, -0.5)
            ax.margins(x=0.18)
            ax.grid(False, axis="y")
            ax.set(title=title, xlabel=unit)
        plots.shared_legend(fig, axes)
        fig.savefig(path)
    return path


def label(setting: Setting) -> str:
    how = "checkpointing" if setting.checkpointing else "no checkpointing"
    return f"{setting.shape}\n{setting.batch} × {setting.length}, β = {setting.beta:g}\n{how}"


