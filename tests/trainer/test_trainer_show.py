"""What a person sees of the trainer: sample tables, curves, overlaid runs, TensorBoard files."""

import io
import math

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from rich.console import Console

from grpo_kernels.trainer import __main__ as entry
from grpo_kernels.trainer import cli, overlay, plots, tensorboard
from grpo_kernels.trainer.arguments import parse
from grpo_kernels.trainer.console import Reporter
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.records import Records, Rows
from grpo_kernels.trainer.rollout import Rollout
from trainer_cases import run

pytestmark = pytest.mark.usefixtures("one_thread")


# --- samples --------------------------------------------------------------------------------------


def shown(rewards, completions, *, prompt="37+48=", size=4, step=2, **options):
    console = Console(file=io.StringIO(), width=80)
    ids = torch.zeros(len(rewards), 1, dtype=torch.long)
    rollout = Rollout(ids, ids, ids, ids.bool(), ids[:, 0].bool(), torch.tensor(rewards),
                      prompts=(prompt,) * len(rewards), completions=tuple(completions))  # fmt: skip
    with Reporter(Options(num_generations=size, samples_every=2, **options), console) as reporter:
        reporter.samples(step, rollout)
    return console.file.getvalue()


def test_samples_are_of_a_group_that_differs_best_first():
    said = shown([1.0, 1.0, 1.0, 1.0, 0.0, 0.5, 1.0, 0.25], ["a", "b", "c", "d", "worst", "second", "best", "third"])
    lines = [line for line in said.splitlines() if "│" in line]
    assert [line.split("│")[1].strip() for line in lines] == ["best", "second", "third", "worst"]
    assert [line.split("│")[2].strip() for line in lines] == ["1.000", "0.500", "0.250", "0.000"]
    # mean 0.4375, standard deviation 0.4270, by hand
    assert lines[0].split("│")[3].strip() == "+1.32" and lines[3].split("│")[3].strip() == "-1.02"
    assert "samples of step 2" in said and lines[0].startswith("37+48=")


def test_samples_are_four_of_many_and_fit():
    said = shown([float(i) for i in range(16)], ["line\none [bold] " + "x" * 200] * 16, prompt="p" * 300, size=16)
    assert sum("│" in line for line in said.splitlines()) == 4
    assert "15.000" in said and " 0.000" in said
    assert r"line\none [bold]" in said and max(map(len, said.splitlines())) <= 80


def test_samples_come_at_their_interval():
    assert shown([1.0, 0.0], ["a", "b"], size=2, step=3) == ""
    console = Console(file=io.StringIO(), width=80)
    with Reporter(Options(samples_every=0), console) as reporter:
        reporter.samples(2, None)
    assert console.file.getvalue() == ""


def test_a_run_shows_its_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)  # what takes the time
    _, _, said = run(tmp_path, samples_every=2, steps=4)
    assert said.count("samples of step") == 2 and "samples of step 4" in said
    assert max(len(line) for line in said.splitlines() if str(tmp_path) not in line) <= 80


def test_without_evaluation(tmp_path):
    """--eval-every 0: the accuracy is not measured, not before the first step and not after the last."""
    options = parse(["--eval-every", "0"])
    result, written, said = run(tmp_path, eval_every=options.eval_every, steps=11)
    assert not any("eval/accuracy" in row for row in written) and [row["step"] for row in written] == [*range(1, 12)]
    assert result.accuracy_before is None and result.accuracy_after is None
    assert "step 10/11" in said and "step 11/11" in said and "step 9/11" not in said
    (line,) = [line for line in said.splitlines() if "accuracy" in line]
    assert line.replace("│", " ").split() == ["accuracy,", "held-out,", "greedy", "-", "-"]
    # A run that goes on may be measured again; what comes first is not from before GRPO.
    result, written, said = run(tmp_path, eval_every=6, steps=13, resume=True)
    assert [row["step"] for row in written if "eval/accuracy" in row] == [12, 13]
    assert result.accuracy_before is None and result.accuracy_after == written[-1]["eval/accuracy"]
    with pytest.raises(OptionError, match="--eval-every must be 0 or more"):
        Options(eval_every=-1)


# --- curves ---------------------------------------------------------------------------------------


def rows(steps=30, **more):
    made = [{"step": 0, "eval/accuracy": 0.1}]
    for step in range(1, steps + 1):
        x = step / steps
        made.append({
            "step": step, "reward": x, "reward_std": 0.4, "frac_reward_zero_std": 0.3, "loss": 0.01 * math.sin(step),
            "advantage/mean_abs": 0.6, "advantage/min": -1.6, "advantage/max": 2.0, "entropy": 1 - x, "grad_norm": 1.0,
            "learning_rate": 1e-3, "completions/mean_length": 3.0, "completions/max_length": 4.0, "step_time": 1.0,
            "sampling_time": 0.2, "reward_time": 0.1, "loss_time": 0.7, "ratio/max": 1.3, **more,
        })  # fmt: skip
    return [*made, {"step": steps, "eval/accuracy": 0.9}]


def drawn(monkeypatch):
    """Titles and labels of the panels that are drawn."""
    figures, real = [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda title: figures.append(real(title)) or figures[-1])
    return lambda: {axes.get_title(loc="left"): axes.get_legend_handles_labels()[1] for axes in figures[-1][1]}


@pytest.mark.parametrize(
    ("more", "options", "panel", "labels"),
    [
        ({"rewards/a/mean": 0.1, "rewards/b/mean": 0.2}, {}, "Raw reward", ["weighted sum", "a", "b"]),
        ({"rewards/a/mean": 0.1}, {}, "Raw reward", []),
        ({"kl": 0.1}, {"kl_to": "old"}, "KL to the sampling policy", []),
        ({"kl": 0.1}, {}, "KL to the policy before GRPO", []),
        ({"cispo_clip_ratio": 0.1}, {"loss_type": "cispo"}, "Clip ratio", ["cispo_clip_ratio"]),
        ({}, {}, "Time of a step", ["sampling", "reward", "loss and update"]),
        ({"optimizer_time": 0.2}, {}, "Time of a step", ["sampling", "reward", "loss and update", "of it, optimizer"]),
    ],
    ids=str,
)
def test_curves(tmp_path, monkeypatch, more, options, panel, labels):
    panels = drawn(monkeypatch)
    monkeypatch.setattr(plots.Figure, "savefig", lambda *_: None)  # what takes the time; whole runs do it
    plots.save_curves(Rows(rows(**more)), Options(**options), "a task", tmp_path / "curves.png")
    assert panels()[panel] == labels and len(panels()) == 12


def written(directory, **more):
    records = Records(directory / "grpo_metrics" / "metrics.jsonl")
    for row in rows(**more):
        records.write(row)
    records.close()
    return directory


def test_plot_overlays_runs(tmp_path, monkeypatch, capsys):
    panels = drawn(monkeypatch)
    a, b = written(tmp_path / "a", kl=0.1), written(tmp_path / "b")
    out = tmp_path / "both.png"
    assert entry.main(["plot", str(a), str(b / "grpo_metrics"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")
    assert panels()["Held-out accuracy"] == [str(a), str(b / "grpo_metrics")]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], ["plot: nowhere has no metrics.jsonl", "--output-dir"]),
        (["early"], ["has no GRPO step yet"]),
        (["broken"], ["is not readable", "line 1"]),
        (["good", "--out", "x.txt"], ["--out x.txt must end in .png"]),
        (["good", "--out", "nowhere/x.png"], ["--out nowhere/x.png", "No such file"]),
        ([], ["DIR"]),
    ],
    ids=str,
)
def test_plot_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "good")
    for name, text in (("early", '{"step": 0, "eval/accuracy": 0.1}\n'), ("broken", "x\n{}\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    with pytest.raises(SystemExit) as exit:
        raise SystemExit(entry.main(["plot", *argv]))
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and all(word in message for word in words)


def test_overlay_of_nothing():
    with pytest.raises(plots.PlotError, match="name the directories"):
        plots.save_overlay({}, overlay.Path("x.png"))


# --- TensorBoard ----------------------------------------------------------------------------------


def test_without_tensorboard_a_run_says_once_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "available", lambda: False)
    _, _, said = run(tmp_path, steps=1)
    assert said.count("TensorBoard") == 1 and "pip install tensorboard" in said
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_files_have_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)  # what takes the time
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install '.[trainer]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, _, said = run(tmp_path, steps=2, save_every=2)
    assert "TensorBoard" not in said
    _, rows, _ = run(tmp_path, steps=3, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("reward", "eval/accuracy", "clip_ratio/low_mean"):
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        got = {event.step: event.value for event in events.Scalars(name)}
        assert got == {step: pytest.approx(value, rel=1e-6) for step, value in wanted}
