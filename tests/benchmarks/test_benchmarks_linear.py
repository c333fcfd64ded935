"""The benchmarks from hidden states and a head: data, truth, the head's products alone, and what is derived."""

from dataclasses import replace

import pytest
import torch

from benchmarks import report, suite
from benchmarks.baselines_peers import EAGER, OURS
from benchmarks.cases import Case
from benchmarks.linear_data import LinearOracle, Products, make_linear_inputs
from benchmarks.measure import Timing
from benchmarks.suite import new_rows, run_suite
from reference import grpo_loss
from tolerance import U, assert_within, steps

CPU = torch.device("cpu")
CASE = Case(4, 12, 97, torch.float32, hidden=16)
KINDS = [
    CASE,
    replace(CASE, masked=0.25),
    replace(CASE, objective="sequence"),
    replace(CASE, dtype=torch.bfloat16, masked=0.25, hidden=64),
]


@pytest.mark.parametrize("chunk", [1, 97 * 5, 1 << 24])
@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
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
    assert 2.5 < logits.std() < 3.5 and inputs.logits is None
    # drawn from the distribution: the mean of log p is minus its entropy
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert (lp.mean() + entropy.mean()).abs() < 0.3
    assert ((lp - inputs.old_logps).abs() > 0.11).sum() == 4 * 64 / 32  # clipped


def test_cases_of_heads():
    assert CASE.name == "4x12x16x97 fp32" and CASE.modes == ("linear",)
    assert CASE.logits_bytes == 4 * 12 * 97 * 4 and CASE.gradient_bytes == (4 * 12 + 97) * 16 * 4
    assert new_rows(CASE, "loss", [OURS]) == [] == new_rows(replace(CASE, hidden=0), "linear", [OURS])


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
    monkeypatch.setattr(suite, "time_all", lambda *_: timings)
    monkeypatch.setattr(suite, "peak_extra_bytes", lambda *_: CASE.gradient_bytes + 5 * 2**20)
    ((ours, eager),) = run_suite([CASE], ["linear"], [OURS, EAGER], CPU, seconds=0.0)
    assert (ours.median_ms, ours.products_multiple, ours.speedup_over_eager) == (3.0, 1.5, 4.0)
    assert (eager.products_multiple, eager.speedup_over_eager) == (6.0, 1.0)
    assert ours.beyond_gradients_bytes == 5 * 2**20 and ours.copy_ms is None is ours.gigabytes_per_second
    lines = report.table([ours, eager]).splitlines()
    assert lines[1].split() == ["ms", "p20-p80", "x", "GEMMs", "MiB", "beyond", "vs", "eager"]
    assert lines[3].split() == ["grpo_kernels", "3.000", "1.00-20.0", "1.50", "5", "5", "4.00x"]
    assert report.summary([ours, eager]).splitlines()[1].endswith("head                    4.00x")
