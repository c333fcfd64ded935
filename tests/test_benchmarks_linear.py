"""The benchmarks from hidden states and a head: truth, peers, rows and report."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.baselines import Implementation
from benchmarks.baselines_linear import eager_linear, ours_linear
from benchmarks.baselines_peers import EAGER, OURS, implementations
from benchmarks.cases import SUITES, Case
from benchmarks.linear_data import LinearOracle, Products, make_linear_inputs
from benchmarks.measure import Timing
from benchmarks.suite import MISSING, OK, WRONG, new_rows, run_suite
from reference import grpo_loss
from tolerance import U, assert_within, steps

CPU = torch.device("cpu")
DEVICES = [CPU] + [torch.device("cuda")] * torch.cuda.is_available()
CASE = Case(4, 12, 97, torch.float32, hidden=16)
MASKED, SEQUENCE = replace(CASE, masked=0.25), replace(CASE, objective="sequence")
BF16 = replace(CASE, dtype=torch.bfloat16, masked=0.25, hidden=64)


def run(call, case=CASE, device=CPU, **kwargs):
    """The row of one implementation."""
    (rows,) = run_suite([case], ["loss", "linear"], [Implementation("peer", {"linear": call}, **kwargs)], device,
                        seconds=0.0)  # fmt: skip
    return rows[0]


@pytest.mark.parametrize("chunk", [1, 97 * 5, 1 << 24])
@pytest.mark.parametrize("case", [CASE, MASKED, SEQUENCE, BF16], ids=lambda case: case.name)
def test_truth_is_the_reference_on_the_whole_batch(case, chunk, monkeypatch):
    monkeypatch.setattr("benchmarks.cases.ROWS_PER_CHUNK_ELEMENTS", chunk)
    inputs = make_linear_inputs(case, CPU)
    hidden, weight = (x.double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    z = hidden @ weight.T
    z = z + (z.to(case.dtype).double() - z).detach()
    whole = grpo_loss(z, inputs.completion_ids, inputs.advantages, old_logps=inputs.old_logps,
                      ref_logps=inputs.ref_logps, completion_mask=inputs.mask, beta=0.04, epsilon=0.2,
                      loss_type="gspo" if case.objective == "sequence" else "grpo")  # fmt: skip
    whole.loss.backward()
    oracle = LinearOracle(inputs)
    torch.testing.assert_close(oracle.loss, whole.loss.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(oracle.d_hidden, hidden.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(oracle.d_weight, weight.grad, rtol=1e-10, atol=1e-12)


def test_the_tokens_are_those_that_the_head_predicts():
    inputs = make_linear_inputs(Case(4, 64, 997, torch.float32, hidden=32), CPU)
    logits = inputs.hidden @ inputs.weight.T
    lp = logits.log_softmax(-1).gather(-1, inputs.completion_ids[..., None])[..., 0]
    assert 2.5 < logits.std() < 3.5
    # drawn from the distribution: the mean of log p is minus its entropy
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert (lp.mean() + entropy.mean()).abs() < 0.3
    clipped = (lp - inputs.old_logps).abs() > 0.11
    assert clipped.sum() == 4 * 64 / 32 and inputs.logits is None


# --- no speed without a right result --------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("case", [CASE, MASKED, SEQUENCE, BF16], ids=lambda case: case.name)
def test_right_implementations_pass(case, device):
    for call in (ours_linear, eager_linear):
        row = run(call, case, device)
        assert row.status == OK, row.detail
        assert row.error_over_tolerance <= 1 and 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.products_ms > 0 and row.products_multiple == pytest.approx(row.median_ms / row.products_ms)
        assert row.copy_ms is None is row.gigabytes_per_second


def changed(change):
    def call(inputs, logits):
        outcome = eager_linear(inputs, logits)
        return outcome._replace(grads=change(*(x.clone() for x in outcome.grads)))

    return call


def put(x, at, value):
    x[at] = value
    return x


WRONG_HEADS = {
    "d hidden scaled": changed(lambda h, w: (h * 1.02, w)),
    "d weight scaled": changed(lambda h, w: (h, w * 1.02)),
    "sign": changed(lambda h, w: (-h, w)),
    "a row dropped": changed(lambda h, w: (put(h, (2, 3), 0.0), w)),
    "a word dropped": changed(lambda h, w: (h, put(w, 5, 0.0))),
    "nan": changed(lambda h, w: (h, put(w, (5, 1), float("nan")))),
    "masked": changed(lambda h, w: (put(h, (0, -1, 0), 1e-9), w)),
    "loss": lambda i, x: eager_linear(i, x)._replace(loss=torch.tensor(0.5)),
    "another reference": lambda i, x: eager_linear(replace(i, ref_logps=i.ref_logps + 0.3), x),
    "another objective": lambda i, x: eager_linear(replace(i, case=replace(i.case, objective="sequence")), x),
}


@pytest.mark.parametrize("case", [MASKED, BF16], ids=lambda case: case.name)
@pytest.mark.parametrize("name", WRONG_HEADS)
def test_a_wrong_result_gets_no_speed(name, case):
    row = run(WRONG_HEADS[name], case)
    assert row.status == WRONG and "times the tolerance" in row.detail and not row.error_over_tolerance <= 1
    assert row.median_ms is row.products_multiple is row.speedup_over_eager is None


def test_a_missing_gradient_is_a_row():
    row = run(lambda i, x: eager_linear(i, x)._replace(grads=None))
    assert row.detail == "ValueError: d hidden must have shape (4, 12, 16), got None"


@pytest.mark.parametrize(("module", "name"), [("trl.kernels", "TRL kernel"), ("liger_kernel", "Liger-Kernel")])
@pytest.mark.parametrize("case", [MASKED, SEQUENCE], ids=lambda case: case.name)
def test_peers_compute_the_same(module, name, case):
    pytest.importorskip(module)
    (peer,) = (i for i in implementations() if i.name == name)
    inputs = make_linear_inputs(case, DEVICES[-1])
    verdict = LinearOracle(inputs).check("linear", peer.calls["linear"](inputs, None))
    assert verdict.passed, verdict


def test_a_peer_that_is_not_there_says_so():
    row = run(lambda *_: None, missing_linear=lambda case, device: f"needs a licence for H = {case.hidden}")
    assert (row.status, row.detail) == (MISSING, "needs a licence for H = 16")


# --- cases and report -----------------------------------------------------------------------------------


def test_cases_of_heads():
    assert CASE.name == "4x12x16x97 fp32" and CASE.modes == ("linear",)
    assert CASE.logits_bytes == 4 * 12 * 97 * 4 and CASE.gradient_bytes == (4 * 12 + 97) * 16 * 4
    assert "linear" not in replace(CASE, hidden=0).modes
    assert new_rows(CASE, "loss", [OURS]) == [] == new_rows(replace(CASE, hidden=0), "linear", [OURS])
    sizes = {(c.batch * c.length, c.hidden, c.vocab) for c in SUITES["gpu"] if c.hidden}
    assert sizes == {(8192, 4096, 151936), (16384, 4096, 151936)}
    assert (512, 2048, 32000) in {(c.batch * c.length, c.hidden, c.vocab) for c in SUITES["cpu"]}


def test_the_products_are_three():
    inputs = make_linear_inputs(CASE, CPU)
    products = Products(inputs)
    products()
    hidden, weight, z = inputs.hidden.flatten(0, 1), inputs.weight, products.z
    for got, x, y in ((z, hidden, weight.T), (products.d_hidden, z, weight), (products.d_weight, z.T, hidden)):
        x, y = x.double(), y.double()
        assert_within(got, x @ y, steps(x.shape[1]) * U * (x.abs() @ y.abs()), "product")


def test_derived_numbers_by_hand(monkeypatch):
    milliseconds = {"products": 2.0, "grpo_kernels": 3.0, "eager PyTorch": 12.0}
    timings = {name: Timing(ms, 1.0, 20.0, 7) for name, ms in milliseconds.items()}
    monkeypatch.setattr("benchmarks.suite.time_all", lambda subjects, *_: {name: timings[name] for name in subjects})
    monkeypatch.setattr("benchmarks.suite.peak_extra_bytes", lambda *_: CASE.gradient_bytes + 5 * 2**20)
    ((ours, eager),) = run_suite([CASE], ["linear"], [OURS, EAGER], CPU, seconds=0.0)
    assert (ours.median_ms, ours.products_multiple, ours.speedup_over_eager) == (3.0, 1.5, 4.0)
    assert (eager.products_multiple, eager.speedup_over_eager) == (6.0, 1.0)
    assert ours.beyond_gradients_bytes == 5 * 2**20
    lines = report.table([ours, eager]).splitlines()
    assert lines[1].split() == ["ms", "p20-p80", "x", "GEMMs", "MiB", "beyond", "vs", "eager"]
    assert lines[3].split() == ["grpo_kernels", "3.000", "1.00-20.0", "1.50", "5", "5", "4.00x"]
    assert report.summary([ours, eager]).splitlines()[1].endswith("head                    4.00x")


def test_command_measures_a_head(tmp_path, capsys):
    arguments = ["--shapes", "2x6x16x97", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line and ".png" not in line) <= 80
    assert "2x6x16x97 bf16: hidden states + head, forward + backward" in printed and "three products" in printed
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["mode"] for row in rows} == {"linear"} and len(rows) == 2 * 4
    for row in rows:
        assert row["status"] == OK or row["detail"]
        if row["implementation"] in ("grpo_kernels", "eager PyTorch"):
            assert row["status"] == OK and row["products_multiple"] > 0
