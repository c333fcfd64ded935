"""The benchmarks' suite: what a GPU run of a few minutes needs, tried on a CPU with tiny cases."""

from dataclasses import replace

import pytest
import torch

from benchmarks import measure, report, suite, warm
from benchmarks.__main__ import main
from benchmarks.baselines import Implementation, Outcome, eager, eager_entropies
from benchmarks.baselines_peers import EAGER, OURS, apart, implementations
from benchmarks.cases import SUITES, Case, make_inputs
from benchmarks.measure import Failed
from benchmarks.oracle import SAMPLED_ROWS, Oracle
from benchmarks.suite import ERROR, MISSING, OK, OOM, WRONG, run_suite

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = Case(4, 32, 97, torch.float32, masked=0.25)
KINDS = [
    CASE,
    replace(CASE, dtype=torch.bfloat16),
    replace(CASE, objective="sequence"),
    replace(CASE, zero_advantage=0.5),
]
NO_KL = replace(CASE, objective="cross-entropy")


def rows_of(call, mode="loss", case=CASE, **kwargs):
    (rows,) = run_suite([case], [mode], [Implementation("peer", {mode: call}, **kwargs)], CPU, seconds=0.0)
    return rows


# --- large cases: a sample of rows ------------------------------------------------------------------------


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr("benchmarks.oracle.ALL_ROWS_BYTES", 0)


def test_large_cases_are_checked_in_a_sample(large):
    inputs = make_inputs(CASE, CPU)
    oracle = Oracle(inputs)
    (truth,) = oracle.truth
    assert oracle.sampled and len(truth.b) == SAMPLED_ROWS == len(set(zip(truth.b.tolist(), truth.t.tolist())))
    assert inputs.mask[truth.b, truth.t].all()
    (again,) = Oracle(inputs).truth
    assert torch.equal(truth.b, again.b) and torch.equal(truth.t, again.t)


def test_the_suites_large_cases_are_those_of_gpus():
    big = {c for name, cases in SUITES.items() for c in cases if c.batch * c.length * c.vocab * 8 > 1 << 30}
    assert SUITES["gpu"][0] in big and not big & set(SUITES["cpu"])


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_right_results_pass_the_sample(large, case):
    for implementation in (OURS, EAGER):
        for mode in case.modes:
            if mode in implementation.calls:
                (row,) = rows_of(implementation.calls[mode], mode, case)
                assert row.status == OK, (mode, row.detail)


def outside(inputs):
    """A row that counts and is not in the sample."""
    (truth,) = Oracle(inputs).truth
    inside = set(zip(truth.b.tolist(), truth.t.tolist()))
    g = Oracle(inputs).dlogps
    return next((b, t) for b, t in inputs.mask.nonzero().tolist() if (b, t) not in inside and g[b, t] != 0)


def changed(change):
    def call(inputs, logits):
        outcome = eager(inputs, logits)
        change(inputs, outcome.grad)
        return outcome

    return call


def scale(inputs, grad):
    grad[outside(inputs)] *= 1.02


def entry(inputs, grad):
    grad[outside(inputs)][3] += 1e-3 * grad.abs().max()


def swapped(inputs, grad):
    """A neighbour's gradient: its sum is right, its token is not."""
    b, t = outside(inputs)
    grad[b, t] = grad[b, t].roll(1)


def nothing(inputs, grad):
    grad[outside(inputs)] = 0


def not_a_number(inputs, grad):
    grad[outside(inputs)][5] = float("nan")


def sampled_entry(inputs, grad):
    (truth,) = Oracle(inputs).truth
    grad[truth.b[7], truth.t[7], 3] *= 1.05


def masked(inputs, grad):
    grad[0, -2, 3] = 1e-12


def last(inputs, grad):
    grad[2, -1, 3] = float("nan")


@pytest.mark.parametrize("change", [scale, entry, swapped, nothing, not_a_number, sampled_entry, masked, last])
def test_wrong_results_of_large_cases_get_no_speed(large, change):
    (row,) = rows_of(changed(change))
    assert row.status == WRONG and row.detail.startswith("gradient") and row.median_ms is None


# --- entropies, other losses ------------------------------------------------------------------------------


def test_wrong_entropies_get_no_speed():
    plain = replace(CASE, masked=0.0)
    assert "entropies" in plain.modes and "entropies" not in CASE.modes

    def off(inputs, logits):
        outcome = eager_entropies(inputs, logits)
        return outcome._replace(entropies=outcome.entropies * 1.001)

    (row,) = rows_of(off, "entropies", plain)
    assert row.status == WRONG and row.detail.startswith("entropies")
    (row,) = rows_of(eager_entropies, "entropies", plain)
    assert row.status == OK and row.minimum_bytes == plain.minimum_bytes("logprobs")
    (row,) = rows_of(lambda i, x: eager_entropies(i, x)._replace(entropies=None), "entropies", plain)
    assert row.status == ERROR and "entropies must have shape" in row.detail


def test_cross_entropy_is_a_case_of_its_own():
    """Here by PyTorch's; on a GPU quack's takes part."""

    def cross_entropy(inputs, logits, scale=1.0):
        x = logits.detach().requires_grad_()
        labels = torch.nn.functional.pad(inputs.completion_ids.masked_fill(inputs.mask == 0, -100), (0, 1), value=-100)
        loss = torch.nn.functional.cross_entropy(x.float().flatten(0, 1), labels.flatten(), reduction="sum") * scale
        return Outcome(loss.detach(), torch.autograd.grad(loss, x)[0])

    assert NO_KL.modes == ("loss", "inplace") and NO_KL.beta == 0 and "cross-entropy" in NO_KL.name
    (row,) = rows_of(cross_entropy, case=NO_KL, objectives=("cross-entropy",))
    assert row.status == OK, row.detail
    (row,) = rows_of(lambda i, x: cross_entropy(i, x, 1.02), case=NO_KL, objectives=("cross-entropy",))
    assert row.status == WRONG
    (rows,) = run_suite([NO_KL], ["loss"], implementations(), CPU, seconds=0.0)
    assert {row.implementation: row.status for row in rows} == {"eager PyTorch": OK, "quack": MISSING}
    (plain,) = run_suite([CASE], ["loss"], implementations(), CPU, seconds=0.0)
    assert "quack" not in {row.implementation for row in plain}


def test_quack_is_called_as_it_wants(monkeypatch):
    """With a stand-in for its function."""
    import sys
    import types

    def cross_entropy_fwd(x, target, return_dx=False, inplace_backward=False):
        assert x.shape == (4 * 33, 97) and return_dx and (target == -100).sum() == 4 * 33 - sum(CASE.lengths)
        leaf = x.detach().clone().requires_grad_()
        losses = torch.nn.functional.cross_entropy(leaf.float(), target, reduction="none")
        (dx,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), x.copy_(dx) if inplace_backward else dx

    module = types.ModuleType("quack.cross_entropy")
    module.cross_entropy_fwd = cross_entropy_fwd
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", module)
    (quack,) = (i for i in implementations() if i.name == "quack")
    assert quack.missing(NO_KL, CUDA) is None
    for mode in ("loss", "inplace"):
        (row,) = rows_of(quack.calls[mode], mode, NO_KL, objectives=quack.objectives)
        assert row.status == OK, row.detail


# --- nothing stops the run --------------------------------------------------------------------------------


def test_no_data_for_nobody(monkeypatch):
    monkeypatch.setattr("benchmarks.suite.make_inputs", lambda *_: pytest.fail("made data"))
    absent = Implementation("peer", {"loss": eager}, lambda case, device: "needs a licence")
    ((row,),) = run_suite([CASE], ["loss"], [absent], CPU, seconds=0.0)
    assert (row.status, row.detail) == (MISSING, "needs a licence")


def test_an_error_while_data_are_made_is_rows(monkeypatch):
    def fails(*_):
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

    monkeypatch.setattr("benchmarks.suite.make_inputs", fails)
    ((row,),) = run_suite([CASE], ["loss"], [OURS], CPU, seconds=0.0)
    assert (row.status, row.detail) == (ERROR, "no data: RuntimeError: CUBLAS_STATUS_ALLOC_FAILED")


def test_a_copy_without_room_is_rows(monkeypatch):
    monkeypatch.setattr("benchmarks.suite.time_all", lambda subjects, *_: dict.fromkeys(subjects, Failed(OOM, "9 GiB")))
    ((row,),) = run_suite([CASE], ["loss"], [OURS], CPU, seconds=0.0)
    assert (row.status, row.detail) == (OOM, "copy, with everything allocated: 9 GiB")


def test_an_error_while_timed_is_rows():
    calls = []

    def third_time(inputs, logits):
        calls.append(0)
        if len(calls) > 2:
            raise RuntimeError("illegal memory access")
        return eager(inputs, logits)

    blocks = run_suite([CASE, replace(CASE, batch=3)], ["loss"], [Implementation("peer", {"loss": third_time})], CPU,
                       seconds=0.0)  # fmt: skip
    (first,), (second,) = blocks
    assert (
        first.status == ERROR
        and first.detail == "copy, with everything allocated: while timed, RuntimeError: illegal memory access"
    )
    assert second.status == ERROR and "illegal" in second.detail


# --- torch.compile, the second timer, compiling beforehand -------------------------------------------------


def test_what_compiles_comes_last_with_a_budget_of_its_own(capsys):
    order = []

    def named(name):
        return lambda i, x: order.append((name, i.case.vocab)) or eager(i, x)

    who = [
        Implementation("grpo_kernels", {"loss": named("ours")}),
        Implementation("torch.compile", {"loss": named("compiled")}, compiles=("loss",)),
    ]
    shapes = [
        "--shapes",
        "2x5x97",
        "2x5x101",
        "--dtypes",
        "fp32",
        "--modes",
        "loss",
        "--device",
        "cpu",
        "--seconds",
        "0",
    ]
    assert main([*shapes, "--compile", "auto"], who) == 0
    assert list(dict.fromkeys(order)) == [("ours", 97), ("ours", 101), ("compiled", 97), ("compiled", 101)]
    assert capsys.readouterr().out.count("[case 2 of 2") == 2


def test_by_default_nothing_is_compiled_by_torch():
    plain, compiled = apart(implementations())
    assert [(i.name, tuple(i.calls)) for i in compiled] == [
        ("torch.compile", ("loss", "logprobs")), ("Liger-Kernel", ("linear",))
    ]  # fmt: skip
    assert "torch.compile" not in {i.name for i in plain}
    assert all("linear" not in i.calls for i in plain if "Liger" in i.name)
    head = Case(2, 5, 97, torch.float32, hidden=16, compiled=True)
    for each in compiled:
        assert suite.missing(each, head if "linear" in each.calls else CASE, next(iter(each.calls)), CUDA) == (
            "not measured; --compile auto"
        )


def test_second_timer(monkeypatch):
    monkeypatch.setattr("benchmarks.suite.do_bench_ms", lambda call, device: (call(), 2.0)[1])
    case = replace(CASE, second_timer=True)
    (rows,) = run_suite([case], ["loss"], [OURS, EAGER], CPU, seconds=0.0)
    assert [(row.do_bench_ms, row.do_bench_copy_multiple) for row in rows] == [(2.0, 1.0)] * 2
    text = report.table(rows)
    assert (
        "by triton's do_bench: grpo_kernels 2.000 ms (1.00 x copy)" in text and max(map(len, text.splitlines())) <= 80
    )
    (rows,) = run_suite([CASE], ["loss"], [OURS], CPU, seconds=0.0)
    assert rows[0].do_bench_ms is None


def test_do_bench(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench", lambda call, return_mode, **_: call() if return_mode == "median" else None)
    assert measure.do_bench_ms(lambda: 3.0, CUDA) == 3.0 and measure.do_bench_ms(lambda: 3.0, CPU) is None

    def full():
        raise torch.OutOfMemoryError("full")

    assert measure.do_bench_ms(full, CUDA) is None


def test_kernels_are_compiled_beforehand(capsys):
    """The processes' part; the kernels of every kind of case, once."""
    todo = warm.jobs(SUITES["gpu"], ["loss", "logprobs", "linear"])
    assert len(todo) == len(set(todo)) and todo[0][0].vocab == 151936 and {case.length for case, _ in todo} == {16}
    assert {c.vocab for c in SUITES["gpu"]} == {case.vocab for case, _ in todo}
    assert warm.main(["--suite", "smoke", "--device", "cpu", "--part", "1/3"]) == 0
    assert capsys.readouterr().out == ""


def test_what_fails_to_compile_beforehand_is_said(monkeypatch):
    def fails(inputs, logits):
        raise RuntimeError("out of resource\nmore")

    small = Case(2, 5, 97, torch.float32)
    problems = warm.run_jobs([(small, "loss")], [Implementation("peer", {"loss": fails})], CPU)
    assert problems == ["2x5x97 fp32, loss, peer: RuntimeError: out of resource"]

    class Process:
        returncode = 1

        def communicate(self, timeout=None):
            return "", "a warning\nTraceback\nRuntimeError: no driver\n"

    monkeypatch.setattr("benchmarks.warm.subprocess.Popen", lambda *args, **kwargs: Process())
    text = warm.warm_up("smoke", ["loss"], processes=2)
    assert text.startswith("Kernels compiled beforehand by 2 processes") and text.endswith(
        "\n  RuntimeError: no driver"
    )
