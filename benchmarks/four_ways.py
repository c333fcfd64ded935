"""The same task, learned four ways: supervised training, GRPO, PPO, distillation.

    python -m benchmarks.four_ways [--seeds 0 1 2] [--steps N] --out DIR

One policy is warmed up per seed, and each way goes on from its weights: with the same problems in the same order, the
same optimizer, rate and number of updates. GRPO and PPO are those of `benchmarks.ppo_vs_grpo`; GRPO, PPO and
distillation sample as many completions. The teacher is a wider model, trained once before all of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from benchmarks import environment
from benchmarks.plots import DPI, FONT_SIZE, GREY, conditions
from benchmarks.ppo_vs_grpo.arms import GRPO, PPO, Arm, Settings
from benchmarks.ppo_vs_grpo.plot import COLOURS, band
from benchmarks.ppo_vs_grpo.report import Figure, curve_of, over_seeds, records, shown, write_csv
from benchmarks.ppo_vs_grpo.runs import Run, StepRow, warmed_up
from benchmarks.report import WIDTH, header
from grpo_kernels.trainer import loop
from grpo_kernels.trainer.model import tiny_qwen2
from grpo_kernels.trainer.options import Options
from grpo_kernels.trainer.rollout import Rollout
from grpo_kernels.trainer.task import Problem, Task, addition
from grpo_kernels.trainer.teacher import Teacher, divergence
from grpo_kernels.trainer.tokenizer import character_tokenizer
from grpo_kernels.trainer.warmup import answer_loss

QUICK = {"seeds": (0, 1), "steps": 4, "prompts": 8, "eval_every": 2, "warmup_steps": 20, "teacher_steps": 20}
K = 8  # of pass@k
MEASURES = {"accuracy": "greedy accuracy", "pass_1": "pass@1", "pass_k": f"pass@{K}"}
START, TEACHER = "the start", "the teacher"


@dataclass(frozen=True)
class Plan(Settings):
    """What all ways share, as in `benchmarks.ppo_vs_grpo`, and the teacher."""

    steps: int = 60
    prompts: int = 32
    learning_rate: float = 1e-3
    value_learning_rate: float = 1e-3
    eval_every: int = 15
    eval_samples: int = 2 * K  # completions of each held-out problem
    teacher_hidden_size: int = 128  # the policy has 64
    teacher_steps: int = 200  # supervised, one update each
    teacher_prompts: int = 256  # in an update
    teacher_learning_rate: float = 2e-3  # as of the warm-up


@dataclass(frozen=True)
class Point:
    """What one policy can do after a step, on the held-out problems."""

    seed: int
    arm: str
    step: int
    seconds: float  # of training so far, without measurements
    accuracy: float  # of greedy completions
    pass_1: float  # of sampled ones
    pass_k: float


# --- the ways that `ppo_vs_grpo` has not ----------------------------------------------------------


class Supervised(Arm):
    """The warm-up goes on: cross-entropy of the right answers, and no samples."""

    name = "supervised"

    def learn(self, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> None:
        for _ in range(self.settings.iterations):
            answer_loss(self.policy, tokenizer, problems).backward()
            self.learners[0].descend()


class SupervisedRun(Run):
    """A run whose arm is shown the answers to a step's problems."""

    def step(self, number: int, measure_accuracy: bool = False) -> StepRow:
        start = self.clock()
        self.arm.policy.train()
        self.arm.learn(self.tokenizer, next(self.problems))
        self.arm.finish_step()
        return StepRow(self.seed, self.arm.name, number, sampling_ms=0.0, update_ms=1e3 * (self.clock() - start))


class Distillation(Arm):
    """Reverse KL to the teacher at every token of the policy's own samples; rewards move nothing."""

    name = "distillation"

    def __init__(self, policy: PreTrainedModel, settings: Settings, teacher: PreTrainedModel) -> None:
        super().__init__(policy, settings)
        self.teacher = Teacher(teacher, None)
        self.options = Options(temperature=settings.temperature)

    def update(self, rollout: Rollout) -> dict[str, float]:
        for _ in range(self.settings.iterations):
            divergence(self.policy, None, self.teacher, rollout, self.options,
                       completion_mask=rollout.completion_mask).loss.backward()  # fmt: skip
            self.learners[0].descend()
        return {}


WAYS = (Supervised, GRPO, PPO, Distillation)
STYLES = {  # colour, marker
    Supervised.name: ("#CC79A7", "D"), GRPO.name: (COLOURS["GRPO"], "o"), PPO.name: (COLOURS["PPO"], "s"),
    Distillation.name: ("#009E73", "^"),
}  # fmt: skip


# --- training -------------------------------------------------------------------------------------


def point(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, plan: Plan, seed: int, arm: str,
    step: int = 0, seconds: float = 0.0,
) -> Point:  # fmt: skip
    """Measures a policy; random numbers go on as if nothing had been sampled."""
    options = Options(seed=seed, eval_samples=plan.eval_samples, temperature=plan.temperature)
    row = loop.measure(policy, tokenizer, task, options)
    return Point(seed, arm, step, seconds, row["eval/accuracy"], row["eval/pass@1"], row[f"eval/pass@{K}"])


def trained_teacher(tokenizer: PreTrainedTokenizerBase, task: Task, plan: Plan) -> tuple[PreTrainedModel, Point]:
    """A wider model, trained on right answers until its rate has fallen to 0."""
    seed = plan.seeds[0]
    torch.manual_seed(seed)
    model = tiny_qwen2(tokenizer, task.max_completion_length, hidden_size=plan.teacher_hidden_size)
    own = replace(plan, steps=plan.teacher_steps, prompts=plan.teacher_prompts, iterations=1,
                  learning_rate=plan.teacher_learning_rate)  # fmt: skip
    run = SupervisedRun(Supervised(model, own), tokenizer, task, seed)
    seconds = sum(run.step(number).update_ms for number in range(1, own.steps + 1)) / 1e3
    return model.eval().requires_grad_(False), point(model, tokenizer, task, plan, seed, TEACHER, own.steps, seconds)


def run_seed(
    policy: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, plan: Plan,
    seed: int, show: Callable[[Sequence[Point]], None],
) -> list[Point]:  # fmt: skip
    """Trains every way from the given weights, which stay as they are; they take turns, step by step."""
    arms = [kind(copy.deepcopy(policy), plan, *([teacher] if kind is Distillation else [])) for kind in WAYS]
    runs = [(SupervisedRun if isinstance(arm, Supervised) else Run)(arm, tokenizer, task, seed) for arm in arms]
    seconds = dict.fromkeys((arm.name for arm in arms), 0.0)
    start = point(policy, tokenizer, task, plan, seed, START)
    points = [start, *(replace(start, arm=arm.name) for arm in arms)]
    show(points[:1])
    for number in range(1, plan.steps + 1):
        for run in runs if number % 2 else runs[::-1]:
            row = run.step(number, measure_accuracy=False)
            seconds[row.arm] += (row.sampling_ms + row.update_ms) / 1e3
        if number % plan.eval_every == 0 or number == plan.steps:
            new = [point(a.policy, tokenizer, task, plan, seed, a.name, number, seconds[a.name]) for a in arms]
            show(new)
            points += new
    return points


# --- what comes out -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    environment: dict[str, object]
    plan: Plan
    parameters: dict[str, int]  # of the policy and of the teacher
    points: list[Point]

    @property
    def arms(self) -> list[str]:
        """The teacher and the start too."""
        return list(dict.fromkeys(point.arm for point in self.points))


def figures(results: Results) -> list[Figure]:
    """What each way ends with: means over the seeds, with the least and the greatest."""
    found = []
    for arm in results.arms:
        for name, metric in (*MEASURES.items(), ("seconds", "seconds of training")):
            curve = curve_of(results.points, arm, name)
            values = list(curve[max(curve)].values())
            one = arm == TEACHER  # there is one, and no range
            found.append(Figure(metric, "", arm, values[0]) if one else over_seeds(metric, arm, values))
    return found


def table(results: Results) -> str:
    """A line per way, at most 80 columns; seconds are means."""
    by_place = {(figure.metric, figure.arm): figure for figure in figures(results)}
    lines = [f"{'':<13}" + "".join(f"{metric:>20}" for metric in MEASURES.values()) + f"{'s':>7}"]
    for arm in (START, *(kind.name for kind in WAYS), TEACHER):
        cells = "".join(f"{shown(by_place[metric, arm]):>20}" for metric in MEASURES.values())
        lines.append(f"{arm:<13}{cells}{by_place['seconds of training', arm].value:>7.1f}")
    return "\n".join(lines)


def write(out: Path, results: Results) -> list[Path]:
    """``results.json`` with conditions and figures, ``results.csv`` the figures, ``points.csv``, ``four_ways.png``."""
    out.mkdir(parents=True, exist_ok=True)
    own = records(figures(results))
    everything = {
        "environment": results.environment, "settings": asdict(results.plan), "parameters": results.parameters,
        "figures": own,
    }  # fmt: skip
    path = out / "results.json"
    path.write_text(json.dumps(everything, indent=1, allow_nan=False) + "\n")
    return [
        path,
        write_csv(out / "results.csv", [row | results.environment for row in own]),
        write_csv(out / "points.csv", records(results.points)),
        draw(results, out / "four_ways.png"),
    ]


def draw(results: Results, path: Path) -> Path:
    """A panel per measure, the legend beside them."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    plan = results.plan
    with rc_context({"font.size": FONT_SIZE}):
        figure = Canvas(figsize=(15, 5), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(f"Two-digit addition, learned four ways from the same start\n{conditions(results.environment)}",
                        fontsize=FONT_SIZE)  # fmt: skip
        panels = figure.subplots(1, len(MEASURES), sharey=True)
        for axes, (name, title) in zip(panels, MEASURES.items()):
            for arm, (colour, marker) in STYLES.items():
                band(axes, curve_of(results.points, arm, name), colour, marker, arm)
            for arm, line in ((TEACHER, "--"), (START, ":")):
                curve = curve_of(results.points, arm, name)
                axes.axhline(statistics.fmean(curve[max(curve)].values()), color=GREY, linestyle=line, label=arm)
            axes.set_title(f"Held-out problems: {title}", loc="left", fontsize=FONT_SIZE, fontweight="bold")
            axes.set_xlabel("step")
            axes.set_ylim(0, 1.02)
            axes.grid(True, color="#DDDDDD", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("share of problems solved")
        seeds = f"{len(plan.seeds)} seed{'' if len(plan.seeds) == 1 else 's'}"
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False,
                      title=f"line: mean of {seeds}\nband: least to greatest")  # fmt: skip
        figure.savefig(path)
    return path


# --- the command line -----------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Plan]:
    default = Plan()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.four_ways", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="a start and four runs each (default: 0 1 2)")
    parser.add_argument("--steps", type=int, metavar="N", help=f"of each run (default: {default.steps})")
    parser.add_argument("--prompts", type=int, metavar="N",
                        help=f"problems per step, with 8 completions each (default: {default.prompts})")  # fmt: skip
    parser.add_argument("--learning-rate", type=float, metavar="X",
                        help=f"of every policy, at its peak (default: {default.learning_rate:g})")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="two seeds, a few small steps: does it run?")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("bench-results/four_ways"),
                        help="write results.json, two CSV files and the plot there (default: %(default)s)")  # fmt: skip
    given = parser.parse_args(argv)
    chosen = dict(QUICK) if given.quick else {}
    for name in ("steps", "prompts", "learning_rate"):
        if (value := getattr(given, name)) is not None:
            if not value > 0:
                parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
            chosen[name] = value
    if given.seeds is not None:
        if len(set(given.seeds)) != len(given.seeds) or min(given.seeds) < 0:
            parser.error(f"--seeds must be different numbers, 0 or more, got {' '.join(map(str, given.seeds))}")
        chosen["seeds"] = tuple(given.seeds)
    return given, Plan(**chosen)


def show(points: Sequence[Point]) -> None:
    cells = "".join(f"  {p.arm} {p.accuracy:.3f}" for p in points)
    print(f"step {points[0].step:>3}{cells}", flush=True)


def measure(plan: Plan, task: Task) -> Results:
    """All of it, on the CPU; prints how far it has got."""
    where = environment.describe(torch.device("cpu")) | {"transformers": environment.version("transformers")}
    print(header(where))
    print(textwrap.fill(", ".join(f"{name} {value}" for name, value in asdict(plan).items()), WIDTH), flush=True)
    tokenizer = character_tokenizer(task.alphabet)
    teacher, taught = trained_teacher(tokenizer, task, plan)
    print(f"\nteacher: {taught.seconds:.0f} s, greedy accuracy {taught.accuracy:.3f}", flush=True)
    points, parameters = [taught], {"teacher": teacher.num_parameters()}
    for seed in plan.seeds:
        torch.manual_seed(seed)
        policy = tiny_qwen2(tokenizer, task.max_completion_length)
        parameters["policy"] = policy.num_parameters()
        warm = warmed_up(policy, tokenizer, task, plan, seed)
        print(f"\nseed {seed}: {warm.steps} supervised steps before; greedy accuracies:", flush=True)
        points += run_seed(policy, teacher, tokenizer, task, plan, seed, show)
    return Results(where, plan, parameters, points)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the files; returns the exit status."""
    given, plan = parse(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    results = measure(plan, addition())
    print("\n" + table(results))
    print("\nWritten:", *write(given.out, results), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
