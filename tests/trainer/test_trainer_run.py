"""The minimal trainer as a whole: short runs, what they write and show, and the command line."""

import dataclasses
import io
import json
import re

import pytest

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_kernels.trainer import __main__ as entry
from grpo_kernels.trainer import cli, data, loop, plots, warmup
from grpo_kernels.trainer.arguments import parse
from grpo_kernels.trainer.console import Reporter
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.records import Records, Rows
from grpo_kernels.trainer.task import addition

pytestmark = pytest.mark.usefixtures("one_thread")

TIMES = {"step_time", "sampling_time", "reward_time", "loss_time", "optimizer_time"}
TASK = addition()
SMALL = {"steps": 3, "batch_size": 4, "num_generations": 4, "eval_every": 2, "warmup_steps": 4}


@pytest.fixture
def easy(monkeypatch):
    """Runs get a reward that an untrained policy earns now and then, so that there is something to learn."""

    def starts_even(prompts, completions, **columns):
        return [float(text[:1] in set("02468")) for text in completions]

    monkeypatch.setitem(data.BUILT_IN, "addition", lambda: dataclasses.replace(TASK, reward=starts_even))
    return dataclasses.replace(TASK, reward=starts_even)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


def run(tmp_path, **options):
    """A short run; its result, the rows of metrics.jsonl, and what it printed."""
    console = quiet()
    result = cli.run(Options(output_dir=str(tmp_path), **{**SMALL, **options}), console)
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    return result, rows, console.file.getvalue()


# --- a run ----------------------------------------------------------------------------------------

STEP_NAMES = {
    "step", "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "step_time", "reward", "reward_std",
    "frac_reward_zero_std", "rewards/starts_even/mean", "rewards/starts_even/std", "advantage/mean_abs",
    "advantage/min", "advantage/max", "sampling_time", "reward_time", "loss_time", "kl", "entropy",
    "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
    "clip_ratio/region_mean", "completions/mean_length", "completions/min_length",
    "completions/max_length", "completions/mean_terminated_length", "completions/clipped_ratio",
}  # fmt: skip


def test_run_writes_what_it_promises(tmp_path, easy):
    result, rows, printed = run(tmp_path)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval/accuracy" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row.keys() >= STEP_NAMES for row in steps)
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert "eval/accuracy" in rows[0]
    assert "eval/accuracy" in rows[-1]
    assert result.accuracy_before == rows[0]["eval/accuracy"]
    assert result.accuracy_after == rows[-1]["eval/accuracy"]
    assert steps[0]["kl"] != 0.0  # the second update of the first rollout has left the reference
    assert steps[0]["num_tokens"] < steps[1]["num_tokens"]
    assert result.metrics == tmp_path / "grpo_metrics" / "metrics.jsonl"
    assert (tmp_path / "grpo_metrics" / "curves.png").read_bytes().startswith(b"\x89PNG")
    for text in ("before GRPO", "after GRPO", str(result.curves.name), "watch the reward"):
        assert text in printed
    own = [line for line in printed.splitlines() if str(tmp_path) not in line]
    assert max(map(len, own)) <= 80


def test_saved_model_is_the_trained_one(tmp_path, easy):
    result, rows, _ = run(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(result.model)
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert loop.evaluate(model, tokenizer, easy) == rows[-1]["eval/accuracy"]
    encoded = tokenizer("37+48=", return_tensors="pt")
    assert model.generate(**encoded).shape[1] <= 6 + TASK.max_completion_length


def test_same_seed_same_metrics(tmp_path, easy, monkeypatch):
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)  # what takes the time

    def rows(name, seed):
        return [{k: v for k, v in row.items() if k not in TIMES} for row in run(tmp_path / name, seed=seed)[1]]

    first = rows("a", 5)
    assert rows("b", 5) == first
    assert rows("c", 6) != first


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0, "num_iterations": 1, "steps": 1},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "kl_estimator": "k2"},
        {"loss_type": "dapo", "epsilon_high": 0.28, "dtype": "bfloat16"},
        {"warmup_steps": 0, "temperature": 0.5, "loss_type": "bnpo", "num_generations": 2},
    ],
    ids=str,
)
def test_run_with_other_options(tmp_path, easy, options, monkeypatch):
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)  # what takes the time
    _, rows, printed = run(tmp_path, **options)
    assert ("kl" in rows[1]) == (options.get("beta") != 0.0)
    assert rows[-1]["step"] == options.get("steps", SMALL["steps"])
    assert all(value is not None for row in rows for value in row.values())
    assert ("warm-up:" in printed) == (options.get("warmup_steps") != 0)


def test_live_display_fits_80_columns(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, legacy_windows=False)
    options = Options(**{**SMALL, "steps": 10_000})
    with Reporter(options, console) as reporter:
        reporter.warming_up(5, 0.1)
        reporter.warmed_up(warmup.WarmUp(5, 0.4, True))
        reporter.row({"step": 0, "eval/accuracy": 0.4})
        reporter.row({"step": 9_999, "reward": 0.5})
    last = [line for line in re.split(r"[\r\n]", console.file.getvalue()) if "9999" in line][-1]
    assert "reward 0.500 accuracy 0.400" in last
    assert "9999/10000" in last
    assert "…" not in last
    assert len(last.removeprefix("\x1b[2K")) <= 80


def test_records_write_what_is_no_number_as_null(tmp_path):
    records = Records(tmp_path / "deep" / "metrics.jsonl")
    records.write({"step": 1, "loss": float("nan"), "kl": float("inf"), "reward": 0.5})
    records.close()
    written = json.loads((tmp_path / "deep" / "metrics.jsonl").read_text())
    assert written == {"step": 1, "loss": None, "kl": None, "reward": 0.5}


def test_curves_survive_values_that_are_no_numbers(tmp_path):
    records = Records(tmp_path / "metrics.jsonl")
    records.write({"step": 0, "eval/accuracy": 0.1})
    names = ("loss", "reward", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean")
    for step in (1, 2, 3):
        records.write({"step": step, **dict.fromkeys(names, float("nan"))})
    plots.save_curves(records, Options(), TASK.name, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_curves_of_a_short_run_without_accuracy(monkeypatch, tmp_path):
    figures, made = [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda title: figures.append((title, made(title))) or figures[-1][1])
    rows = [{"step": step, "reward": 0.5, "entropy": 11.7} for step in range(1, 31)]
    plots.save_curves(Rows(rows[:10]), Options(), TASK.name, tmp_path / "short.png")
    plots.save_curves(Rows(rows), Options(), TASK.name, tmp_path / "long.png")
    (short, (_, panels)), (long, _) = figures
    assert "running median" not in short and "running median" in long  # a short run has none
    accuracy, entropy = panels[3], panels[6]
    assert not list(accuracy.get_xticks()) and [text.get_text() for text in accuracy.texts] == ["not measured"]
    assert entropy.get_ylim()[1] > 1.04 * 11.7  # a curve that is all but constant is not cut in half by the edge


def test_running_median_and_limits():
    assert plots.running_median([1, 2, 100, 3, 4], 3) == [1.5, 2, 3, 4, 3.5]
    low, high = plots.limits([0.0] * 50 + [1.0] * 50 + [1000.0])
    assert low < 0.0 < 1.0 < high < 2.0


# --- command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-generations", "1"], ["--num-generations", "at least 2"]),
        (["--steps", "0"], ["--steps", "at least 1"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--seed", "-1"], ["--seed"]),
        (["--loss-type", "ppo"], ["--loss-type", "dr_grpo"]),
        (["--beta", "-0.1"], ["--beta", "at least 0"]),
        (["--beta", "nan"], ["--beta"]),
        (["--epsilon", "inf"], ["--epsilon"]),
        (["--learning-rate", "0"], ["--learning-rate", "above 0"]),
        (["--temperature", "0"], ["--temperature", "above 0"]),
        (["--warmup-accuracy", "1.5"], ["--warmup-accuracy"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--step", "3"], ["--step"]),
        (["--device", "abacus"], ["--device abacus", "--device cpu"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_bad_option_is_one_line(argv, words, capsys, tmp_path):
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as exit:
        raise SystemExit(entry.main([*argv, "--output-dir", str(output)]))
    assert exit.value.code == 2
    printed, message = capsys.readouterr()
    assert printed == ""
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert all(word in message for word in words)
    assert not output.exists()


def test_output_directory_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "taken"
    path.write_text("mine")
    assert entry.main(["--output-dir", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --output-dir")
    assert message.count("\n") == 1
    assert path.read_text() == "mine"


def test_every_option_has_help_and_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in Options.__dataclass_fields__:
        assert re.search(rf"--{name.replace('_', '-')}[, ]", text)
    assert text.isascii()  # a terminal may not have more
    assert text.count("(default: ") == len(Options.__dataclass_fields__)


def test_command_line_reaches_the_options():
    options = parse(["--seed", "7", "--epsilon-high", "0.3", "--loss-type", "dapo", "--output-dir", "there"])
    assert options == Options(seed=7, epsilon_high=0.3, loss_type="dapo", output_dir="there")


def test_options_from_python_are_checked_too():
    with pytest.raises(OptionError, match=r"--kl-estimator must be one of k1, .*, got k9"):
        Options(kl_estimator="k9")
    with pytest.raises(OptionError, match=r"--epsilon-high means two things for cispo\. Say --cispo-max"):
        Options(loss_type="cispo", epsilon_high=0.3)


def test_missing_requirement_names_the_install_command(monkeypatch, capsys):
    assert entry.missing_requirements() == []
    monkeypatch.setattr(entry, "missing_requirements", lambda: ["matplotlib", "rich"])
    assert entry.main([]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "-m pip install matplotlib rich" in message


def test_interrupt_leaves_the_metrics(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupted)
    assert entry.main(["--output-dir", str(tmp_path), "--warmup-steps", "0"]) == 130
    assert str(tmp_path / "grpo_metrics") in capsys.readouterr().err
    assert (tmp_path / "grpo_metrics" / "metrics.jsonl").exists()
