"""The benchmarks: what they report is checked, complete, and survives whatever a peer does."""

import csv
import json
from dataclasses import fields, replace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.baselines import IMPLEMENTATIONS, Implementation, Outcome, eager, eager_logprobs, ours, ours_inplace
from benchmarks.cases import MODES, SUITES, Case, make_inputs, parse_shape
from benchmarks.measure import Timed, Timing, peak_extra_bytes, time_all
from benchmarks.oracle import Oracle
from benchmarks.report import write
from benchmarks.suite import ERROR, MISSING, OK, OOM, WRONG, Row, run_suite
from reference import grpo_loss

CPU = torch.device("cpu")
DEVICES = [CPU] + [torch.device("cuda")] * torch.cuda.is_available()
CASE = Case(2, 5, 97, torch.float32, masked=0.2)
TIMES = ("median_ms", "p20_ms", "p80_ms", "copy_multiple", "gigabytes_per_second", "speedup_over_eager")


def run(call, mode="loss", case=CASE, device=CPU, missing=lambda device: None) -> Row:
    """The row of one implementation, with eager PyTorch beside it."""
    peer = Implementation("peer", {mode: call}, missing)
    ((row, eager_row),) = run_suite([case], [mode], [peer, eager_implementation()], device, seconds=0.0)
    assert eager_row.status == OK and eager_row.median_ms > 0
    return row


def eager_implementation() -> Implementation:
    calls = {"loss": eager, "logprobs": eager_logprobs, "inplace": eager}
    return Implementation("eager PyTorch", calls)


# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_command_measures_and_writes(device, tmp_path, capsys):
    shapes = ["--shapes", "2x5x97", "1x3x640", "--modes", *MODES]
    assert main([*shapes, "--device", device.type, "--seconds", "0", "--out", str(tmp_path)]) == 0

    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 80
    assert "2x5x97 fp32" in printed and "1x3x640 bf16" in printed
    if device.type == "cpu":
        assert "Liger-Kernel    not run: needs a GPU" in printed and "No GPU is used" in printed

    results = json.loads((tmp_path / "results.json").read_text())
    where = results["environment"]
    for key in ("date", "device", "driver", "cpu", "torch", "triton", "liger_kernel", "grpo_kernels", "commit"):
        assert key in where
    assert where["torch"] == torch.__version__ and where["device"]
    rows = results["rows"]
    assert {tuple(row) for row in rows} == {tuple(field.name for field in fields(Row))}
    assert len(rows) == 2 * 2 * (3 + 2 + 3)  # shapes × dtypes × implementations that have the mode
    for row in rows:
        if row["status"] == OK:
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["copy_multiple"] > 0
            assert row["error_over_tolerance"] <= 1
    assert {row["status"] for row in rows if row["implementation"] != "Liger-Kernel"} == {OK}

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
        ["--suite", "cpu", "--shapes", "2x5x97"],
        ["--threads", "0"],
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


def test_parse_shape():
    assert parse_shape("4x128x32000") == parse_shape("4×128×32000") == (4, 128, 32000)
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
@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_right_implementations_pass(dtype, masked, device):
    case = Case(4, 16, 301, dtype, masked=masked)
    for mode in MODES:
        for implementation in IMPLEMENTATIONS[:2]:
            if mode in implementation.calls:
                row = run(implementation.calls[mode], mode, case, device)
                assert row.status == OK, row.detail
                assert row.error_over_tolerance <= 1 and row.median_ms > 0


# --- a row for everything that can happen ---------------------------------------------------------------


def test_missing_implementation_says_why():
    def never(inputs, logits):
        raise AssertionError("was run")

    row = run(never, missing=lambda device: "needs a licence")
    assert (row.status, row.detail, row.median_ms) == (MISSING, "needs a licence", None)


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
    blocks = list(run_suite([CASE], ["loss", "logprobs"], IMPLEMENTATIONS, CPU, seconds=0.0))
    assert [row.status for rows in blocks for row in rows] == [OOM] * 6
    assert "9 GiB" in blocks[0][0].detail


# --- the data and the truth -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 97 * 2, 1 << 24])
def test_truth_is_the_reference_on_the_whole_batch(chunk, monkeypatch):
    monkeypatch.setattr("benchmarks.cases.ROWS_PER_CHUNK_ELEMENTS", chunk)
    inputs = make_inputs(CASE, CPU)
    x = inputs.logits.double().requires_grad_()
    whole = grpo_loss(
        x,
        inputs.completion_ids,
        inputs.advantages,
        old_logps=inputs.old_logps,
        ref_logps=inputs.ref_logps,
        completion_mask=inputs.mask,
        loss_type="grpo",
        beta=0.04,
        epsilon=0.2,
    )
    whole.loss.backward()
    grad = torch.zeros_like(x)
    loss = 0.0
    for t in Oracle(inputs).truth():
        loss = loss + t.loss
        grad[t.b, t.start : t.stop] = t.grad
    torch.testing.assert_close(loss, whole.loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, x.grad, rtol=1e-12, atol=1e-15)


def test_inputs_clip_one_token_in_32():
    inputs = make_inputs(Case(4, 64, 211, torch.float32), CPU)
    lp = eager_logprobs(inputs, inputs.logits).logps
    log_ratio = lp - inputs.old_logps
    clipped = log_ratio.abs() > 0.11
    assert clipped.sum() == 4 * 64 / 32
    torch.testing.assert_close(log_ratio[clipped], torch.full((8,), 0.5), rtol=1e-4, atol=1e-4)
    assert {-1.0, 1.0} == set(inputs.advantages.sign().tolist())
    p = lp.exp()
    assert 0.01 < p.min() and p.max() < 0.97  # neither certain nor impossible


def test_minimum_bytes_by_hand():
    case = Case(2, 10, 100, torch.bfloat16, masked=0.25)
    assert case.lengths == [5, 10]
    assert case.logits_bytes == 2 * 11 * 100 * 2
    assert case.minimum_bytes("logprobs") == 15 * 100 * 2
    assert case.minimum_bytes("loss") == case.minimum_bytes("inplace") == 15 * 100 * 2 + 4400


def test_inputs_are_left_alone():
    before, after = make_inputs(CASE, CPU), make_inputs(CASE, CPU)
    for mode in MODES:
        for implementation in IMPLEMENTATIONS[:2]:
            if mode in implementation.calls:
                logits = after.logits.clone() if mode == "inplace" else after.logits
                implementation.calls[mode](after, logits)
    for field in ("logits", "completion_ids", "advantages", "old_logps", "ref_logps", "mask"):
        assert torch.equal(getattr(before, field), getattr(after, field)), field


def test_inplace_mode_writes_over_the_buffer_it_is_given():
    inputs = make_inputs(CASE, CPU)
    scratch = inputs.logits.clone()
    outcome = ours_inplace(inputs, scratch)
    assert outcome.grad.data_ptr() == scratch.data_ptr()
    torch.testing.assert_close(scratch, ours(inputs, inputs.logits).grad, rtol=0, atol=0)


def test_suites_are_sound():
    for suite in SUITES.values():
        assert len({case.name for case in suite}) == len(suite)
        for case in suite:
            assert min(case.lengths) >= 0 and max(case.lengths) == case.length


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
    path, _ = write(tmp_path, {"date": "today"}, [row])

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    (record,) = json.loads(path.read_text(), parse_constant=refuse)["rows"]
    assert record["error_over_tolerance"] is None and record["status"] == WRONG


# --- time and memory ---------------------------------------------------------------------------------------


def test_percentiles(monkeypatch):
    times = iter([99.0, *map(float, range(1, 12))])  # the first is the warm-up
    monkeypatch.setattr("benchmarks.measure._cpu_ms", lambda subject, device: [next(times)])
    timing = time_all({"x": Timed(lambda: None)}, CPU, 0.0, min_rounds=11)["x"]
    assert (timing.p20, timing.median, timing.p80, timing.repetitions) == (3.0, 6.0, 9.0, 11)


def test_subjects_take_turns_and_are_prepared_every_time():
    log = []
    subjects = {
        "a": Timed(lambda: log.append("a")),
        "b": Timed(lambda: log.append("b"), prepare=lambda: log.append("prepare b")),
    }
    time_all(subjects, CPU, 0.0, min_rounds=2)
    assert log == ["a", "prepare b", "b"] * 3


def test_subject_that_runs_out_of_memory_while_timed_drops_out():
    def fails():
        raise torch.OutOfMemoryError("full\ndetails")

    timings = time_all({"a": Timed(fails), "b": Timed(lambda: None)}, CPU, 0.0)
    assert timings["a"] == "full" and timings["b"].repetitions >= 5


def test_peak_memory_counts_what_a_call_allocates_and_frees():
    def allocate():
        torch.ones(8 << 20)  # 32 MiB, freed at once
        return torch.ones(8 << 20)

    peak = peak_extra_bytes(allocate, CPU)
    if peak is None:
        pytest.skip("this system does not tell the peak of the resident memory")
    assert 31 << 20 <= peak <= 48 << 20
