"""curves.png: what a run did, in six panels."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpo_kernels.trainer.options import Options
from grpo_kernels.trainer.records import Records

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c8641b", "#666666"


def running_median(values: Sequence[float], span: int) -> list[float]:
    """Median over ``span`` values around each point, over fewer at the ends; one outlier leaves it as it is."""
    half = span // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits that show all but the outermost 1% of the finite values at each end."""
    ordered = sorted(value for value in values if math.isfinite(value)) or [0.0]
    cut = len(ordered) // 100
    low, high = ordered[cut], ordered[-1 - cut]
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _panel(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel("GRPO step", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _note(axes: Axes, text: str, y: float) -> None:
    axes.text(0.98, y, text, transform=axes.transAxes, ha="right", va="center", fontsize=8, color=_GREY)


def _curve(axes: Axes, records: Records, name: str, colour: str, label: str | None = None) -> None:
    """The values of each step, faint, and their running median."""
    steps, values = records.series(name)
    span = len(values) // 15
    if span > 1:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    marker = "o" if len(values) == 1 else None
    axes.plot(steps, running_median(values, span), color=colour, linewidth=1.8, label=label, marker=marker)


def save_curves(records: Records, options: Options, task_name: str, path: Path) -> None:
    """Draws reward, held-out accuracy, loss, KL, entropy and clip ratio over the GRPO steps.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(12, 6.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    (reward, accuracy, loss), (kl, entropy, clip) = figure.subplots(2, 3)
    figure.suptitle(
        f"GRPO on {task_name}: loss type {options.loss_type}, β = {options.beta:g}, ε = {options.epsilon:g}, "
        f"{options.batch_size} prompts × {options.num_generations} completions, seed {options.seed}\n"
        "faint: each step; bold: running median",
        fontsize=11,
    )
    _panel(reward, "Reward", "mean over the step's samples")
    _curve(reward, records, "reward", _BLUE)
    reward.set_ylim(-0.02, 1.02)

    _panel(accuracy, "Held-out accuracy", "exact match, greedy")
    steps, values = records.series("eval/accuracy")
    accuracy.plot(steps, values, color=_BLUE, linewidth=1.8, marker="o", markersize=3.5)
    accuracy.set_ylim(-0.02, 1.02)
    _note(accuracy, f"{values[0]:.3f} before, {values[-1]:.3f} after", 0.06)

    _panel(loss, "Loss: near 0 by construction", "watch the reward instead")
    _curve(loss, records, "loss", _GREY)
    loss.axhline(0.0, color="black", linewidth=0.6)
    loss.set_ylim(*limits(records.series("loss")[1]))

    if records.series("kl")[0]:
        _panel(kl, "KL to the policy before GRPO", f"nats per token, {options.kl_estimator} estimate")
        _curve(kl, records, "kl", _BLUE)
        kl.set_ylim(*limits(records.series("kl")[1]))
    else:
        _panel(kl, "KL to the sampling policy", "nats per token")
        _curve(kl, records, "approx_kl", _BLUE)
        _note(kl, "β = 0: no reference policy", 0.94)

    _panel(entropy, "Entropy", "nats per token")
    _curve(entropy, records, "entropy", _BLUE)
    entropy.set_ylim(bottom=0.0)

    _panel(clip, "Clip ratio", "share of tokens")
    _curve(clip, records, "clip_ratio/low_mean", _BLUE, "below 1 − ε, A < 0")
    _curve(clip, records, "clip_ratio/high_mean", _ORANGE, "above 1 + ε, A > 0")
    clip.set_ylim(bottom=0.0)
    clip.legend(fontsize=8, frameon=False)
    if options.num_iterations == 1:
        _note(clip, "one optimizer step per batch: ratio 1, nothing clips", 0.5)
    figure.savefig(path)
