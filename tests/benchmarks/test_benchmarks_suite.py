"""The benchmarks' loop, with tiny cases: a wrong result has no time, whatever fails is a row, and the run goes on."""

from dataclasses import astuple, fields, replace

import pytest
import torch

from benchmarks import measure, report, suite, warm
from benchmarks.baselines import Implementation, Outcome, eager, eager_logprobs
from benchmarks.baselines_linear import eager_linear
from benchmarks.baselines_peers import EAGER, OURS, apart, implementations
from benchmarks.budget import Budget
from benchmarks.cases import MODES, SUITES, Case, make_inputs
from benchmarks.measure import Timing
from benchmarks.oracle import ROUNDING, SAMPLED_ROWS, Oracle
from benchmarks.suite import ERROR, MISSING, OK, OOM, WRONG, Row, run_suite

CPU, CUDA, NAN = torch.device("cpu"), torch.device("cuda"), float("nan")
DEVICES = [CPU] + [CUDA] * torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16]
CASE = Case(4, 32, 97, torch.float32, masked=0.25)
PLAIN, HEAD = replace(CASE, masked=0.0), replace(CASE, length=12, hidden=64)
CASES = {"loss": CASE, "logprobs": CASE, "entropies": PLAIN, "linear": HEAD}
SEQUENCE = {"objective": "sequence"}
KINDS = [{}, {"masked": 0.5}, {"zero_advantage": 0.5}, SEQUENCE, SEQUENCE | {"masked": 0.5}]
RESULTS = [field.name for field in fields(Row)].index("error_over_tolerance") + 1  # of a Row: what a right result has


def row_of(mode, call, case=None, **kwargs):
    """The row of one implementation, with eager PyTorch beside it."""
    peer = Implementation("peer", {mode: call}, **kwargs)
    ((row, beside),) = run_suite([case or CASES[mode]], [mode], [peer, EAGER], CPU, seconds=0.0)
    assert beside.status == OK and beside.median_ms > 0
    return row


@pytest.fixture
def large(monkeypatch):
    """Every case is as one of a GPU, of which a sample of rows is checked entry by entry."""
    monkeypatch.setattr("benchmarks.oracle.ALL_ROWS_BYTES", 0)


# --- no time without a right result -----------------------------------------------------------------------


def row(edit, sampled=False):
    """Edits the gradient of one row that has one and is, or is not, in the sample of large cases."""

    def change(inputs, outcome):
        oracle = Oracle(inputs)
        ((b, t),) = oracle._sample()
        inside = list(zip(b.tolist(), t.tolist()))
        edit(outcome.grad[next((b, t) for b, t in oracle.dlogps.nonzero().tolist() if ((b, t) in inside) == sampled)])

    return change


def of_other(call, **change):
    """What eager PyTorch makes of other inputs."""
    return lambda i, o: call(replace(i, **{name: edit(getattr(i, name)) for name, edit in change.items()}), i.logits)


# mode → what is off: how. Each changes eager PyTorch's outcome, or gives another.
WRONG_RESULTS = {
    "loss": {
        "loss: scaled": lambda i, o: o.loss.mul_(1.1),
        "loss: nan": lambda i, o: o.loss.fill_(NAN),
        "gradient: scaled": lambda i, o: o.grad.mul_(1.02),
        "gradient: sign": lambda i, o: o.grad.neg_(),
        "gradient: masked": lambda i, o: o.grad[0, -2, 3].fill_(1e-12),
        "gradient: last position": lambda i, o: o.grad[2, -1, 3].fill_(NAN),
        "gradient: a row scaled": row(lambda g: g.mul_(1.02)),
        "gradient: a row dropped": row(lambda g: g.zero_()),
        "gradient: another token's": row(lambda g: g.copy_(g.roll(1))),  # its sum is right
        "gradient: an entry": row(lambda g: g[3].add_(30 * ROUNDING[g.dtype] * g.abs().max())),
        "gradient: nan": row(lambda g: g[5].fill_(NAN)),
        "gradient: an entry of the sample": row(lambda g: g[3].mul_(1.05), sampled=True),
        "off: another reference": of_other(eager, ref_logps=lambda x: x + 0.1),
        "off: another objective": of_other(eager, case=lambda case: replace(case, **SEQUENCE)),
    },
    "logprobs": {"log-probs: off": lambda i, o: o.logps.add_(1e-3)},
    "entropies": {"entropies: scaled": lambda i, o: o.entropies.mul_(1.001)},
    "linear": {
        "loss: another": lambda i, o: o.loss.fill_(0.5),
        "d hidden: scaled": lambda i, o: o.grads[0].mul_(1.02),
        "d hidden: sign": lambda i, o: o.grads[0].neg_(),
        "d hidden: a row dropped": lambda i, o: o.grads[0][2, 3].zero_(),
        "d hidden: masked": lambda i, o: o.grads[0][0, -1, 0].fill_(1e-9),
        "d weight: scaled": lambda i, o: o.grads[1].mul_(1.02),
        "d weight: a word dropped": lambda i, o: o.grads[1][5].zero_(),
        "d weight: nan": lambda i, o: o.grads[1][5, 1].fill_(NAN),
        "off: another reference": of_other(eager_linear, ref_logps=lambda x: x + 0.3),
        "off: another objective": of_other(eager_linear, case=lambda case: replace(case, **SEQUENCE)),
    },
}
TABLE = [(mode, name, False) for mode, names in WRONG_RESULTS.items() for name in names]
TABLE += [("loss", name, True) for name in WRONG_RESULTS["loss"]]


@pytest.mark.parametrize(("mode", "name", "sampled"), TABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_wrong_result_gets_no_time(dtype, mode, name, sampled, request):
    if sampled:
        request.getfixturevalue("large")

    def call(inputs, logits):
        outcome = EAGER.calls[mode](inputs, logits)
        changed = WRONG_RESULTS[mode][name](inputs, outcome)
        return changed if isinstance(changed, Outcome) else outcome

    row = row_of(mode, call, replace(CASES[mode], dtype=dtype))
    assert row.status == WRONG and name.split(":")[0] in row.detail and "times the tolerance" in row.detail
    assert not row.error_over_tolerance <= 1 and set(astuple(row)[RESULTS:]) == {None}


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("sizes", [{"vocab": 301}, {"vocab": 301, "hidden": 64}], ids=["logits", "head"])
@pytest.mark.parametrize("what", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_right_results_pass(dtype, what, sizes, device, request):
    case = Case(4, 32, dtype=dtype, **sizes, **what)
    blocks = [*run_suite([case], list(MODES), [OURS, EAGER], device, seconds=0.0)]
    request.getfixturevalue("large")
    blocks += run_suite([case], list(MODES), [OURS, EAGER], device, seconds=0.0)
    assert [block[0].mode for block in blocks] == [*case.modes] * 2
    for row in (row for block in blocks for row in block):
        assert row.status == OK, row.detail
        assert row.error_over_tolerance <= 1 and 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert (row.products_multiple if case.hidden else row.copy_multiple) > 0


def test_large_cases_are_checked_in_a_sample(large):
    inputs = make_inputs(CASE, CPU)
    oracle = Oracle(inputs)
    (truth,), (again,) = oracle.truth, Oracle(inputs).truth
    assert oracle.sampled and len(truth.b) == SAMPLED_ROWS == len(set(zip(truth.b.tolist(), truth.t.tolist())))
    assert inputs.mask[truth.b, truth.t].all() and torch.equal(truth.b, again.b) and torch.equal(truth.t, again.t)


def test_logprobs_at_masked_positions_may_be_anything():
    def poisoned(inputs, logits):
        return Outcome(logps=eager_logprobs(inputs, logits).logps.masked_fill(inputs.mask == 0, NAN))

    assert row_of("logprobs", poisoned).status == OK


# --- whatever fails is a row ------------------------------------------------------------------------------

ALLOCATOR = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
FAILURES = [  # mode, where, what it raises or returns, status, detail
    ("loss", "call", torch.OutOfMemoryError("Tried to allocate 9 GiB\nmore"), OOM,
     "OutOfMemoryError: Tried to allocate 9 GiB"),
    ("loss", "call", ALLOCATOR, OOM, f"RuntimeError: {ALLOCATOR}"),
    ("loss", "call", MemoryError("no"), OOM, "MemoryError: no"),
    ("loss", "call", AssertionError("contiguous"), ERROR, "AssertionError: contiguous"),
    ("loss", "call", Outcome(torch.tensor(0.0), torch.zeros(4, 32, 97)), ERROR,
     "ValueError: grad must have shape (4, 33, 97), got (4, 32, 97)"),
    ("entropies", "call", Outcome(logps=torch.zeros(4, 32)), ERROR,
     "ValueError: entropies must have shape (4, 32), got None"),
    ("linear", "call", Outcome(torch.tensor(0.0)), ERROR, "ValueError: d hidden must have shape (4, 12, 64), got None"),
    ("loss", "make_inputs", torch.OutOfMemoryError("9 GiB"), OOM,
     "no room for logits, a copy and the float64 check: OutOfMemoryError: 9 GiB"),
    ("linear", "make_linear_inputs", RuntimeError("CUBLAS_STATUS"), ERROR, "no data: RuntimeError: CUBLAS_STATUS"),
    ("loss", "time_all", RuntimeError("illegal memory access"), ERROR,
     "copy, with everything allocated: while timed, RuntimeError: illegal memory access"),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "where", "what", "status", "detail"), FAILURES, ids=lambda x: str(x)[:20])
def test_a_failure_is_a_row_and_the_run_goes_on(mode, where, what, status, detail, monkeypatch):
    def fails(*_):
        if isinstance(what, Exception):
            raise what
        return what

    right = EAGER.calls[mode]
    who = [Implementation("peer", {mode: lambda *a: fails() if where == "call" and broken else right(*a)}), EAGER]
    who.append(Implementation("absent", {mode: fails}, *[lambda case, device: f"a licence for {case.vocab}"] * 2))
    blocks = run_suite([CASES[mode], replace(CASES[mode], vocab=101)], [mode], who, CPU, seconds=0.0)
    broken = True
    with monkeypatch.context() as patch:
        if where != "call":
            patch.setattr(suite, where, fails)
        row, beside, absent = next(blocks)
    assert (row.status, row.detail, row.median_ms, row.copy_multiple) == (status, detail, None, None)
    assert beside.status == (OK if where == "call" else status)
    assert (absent.status, absent.detail) == (MISSING, "a licence for 97")
    broken = False
    assert [row.status for row in next(blocks)] == [OK, OK, MISSING]


def test_no_data_for_nobody(monkeypatch):
    monkeypatch.setattr(suite, "make_inputs", lambda *_: pytest.fail("made data"))
    absent = Implementation("peer", {"loss": eager}, lambda case, device: "needs a licence")
    ((row,),) = run_suite([CASE], ["loss"], [absent], CPU, seconds=0.0)
    assert (row.status, row.detail) == (MISSING, "needs a licence")


def test_spent_budget_leaves_rows_with_a_reason(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.budget.time.monotonic", lambda: now[0])
    blocks = []
    for block in run_suite([CASE, PLAIN], ["loss", "logprobs"], [OURS], CPU, seconds=Budget(60.0, 0.0)):
        blocks += block
        now[0] += 61.0
    found = [(row.case, row.mode, row.status) for row in blocks]
    cases = [(case.name, mode) for case in (CASE, PLAIN) for mode in ("loss", "logprobs")]
    assert found == [(*cases[0], OK), *((*each, MISSING) for each in cases[1:])]
    assert {row.detail for row in blocks[1:]} == {"the run's 60 s are spent; --minutes"}


# --- what is derived of times, and the second timer -------------------------------------------------------


def test_derived_numbers_by_hand(monkeypatch):
    milliseconds = {"copy": 2.0, "peer": 4.0, "eager PyTorch": 12.0}
    timings = {name: Timing(ms, 1.0, 20.0, 7) for name, ms in milliseconds.items()}
    monkeypatch.setattr(suite, "time_all", lambda *_: timings)
    case = Case(2, 10, 100, torch.float32)  # 8000 bytes to read, 8800 to write, of 8800
    row = row_of("loss", eager, case)
    assert (row.median_ms, row.copy_ms, row.copy_multiple, row.speedup_over_eager) == (4.0, 2.0, 2.0, 3.0)
    assert row.gigabytes_per_second == pytest.approx(16800 / 4e-3 / 1e9)
    assert row.share_of_copy_bandwidth == pytest.approx((16800 / 4) / (17600 / 2))
    row = row_of("logprobs", eager_logprobs, case)
    assert row.share_of_copy_bandwidth == pytest.approx((8000 / 4) / (17600 / 2))


def test_second_timer(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench", lambda call, return_mode, **_: call() if return_mode == "median" else None)
    assert measure.do_bench_ms(lambda: 3.0, CUDA) == 3.0 and measure.do_bench_ms(lambda: 3.0, CPU) is None
    assert measure.do_bench_ms(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("full")), CUDA) is None

    monkeypatch.setattr(suite, "do_bench_ms", lambda call, device: (call(), 2.0)[1])
    plain, timed = run_suite([CASE, replace(PLAIN, second_timer=True)], ["loss"], [OURS, EAGER], CPU, seconds=0.0)
    assert [(r.do_bench_ms, r.do_bench_copy_multiple) for r in plain + timed] == [(None, None)] * 2 + [(2.0, 1.0)] * 2
    assert "by triton's do_bench: grpo_kernels 2.000 ms (1.00 x copy)" in report.table(timed)


# --- compiling, beforehand and by torch -------------------------------------------------------------------


def test_by_default_nothing_is_compiled_by_torch():
    plain, compiled = ({(i.name, mode): i for i in part for mode in i.calls} for part in apart(implementations()))
    assert list(compiled) == [("torch.compile", "loss"), ("torch.compile", "logprobs"), ("Liger-Kernel", "linear")]
    assert plain and not plain.keys() & compiled.keys()
    for (_, mode), each in compiled.items():
        case = replace(CASES[mode], compiled=True)
        assert suite.missing(each, case, mode, CUDA) == "not measured; --compile auto"


def test_kernels_are_compiled_beforehand(capsys, monkeypatch):
    """Those of every kind of case, once, the first case's first; what fails is said."""
    todo = warm.jobs(SUITES["gpu"], ["loss", "logprobs", "linear"])
    assert len(todo) == len(set(todo)) and todo[0][0].vocab == SUITES["gpu"][0].vocab
    assert {(c.vocab, c.dtype, c.hidden) for c in SUITES["gpu"]} == {(c.vocab, c.dtype, c.hidden) for c, _ in todo}
    assert warm.main(["--suite", "smoke", "--device", "cpu", "--part", "1/3"]) == 0 and capsys.readouterr().out == ""

    def fails(inputs, logits):
        raise RuntimeError("out of resource\nmore")

    problems = warm.run_jobs([(CASE, "loss")], [Implementation("peer", {"loss": fails})], CPU)
    assert problems == [f"{CASE.name}, loss, peer: RuntimeError: out of resource"]

    class Process:
        returncode = 1

        def communicate(self, timeout=None):
            return "", "a warning\nTraceback\nRuntimeError: no driver\n"

    monkeypatch.setattr("benchmarks.warm.subprocess.Popen", lambda *args, **kwargs: Process())
    text = warm.warm_up("smoke", ["loss"], processes=2)
    assert text.startswith("Kernels compiled beforehand by 2 processes") and text.endswith("  RuntimeError: no driver")
