"""`python -m benchmarks.smoke`: passes, says where it ran, and fails on every fault without stopping at it."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks import smoke
from benchmarks.smoke import errors
from benchmarks.smoke_cases import all_cases, case, distillation_cases, on_chip_cases
from benchmarks.smoke_job import ROUNDING, Job
from grpo_kernels.triton_backend import distillation_launch, launch

BF16_LOSS, PACKED_LOGPS = "loss: grpo, KL k3 bf16 131", "log-probs: and backward, packed"


def run(capsys, *only: str) -> tuple[int, list[str]]:
    status = smoke.main(["--small", "--workers", "0", "--only", "|".join(only)])
    return status, capsys.readouterr().out.splitlines()


def spoil(monkeypatch, function: str, change) -> None:
    """``change(results, arguments)`` after every launch of that kind."""
    monkeypatch.setattr(launch, function, changed(getattr(launch, function), change))


def changed(function, change):
    def spoilt(*args, **kwargs):
        results = function(*args, **kwargs)
        change(results, args)
        return results

    return spoilt


def test_the_command():
    """As CI runs it: whole, in a process of its own that chooses by itself how kernels run."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.smoke"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[0].startswith("No GPU: a small part, interpreted")
    assert sum(line.endswith(" ok") for line in lines) == sum(each.small for each in all_cases()) >= 5
    assert "commit" in lines[-2] and "no faults" in lines[-1]
    on_chip = [line for line in lines if line.startswith("on chip")]
    assert all(line.endswith(" not run") for line in on_chip) and f"{len(on_chip)} not run" in lines[-1]
    assert sum("needs an NVIDIA GPU" in line for line in lines) == len(on_chip) == len(on_chip_cases())
    assert max(map(len, lines[2:-2])) <= 80


def test_names_are_unique_and_short():
    names = [each.name for each in all_cases(with_compile=True)]
    assert len(set(names)) == len(names)
    assert {len(name) for name in names} == {51}


def test_planted_gradient(monkeypatch, capsys):
    """One entry of the gradient is off by a hundredth of its row's factor."""
    spoil(monkeypatch, "loss", lambda results, args: args[1][0, 0, 7].add_(1e-3))
    status, lines = run(capsys, BF16_LOSS, PACKED_LOGPS)
    assert status == 1
    assert lines[2].endswith("WRONG") and "gradient of logits is off by" in lines[3]
    assert lines[4].endswith(" ok") and "1 faults" in lines[-1]


def test_unwritten_entry(monkeypatch, capsys):
    spoil(monkeypatch, "slope", lambda results, args: args[1][0, -1, -1:].fill_(float("nan")))
    status, lines = run(capsys, PACKED_LOGPS)
    assert status == 1 and "gradient of logits is off by inf" in lines[3]


def test_planted_exception(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("out of\nregisters")

    monkeypatch.setattr(launch, "loss", broken)
    status, lines = run(capsys, BF16_LOSS, PACKED_LOGPS)
    assert status == 1
    assert lines[2].endswith("ERROR") and lines[3] == "    RuntimeError: out of"
    assert lines[4].endswith(" ok")


def test_planted_noise(monkeypatch, capsys):
    """Within the tolerance, but not the same twice."""
    calls = []

    def disturb(results, args):
        calls.append(1)
        results[0].mul_(1 + len(calls) * 2.0**-23)

    spoil(monkeypatch, "logprobs", disturb)
    status, lines = run(capsys, PACKED_LOGPS)
    assert status == 1 and lines[3] == "    two runs do not give the same bits"


def test_fault_of_the_truth_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(Job, "truth", lambda self: 1 / 0)
    status, lines = run(capsys, PACKED_LOGPS)
    assert status == 1 and lines[2].endswith("ERROR") and "ZeroDivisionError" in lines[3]


def small(*begin: str) -> list[int]:
    """Places in the table of cases."""
    return [index for index, each in enumerate(all_cases()) if each.small and each.name.startswith(begin)]


def test_workers_check_beside_each_other():
    """Here they interpret: what counts is that fresh processes check cases by their place in the table, in order."""
    chosen = small("loss: sampling correction", "log-probs: and backward")
    found = list(smoke.checked_by_workers(2, chosen, False))
    assert [line[:51] for line, _ in found] == [all_cases()[index].name for index in chosen]
    assert all(line.endswith(" ok") and not wrong for line, wrong in found)


def test_a_process_that_lost_the_gpu_checks_nothing(monkeypatch):
    monkeypatch.setitem(smoke._gpu, "lost", False)
    monkeypatch.setattr(Job, "run", lambda *args: 1 / 0)
    monkeypatch.setattr(smoke, "gpu_is_lost", lambda: True)
    index = small("loss: grpo, KL k3")[0]
    line, wrong = smoke.check_in_worker(index, False)
    assert line.endswith("ERROR") and "ZeroDivisionError" in wrong[0]
    assert smoke.check_in_worker(index, False) is None


class Future:
    def __init__(self, result):
        self.value = result

    def result(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class Pool:
    """Stands for processes of which each ends at a case, or has lost the GPU after it."""

    rounds: ClassVar[list[int]] = []

    def __init__(self, count, context):
        self.count, self.broken, self.lost = count, False, False
        self.rounds.append(count)

    __enter__, __exit__ = lambda self: self, lambda self, *_: None

    def submit(self, function, index, with_compile):
        if self.broken or index == 3:
            self.broken = True
            return Future(smoke.BrokenProcessPool())
        if self.lost:
            return Future(None)
        self.lost = index == 1
        return Future((f"case {index}", []))


def test_what_a_lost_process_leaves_goes_to_new_ones(monkeypatch):
    """Case 1 loses the GPU, case 3 ends its process: every case has its line, once, and 3 alone is at fault."""
    monkeypatch.setattr(smoke, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(Pool, "rounds", [])
    found = list(smoke.checked_by_workers(4, [0, 1, 2, 3, 4, 5], False))
    assert [line for line, wrong in found if not wrong] == [f"case {index}" for index in (0, 1, 2, 4, 5)]
    assert [wrong for _, wrong in found if wrong] == [["its process ended"]]
    assert Pool.rounds[0] == 4 and set(Pool.rounds[1:]) == {1}


def test_errors():
    nan, inf = float("nan"), float("inf")
    truth = {"x": (torch.tensor([1.0, nan]).double(), torch.tensor([0.5, 1.0]).double())}
    for got, want in (([1.25, nan], 0.5), ([nan, nan], inf), ([1.0, 0.0], inf), ([inf, nan], inf)):
        assert list(errors({"x": torch.tensor(got)}, truth)) == [(want, "x")]
    with pytest.raises(ValueError, match="shape"):
        list(errors({"x": torch.zeros(3)}, truth))
    with pytest.raises(KeyError):
        list(errors({"y": torch.zeros(2)}, truth))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_tolerance_is_the_dtype_s(dtype):
    """The exact gradient, rounded to the dtype, is right; moved by four units in the last place it is not."""
    job = Job(case("loss", 67, dtype, upstream=1024.0), torch.device("cpu"))
    truth = job.truth()
    want, _ = truth["gradient of logits"]
    name = "gradient of logits"
    assert next(errors({name: want.to(dtype)}, truth))[0] <= 1
    if dtype != torch.float32:  # where fp32's sums count for more than its last place
        off = want * (1 + 4 * torch.finfo(dtype).eps)
        assert next(errors({name: off.to(dtype)}, truth))[0] > 1


def test_what_users_meet_is_there():
    for wanted in (
        *((V, dtype, "loss", "padded") for V in (151936, 128256, 50257, 32000, 131) for dtype in ROUNDING),
        (151936, torch.bfloat16, "loss", "packed"), (50257, torch.bfloat16, "loss", "extra"),
        *((151936, torch.bfloat16, kind, "padded") for kind in ("logps", "parts", "head", "head logps")),
    ):  # fmt: skip
        assert wanted in {(each.V, each.dtype, each.kind, each.layout) for each in all_cases()}


def test_every_divergence_is_there():
    found = {(each.V, each.dtype, each.options["beta"], each.top, each.options.get("tail"))
             for each in distillation_cases() if each.kind == "distil"}  # fmt: skip
    for V, dtype in ((151936, torch.bfloat16), (32000, torch.bfloat16), (131, torch.float32)):
        for beta, (top, tail) in itertools.product((0.0, 0.3, 1.0), ((0, None), (32, True), (32, False))):
            assert (V, dtype, beta, top, tail) in found
    assert {each.top for each in distillation_cases() if each.kind == "head distil"} == {0, 32}


def test_planted_divergence_and_gradient(monkeypatch, capsys):
    def off_by_a_percent(results, args):
        args[2][0, 0].mul_(1.01)

    monkeypatch.setattr(distillation_launch, "gradient", changed(distillation_launch.gradient, off_by_a_percent))
    status, lines = run(capsys, "distil: mixed", "distil: forward")
    assert status == 1 and lines[2].endswith("WRONG") and "gradient of logits is off by" in lines[3]
    assert lines[4].endswith("WRONG") and "2 faults" in lines[-1]


def test_on_chip_cases_have_more_rows_than_there_are_programs():
    """132 multiprocessors; three programs on each at V = 32000."""
    for each in on_chip_cases():
        assert each.rows == "onchip" and 4 * each.tokens > 132 * (3 if each.V == 32000 else 1)
    assert {each.V for each in on_chip_cases()} == {262144, 151936, 128256, 32000}
