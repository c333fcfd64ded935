"""The benchmarks' command: what it reports is complete, within its budget, and not lost if the run is cut off."""

import csv
import json
from dataclasses import fields

import pytest
import torch

from benchmark_rows import made_up
from benchmarks import report
from benchmarks.__main__ import choose_cases, main, parse_arguments
from benchmarks.baselines import Implementation, eager, ours
from benchmarks.baselines_peers import EAGER
from benchmarks.budget import Budget
from benchmarks.cases import MODES, SUITES, Case
from benchmarks.suite import OK, OOM, Row

CPU = torch.device("cpu")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
QUICK = ["--dtypes", "fp32", "--modes", "loss", "--device", "cpu", "--seconds", "0", "--no-plots"]


@pytest.mark.parametrize("device", DEVICES)
def test_command_measures_and_writes(device, tmp_path, capsys):
    arguments = ["--shapes", "2x5x97", "1x3x640", "2x6x16x97", "--modes", *MODES, "--device", device, "--seconds", "0"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0

    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if ".png" not in line and str(tmp_path) not in line) <= 80
    assert "2x5x97 fp32" in printed and "1x3x640 bf16" in printed and "2x6x16x97 bf16: hidden states + head" in printed
    if device == "cpu":
        assert "Liger-Kernel    not run: needs a GPU" in printed and "No GPU is used" in printed

    results = json.loads((tmp_path / "results.json").read_text())
    where, rows = results["environment"], results["rows"]
    for key in ("date", "device", "driver", "cpu", "triton", "liger_kernel", "grpo_kernels", "commit"):
        assert key in where
    assert where["torch"] == torch.__version__ and len(where["kernels"]) == 16
    command = where["command"]
    assert command.startswith("python -m benchmarks --shapes 2x5x97") and command.endswith("--out DIR")
    assert {tuple(row) for row in rows} == {tuple(field.name for field in fields(Row))}
    assert len(rows) == 2 * (2 * (5 + 2 + 5 + 3) + 4)  # dtypes × (shapes × implementations that have the mode, + heads)
    for row in rows:
        if row["status"] == OK:
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["error_over_tolerance"] <= 1
            assert (row["products_multiple"] if row["mode"] == "linear" else row["copy_multiple"]) > 0
        else:
            assert row["detail"]
    assert {row["status"] for row in rows if row["implementation"] in ("grpo_kernels", "eager PyTorch")} == {OK}

    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [*rows[0], *where] and [line["case"] for line in lines] == [row["case"] for row in rows]
    assert lines[0]["commit"] == (where["commit"] or "") and float(lines[0]["median_ms"]) == rows[0]["median_ms"]


def test_command_fails_if_ours_is_wrong(tmp_path, capsys):
    def wrong(inputs, logits):
        outcome = ours(inputs, logits)
        return outcome._replace(grad=outcome.grad * float("nan"))

    broken = [Implementation("grpo_kernels", {"loss": wrong}), EAGER]
    assert main(["--shapes", "2x5x97", *QUICK, "--out", str(tmp_path)], broken) == 1
    captured = capsys.readouterr()
    assert "\n  grpo_kernels    wrong result: gradient off by nan times" in captured.out
    assert "grpo_kernels failed in 1" in captured.err
    text = (tmp_path / "results.json").read_text()  # a NaN is no JSON
    row = json.loads(text, parse_constant=lambda constant: pytest.fail(constant))["rows"][0]
    assert row["error_over_tolerance"] is None is row["median_ms"]


def test_cases_that_are_asked_for():
    arguments = "--shapes 4x5x97 2×6×16×97 --dtypes fp32 --masked 0.25 --zero-advantage 0.5 --objective sequence"
    what = {"masked": 0.25, "zero_advantage": 0.5, "objective": "sequence", "compiled": True}
    cases = [Case(4, 5, 97, torch.float32, **what), Case(2, 6, 97, torch.float32, hidden=16, **what)]
    assert choose_cases(parse_arguments(arguments.split()), CPU) == (None, cases)
    name, cases = choose_cases(parse_arguments(["--suite", "gpu", "--dtypes", "bf16"]), CPU)
    assert (name, cases) == ("cpu", [case for case in SUITES["cpu"] if case.dtype == torch.bfloat16])


REFUSED = [
    "--shapes 2x5", "--shapes 2x0x97", "--shapes 2x5x3x97x1", "--shapes 4,128,32000", "--suite cpu --shapes 2x5x97",
    "--threads 0", "--minutes 0", "--compile-minutes 0", "--shapes 2x5x97 --masked 0.6", "--modes all",
    "--shapes 2x5x97 --zero-advantage -1", "--suite cpu --objective sequence",
    *["--device cuda"] * (not torch.cuda.is_available()),
]  # fmt: skip


@pytest.mark.parametrize("arguments", REFUSED)
def test_command_refuses_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2 and "error:" in capsys.readouterr().err


def test_what_compiles_comes_last_with_a_budget_of_its_own(capsys):
    order = []

    def named(name):
        return lambda i, x: order.append((name, i.case.vocab)) or eager(i, x)

    who = [
        Implementation("grpo_kernels", {"loss": named("ours")}),
        Implementation("torch.compile", {"loss": named("compiled")}, compiles=("loss",)),
    ]
    assert main(["--shapes", "2x5x97", "2x5x101", *QUICK, "--compile", "auto"], who) == 0
    assert list(dict.fromkeys(order)) == [("ours", 97), ("ours", 101), ("compiled", 97), ("compiled", 101)]
    assert capsys.readouterr().out.count("[case 2 of 2") == 2


def test_report_is_at_most_80_columns_wide():
    rows = made_up(SUITES["gpu"])
    for row in rows:
        row.median_ms, row.p20_ms, row.p80_ms, row.copy_ms = 1234.5, 1229.9, 1299.9, 98.765
        row.copy_multiple, row.share_of_copy_bandwidth, row.gigabytes_per_second = 12.5, 0.08, 4321.0
        row.speedup_over_eager, row.extra_per_logits = 123.45, 12.34
        row.products_ms, row.products_multiple = 100.0, 12.34
        row.extra_bytes, row.beyond_gradients_bytes = 100 << 30, 90 << 30
        if row.implementation in ("torch.compile", "Liger-Kernel"):
            row.status, row.detail, row.median_ms = OOM, "Tried to allocate " * 9, None
    blocks = {}
    for row in rows:
        blocks.setdefault((row.case, row.mode), []).append(row)
    assert max(len(line) for block in blocks.values() for line in report.table(block).splitlines()) <= 80
    lines = report.summary(rows).splitlines()
    ours = sum(len(case.modes) for case in SUITES["gpu"] if case.objective != "cross-entropy")  # another's loss
    assert max(map(len, lines)) <= 80 and len(lines) == 1 + ours == len({line[:35] for line in lines})
    assert "OOM" in lines[1]


# --- the time budget ------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch):
    """[the time in seconds]"""
    now = [100.0]
    monkeypatch.setattr("benchmarks.budget.time.monotonic", lambda: now[0])
    return now


def test_budget_is_dealt_out(now):
    budget = Budget(60.0, per_row=1.0)
    assert budget.start_case()
    assert budget.for_a_row(10, 5) == 1.0  # never more than a row needs
    assert budget.for_a_row(300, 5) == pytest.approx(0.1)  # at first half of it is for timing
    now[0] = 110.0  # 4 of 10 s were timing: each of the 5 cases after this one is taken to need 6 s beside it
    budget.timed(4.0)
    assert budget.start_case()
    assert budget.for_a_row(100, 5) == pytest.approx((50 - 5 * 6) / 100)
    assert budget.for_a_row(100, 20) == 0.0  # then rows get the fewest rounds, and no case is left out for it
    now[0] = 149.0
    assert budget.start_case() and not budget.spent
    now[0] = 155.0
    assert not budget.start_case()  # the shortest took 6 s
    now[0] = 160.0
    assert budget.spent and budget.for_a_row(100, 0) == 0.0
    now[0] = 1e9
    assert not Budget(None, 3.0).spent and Budget(None, 3.0).for_a_row(7, 0) == 3.0
    assert Budget(60.0, 1.0, used=50.0).used == 50.0


def test_what_is_left_out_is_said(now, monkeypatch, capsys, tmp_path):
    def slow(inputs, logits):
        now[0] += 20.0
        return eager(inputs, logits)

    monkeypatch.setitem(SUITES, "cpu", tuple(Case(2, 5, vocab, torch.float32) for vocab in (97, 101, 103)))
    arguments = ["--suite", "gpu", *QUICK, "--minutes", "1", "--out", str(tmp_path)]
    assert main(arguments, [Implementation("peer", {"loss": slow})]) == 0
    printed = capsys.readouterr().out
    assert "Suite 'gpu', on this device: 'cpu'." in printed and "[case 1 of 3, " in printed
    assert "Left out, for want of time:\n  2x5x101 fp32\n  2x5x103 fp32\n" in printed
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 3


def test_results_are_there_if_the_run_is_cut_off(tmp_path):
    def cut(inputs, logits):
        if inputs.case.vocab == 101:
            raise KeyboardInterrupt
        return eager(inputs, logits)

    with pytest.raises(KeyboardInterrupt):
        main(["--shapes", "2x5x97", "2x5x101", *QUICK, "--out", str(tmp_path)], [Implementation("peer", {"loss": cut})])
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["case"] == "2x5x97 fp32" and row["median_ms"] > 0
