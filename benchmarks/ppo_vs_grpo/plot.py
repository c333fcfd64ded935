"""ppo_vs_grpo.png: reward and accuracy with their spread over seeds, memory and time, on one slide."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.plots import DPI, FONT_SIZE, GREY, conditions
from benchmarks.ppo_vs_grpo.report import MIB, Results, figures, seeds_of

COLOURS = {"GRPO": "#D55E00", "PPO": "#0072B2", "PPO, both graphs at once": "#7FB6D9"}
MARKERS = {"GRPO": "o", "PPO": "s"}
NAME = "ppo_vs_grpo.png"


def draw(results: Results, out: Path) -> Path:
    """Raises: OSError: the file cannot be written."""
    with rc_context({"font.size": FONT_SIZE}):
        figure = Figure(figsize=(13.3, 7.5), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        (reward, accuracy), (memory, time) = figure.subplots(2, 2, height_ratios=(1.25, 1.0))
        settings, seeds = results.settings, seeds_of(results)
        groups = "the same rollouts at first"
        if settings.ppo_generations != settings.num_generations:
            problems = [settings.completions // n for n in (settings.num_generations, settings.ppo_generations)]
            groups = f"{problems[0]} and (PPO) {problems[1]} problems per step"
        figure.suptitle(f"PPO beside GRPO: two-digit addition, same start and tokens, {groups}\n",
                        fontsize=FONT_SIZE + 3, fontweight="bold")  # fmt: skip
        figure.text(0.5, 0.945, conditions(results.environment), ha="center", va="top", fontsize=FONT_SIZE - 4)
        curves(reward, results, "reward", f"Mean reward of a step's {settings.completions} completions")
        curves(accuracy, results, "accuracy", "Held-out accuracy, greedy")
        for axes in (reward, accuracy):
            axes.set_xlabel(f"step (line: mean of {seeds}; band: least to greatest)")
        memory_bars(memory, results)
        time_bars(time, results)
        for axes in (reward, accuracy, memory, time):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(out / NAME)
    return out / NAME


def curves(axes: Axes, results: Results, name: str, title: str) -> None:
    for arm in results.arms:
        curve = results.curve(arm, name)
        marker = MARKERS[arm] if len(curve) < 30 else None
        band(axes, curve, COLOURS[arm], marker, arm)
    axes.set_title(title, loc="left", fontsize=FONT_SIZE, fontweight="bold")
    axes.set_ylim(0, 1)
    axes.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right")


def band(axes: Axes, curve: dict[int, dict[int, float]], colour: str, marker: str | None, label: str) -> None:
    """The mean over the seeds as a line, from the least to the greatest as a band; ``curve``: step → seed → value."""
    steps = sorted(curve)
    values = [list(curve[step].values()) for step in steps]
    low, high = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0)
    mean = [statistics.fmean(v) for v in values]
    axes.plot(steps, mean, color=colour, linewidth=2.5, marker=marker, markersize=6, label=label)


def memory_bars(axes: Axes, results: Results) -> None:
    """Peaks as multiples of GRPO's, since the two models are of very different size."""
    models = list(dict.fromkeys(row.model for row in results.memory))
    arms = list(dict.fromkeys(row.arm for row in results.memory))
    height, most = 0.8 / len(arms), 0.0
    labels = []
    for place, model in enumerate(models):
        rows = {row.arm: row for row in results.memory if row.model == model}
        unit = rows["GRPO"].peak
        size = rows["GRPO"]
        parameters = f"{size.parameters / 1e6:.1f}M" if size.parameters >= 1e6 else f"{size.parameters / 1e3:.0f}k"
        labels.append(f"{parameters} parameters,\n{size.completions} completions")
        for i, arm in enumerate(arms):
            at = place + (i - (len(arms) - 1) / 2) * height
            ratio = rows[arm].peak / unit
            most = max(most, ratio)
            axes.barh(at, ratio, height * 0.92, color=COLOURS[arm])
            held = rows[arm].held / unit
            axes.barh(at, held, height * 0.92, color="none", edgecolor="white", hatch="///", linewidth=0)
            axes.text(ratio + 0.02, at, f"{ratio:.2f}×  {rows[arm].peak / MIB:.0f} MiB", va="center",
                      fontsize=FONT_SIZE - 3)  # fmt: skip
    axes.set_title("Peak memory of a step (hatched: held between steps)", loc="left", fontsize=FONT_SIZE,
                   fontweight="bold")  # fmt: skip
    axes.set_yticks(range(len(models)), labels, fontsize=FONT_SIZE - 2)
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.28)
    axes.set_xlabel("as a multiple of GRPO's; light blue: PPO with both graphs at once")
    axes.axvline(1, color=GREY, linestyle=":", linewidth=1.5)


def time_bars(axes: Axes, results: Results) -> None:
    found = {(f.metric, f.arm): f.value for f in figures(results)}
    totals = []
    for place, arm in enumerate(results.arms):
        sampling, update = (found[f"time of a step: {name}", arm] for name in ("sampling", "update"))
        axes.barh(place, sampling, 0.55, color="#BBBBBB")
        axes.barh(place, update, 0.55, left=sampling, color=COLOURS[arm])
        for middle, part, colour in ((sampling / 2, sampling, "black"), (sampling + update / 2, update, "white")):
            axes.text(middle, place, f"{part:.0f}", ha="center", va="center", color=colour, fontsize=FONT_SIZE - 3)
        axes.text(1.01 * (sampling + update), place, f"{sampling + update:.0f} ms", va="center",
                  fontsize=FONT_SIZE - 3)  # fmt: skip
        totals.append(sampling + update)
    axes.set_yticks(range(len(results.arms)), results.arms)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(totals))
    axes.set_title("Time of a step, median (grey: sampling)", loc="left", fontsize=FONT_SIZE,
                   fontweight="bold")  # fmt: skip
    axes.set_xlabel("ms")
