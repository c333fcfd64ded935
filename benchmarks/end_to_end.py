"""Whole training steps of TRL's GRPOTrainer and of FusedGRPOTrainer, side by side: `python -m benchmarks.end_to_end`.

Both get the same random weights, completions of random ids and random rewards: nothing is sampled or downloaded. A
third trainer, whose loss is a mean of the hidden states, shows what the model takes by itself. Without a GPU the
policy is tiny.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path

import torch

# Before transformers and TRL are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # of rollout_func
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)

try:
    from benchmarks import training_steps
except ImportError as problem:  # of TRL, or of what it needs
    raise SystemExit(f"benchmarks.end_to_end needs TRL: pip install '.[trainer,bench]' ({problem})") from None
from benchmarks import environment, plots, report
from benchmarks.budget import Budget
from benchmarks.measure import Failed
from benchmarks.suite import ERROR, OK, OOM
from benchmarks.training_steps import FUSED, MODEL_ALONE, SHAPES, STOCK, TRAINERS, Run, Setting

GPU, CPU = (("qwen2.5-0.5b",), 8, (1024, 4000)), (("tiny",), 4, (16,))  # shapes, B, T
CHECKPOINTED = 2048  # tokens of a completion, above which gradients are checkpointed if nothing is said
GIB = 2**30
COLOURS = {MODEL_ALONE: plots.GREY, STOCK: plots.STYLES["TRL kernel"][0], FUSED: plots.STYLES["grpo_kernels"][0]}
LEGEND = (
    "ms/step: median of the steps after the first, from the first pass to the logged numbers, the optimiser included, "
    "the making of completions not. peak: of the memory that tensors held, weights and optimiser included. loss: how "
    "far the peak of passes and backward is above that of the model alone, whose loss is a mean of the hidden states. "
    "The last columns: the change from TRL. "
    "A loss is a sum of terms of about size one that nearly cancel: its difference is relative to 1 at least."
)


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
    longest: int | None = None  # T
    host_waits: float | None = None  # for the GPU, per step
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    loss_difference: float | None = None  # from TRL's, relative to 1 at least; the largest of the steps
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


def measure(
    setting: Setting, device: torch.device, search: bool, spent: Callable[[], bool], waits: bool = False
) -> list[Row]:
    """The rows of one setting. ``search``: the longest T, too, until the time is ``spent``; ``waits``: the host's."""
    rows = {name: row_of(setting, name, training_steps.attempt(setting, name, device)) for name in TRAINERS}
    stock, fused, alone = rows[STOCK], rows[FUSED], rows[MODEL_ALONE]
    for row in (stock, fused):
        if row.pass_bytes is not None and alone.pass_bytes is not None:
            row.loss_bytes = row.pass_bytes - alone.pass_bytes
    if stock.status == fused.status == OK:
        for name, (title, least) in SERIES.items():
            off = relative_difference(getattr(fused, name), getattr(stock, name), least)
            setattr(fused, f"{title.replace(' ', '_')}_difference", off)
    for row in (stock, fused) if waits else ():
        row.host_waits = training_steps.host_waits(setting, row.trainer, device)
    for row in (stock, fused) if search else ():
        if row.status in (OK, OOM):
            row.longest = longest(setting, row, device, spent)
    return list(rows.values())


def longest(setting: Setting, row: Row, device: torch.device, spent: Callable[[], bool]) -> int | None:
    def fits(T: int) -> bool:  # two steps: the optimiser's state is there in the second
        if T == setting.length:
            return row.status == OK
        found = training_steps.attempt(replace(setting, length=T, steps=2), row.trainer, device)
        if isinstance(found, Failed) and found.status != OOM:
            row.status, row.detail = found.status, f"T = {T}: {found.reason}"
        return not isinstance(found, Failed)

    return training_steps.longest(fits, setting.length, lambda: row.status == ERROR or spent())


# --- what comes out -------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """One setting's, at 80 columns."""
    stock = next(row for row in rows if row.trainer == STOCK)
    lines = [setting_of(rows[0]).name]
    if any(row.status == OK for row in rows):
        titles = f"{'peak GiB':>9}{'loss GiB':>9}{'time':>9}{'peak':>8}"
        lines.append(f"  {'':<13}{'ms/step':>9}  {'least-most':<16}{titles}")
    lines += [line(row, stock) for row in rows]
    shown = [row for row in rows if row.trainer != MODEL_ALONE]
    if any(row.longest for row in shown):
        found = ", ".join(f"{row.trainer} {row.longest or 'none'}" for row in shown)
        lines.append(f"  longest T that fits: {found}")
    if any(row.host_waits is not None for row in shown):
        found = ", ".join(f"{row.trainer} {row.host_waits:.1f}" for row in shown if row.host_waits is not None)
        lines.append(f"  times per step that the host waits for the GPU: {found}")
    if any(row.losses for row in shown):
        lines += series(shown)
    fused = next(row for row in rows if row.trainer == FUSED)
    if fused.grad_norm_difference is not None:
        off = ", ".join(
            f"{title} {getattr(fused, title.replace(' ', '_') + '_difference'):.1e}" for title, _ in SERIES.values()
        )
        lines.append(f"  largest relative difference: {off}")
    return "\n".join(lines)


def line(row: Row, stock: Row) -> str:
    if row.status != OK:
        return report.shorten(f"  {row.trainer:<13}  {row.status}: {row.detail}", report.WIDTH)
    spread = f"{row.least_ms:.1f}-{row.most_ms:.1f}"
    peak, loss = ("n/a" if n is None else f"{n / GIB:.2f}" for n in (row.peak_bytes, row.loss_bytes))
    beside = [change(getattr(row, name), getattr(stock, name)) for name in ("step_ms", "peak_bytes")]
    if row.trainer == MODEL_ALONE:
        loss = ""
    if row.trainer != FUSED:
        beside = ["", ""]
    text = f"  {row.trainer:<13}{row.step_ms:>9.1f}  {spread:<16}{peak:>9}{loss:>9}{beside[0]:>9}{beside[1]:>8}"
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
    with matplotlib.rc_context({"font.size": plots.FONT_SIZE}):
        size = (13.3, 3.6 + 1.3 * len(settings))
        fig, axes = plots.figure(where, "Whole training steps of TRL's trainers, random policy", size, len(panels))
        for ax, (name, (title, unit, scale, form)) in zip(axes, panels.items()):
            for i, trainer in enumerate(TRAINERS):
                own = [(settings.index(setting_of(row)), row) for row in rows if row.trainer == trainer]
                known = [(at + 0.27 * (i - 1), getattr(row, name) / scale) for at, row in own if getattr(row, name)]
                if known:
                    bars = ax.barh(*zip(*known), 0.25, color=COLOURS[trainer], label=trainer)
                    ax.bar_label(bars, fmt=form, padding=3, fontsize=plots.FONT_SIZE - 3)
                for at, row in own:
                    if row.status != OK and not getattr(row, name):
                        ax.text(0, at + 0.27 * (i - 1), f" {row.status}", va="center", fontsize=plots.FONT_SIZE - 3)
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


# --- the command ----------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="of the policy (default: qwen2.5-0.5b; cpu: tiny)")
    parser.add_argument("--batch", type=int, metavar="B", help="completions of a step (default: 8; cpu: 4)")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="T", help="tokens (default: 1024 4000; cpu: 16)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                        help=f"of gradients (default: where T is above {CHECKPOINTED})")  # fmt: skip
    parser.add_argument("--beta", nargs="+", type=float, default=(0.0,), help="with a reference, if not 0 (default: 0)")
    parser.add_argument("--steps", type=int, default=5, help="of the optimiser (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="(default: %(default)s)")
    parser.add_argument("--longest", action="store_true", help="the longest T that fits, too, by bisection (GPU)")
    parser.add_argument("--waits", action="store_true", help="how often the host waits, too, in runs of its own (GPU)")
    parser.add_argument("--minutes", type=float, help="begin no setting after these (default: no limit)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where to run (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write end_to_end.json, .csv and .png there")
    given = parser.parse_args(argv)
    given.device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    if given.longest and given.device.type == "cpu":
        parser.error("--longest needs a GPU: on a CPU a policy that is too long ends the process, not the run")
    if given.waits and given.device.type == "cpu":
        parser.error("--waits needs a GPU: on a CPU the host waits for nothing")
    shapes, batch, lengths = GPU if given.device.type == "cuda" else CPU
    given.shapes, given.lengths = given.shapes or shapes, given.lengths or lengths
    given.batch = batch if given.batch is None else given.batch
    if given.batch < 2:
        parser.error("--batch must be at least 2: it is one group")
    if given.steps < 1 or min(given.lengths) < 1:
        parser.error("--steps and --lengths must be at least 1")
    if given.minutes is not None and given.minutes <= 0:
        parser.error("--minutes must be positive")
    return given


def settings(given: argparse.Namespace) -> list[Setting]:
    return [
        Setting(shape, given.batch, T, T > CHECKPOINTED if given.checkpointing is None else given.checkpointing, beta,
                given.steps, given.learning_rate)
        for shape, T, beta in product(given.shapes, given.lengths, given.beta)
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_arguments(argv)
    budget = Budget(given.minutes and given.minutes * 60, per_row=0.0)
    quiet()
    where = environment.describe(given.device) | {"transformers": environment.version("transformers")}
    print(report.header(where) + f"\nTRL {where['trl']}, transformers {where['transformers']}\n", flush=True)
    training_steps.take_workspaces(given.device)
    rows: list[Row] = []
    for setting in settings(given):
        if budget.spent:
            print(f"left out, --minutes {given.minutes:g} are over: {setting.name}", flush=True)
            continue
        block = measure(setting, given.device, given.longest, lambda: budget.spent, given.waits)
        rows += block
        print(table(block) + "\n", flush=True)
        if given.out:
            write(given.out, where, rows)
    print(textwrap.fill(LEGEND, report.WIDTH))
    if given.out and rows:
        try:
            print(draw(where, rows, given.out / "end_to_end.png"))
        except plots.PlotError as error:
            print(f"end_to_end.png was not drawn: {error}")
    print(f"{budget.used:.0f} s")
    return int(not rows or any(row.status == ERROR for row in rows))


def quiet() -> None:
    """Neither bars nor what transformers and TRL say of each other; this package's warnings stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
