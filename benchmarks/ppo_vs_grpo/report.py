"""From steps and memory to a table, a summary and files."""

from __future__ import annotations

import csv
import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.ppo_vs_grpo.arms import Settings
from benchmarks.ppo_vs_grpo.memory import MemoryRow
from benchmarks.ppo_vs_grpo.runs import StepRow
from benchmarks.report import WIDTH, finite

LAST = 10  # steps at the end of a run
MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """One number of one arm, with the least and the greatest over seeds where there is one per seed."""

    metric: str
    unit: str
    arm: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Results:
    environment: dict[str, object]
    settings: Settings
    steps: list[StepRow]
    memory: list[MemoryRow]

    @property
    def arms(self) -> list[str]:
        """Those that were trained."""
        return list(dict.fromkeys(row.arm for row in self.steps))

    def curve(self, arm: str, name: str) -> dict[int, dict[int, float]]:
        return curve_of(self.steps, arm, name)


def curve_of(rows: Sequence[object], arm: str, name: str) -> dict[int, dict[int, float]]:
    """step → seed → value, where there is one; rows have ``arm``, ``step`` and ``seed``."""
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        value = getattr(row, name)
        if row.arm == arm and value is not None:
            found.setdefault(row.step, {})[row.seed] = value
    return found


def over_seeds(metric: str, arm: str, values: Sequence[float]) -> Figure:
    return Figure(metric, "", arm, statistics.fmean(values), min(values), max(values))


def figures(results: Results) -> list[Figure]:
    """All that the table shows."""
    found: list[Figure] = []
    for arm in results.arms:
        accuracy, reward = results.curve(arm, "accuracy"), results.curve(arm, "reward")
        last = sorted(reward)[-LAST:]
        at_end = [statistics.fmean(reward[step][seed] for step in last) for seed in reward[last[0]]]
        width = statistics.fmean(max(by_seed.values()) - min(by_seed.values()) for by_seed in reward.values())
        found += [
            over_seeds("held-out accuracy before", arm, list(accuracy[0].values())),
            over_seeds("held-out accuracy after", arm, list(accuracy[max(accuracy)].values())),
            over_seeds(f"reward, last {len(last)} steps", arm, at_end),
            Figure("reward: max - min over seeds, mean", "", arm, width),
        ]
        for metric, name in (("sampling", "sampling_ms"), ("update", "update_ms")):
            times = [value for by_seed in results.curve(arm, name).values() for value in by_seed.values()]
            found.append(Figure(f"time of a step: {metric}", "ms", arm, statistics.median(times)))
        found += [
            Figure(f"{name} per step", "", arm, statistics.fmean(v for s in curve.values() for v in s.values()))
            for name, curve in (
                ("token budget", results.curve(arm, "budget_tokens")),
                ("tokens up to their ends", results.curve(arm, "counted_tokens")),
            )
        ]
        explained = results.curve(arm, "explained_variance")
        if explained:
            ends = [statistics.fmean(explained[step][seed] for step in last) for seed in explained[last[0]]]
            found.append(over_seeds(f"value: variance explained, last {len(last)}", arm, ends))
    for row in results.memory:
        held, peak = f"memory held, {row.model} model", f"memory at its peak, {row.model} model"
        if row.arm in results.arms:
            found.append(Figure(held, "MiB", row.arm, row.held / MIB))
        else:
            peak = f"peak, both graphs at once, {row.model} model"
        found.append(Figure(peak, "MiB", row.arm.split(",")[0], row.peak / MIB))
    return found


def shown(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    if figure.low is not None:
        return f"{figure.value:.3f} ({figure.low:.3f}-{figure.high:.3f})"
    if figure.unit:
        return f"{figure.value:.1f} {figure.unit}"
    return f"{figure.value:.3f}" if figure.value < 10 else f"{figure.value:.0f}"


def table(results: Results) -> str:
    """Medians of times; means of the rest, with (min-max) over seeds."""
    found = figures(results)
    metrics = list(dict.fromkeys(figure.metric for figure in found))
    by_place = {(figure.metric, figure.arm): figure for figure in found}
    lines = [f"{'':<38}" + "".join(f"{arm:>21}" for arm in results.arms)]
    lines += [
        f"{metric:<38}" + "".join(f"{shown(by_place.get((metric, arm))):>21}" for arm in results.arms)
        for metric in metrics
    ]
    return "\n".join(lines)


def seeds_of(results: Results) -> str:
    count = len(results.settings.seeds)
    return f"{count} seed{'' if count == 1 else 's'}"


def memory_of(results: Results, model: str, arm: str) -> MemoryRow:
    return next(row for row in results.memory if (row.model, row.arm) == (model, arm))


def summary(results: Results) -> list[str]:
    """What was measured of what is often said, and what it does not show."""
    found = {(figure.metric, figure.arm): figure for figure in figures(results)}
    lines = ["What was measured of what is often said"]
    for model in dict.fromkeys(row.model for row in results.memory):
        grpo, ppo = memory_of(results, model, "GRPO"), memory_of(results, model, "PPO")
        both = memory_of(results, model, "PPO, both graphs at once")
        lines.append(
            f'"Half the memory": GRPO\'s peak was {grpo.peak / ppo.peak:.2f} of PPO\'s with the {model} model '
            f"({grpo.parameters:,} parameters, {grpo.completions} completions per step), and "
            f"{grpo.peak / both.peak:.2f} where PPO holds both graphs at once; between steps it holds "
            f"{grpo.held / ppo.held:.2f}."
        )
    after = {arm: found["held-out accuracy after", arm] for arm in results.arms}
    width = {arm: found["reward: max - min over seeds, mean", arm] for arm in results.arms}
    lines.append(
        f'"More stable": over {seeds_of(results)} the final accuracy spread by '
        + " and ".join(f"{after[arm].high - after[arm].low:.3f} ({arm})" for arm in results.arms)
        + ", the reward at a step by "
        + " and ".join(f"{width[arm].value:.3f} ({arm})" for arm in results.arms)
        + ", the greatest less the least."
    )
    explained = [figure for (metric, _), figure in found.items() if metric.startswith("value:")]
    lines += [
        f"PPO's value network explained {figure.value:.2f} of the variance of the returns at the end of the runs: the "
        "nearer to 0, the more PPO is a policy gradient with the batch's mean as its baseline."
        for figure in explained
    ]
    times = {arm: sum(found[f"time of a step: {name}", arm].value for name in ("sampling", "update"))
             for arm in results.arms}  # fmt: skip
    lines.append(
        f"Time: PPO's step took {times['PPO'] / times['GRPO']:.2f} of GRPO's "
        f"({times['PPO']:.0f} and {times['GRPO']:.0f} ms, of which the sampling is the same work)."
    )
    lines.append(
        "What this does not show: anything about another task, about large models, or about rewards that come in the "
        "middle of a completion, where a value network has more to tell. A handful of seeds says little about how "
        "often a run fails. Neither arm's settings were searched for its best."
    )
    return lines


def wrapped(lines: Sequence[str]) -> str:
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)


def write(out: Path, results: Results) -> list[Path]:
    """``results.json`` with conditions, settings and figures, ``results.csv`` the figures, ``steps.csv`` every step."""
    out.mkdir(parents=True, exist_ok=True)
    everything = {
        "environment": results.environment,
        "settings": asdict(results.settings),
        "summary": summary(results),
        "figures": records(figures(results)),
        "memory": records(results.memory),
    }
    path = out / "results.json"
    path.write_text(json.dumps(everything, indent=1, allow_nan=False) + "\n")
    return [
        path,
        write_csv(out / "results.csv", [row | results.environment for row in everything["figures"]]),
        write_csv(out / "steps.csv", records(results.steps)),
    ]


def records(rows: Sequence[object]) -> list[dict[str, object]]:
    return [{name: finite(value) for name, value in asdict(row).items()} for row in rows]


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
