"""The run on one GPU of docs/trainer.md, at a tiny shape on the CPU; and what a step's row says of time and memory."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from benchmarks import random_policy
from grpo_kernels.trainer import __main__ as entry
from grpo_kernels.trainer import cli, gauges, loop, plots
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.records import Rows
from grpo_kernels.trainer.task import countdown
from tolerance import U
from trainer_cases import run

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainer.md"


def commands() -> list[list[str]]:
    """Of the page's section: the words of each of its commands."""
    section = PAGE.read_text(encoding="utf-8").split("\n## A run on one GPU\n")[1].split("\n## ")[0]
    lines = "\n".join(re.findall(r"^    (.+)$", section, re.MULTILINE)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_the_recipe(tmp_path):
    """Its own commands, with a smaller shape and fewer steps."""
    make, train = commands()[:2]
    assert make[:3] == ["python", "-m", "benchmarks.random_policy"] and "qwen2.5-0.5b" in make
    assert train[:3] == ["python", "-m", "grpo_kernels.trainer"]
    random_policy.main(["--shape", "tiny", "--out", str(tmp_path / "policy")])
    fewer = {"--model": str(tmp_path / "policy"), "--steps": "2", "--batch-size": "2", "--output-dir": str(tmp_path)}
    arguments = train[3:]
    for name, value in fewer.items():
        arguments[arguments.index(name) + 1] = value
    assert entry.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "grpo_metrics" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["rewards/reaches_target/mean"] == 0.0 and 0.3 < row["rewards/digits/mean"] < 0.9
        assert row["frac_reward_zero_std"] == 0.0 and row["grad_norm"] > 0
        assert {"loss", "policy_loss", "kl", "entropy"} <= row.keys()
        assert 0 < row["optimizer_time"] < row["loss_time"] < row["step_time"]
    assert (tmp_path / "grpo_metrics" / "curves.png").exists() and not (tmp_path / "checkpoints").exists()


def test_every_id_is_a_text_of_its_own():
    alphabet, size = countdown().alphabet, random_policy.SHAPES["tiny"]["vocab_size"]
    tokenizer = random_policy.full_tokenizer(alphabet, size)
    texts = [tokenizer.decode([i]) for i in range(3, size)]
    assert len(tokenizer) == size and len(set(texts)) == size - 3 and set("".join(texts)) == set(alphabet)
    prompt = "3,5,7>22:"
    ids = tokenizer(prompt)["input_ids"]
    assert len(ids) == len(prompt) and tokenizer.decode(ids) == prompt


def test_digits():
    assert random_policy.digits(["p"] * 3, ["12+3", "", "+"]) == [0.75, 0.0, 0.0]


# --- a step's row ---------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_its_parts(tmp_path, monkeypatch):
    """dapo's weights are those of the mean over tokens, which the entropy is: two updates, each with its own."""
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)  # what takes the time
    _, rows, _ = run(tmp_path, loss_type="dapo", entropy_coef=0.5, beta=0.5, num_iterations=2, eval_every=0)
    for row in rows:
        # Sums of three numbers in fp32; the loss is their mean over two updates.
        assert row["loss"] == pytest.approx(row["policy_loss"] - 0.5 * row["entropy"], abs=8 * U * row["entropy"])
        assert row["entropy"] > 1 and row["policy_loss"] > 1e-4  # the KL's


def test_memory_is_of_the_parts_of_a_step(tmp_path, monkeypatch):
    """A device that knows its peaks: of sampling, and of what comes after."""
    made = []

    class Peak:
        def __init__(self, device):
            made.append(device.type)

        def row(self, name):
            return {name: {"sampling_memory": 3.0, "loss_memory": 5.25}[name]}

    monkeypatch.setattr(loop, "MemoryPeak", Peak)
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)  # what takes the time
    _, rows, said = run(tmp_path, eval_every=0)
    assert [(row["sampling_memory"], row["loss_memory"]) for row in rows] == [(3.0, 5.25)] * 3
    assert made == ["cpu"] * 6
    (line,) = [line for line in said.splitlines() if line.startswith("a step")]
    pattern = r"a step   [\d.]+ s: sampling [\d.]+, loss [\d.]+, of it optimizer [\d.]+; 5.2 GiB"
    assert re.fullmatch(pattern, line) and len(line) <= 80


def test_gauges_of_a_gpu_do_not_wait(monkeypatch):
    """Blocks are marked on the device's stream; the host waits once, for the last mark, when it is asked."""
    clock, waits = iter((1.0, 3.0, 10.0, 14.5)), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at, self.stream = next(clock), stream

        def synchronize(self):
            waits.append(self.at)

        def elapsed_time(self, end):
            return end.at - self.at

    cuda = SimpleNamespace(Event=Event, current_stream=lambda device: f"of {device}",
                           reset_peak_memory_stats=lambda device: waits.append(f"reset {device}"),
                           max_memory_allocated=lambda device: 3 * 2**29)  # fmt: skip
    monkeypatch.setattr(gauges.torch, "cuda", cuda)
    watch = gauges.Stopwatch(torch.device("cuda:1"))
    for _ in range(2):
        with watch:
            pass
    assert waits == []
    assert watch.seconds() == pytest.approx((2.0 + 4.5) / 1e3) and waits == [14.5]
    assert watch._spans[0][0].stream == "of cuda:1"
    peak = gauges.MemoryPeak(torch.device("cuda:1"))
    assert waits[1:] == ["reset cuda:1"] and peak.row("loss_memory") == {"loss_memory": 1.5}


def test_gauges_of_a_cpu():
    watch = gauges.Stopwatch(torch.device("cpu"))
    assert watch.seconds() == 0.0
    with watch:
        torch.ones(100).sum()
    assert 0 < watch.seconds() < 1
    assert gauges.MemoryPeak(torch.device("cpu")).row("loss_memory") == {}


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"beta": 0.5, "entropy_coef": 0.25}, {"loss": 1.0, "without the bonus": 3.0, "β × KL": 2.0,
                                               "−c × entropy": -2.0}),
        ({"beta": 0.0}, {"loss": 1.0}),
        ({"beta": 0.5, "teacher": "a"}, {"loss": 1.0}),
    ],
    ids=str,
)
def test_the_panel_of_the_loss_shows_its_parts(tmp_path, monkeypatch, options, labels):
    figures, real = [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda title: figures.append(real(title)) or figures[-1])
    monkeypatch.setattr(plots.Figure, "savefig", lambda *_: None)  # what takes the time
    row = {"loss": 1.0, "kl": 4.0, "entropy": 8.0, "reward": 0.5, "loss_memory": 5.25, "learning_rate": 1.0,
           "policy_loss": 3.0}  # fmt: skip
    plots.save_curves(Rows([{"step": 1, **row}]), Options(**options), "a task", tmp_path / "curves.png")
    panels = {axes.get_title(loc="left"): axes for axes in figures[0][1]}
    lines = panels["Loss: near 0 by construction"].get_lines()
    assert {line.get_label(): line.get_ydata()[0] for line in lines if line.get_label()[0] != "_"} == labels
    assert [text.get_text() for text in panels["Time of a step"].texts] == ["memory: 5.2 GiB"]


# --- no checkpoints -------------------------------------------------------------------------------


def test_a_run_without_checkpoints(tmp_path, monkeypatch):
    """--save-every 0: not at the end either, and no reference, which only a resumed run needs."""
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)  # what takes the time
    result, rows, _ = run(tmp_path, save_every=0, beta=0.04)
    assert not (tmp_path / "checkpoints").exists() and (result.model / "config.json").exists()
    assert run(tmp_path, save_every=0, beta=0.04)[1] == rows  # nothing of the first is in the way
    with pytest.raises(OptionError, match="--resume: there is no checkpoint in"):
        run(tmp_path, resume=True)
    assert run(tmp_path / "kept", save_every=2, beta=0.04)[1] == rows
    assert {path.name for path in (tmp_path / "kept" / "checkpoints").iterdir()} == {
        "reference", "step-00000002", "step-00000003",
    }  # fmt: skip
    with pytest.raises(OptionError, match="--save-every must be 0 or more, got -1"):
        Options(save_every=-1)
