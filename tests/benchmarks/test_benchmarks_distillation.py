"""The benchmarks of distillation: the truth is the reference's, all who are measured come to it, faults show."""

from dataclasses import replace

import pytest
import torch

import cases
import reference
from benchmarks.cases import Case
from benchmarks.distillation import IMPLEMENTATIONS, OBJECTIVE, DistillationOracle, LinearDistillationOracle
from benchmarks.linear_data import Products
from benchmarks.suite import OK, inputs_of, prepare, run_suite

DEVICE = torch.device(cases.DEVICE)

CASE = Case(4, 12, 97, torch.float32, objective=OBJECTIVE)
KINDS = [
    CASE,
    replace(CASE, masked=0.25),
    replace(CASE, masked=0.25, dtype=torch.bfloat16),
    replace(CASE, hidden=16),
    replace(CASE, hidden=16, masked=0.25),
    replace(CASE, hidden=64, dtype=torch.bfloat16),
]


def rounded(hidden, weight, dtype):
    """Logits in float64, rounded as a head rounds them, with the gradient of those that are not."""
    z = hidden @ weight.T
    return z + (z.to(dtype).double() - z).detach()


@pytest.mark.parametrize("chunk", [1, 97 * 5, 1 << 24])
@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_truth_is_the_reference_on_the_whole_batch(case, chunk, monkeypatch):
    monkeypatch.setattr("benchmarks.cases.ROWS_PER_CHUNK_ELEMENTS", chunk)
    inputs, oracle, _ = prepare(case, DEVICE, 0)
    if case.hidden:
        leaves = [x.double().requires_grad_() for x in (inputs.hidden, inputs.weight)]
        x = rounded(*leaves, case.dtype)
        z = rounded(inputs.teacher_hidden.double(), inputs.teacher_weight.double(), case.dtype)
    else:
        leaves = [inputs.logits.double().requires_grad_()]
        x, z = leaves[0], inputs.teacher.double()
    whole = reference.distillation_loss(x, z, beta=1.0, completion_mask=inputs.mask)
    whole.loss.backward()
    torch.testing.assert_close(oracle.loss, whole.loss.detach(), rtol=1e-10, atol=1e-10)
    if case.hidden:
        torch.testing.assert_close(oracle.d_hidden, leaves[0].grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(oracle.d_weight, leaves[1].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("who", IMPLEMENTATIONS, ids=lambda who: who.name)
def test_everyone_computes_the_same(who):
    if who.name.startswith("TRL"):
        pytest.importorskip("trl.kernels.chunked_divergence")
    checked = set()
    for case in KINDS:
        inputs, oracle, _ = prepare(case, DEVICE, 0)
        for mode in (mode for mode in case.modes if mode in who.calls):
            verdict = oracle.check(mode, who.calls[mode](inputs, None if case.hidden else inputs.logits.clone()))
            assert verdict.passed, f"{case.name}, {mode}: {verdict}"
            checked.add(mode)
    assert checked == set(who.calls)


@pytest.mark.parametrize("sampled", (False, True))
def test_what_is_wrong_is_noticed(sampled, monkeypatch):
    if sampled:
        monkeypatch.setattr("benchmarks.distillation.ALL_ROWS_BYTES", 0)
    case = replace(CASE, masked=0.25)
    inputs = inputs_of(case, DEVICE)
    oracle, good = DistillationOracle(inputs), IMPLEMENTATIONS[0].calls["loss"](inputs, inputs.logits)
    assert oracle.check("loss", good).passed
    spoilt = {"gradient": good.grad * 1.01, "gradient of masked rows": good.grad.clone()}
    spoilt["gradient of masked rows"][:, -1, 3] = 1e-9
    for what, grad in spoilt.items():
        verdict = oracle.check("loss", good._replace(grad=grad))
        assert not verdict.passed and verdict.what == what
    verdict = oracle.check("loss", good._replace(loss=good.loss + 0.01))
    assert not verdict.passed and verdict.what == "loss"
    assert not oracle.check("loss", good._replace(grad=good.grad * float("nan"))).passed
    with pytest.raises(ValueError, match="grad must have shape"):
        oracle.check("loss", good._replace(grad=None))


def test_what_is_wrong_of_a_head_is_noticed():
    inputs = inputs_of(replace(CASE, hidden=16), DEVICE)
    oracle, good = LinearDistillationOracle(inputs), IMPLEMENTATIONS[0].calls["linear"](inputs, None)
    assert oracle.check("linear", good).passed
    for place in range(2):
        grads = [x * (1.01 if k == place else 1) for k, x in enumerate(good.grads)]
        assert not oracle.check("linear", good._replace(grads=tuple(grads))).passed


def test_the_products_are_four_and_both_models_are_read():
    inputs = inputs_of(replace(CASE, hidden=16), DEVICE)
    products = Products(inputs)
    products.teacher = (inputs.teacher_hidden.flatten(0, 1), inputs.teacher_weight.T * torch.nan)
    products()  # its logits go first, and the student's over them
    assert products.d_weight.isfinite().all()
    assert Products(inputs_of(Case(4, 12, 97, torch.float32, hidden=16), DEVICE)).teacher is None
    rows = 4 * 12 * 97 * 4
    assert CASE.minimum_bytes("loss") == 2 * rows + CASE.logits_bytes and CASE.modes == ("loss", "inplace")


def test_rows_of_a_suite():
    modes = ("loss", "inplace", "logprobs", "linear")
    cases = (CASE, replace(CASE, hidden=16))
    rows = [row for block in run_suite(cases, modes, IMPLEMENTATIONS[:2], DEVICE, seconds=0.0) for row in block]
    found = [(row.mode, row.implementation, row.status) for row in rows]
    assert found == [("loss", "grpo_kernels", OK), ("loss", "eager PyTorch", OK), ("inplace", "grpo_kernels", OK),
                     ("linear", "grpo_kernels", OK), ("linear", "eager PyTorch", OK)]  # fmt: skip
