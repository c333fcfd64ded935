"""curves.png: what a run did, in twelve panels; and several runs in one picture."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpo_kernels.trainer.options import Options
from grpo_kernels.trainer.pass_at_k import rates_in
from grpo_kernels.trainer.records import Rows

# Okabe and Ito's, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BLUE, _ORANGE, _GREEN, _GREY = *COLOURS[:3], "#666666"


class PlotError(ValueError):
    """There is nothing to plot; the message says what to do."""


def running_median(values: Sequence[float], span: int) -> list[float]:
    """Median over ``span`` values around each point, over fewer at the ends; one outlier leaves it as it is."""
    half = span // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _span(count: int) -> int:
    """Of the running median of so many values; 0 or 1: none."""
    return count // 15


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


def _legend(axes: Axes) -> None:
    """Where it covers least. A curve behind it shines through its pale ground, and does not cross its words."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, framealpha=0.75, edgecolor="none", borderpad=0.2)


def _curve(
    axes: Axes, records: Rows, name: str, colour: str, label: str | None = None, factor: float = 1.0
) -> list[float]:
    """The values of each step times a factor, faint, and their running median; returns them."""
    steps, values = records.series(name)
    values = [factor * value for value in values]
    span = _span(len(values))
    if span > 1:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    marker = "o" if len(values) == 1 else None
    axes.plot(steps, running_median(values, span), color=colour, linewidth=1.8, label=label, marker=marker)
    return values


def _figure(title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(16, 9.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure, list(figure.subplots(3, 4).flat)


def save_curves(records: Rows, options: Options, task_name: str, path: Path) -> None:
    """Draws a run's rewards, accuracy, loss, KL, entropy, clip ratios, lengths and times over the GRPO steps.

    Raises:
        OSError: the file cannot be written.
    """
    smoothed = _span(len(records.series("reward")[0])) > 1
    figure, panels = _figure(
        f"GRPO on {task_name}: loss type {options.loss_type}, β = {options.beta:g}, ε = {options.epsilon:g}, "
        f"{options.batch_size} prompts × {options.num_generations} completions, {options.updates} updates a step, "
        f"seed {options.seed}" + ("\nfaint: each step; bold: running median" if smoothed else "")
    )
    reward, spread, advantage, accuracy, loss, kl, entropy, clip, length, seconds, norm, rate = panels
    _rewards(reward, records)
    _panel(spread, "Reward spread", "points; share")
    _curve(spread, records, "reward_std", _BLUE, "standard deviation of all rewards")
    _curve(spread, records, "frac_reward_zero_std", _ORANGE, "share of groups without spread")
    _legend(spread)

    _panel(advantage, "Normalised advantage", "per completion")
    for name, colour in (("max", _GREEN), ("mean_abs", _BLUE), ("min", _ORANGE)):
        _curve(advantage, records, f"advantage/{name}", colour, name.replace("mean_abs", "mean |A|"))
    _legend(advantage)

    _accuracy(accuracy, records)

    _loss(loss, records, options)
    _kl(kl, records, options)

    _panel(entropy, "Entropy", "nats per token")
    _curve(entropy, records, "entropy", _BLUE)
    entropy.set_ylim(0.0, 1.05 * limits(records.series("entropy")[1])[1])
    _clips(clip, records, options)

    _panel(length, "Completion length", "tokens")
    _curve(length, records, "completions/mean_length", _BLUE, "mean")
    _curve(length, records, "completions/max_length", _GREY, "longest")
    _legend(length)
    _panel(seconds, "Time of a step", "seconds")
    for name, colour in (("sampling", _BLUE), ("reward", _GREEN), ("loss", _ORANGE)):
        label = "loss and update" if name == "loss" else name
        _curve(seconds, records, f"{name}_time", colour, label)
    if records.series("optimizer_time")[0]:
        _curve(seconds, records, "optimizer_time", _GREY, "of it, optimizer")
    _legend(seconds)
    if memory := records.series("loss_memory")[1]:
        _note(seconds, f"memory: {max(memory):.1f} GiB", 0.5)
    _panel(norm, "Gradient norm, before it is clipped", "")
    _curve(norm, records, "grad_norm", _BLUE)
    _panel(rate, "Learning rate", "")
    rate.plot(*records.series("learning_rate"), color=_BLUE, linewidth=1.8)
    figure.savefig(path)


def _rewards(axes: Axes, records: Rows) -> None:
    """The sum; and where there are several functions, each."""
    _panel(axes, "Raw reward", "mean over the step's samples")
    parts = [name for name in records.names("rewards/") if name.endswith("/mean")]
    _curve(axes, records, "reward", COLOURS[0], "weighted sum" if len(parts) > 1 else None)
    if len(parts) > 1:
        for i, name in enumerate(parts):
            label = name.removeprefix("rewards/").removesuffix("/mean")
            _curve(axes, records, name, COLOURS[1 + i % (len(COLOURS) - 1)], label)
    _legend(axes)


def _accuracy(axes: Axes, records: Rows) -> None:
    """Greedy; and pass@k, darker for a larger k."""
    rates = rates_in(records)
    _panel(axes, "Held-out accuracy", "share of problems" if rates else "greedy")
    steps, values = records.series("eval/accuracy")
    axes.plot(steps, values, color=_BLUE, linewidth=1.8, marker="o", markersize=3.5, label="greedy" if rates else None)
    for i, name in enumerate(rates):
        axes.plot(*records.series(name), color=_ORANGE, alpha=0.3 + 0.7 * (i + 1) / len(rates), linewidth=1.4,
                  marker="o", markersize=2.5, label=name.removeprefix("eval/"))  # fmt: skip
    axes.set_ylim(-0.02, 1.02)
    if rates:  # beside the curves, which may be anywhere; in their order from above
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    if not values:
        axes.set_xticks([])
        _note(axes, "not measured", 0.5)
    elif not rates and None not in (ends := records.ends("eval/accuracy")):
        _note(axes, f"{ends[0]:.3f} before, {ends[1]:.3f} after", 0.06)


def _loss(axes: Axes, records: Rows, options: Options) -> None:
    """The whole, and the KL and the entropy where they are parts of it, as means over tokens."""
    _panel(axes, "Loss: near 0 by construction", "mean over the updates")
    parts = [_curve(axes, records, "loss", _GREY, "loss")]
    bonus = -(options.entropy_coef or 0.0)
    for name, factor, colour, label in (("policy_loss", bool(bonus), _GREEN, "without the bonus"),
                                        ("kl", options.beta, _BLUE, "β × KL"),
                                        ("entropy", bonus, _ORANGE, "−c × entropy")):  # fmt: skip
        if factor and options.teacher is None and records.series(name)[0]:
            parts.append(_curve(axes, records, name, colour, label, factor))
    axes.axhline(0.0, color="black", linewidth=0.6)
    axes.set_ylim(*limits([value for part in parts for value in part]))
    _legend(axes)


def _kl(axes: Axes, records: Rows, options: Options) -> None:
    if options.teacher is not None:
        _panel(axes, "Divergence from the teacher", "nats per token")
        _curve(axes, records, "divergence", _BLUE)
        return
    if not records.series("kl")[0]:
        _panel(axes, "KL to the sampling policy", "nats per token")
        _curve(axes, records, "approx_kl", _BLUE)
        _note(axes, "β = 0: no reference policy", 0.94)
        return
    to = "policy before GRPO" if options.kl_to == "reference" else "sampling policy"
    _panel(axes, f"KL to the {to}", f"nats per token, {options.kl_estimator} estimate")
    _curve(axes, records, "kl", _BLUE)
    axes.set_ylim(*limits(records.series("kl")[1]))


def _clips(axes: Axes, records: Rows, options: Options) -> None:
    """Of the loss type's own kind: two-sided, one-sided, a weight, or none."""
    _panel(axes, "Clip ratio", "share of tokens")
    if records.series("clip_ratio/low_mean")[0]:
        _curve(axes, records, "clip_ratio/low_mean", _BLUE, "below 1 − ε, A < 0")
        _curve(axes, records, "clip_ratio/high_mean", _ORANGE, "above 1 + ε, A > 0")
    else:
        for name in ("cispo_clip_ratio", "vespo/phi_seq_mean"):
            if records.series(name)[0]:
                _curve(axes, records, name, _BLUE, name)
    axes.set_ylim(bottom=0.0)
    _legend(axes)
    if options.updates == 1:
        _note(axes, "one update per step: ratio 1, nothing clips", 0.5)


# --- several runs ---------------------------------------------------------------------------------

_OVERLAID = (
    ("reward", "Raw reward", "mean over the step's samples"),
    ("reward_std", "Reward spread", "standard deviation"),
    ("advantage/mean_abs", "Normalised advantage", "mean |A|"),
    ("eval/accuracy", "Held-out accuracy", "greedy"),
    ("loss", "Loss: near 0 by construction", "mean over the updates"),
    ("kl", "KL to the reference", "nats per token"),
    ("entropy", "Entropy", "nats per token"),
    ("clip_ratio/region_mean", "Clip ratio", "share of tokens"),
    ("completions/mean_length", "Completion length", "tokens"),
    ("step_time", "Time of a step", "seconds"),
    ("grad_norm", "Gradient norm", ""),
    ("ratio/max", "Largest ratio", ""),
)


def save_overlay(runs: Mapping[str, Rows], path: Path) -> None:
    """Draws the curves of several runs over each other.

    Args:
        runs: by the names that the legend gives them.

    Raises:
        PlotError: there is no run. OSError: the file cannot be written.
    """
    if not runs:
        raise PlotError("there is no run to plot: name the directories of some.")
    figure, panels = _figure("Running medians of " + ("one run" if len(runs) == 1 else f"{len(runs)} runs"))
    for axes, (name, title, unit) in zip(panels, _OVERLAID):
        _panel(axes, title, unit)
        seen: list[float] = []
        for i, (run, records) in enumerate(runs.items()):
            steps, values = records.series(name)
            marker = "o" if name.startswith("eval/") or len(values) == 1 else None
            axes.plot(steps, running_median(values, 1 if marker else _span(len(values))), label=run, linewidth=1.6,
                      color=COLOURS[i % len(COLOURS)], linestyle=("-", "--", ":")[i // len(COLOURS) % 3],
                      marker=marker, markersize=3.5)  # fmt: skip
            seen += values
        if name == "eval/accuracy":
            axes.set_ylim(-0.02, 1.02)
        elif seen:
            axes.set_ylim(*limits(seen))
        else:
            _note(axes, "in none of these runs", 0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9, frameon=False)
    figure.savefig(path)
