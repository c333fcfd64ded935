"""The benchmarks: what they report is checked, complete, and survives whatever a peer does."""

import csv
import json
from dataclasses import fields, replace

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.baselines import Implementation, Outcome, eager, eager_entropies, eager_logprobs, ours
from benchmarks.baselines_peers import EAGER, OURS, implementations
from benchmarks.budget import Budget
from benchmarks.cases import MODES, SUITES, Case, parse_shape
from benchmarks.measure import Timing
from benchmarks.suite import ERROR, MISSING, OK, OOM, WRONG, Row, new_rows, run_suite

CPU = torch.device("cpu")
DEVICES = [CPU] + [torch.device("cuda")] * torch.cuda.is_available()
CASE = Case(2, 5, 97, torch.float32, masked=0.2)
SEQUENCE = {"objective": "sequence"}
WHAT = [{}, {"masked": 0.5}, {"zero_advantage": 0.5}, SEQUENCE, SEQUENCE | {"masked": 0.5}]
TIMES = ("median_ms", "p20_ms", "p80_ms", "copy_multiple", "gigabytes_per_second", "speedup_over_eager")


def run(call, mode="loss", case=CASE, device=CPU, missing=lambda case, device: None) -> Row:
    """The row of one implementation, with eager PyTorch beside it."""
    peer = Implementation("peer", {mode: call}, missing)
    ((row, eager_row),) = run_suite([case], [mode], [peer, eager_implementation()], device, seconds=0.0)
    assert eager_row.status == OK and eager_row.median_ms > 0
    return row


def eager_implementation() -> Implementation:
    calls = {"loss": eager, "logprobs": eager_logprobs, "entropies": eager_entropies, "inplace": eager}
    return Implementation("eager PyTorch", calls)


# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_command_measures_and_writes(device, tmp_path, capsys):
    shapes = ["--shapes", "2x5x97", "1x3x640", "--modes", *MODES]
    assert main([*shapes, "--device", device.type, "--seconds", "0", "--out", str(tmp_path)]) == 0

    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if ".png" not in line and str(tmp_path) not in line) <= 80
    assert "2x5x97 fp32" in printed and "1x3x640 bf16" in printed
    if device.type == "cpu":
        assert "Liger-Kernel    not run: needs a GPU" in printed and "No GPU is used" in printed

    results = json.loads((tmp_path / "results.json").read_text())
    where = results["environment"]
    for key in ("date", "device", "driver", "cpu", "torch", "triton", "liger_kernel", "grpo_kernels"):
        assert key in where
    assert "commit" in where and len(where["kernels"]) == 16
    assert where["command"].startswith("python -m benchmarks --shapes 2x5x97")
    assert where["command"].endswith("--out DIR")
    assert where["torch"] == torch.__version__ and where["device"]
    rows = results["rows"]
    assert {tuple(row) for row in rows} == {tuple(field.name for field in fields(Row))}
    assert len(rows) == 2 * 2 * (5 + 2 + 5 + 3)  # shapes × dtypes × implementations that have the mode
    for row in rows:
        if row["status"] == OK:
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["copy_multiple"] > 0
            assert row["error_over_tolerance"] <= 1
    always = ("grpo_kernels", "eager PyTorch")
    assert {row["status"] for row in rows if row["implementation"] in always} == {OK}
    assert all(row["detail"] for row in rows if row["status"] != OK)

    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["case"] for line in lines] == [row["case"] for row in rows]
    assert lines[0]["commit"] == (where["commit"] or "") and float(lines[0]["median_ms"]) == rows[0]["median_ms"]


def test_command_fails_if_ours_is_wrong(capsys):
    def wrong(inputs, logits):
        outcome = ours(inputs, logits)
        return outcome._replace(grad=outcome.grad * 1.01)

    broken = [Implementation("grpo_kernels", {"loss": wrong}), eager_implementation()]
    arguments = ["--shapes", "2x5x97", "--dtypes", "fp32", "--modes", "loss", "--device", "cpu", "--seconds", "0"]
    assert main(arguments, broken) == 1
    captured = capsys.readouterr()
    (line,) = (line for line in captured.out.splitlines() if line.startswith("  grpo_kernels "))
    assert line.startswith("  grpo_kernels    wrong result: gradient off by")
    assert "grpo_kernels failed in 1" in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "2x5"],
        ["--shapes", "2x0x97"],
        ["--shapes", "2x5x3x97x1"],
        ["--suite", "cpu", "--shapes", "2x5x97"],
        ["--threads", "0"],
        ["--minutes", "0"],
        ["--compile-minutes", "0"],
        ["--shapes", "2x5x97", "--masked", "0.6"],
        ["--shapes", "2x5x97", "--zero-advantage", "-1"],
        ["--suite", "cpu", "--objective", "sequence"],
        ["--modes", "all"],
        pytest.param(
            ["--device", "cuda"], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_command_refuses_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and "error:" in capsys.readouterr().err


def test_command_runs_one_case_of_any_kind(capsys):
    arguments = ["--shapes", "4x5x97", "--dtypes", "fp32", "--device", "cpu", "--seconds", "0"]
    arguments += ["--modes", "loss", "inplace"]
    arguments += ["--masked", "0.25", "--zero-advantage", "0.5", "--objective", "sequence", "--compile", "none"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "4x5x97 fp32 25% masked 50% A=0 sequence: forward + backward in place" in printed
    assert "torch.compile   not run: not measured; --compile auto" in printed


def test_gpu_suite_on_a_cpu_is_the_cpu_suite(capsys, monkeypatch):
    monkeypatch.setitem(SUITES, "cpu", (CASE,))
    assert main(["--suite", "gpu", "--device", "cpu", "--seconds", "0", "--modes", "loss"]) == 0
    printed = capsys.readouterr().out
    assert "Suite 'gpu', on this device: 'cpu'." in printed and "No GPU is used" in printed
    assert "[case 1 of 1, " in printed and CASE.name in printed


def test_parse_shape():
    assert parse_shape("4x128x32000") == parse_shape("4×128×32000") == (4, 128, 32000, 0)
    assert parse_shape("4x128x2048x32000") == (4, 128, 32000, 2048)
    with pytest.raises(ValueError, match="wanted BxTxV"):
        parse_shape("4,128,32000")


# --- no speed without a right result --------------------------------------------------------------------


def scaled_loss(inputs, logits):
    outcome = eager(inputs, logits)
    return outcome._replace(loss=outcome.loss * 1.1)


def scaled_gradient(inputs, logits):
    outcome = eager(inputs, logits)
    return outcome._replace(grad=outcome.grad * 1.02)


def wrong_sign(inputs, logits):
    outcome = eager(inputs, logits)
    return outcome._replace(grad=-outcome.grad)


def one_entry(value):
    """One entry of the gradient replaced, of a position that is unmasked, masked or past the last token."""

    def call(inputs, logits, at):
        outcome = eager(inputs, logits)
        outcome.grad[at] += value
        return outcome

    return call


WRONG_LOSSES = {
    "loss": scaled_loss,
    "gradient": scaled_gradient,
    "sign": wrong_sign,
    "entry": lambda i, x: one_entry(0.01)(i, x, (0, 0, 3)),
    "nan": lambda i, x: one_entry(float("nan"))(i, x, (1, 2, 3)),
    "masked": lambda i, x: one_entry(1e-12)(i, x, (0, 4, 3)),
    "last position": lambda i, x: one_entry(1e-12)(i, x, (0, 5, 3)),
    "nan loss": lambda i, x: eager(i, x)._replace(loss=torch.tensor(float("nan"))),
    "kl": lambda i, x: eager(replace(i, ref_logps=i.ref_logps + 0.1), x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_wrong_loss_gets_no_speed(name, dtype):
    row = run(WRONG_LOSSES[name], case=replace(CASE, dtype=dtype))
    assert row.status == WRONG and "times the tolerance" in row.detail
    assert not row.error_over_tolerance <= 1
    assert all(getattr(row, field) is None for field in TIMES)


def test_wrong_logprobs_get_no_speed():
    def off(inputs, logits):
        return Outcome(logps=eager_logprobs(inputs, logits).logps + 1e-3)

    row = run(off, "logprobs")
    assert row.status == WRONG and row.detail.startswith("log-probs") and row.median_ms is None


def test_logprobs_at_masked_positions_may_be_anything():
    def poisoned(inputs, logits):
        return Outcome(logps=eager_logprobs(inputs, logits).logps.masked_fill(inputs.mask == 0, float("nan")))

    assert run(poisoned, "logprobs").status == OK


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("what", WHAT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_right_implementations_pass(dtype, what, device):
    case = Case(4, 16, 301, dtype, **what)
    for mode in case.modes:
        for implementation in (OURS, EAGER):
            if mode in implementation.calls:
                row = run(implementation.calls[mode], mode, case, device)
                assert row.status == OK, row.detail
                assert row.error_over_tolerance <= 1 and row.median_ms > 0


# --- a row for everything that can happen ---------------------------------------------------------------


def test_missing_implementation_says_why():
    def never(inputs, logits):
        raise AssertionError("was run")

    row = run(never, missing=lambda case, device: f"needs a licence for V = {case.vocab} on {device}")
    assert (row.status, row.detail, row.median_ms) == (MISSING, "needs a licence for V = 97 on cpu", None)


@pytest.mark.parametrize(
    "error, status",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore"), OOM),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OOM),
        (MemoryError("no"), OOM),
        (RuntimeError("something else"), ERROR),
        (AssertionError("contiguous"), ERROR),
    ],
)
def test_exception_is_a_row(error, status):
    def fails(inputs, logits):
        raise error

    row = run(fails)
    assert row.status == status and row.median_ms is None
    assert row.detail == f"{type(error).__name__}: {str(error).splitlines()[0]}"


def test_wrong_shape_is_a_row():
    row = run(lambda inputs, logits: eager(inputs, logits)._replace(grad=torch.zeros(2, 5, 97)))
    assert row.status == ERROR and "grad must have shape (2, 6, 97), got (2, 5, 97)" in row.detail


def test_case_without_room_is_rows(monkeypatch):
    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    monkeypatch.setattr("benchmarks.suite.make_inputs", no_room)
    blocks = list(run_suite([CASE], ["loss", "logprobs"], implementations(), CPU, seconds=0.0))
    assert [row.status for rows in blocks for row in rows] == [OOM, OOM, MISSING, MISSING, MISSING] * 2
    assert "9 GiB" in blocks[0][0].detail and blocks[0][3].detail == "needs a GPU"


# --- what is derived and written ------------------------------------------------------------------------


def test_derived_numbers_by_hand(monkeypatch):
    milliseconds = {"copy": 2.0, "peer": 4.0, "eager PyTorch": 12.0}
    monkeypatch.setattr(
        "benchmarks.suite.time_all",
        lambda subjects, *_: {name: Timing(milliseconds[name], 1.0, 20.0, 7) for name in subjects},
    )
    case = Case(2, 10, 100, torch.float32)  # 8000 bytes to read, 8800 to write, of 8800
    row = run(eager, case=case)
    assert (row.median_ms, row.copy_ms, row.copy_multiple, row.speedup_over_eager) == (4.0, 2.0, 2.0, 3.0)
    assert row.gigabytes_per_second == pytest.approx(16800 / 4e-3 / 1e9)
    assert row.share_of_copy_bandwidth == pytest.approx((16800 / 4) / (17600 / 2))
    assert run(eager_logprobs, "logprobs", case).share_of_copy_bandwidth == pytest.approx((8000 / 4) / (17600 / 2))


def test_results_are_strict_json(tmp_path):
    row = run(WRONG_LOSSES["nan"])
    path, _ = report.write(tmp_path, {"date": "today"}, [row])

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    (record,) = json.loads(path.read_text(), parse_constant=refuse)["rows"]
    assert record["error_over_tolerance"] is None and record["status"] == WRONG


def test_report_is_at_most_80_columns_wide():
    rows = []
    for case in SUITES["gpu"]:
        for mode in case.modes:
            block = new_rows(case, mode, implementations())
            for row in block[:-1]:
                row.median_ms, row.p20_ms, row.p80_ms, row.copy_ms = 1234.5, 1229.9, 1299.9, 98.765
                row.copy_multiple = 12.5
                row.gigabytes_per_second, row.share_of_copy_bandwidth = 4321.0, 0.08
                row.speedup_over_eager, row.extra_per_logits = 123.45, 12.34
                row.products_ms, row.products_multiple = 100.0, 12.34
                row.extra_bytes, row.beyond_gradients_bytes = 100 << 30, 90 << 30
            block[-1].status, block[-1].detail = OOM, "Tried to allocate " * 9
            rows += block
            assert max(map(len, report.table(block).splitlines())) <= 80
    lines = report.summary(rows).splitlines()
    ours = [case for case in SUITES["gpu"] if case.objective != "cross-entropy"]
    assert max(map(len, lines)) <= 80 and len(lines) == 1 + sum(len(case.modes) for case in ours)
    assert len({line[:35] for line in lines}) == len(lines)  # no two rows read the same
    assert "OOM" in lines[1]


# --- the time budget ------------------------------------------------------------------------------------


def test_budget_is_dealt_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("benchmarks.budget.time.monotonic", lambda: now[0])
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


def test_spent_budget_leaves_rows_with_a_reason(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.budget.time.monotonic", lambda: now[0])
    blocks = []
    cases = [CASE, replace(CASE, batch=3)]
    for block in run_suite(cases, ["loss", "logprobs"], [OURS], CPU, seconds=Budget(60.0, 0.0)):
        blocks.append(block)
        now[0] += 61.0
    (first,), *others = blocks
    assert first.status == OK and [(row.case, row.mode) for (row,) in others] == [
        (CASE.name, "logprobs"), (cases[1].name, "loss"), (cases[1].name, "logprobs")
    ]  # fmt: skip
    assert all((row.status, row.detail) == (MISSING, "the run's 60 s are spent; --minutes") for (row,) in others)


def test_what_is_left_out_is_said(monkeypatch, capsys, tmp_path):
    now = [0.0]
    monkeypatch.setattr("benchmarks.budget.time.monotonic", lambda: now[0])

    def slow(inputs, logits):
        now[0] += 20.0
        return eager(inputs, logits)

    arguments = ["--shapes", "2x5x97", "2x5x101", "2x5x103", "--dtypes", "fp32", "--modes", "loss", "--device", "cpu"]
    who = [Implementation("peer", {"loss": slow})]
    assert main([*arguments, "--seconds", "0", "--minutes", "1", "--out", str(tmp_path), "--no-plots"], who) == 0
    assert "Left out, for want of time:\n  2x5x101 fp32\n  2x5x103 fp32\n" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 3


def test_results_are_there_if_the_run_is_cut_off(tmp_path):
    def cut(inputs, logits):
        if inputs.case.vocab == 101:
            raise KeyboardInterrupt
        return eager(inputs, logits)

    arguments = ["--shapes", "2x5x97", "2x5x101", "--dtypes", "fp32", "--modes", "loss", "--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--seconds", "0", "--out", str(tmp_path)], [Implementation("peer", {"loss": cut})])
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["case"] == "2x5x97 fp32" and row["median_ms"] > 0
