"""What a person sees: a header, two progress bars, tables of samples, and a short table at the end.

On a terminal the bars are live; elsewhere (a pipe, a log of CI) the same numbers come as plain lines.
"""

import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from grpo_kernels.trainer import tensorboard
from grpo_kernels.trainer.options import REWARD_WINDOW, SOLVED_REWARD, Options
from grpo_kernels.trainer.pass_at_k import PREFIX, rates_in
from grpo_kernels.trainer.records import Rows
from grpo_kernels.trainer.rewards import advantages_of
from grpo_kernels.trainer.rollout import Rollout, Row
from grpo_kernels.trainer.task import Task
from grpo_kernels.trainer.warmup import WarmUp

# Rewards of single steps are noisy: the table shows means over this many.
WINDOW = 10
SAMPLES = 4  # completions in a table, of one prompt
WIDTH = 80


class Reporter:
    """Prints a run's progress. Use as a context manager, so that the bars are taken down on any exit."""

    def __init__(self, options: Options, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._options = options
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<7}"),
            TextColumn("{task.fields[status]:<30}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]:>9}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._bar = self._progress.add_task("", total=None, visible=False, status="", count="")
        self._rewards: list[float] = []
        self._last: Row = {}
        self._accuracy: float | None = None

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _say(self, text: str = "") -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def header(self, task: Task, parameters: int, device: torch.device, vocabulary: int, left_out: int = 0) -> None:
        options = self._options
        hidden = options.takes_hidden_states(task.max_completion_length, vocabulary)
        self._say(f"GRPO on {task.name}: {len(task.train)} problems to learn from, {len(task.held_out)} held out")
        if left_out:
            self._say(f"  {left_out} left out: their prompts have more than {options.max_prompt_length} tokens")
        example = _one_line(task.held_out[0].prompt)[-30:] + _one_line(task.held_out[0].answer)[-20:]
        self._say(f"  e.g. {example}  ({task.note})")
        what = "Qwen2 of" if options.model is None else f"{Path(options.model).name[:24]},"
        weights = "random weights" if options.model is None else "fp32 weights"
        self._say(f"{what} {parameters:,} parameters, {weights}; {device}, {options.dtype}, seed {options.seed}")
        self._say(
            f"{options.batch_size} prompts x {options.num_generations} completions a step, "
            f"{options.updates} updates each; loss {options.loss_type}, beta {options.beta:g}"
        )
        if not tensorboard.available():
            self._say(tensorboard.HOW_TO_GET_IT)
        self._say("loss from hidden states and the head, chunk by chunk" if hidden else "loss from logits")
        self._say()

    def warming_up(self, step: int, accuracy: float) -> None:
        aim = self._options.warmup_accuracy
        if self._live:
            self._progress.update(
                self._bar, description="warm-up", visible=True, total=aim, completed=min(accuracy, aim),
                status=f"accuracy {accuracy:.3f}", count=f"step {step}",
            )  # fmt: skip
        elif step % 50 == 0:
            self._say(f"warm-up  accuracy {accuracy:.3f}  step {step}")

    def warmed_up(self, warmup: WarmUp) -> None:
        if warmup.steps == 0:
            return
        text = f"warm-up: {warmup.steps} supervised steps, held-out accuracy {warmup.accuracy:.3f}"
        if not warmup.reached:
            text += f", below the {self._options.warmup_accuracy:g} aimed at"
        self._progress.remove_task(self._bar)
        self._say(text)
        self._bar = self._progress.add_task("GRPO", total=self._options.max_steps, status="", count="")

    def resumed(self, step: int, finished: bool) -> None:
        """Says where a run goes on; ``finished``: that it does not."""
        said = f"going on from the checkpoint of step {step}"
        if finished:
            said = f"the run is finished; --steps N above {step} goes on with it"
        self._say(said)
        self._progress.remove_task(self._bar)
        self._bar = self._progress.add_task("GRPO", total=self._options.max_steps, status="", count="")

    def samples(self, step: int, rollout: Rollout) -> None:
        """A table of one prompt's completions, at intervals: of the first group whose rewards differ."""
        every, size = self._options.samples_every, self._options.num_generations
        if not every or step % every:
            return
        advantages = advantages_of(rollout, self._options).tolist()
        groups = range(0, len(advantages), size)
        first = next((i for i in groups if any(advantages[i : i + size])), 0)
        # From best to worst, evenly.
        order = sorted(range(first, first + size), key=lambda i: -advantages[i])
        shown = [order[i * (size - 1) // (min(SAMPLES, size) - 1)] for i in range(min(SAMPLES, size))]
        table = Table(title=f"samples of step {step}", title_justify="left", show_edge=False, pad_edge=False,
                      header_style="bold", width=min(WIDTH, self._console.width))  # fmt: skip
        for title in ("prompt", "completion"):
            table.add_column(title, ratio=1, no_wrap=True, overflow="ellipsis")
        for title in ("reward", "advantage"):
            table.add_column(title, justify="right")
        prompt = _one_line(rollout.prompts[first])
        for i in shown:
            cells = (prompt[-200:], _one_line(rollout.completions[i]))
            table.add_row(*map(Text, cells), f"{rollout.rewards[i].item():.3f}", f"{advantages[i]:+.2f}")
            prompt = ""
        self._console.print(table)
        self._say()

    def row(self, row: Row) -> None:
        """Shows a row of metrics, of a step or of an evaluation."""
        if "eval/accuracy" in row:
            self._accuracy = row["eval/accuracy"]
        else:
            self._last = row
            self._rewards.append(row["reward"])
        if not self._last:
            return
        steps, step = self._options.max_steps, self._last["step"]
        if self._live:
            self._progress.update(
                self._bar, description="GRPO", visible=True, total=steps, completed=step,
                status=f"reward {self._last['reward']:.3f}{self._measured(' ')}", count=f"{step}/{steps}",
            )  # fmt: skip
        elif "eval/accuracy" in row or (not self._options.eval_every and (step % WINDOW == 0 or step == steps)):
            recent = self._rewards[-(self._options.eval_every or WINDOW) :]
            line = f"reward {sum(recent) / len(recent):.3f}{self._measured('  ')}"
            for name in ("kl", "divergence", "entropy"):
                if name in self._last:
                    line += f"  {name} {self._last[name]:.3f}"
            self._say(f"{line}  step {step}/{steps}  {self._last['step_time']:.2f} s")
            passes = [f"{name.removeprefix('eval/')} {row[name]:.3f}" for name in row if name.startswith(PREFIX)]
            if passes:
                self._say("  " + "  ".join(dict.fromkeys((passes[0], passes[-1]))))

    def _measured(self, space: str) -> str:
        return "" if self._accuracy is None else f"{space}accuracy {self._accuracy:.3f}"

    def summary(self, records: Rows, seconds: dict[str, float], files: dict[str, Path]) -> None:
        """The table at the end.

        Args:
            seconds: wall time by phase.
            files: what was written, by what it is.
        """
        self._progress.stop()
        reward = records.series("reward")[1]
        window = min(WINDOW, len(reward))
        table = Table(title=None, show_edge=False, pad_edge=False, header_style="bold")
        for title in ("", "before GRPO", "after GRPO"):
            table.add_column(title, justify="right" if title else "left")
        for name in ("eval/accuracy", *rates_in(records)):
            before, after = ("-" if value is None else f"{value:.3f}" for value in records.ends(name))
            how = "sampled" if name.startswith(PREFIX) else "greedy"
            table.add_row(f"{name.removeprefix('eval/')}, held-out, {how}", before, f"[bold]{after}[/bold]")
        first, last = sum(reward[:window]) / window, sum(reward[-window:]) / window
        table.add_row(f"reward, sampled, {window} steps", f"{first:.3f}", f"{last:.3f}")
        self._say()
        if self._options.solved(reward):
            self._say(f"stopped at step {len(reward)}: mean reward of {REWARD_WINDOW} steps at {SOLVED_REWARD}")
            self._say()
        self._console.print(table)
        self._say()
        for what, path in files.items():
            self._say(f"{what:<8} {path}")
        self._say(f"{'time':<8} " + ", ".join(f"{phase} {spent:.0f} s" for phase, spent in seconds.items()))
        self._say(f"{'a step':<8} {_a_step(records)}")
        if self._options.teacher is None:
            self._say("The loss is near 0 by construction (centred advantages): watch the reward.")
        else:
            self._say("The loss is the divergence from the teacher: 0 where the policy has become it.")


def _a_step(records: Rows) -> str:
    """The medians of its time and of the parts of it, and the most memory that it took."""
    names = {"sampling": "sampling", "loss": "loss", "optimizer": "of it optimizer"}
    times = {name: records.series(f"{name}_time")[1] for name in ("step", *names)}
    said = f"{statistics.median(times.pop('step')):.3f} s: "
    said += ", ".join(f"{names[name]} {statistics.median(seen):.3f}" for name, seen in times.items() if seen)
    memory = [gib for name in ("sampling", "loss") for gib in records.series(f"{name}_memory")[1]]
    return f"{said}; {max(memory):.1f} GiB" if memory else said


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")
