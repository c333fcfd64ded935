"""Plots of a run's results.json, as PNG: `python -m benchmarks.plots DIR`. Needs matplotlib."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.cases import OTHER_LOSSES
from benchmarks.records import OURS, PEERS, PLOT, Line, quoted, tokens
from benchmarks.suite import OK, OOM

# Okabe and Ito's colours, told apart by colour-blind readers too; markers differ as well.
STYLES = {
    "grpo_kernels": ("#D55E00", "o"),
    "Liger-Kernel": ("#0072B2", "s"),
    "TRL kernel": ("#009E73", "^"),
    "torch.compile": ("#CC79A7", "D"),
    "eager PyTorch": ("#000000", "v"),
    "quack": ("#56B4E9", "X"),
}
OTHER_STYLE = ("#E69F00", "P")
GREY = "#7F7F7F"
FONT_SIZE = 13
DPI = 150
GROUPS_PER_PANEL = 4  # of bars

Row = dict[str, object]
Key = tuple[object, ...]


class PlotError(Exception):
    """Nothing can be plotted; the message says why and what to do."""


# --- what is shown --------------------------------------------------------------------------------------


def plain(rows: Iterable[Row]) -> list[Row]:
    """Every row counts, and the ratio is the token's."""
    return [r for r in rows if not r["masked"] and not r["zero_advantage"] and r["objective"] == "token"]


def longest_sweep(rows: Sequence[Row], fixed: Callable[[Row], Key], swept: Callable[[Row], object]) -> list[Row]:
    """The plain rows that agree in what is fixed and differ most in what is swept; of equals, bf16."""
    groups: dict[Key, list[Row]] = {}
    for row in plain(rows):
        groups.setdefault((*fixed(row), row["dtype"]), []).append(row)
    if not groups:
        return []
    return max(groups.values(), key=lambda g: (len({swept(r) for r in g}), g[0]["dtype"] == "bf16", tokens(g[0])))


def series(rows: Sequence[Row], modes: Sequence[str]) -> dict[tuple[str, str], list[Row]]:
    """(implementation, mode) → rows, in the order of `STYLES`, in place last."""
    names = [*STYLES, *(r["implementation"] for r in rows)]
    keys = dict.fromkeys((name, mode) for mode in modes for name in names)
    found = {k: [r for r in rows if (r["implementation"], r["mode"]) == k] for k in keys}
    return {key: group for key, group in found.items() if group}


# --- how it is shown ------------------------------------------------------------------------------------


def figure(environment: dict[str, object], title: str, size: tuple[float, float], panels: int = 1):
    """(figure, its axes), with the conditions of the measurement under the title."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": FONT_SIZE}):
        fig = Figure(figsize=size, dpi=DPI, layout="constrained")
        axes = fig.subplots(1, panels, squeeze=False)[0]
    fig.suptitle(f"{title}\n", fontsize=FONT_SIZE + 4, fontweight="bold", linespacing=1.7)
    fig.text(0.5, 0.98 - 0.35 / size[1], conditions(environment), ha="center", va="top", fontsize=FONT_SIZE - 3)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#DDDDDD", linewidth=0.8)
        ax.set_axisbelow(True)
    return fig, axes


def conditions(environment: dict[str, object]) -> str:
    e = environment
    where = str(e["device"]) + (f" (CPU path, threads: {e['threads']})" if e["device_type"] == "cpu" else "")
    commit = str(e["commit"] or "unknown")[:10] + ("+changes" if "+" in str(e["commit"]) else "")
    driver = f", driver {e['driver']}" if e["driver"] else ""
    versions = f"torch {e['torch']}, triton {e['triton']}, grpo_kernels {e['grpo_kernels']} ({commit})"
    return f"{where}{driver}, {str(e['date'])[:10]}; {versions}"


def style(key: tuple[str, str]) -> dict[str, object]:
    name, mode = key
    colour, marker = STYLES.get(name, OTHER_STYLE)
    rank = list(STYLES).index(name) if name in STYLES else len(STYLES)
    in_place = mode == "inplace"
    return {
        "color": colour,
        "marker": marker,
        "linestyle": "--" if in_place else "-",
        "markerfacecolor": "white" if in_place else colour,
        "label": f"{name}, in place" if in_place else name,
        "linewidth": 2.5,
        "markersize": 7 + 2 * min(rank, 2),  # of lines that coincide, the markers stay visible around each other
        "zorder": 10 - rank,
    }


def log_axes(ax, ticks: dict[float, str]) -> None:
    """Both logarithmic, with plain numbers, and `ticks` on the x axis alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


# --- the plots ------------------------------------------------------------------------------------------


def time_against_vocabulary(environment: dict[str, object], rows: Sequence[Row]):
    swept = longest_sweep(rows, lambda r: (tokens(r),), lambda r: r["vocab"])
    timed = [r for r in swept if r["status"] == OK]
    if len({r["vocab"] for r in timed}) < 2:
        raise PlotError("needs two vocabularies at one number of rows")
    what = f"{tokens(timed[0])} rows, {timed[0]['dtype']}"
    fig, axes = figure(environment, f"Time of the GRPO loss by vocabulary: {what}", (13.3, 7.0), 2)
    ticks = {r["vocab"]: f"{r['vocab']}\n{r['model']}" for r in sorted(timed, key=lambda r: r["vocab"])}
    vocabularies = list(ticks)
    for left, right in itertools.pairwise(vocabularies):  # a near neighbour's name goes below
        if right < 1.4 * left and not ticks[left].startswith("\n"):
            ticks[right] = "\n\n" + ticks[right]
    for ax, modes, title in zip(
        axes, [("loss", "inplace"), ("logprobs",)], ["Forward + backward", "Log-probabilities only"]
    ):
        chosen = [r for r in timed if r["mode"] in modes]
        copies = sorted({r["vocab"]: r["copy_ms"] for r in chosen}.items())
        ax.plot(*zip(*copies), color=GREY, linestyle=":", linewidth=2.5, label="copy of the logits") if copies else None
        for key, group in series(chosen, modes).items():
            points = sorted((r["vocab"], r["median_ms"]) for r in group)
            ax.plot(*zip(*points), **style(key))
        log_axes(ax, ticks)
        ax.set(title=title, xlabel="vocabulary V (tokens)", ylabel="median time (ms)")
    shared_legend(fig, axes)
    return fig


def memory_against_rows(environment: dict[str, object], rows: Sequence[Row]):
    swept = longest_sweep(rows, lambda r: (r["vocab"],), tokens)
    swept = [r for r in swept if r["mode"] in ("loss", "inplace")]
    known = [r for r in swept if r["status"] == OK and r["extra_bytes"]]
    if len({tokens(r) for r in known}) < 2:
        raise PlotError("needs two numbers of rows at one vocabulary")
    first = known[0]
    what = f"V = {first['vocab']}" + (f" ({first['model']})" if first["model"] else "") + f", {first['dtype']}"
    fig, (ax,) = figure(environment, f"Extra memory of forward + backward: {what}", (11.0, 7.0))
    logits = sorted({tokens(r): r["logits_bytes"] / 2**30 for r in swept}.items())
    ax.plot(*zip(*logits), color=GREY, linestyle=":", linewidth=2.5, zorder=11, label="the logits themselves")
    for key, group in series(known, ("loss", "inplace")).items():
        ax.plot(*zip(*sorted((tokens(r), r["extra_bytes"] / 2**30) for r in group)), **style(key))
    log_axes(ax, {n: str(n) for n, _ in logits})
    out_of_memory(ax, [r for r in swept if r["status"] == OOM])
    ax.set(xlabel="rows of logits N (tokens)", ylabel="peak above the inputs, gradient included (GiB)")
    shared_legend(fig, [ax])
    return fig


def out_of_memory(ax, rows: Sequence[Row]) -> None:
    """A cross at the upper edge, where it has no value, for every number of rows that was too many."""
    names: dict[int, list[str]] = {}
    for row in rows:
        names.setdefault(tokens(row), []).append(row["implementation"])
    if names:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.15)
    at_edge = ax.get_xaxis_transform()
    for n, who in names.items():
        ax.plot([n], [0.95], transform=at_edge, color="black", marker="X", markersize=11, linestyle="none")
        text = f"out of memory:\n{', '.join(dict.fromkeys(who))}"
        ax.annotate(
            text, (n, 0.95), (-12, 0), xycoords=at_edge, textcoords="offset points", ha="right", va="center",
            fontsize=FONT_SIZE - 2,
        )  # fmt: skip


def share_of_copy_bandwidth(environment: dict[str, object], rows: Sequence[Row]):
    chosen = [r for r in rows if r["status"] == OK and r["mode"] in ("loss", "inplace")]
    chosen = [r for r in chosen if r["objective"] not in OTHER_LOSSES]
    if not chosen:
        raise PlotError("needs a row of forward + backward")
    dtype = "bf16" if any(r["dtype"] == "bf16" for r in chosen) else chosen[0]["dtype"]
    chosen = [r for r in chosen if r["dtype"] == dtype]
    sizes = [tokens(r) for r in chosen]
    size = max(sizes, key=sizes.count)
    chosen = [r for r in chosen if tokens(r) == size]
    labels = list(dict.fromkeys(r["label"] for r in chosen))[: 2 * GROUPS_PER_PANEL]
    groups = series([r for r in chosen if r["label"] in labels], ("inplace", "loss"))
    panels = 1 + (len(labels) > GROUPS_PER_PANEL)
    each = -(-len(labels) // panels)
    title = f"Forward + backward, share of the copy bandwidth: {size} rows, {dtype}"
    fig, axes = figure(environment, title, (13.3, 2.4 + 0.14 * each * (len(groups) + 2)), panels)
    for i, ax in enumerate(axes):
        bars(ax, labels[i * each : (i + 1) * each], groups, strip=f" {size} {dtype}")
        ax.set_xlabel("bytes that must move / time,\nas % of a copy's bandwidth in the same run")
    shared_legend(fig, axes)
    return fig


def bars(ax, labels: Sequence[str], groups: dict[tuple[str, str], list[Row]], strip: str) -> None:
    """Horizontal, one group per label; `strip` is what all labels have in common."""
    height = 1 / (len(groups) + 1.5)
    for i, (key, group) in enumerate(groups.items()):
        look = style(key)
        in_place = {"hatch": "///", "edgecolor": "white"} if key[1] == "inplace" else {}
        group = [r for r in group if r["label"] in labels]
        at = [labels.index(r["label"]) + (i - (len(groups) - 1) / 2) * height for r in group]
        widths = [100 * r["share_of_copy_bandwidth"] for r in group]
        drawn = ax.barh(at, widths, height * 0.92, color=look["color"], label=look["label"], **in_place)
        for label in ax.bar_label(drawn, fmt="%.0f%%", padding=3, fontsize=FONT_SIZE - 4):
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # where the copy's line crosses it
    ax.axvline(100, color=GREY, linestyle=":", linewidth=2.5, label="copy of the logits")
    ax.set_yticks(range(len(labels)), [label.replace(strip, "").replace(" ", "\n", 1) for label in labels])
    ax.invert_yaxis()
    ax.grid(False, axis="y")


def copy_multiples(environment: dict[str, object], rows: Sequence[Row]):
    """What the README's table holds: a line per case, a point per implementation."""
    lines = quoted(rows)
    if not lines:
        raise PlotError(f"needs a row of {OURS}")
    heads = [line for line in lines if line.mode == "linear"]
    others = [line for line in lines if line.mode != "linear"]
    parts = [(others, "× a copy of the logits"), (heads, "× the head's three matrix products")]
    parts = [part for part in parts if part[0]]
    size = tokens(next(r for r in rows if r["implementation"] == OURS and r["status"] == OK))
    height = min(12.8, 2.9 + 0.5 * len(lines))
    fig, _ = figure(environment, f"Time by implementation, {size} rows: left is faster", (13.3, height))
    for ax in fig.axes:
        ax.remove()
    axes = fig.subplots(len(parts), 1, squeeze=False, height_ratios=[len(part) + 1 for part, _ in parts])[:, 0]
    for ax, (part, unit) in zip(axes, parts):
        points(ax, part, unit)
    shared_legend(fig, axes)
    return fig


def _ticks(lowest: float, highest: float) -> tuple[float, ...]:
    """Steps that leave at least three between the two, and room for their labels."""
    if highest < 2 * lowest:
        return (0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2)
    return (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50)


def points(ax, lines: Sequence[Line], unit: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for y, line in enumerate(lines):
        known = [*line.times.values(), *line.in_place.values()]
        ax.plot([line.floor, max(known)], [y, y], color="#DDDDDD", linewidth=2, zorder=1)
        ax.plot([line.floor], [y], color=GREY, marker="|", markersize=18, markeredgewidth=2.5, linestyle="none",
                label="what must move, at a copy's speed")  # fmt: skip
        for times, mode in ((line.times, line.mode), (line.in_place, "inplace")):
            for name in (OURS, *PEERS):
                if name in times and (mode != "inplace" or name == OURS):
                    look = style((name, mode))
                    # In place is a ring around the other, so that both are seen where they coincide.
                    look |= {"linestyle": "none", "markersize": look["markersize"] + (7 if mode == "inplace" else 2)}
                    if mode == "inplace":
                        look |= {"markerfacecolor": "none", "markeredgewidth": 1.6}
                    ax.plot([times[name]], [y], **look)
    ax.set_xscale("log")
    highest = max(value for line in lines for value in (*line.times.values(), *line.in_place.values()))
    lowest = min(line.floor for line in lines)
    ticks = [t for t in _ticks(lowest, highest) if lowest / 1.3 < t < highest * 1.3]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_yticks(range(len(lines)), [line.title for line in lines])
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.set_xlabel(f"time, {unit}")
    ax.spines[["top", "right"]].set_visible(False)


def shared_legend(fig, axes) -> None:
    found = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    for ax in axes[1:]:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            found.setdefault(label, handle)
    fig.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(len(found), 4), frameon=False)


PLOTS = {
    "time_vs_vocab.png": time_against_vocabulary,
    "memory_vs_rows.png": memory_against_rows,
    "copy_bandwidth.png": share_of_copy_bandwidth,
    PLOT: copy_multiples,
}


def draw(directory: Path) -> list[Path | str]:
    """Draws what `directory`/results.json has enough rows for, beside it.

    Returns: the files, and a sentence for each plot that was not drawn.

    Raises:
        PlotError: no matplotlib, or no results there.
    """
    try:
        import matplotlib
    except ImportError:
        raise PlotError("matplotlib is not installed: pip install matplotlib") from None
    results = load(directory)
    made: list[Path | str] = []
    for name, plot in PLOTS.items():
        try:
            with matplotlib.rc_context({"font.size": FONT_SIZE}):
                plot(results["environment"], results["rows"]).savefig(directory / name)
            made.append(directory / name)
        except PlotError as error:
            made.append(f"{name} was not drawn: {error}")
    return made


def load(directory: Path) -> dict[str, object]:
    path = directory / "results.json"
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}; python -m benchmarks --out {directory} writes it") from None
    except ValueError as error:
        raise PlotError(f"{path} is not JSON: {error}") from None
    beside = directory / "record.json"
    if beside.exists():  # the machine that measured may have had a commit of its own
        results["environment"]["commit"] = json.loads(beside.read_text())["kernels_commit"]
    needed = {"objective", "zero_advantage", "label", "extra_bytes", "share_of_copy_bandwidth"}
    if not all(needed <= set(row) for row in results.get("rows", [{}])):
        raise PlotError(f"{path} was written by an older version; run python -m benchmarks --out {directory} again")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where results.json is; the plots go there too")
    directory = parser.parse_args(argv).directory
    try:
        print(*draw(directory), sep="\n")
    except PlotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
