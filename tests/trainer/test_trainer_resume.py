"""Checkpoints of the trainer: what is in them, how runs go on from them, and what a kill leaves."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from safetensors.torch import load_file

from grpo_kernels.trainer import __main__ as entry
from grpo_kernels.trainer import checkpoint, cli
from grpo_kernels.trainer.arguments import parse
from grpo_kernels.trainer.checkpoint import Checkpoints
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.records import Records
from trainer_cases import rows_of, run, saved_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"batch_size": 2, "num_generations": 4, "num_minibatches": 2, "learning_rate": 0.02, "samples_every": 0,
            "reward": ("trainer_cases:starts_even",)}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The picture costs more than a run of this size, and few held-out problems are enough."""
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


def weights(directory):
    return load_file(directory / "model" / "model.safetensors")


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Exception):
    """In the place of a kill."""


def stop_after(monkeypatch, step, *, at=checkpoint.RunSaver):
    """The run ends right behind the save of a step, or where nothing is saved."""
    save = at.save

    def stopping(self, optimizer, progress, last):
        save(self, optimizer, progress, last)
        if progress.step == step:
            raise Stopped

    monkeypatch.setattr(at, "save", stopping)


# --- killed ---------------------------------------------------------------------------------------


def test_killed_at_any_moment_and_resumed(tmp_path, model):
    """SIGKILL in the middle of saves: the same weights, moments, random states and metrics as without it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "tests" / "trainer" / "trainer_faults.py"), model, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) >= 9
    kinds = " ".join(each["event"] for each in report)
    for kind in ("half of", "flush", "rename to step-", "rename to .unfinished-removed", "remove"):
        assert kind in kinds
    assert {each["from"] for each in report} >= {None, "step-00000002", "step-00000004", "step-00000006"}
    whole, rows = tmp_path / "whole", rows_of(tmp_path / "whole")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert len({row["grad_norm"] for row in rows if "loss" in row}) == 6
    for each in report:
        directory = tmp_path / each["run"]
        assert each["killed"] == -signal.SIGKILL and each["resumed"] == 0, each
        assert each.get("again", -signal.SIGKILL) == -signal.SIGKILL
        assert rows_of(directory) == rows, each
        same(weights(directory), weights(whole))
        for name in ("optimizer", "random"):
            path = Path("checkpoints", "step-00000006", f"{name}.safetensors")
            same(load_file(directory / path), load_file(whole / path))
        assert [path.name for path in Checkpoints(directory / "checkpoints").all()] == ["step-00000006"]
        assert not list((directory / "checkpoints").glob(".unfinished*"))


# --- resumed --------------------------------------------------------------------------------------


def test_rows_behind_the_checkpoint_are_taken_back(tmp_path, model, monkeypatch):
    """Steps that were logged and not saved are logged once; a torn last line is none."""
    settings = SETTINGS | {"model": model, "steps": 5, "save_every": 2}
    run(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            run(tmp_path / "part", **settings)
    metrics = tmp_path / "part" / "grpo_metrics" / "metrics.jsonl"
    assert max(row["step"] for row in rows_of(tmp_path / "part")) == 3
    with metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    _, rows, said = run(tmp_path / "part", **settings, resume=True)
    assert "going on from the checkpoint of step 2" in said
    assert rows == rows_of(tmp_path / "whole")
    same(weights(tmp_path / "part"), weights(tmp_path / "whole"))


def test_resumed_tiny_model_with_warm_up_and_reference(tmp_path, monkeypatch):
    """The KL is to the policy behind the warm-up, which only the run's own files have; warm-up is not repeated."""
    settings = {"batch_size": 2, "num_generations": 4, "steps": 4, "save_every": 2, "warmup_steps": 3, "beta": 0.1,
                "learning_rate": 0.02,
                "reward": ("trainer_cases:starts_even",), "top_p": 0.9, "lr_scheduler_type": "cosine"}  # fmt: skip
    run(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            run(tmp_path / "part", **settings)
    _, rows, said = run(tmp_path / "part", **settings, resume=True)
    assert "warm-up:" not in said
    assert rows == rows_of(tmp_path / "whole")
    assert rows[-2]["kl"] > 0
    same(weights(tmp_path / "part"), weights(tmp_path / "whole"))


def test_resume_takes_the_options_of_the_checkpoint(tmp_path, model):
    settings = SETTINGS | {"model": model, "steps": 2, "seed": 7}
    run(tmp_path, **settings)
    options = parse(["--resume", "--output-dir", str(tmp_path), "--steps", "3", "--threads", "2"])
    assert options == Options(**settings | {"steps": 3, "threads": 2, "eval_every": 2}, output_dir=str(tmp_path),
                              resume=True)  # fmt: skip
    _, rows, _ = run(tmp_path, **settings | {"steps": 3}, resume=True)  # a finished run is given another step
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


def test_a_changed_option_is_refused_by_name(tmp_path, model, capsys):
    run(tmp_path, **SETTINGS, model=model, steps=1)
    capsys.readouterr()
    for given, words in (("--beta 0.5", "--beta is 0.04 in the checkpoint and 0.5 here"),
                         ("--seed 1", "--seed is 0 in the checkpoint and 1 here"),
                         ("--reward exact_answer", "--reward is trainer_cases:starts_even in the checkpoint"),
                         ("--max-prompt-length 50", "--max-prompt-length is not set in the checkpoint")):  # fmt: skip
        assert entry.main(["--resume", "--output-dir", str(tmp_path), *given.split()]) == 2
        message = capsys.readouterr().err
        assert words in message and "cannot change" in message and message.count("\n") == 1


def test_changed_problems_are_refused(tmp_path, model):
    data = tmp_path / "data.jsonl"
    settings = SETTINGS | {"model": model, "dataset": str(data), "max_completion_length": 3}
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 4)
    run(tmp_path / "run", **settings, steps=1)
    data.write_text('{"prompt": "1+2=", "answer": "3"}\n' * 4)
    with pytest.raises(OptionError, match=r"--resume: the problems of .* are not those of the checkpoint"):
        run(tmp_path / "run", **settings, steps=2, resume=True)


def test_changed_fields_are_refused(tmp_path, model):
    """Rewards read them."""
    data = tmp_path / "data.jsonl"
    settings = SETTINGS | {"model": model, "dataset": str(data), "max_completion_length": 3,
                           "reward": ("target_length",)}  # fmt: skip
    data.write_text('{"prompt": "1+1=", "answer": "2", "target_length": 1}\n' * 4)
    run(tmp_path / "run", **settings, steps=1)
    data.write_text('{"target_length": 1, "prompt": "1+1=", "answer": "2"}\n' * 4)
    run(tmp_path / "run", **settings, steps=2, resume=True)
    data.write_text('{"prompt": "1+1=", "answer": "2", "target_length": 2}\n' * 4)
    with pytest.raises(OptionError, match=r"--resume: the problems of .* are not those of the checkpoint"):
        run(tmp_path / "run", **settings, steps=3, resume=True)


def test_a_finished_run_is_not_run_again(tmp_path, model):
    settings = SETTINGS | {"model": model, "steps": 2}
    run(tmp_path, **settings)
    before, rows = weights(tmp_path), rows_of(tmp_path)
    result, again, said = run(tmp_path, **settings, resume=True)
    assert "the run is finished; --steps N above 2 goes on with it" in said
    assert again == rows and result.accuracy_after == rows[-1]["eval/accuracy"]
    same(weights(tmp_path), before)


def test_a_stopped_run_is_not_replaced_by_mistake(tmp_path, model, monkeypatch):
    settings = SETTINGS | {"model": model, "steps": 3, "save_every": 1}
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            run(tmp_path, **settings)
    with pytest.raises(OptionError, match=r"a checkpoint of step 2. Continue it with --resume, replace it"):
        run(tmp_path, **settings)
    _, rows, _ = run(tmp_path, **settings, overwrite=True)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    (tmp_path / "checkpoints" / "step-1").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    run(tmp_path, **settings)  # a finished one is, and nothing beside it
    assert (tmp_path / "checkpoints" / "step-1").exists()
    assert (tmp_path / "checkpoints" / "notes.txt").read_text() == "mine"


def test_missing_parts_are_named(tmp_path, model):
    settings = SETTINGS | {"model": model, "steps": 1}
    run(tmp_path, **settings)
    (tmp_path / "checkpoints" / "reference").rename(tmp_path / "reference")
    with pytest.raises(OptionError, match=r"--resume: .*reference is gone"):
        run(tmp_path, **settings | {"steps": 2}, resume=True)
    (tmp_path / "grpo_metrics" / "metrics.jsonl").unlink()
    with pytest.raises(OptionError, match=r"--resume: .*metrics.jsonl is gone"):
        run(tmp_path, **settings | {"steps": 2}, resume=True)


# --- files ----------------------------------------------------------------------------------------


def test_nothing_is_unpickled_and_old_checkpoints_go(tmp_path, model, monkeypatch):
    settings = SETTINGS | {"model": model, "save_every": 1, "save_total_limit": 2}
    run(tmp_path, **settings, steps=4)
    names = [path.name for path in Checkpoints(tmp_path / "checkpoints").all()]
    assert names == ["step-00000003", "step-00000004"]
    files = {path.name for path in (tmp_path / "checkpoints" / names[0]).iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "optimizer.safetensors", "random.safetensors",
            "state.json"} <= files  # fmt: skip
    kinds = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}
    state = json.loads((tmp_path / "checkpoints" / names[-1] / "state.json").read_text())
    assert state["progress"]["step"] == state["schedule"]["step"] == state["data"]["batches"] == 4

    def refuse(*_, **__):
        raise AssertionError("unpickles")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    _, rows, _ = run(tmp_path, **settings, steps=5, resume=True)
    assert rows[-2]["step"] == 5


def test_random_states_come_back():
    import random

    import numpy as np

    random.gauss(0, 1)
    np.random.randn()  # half of a pair is kept
    states = checkpoint.random_states()
    first = (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand())
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    checkpoint.set_random_states({name: state.clone() for name, state in states.items()})
    again = (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand())
    assert again == first


def test_records_that_go_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = Records(path)
    for step in (0, 1, 2, 3):
        records.write({"step": step, "loss": float("nan") if step == 1 else 0.1 + step})
    records.close()
    again = Records(path, keep_until=2)
    again.write({"step": 3, "loss": 1 / 3})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "loss": 0.1}, {"step": 1, "loss": None}, {"step": 2, "loss": 2.1}, {"step": 3, "loss": 1 / 3}
    ]  # fmt: skip
    path.write_text('{"step": 0}\nnot a row\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"line 2, is no row"):
        Records(path, keep_until=2)
