"""`python -m benchmarks.group_size`, at a size of seconds."""

import csv

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from benchmarks import group_size
from grpo_kernels.trainer.options import Options
from grpo_kernels.trainer.records import Rows


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The command sets torch's threads to one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_table_a_picture_and_a_file(tmp_path, capsys):
    arguments = "--group-sizes 2 4 --seeds 0 1 --steps 2 --prompts 2 --warmup-steps 1 --out".split()
    assert group_size.main([*arguments, str(tmp_path)]) == 0
    said = capsys.readouterr().out
    lines = said.split("\n\n")[1].splitlines()
    assert [line.split("│")[0].strip() for line in lines if "│" in line] == ["2", "4"]
    with (tmp_path / "group_size.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["num_generations"], row["completions"], row["steps"]) for row in rows] == [
        ("0", "2", "4", "2"), ("0", "4", "8", "2"), ("1", "2", "4", "2"), ("1", "4", "8", "2")
    ]  # fmt: skip
    assert rows[0]["accuracy_before"] == rows[1]["accuracy_before"]  # the same weights
    assert all(float(row["step_seconds"]) > float(row["loss_seconds"]) > 0 for row in rows)
    assert (tmp_path / "group_size.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_held():
    assert [group_size.prompts_of(size, 16, "prompts") for size in (2, 8, 32)] == [16, 16, 16]
    assert [group_size.prompts_of(size, 16, "completions") for size in (2, 8, 32)] == [64, 16, 4]


def test_a_row():
    step = {"reward": 0.5, "step_time": 3.0, "sampling_time": 1.0, "loss_time": 2.0}
    rows = Rows([
        {"step": 0, "eval/accuracy": 0.1},
        {"step": 1, "frac_reward_zero_std": 0.2, **step},
        {"step": 2, "frac_reward_zero_std": 0.6, **step},
        {"step": 2, "eval/accuracy": 0.7},
    ])  # fmt: skip
    row = group_size.measured(Options(batch_size=3, num_generations=4, seed=5), rows)
    assert row == group_size.Row(5, 4, 3, 12, 2, 0.1, 0.7, 0.5, pytest.approx(0.4), 3.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("argv", "words"), [(["--group-sizes", "1"], "--group-sizes must be at least 2"), (["--prompts", "0"], "--prompts")]
)
def test_bad_arguments(argv, words, capsys):
    with pytest.raises(SystemExit):
        group_size.main(argv)
    assert words in capsys.readouterr().err
