"""The benchmarks' data, truth, clocks and peers."""

import shutil
import sys
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import baselines, measure
from benchmarks.baselines import eager, eager_logprobs, ours, ours_inplace
from benchmarks.baselines_peers import EAGER, OURS, Compiled, implementations
from benchmarks.cases import SUITES, Case, make_inputs, suite
from benchmarks.linear_data import LinearOracle, make_linear_inputs
from benchmarks.measure import Round, Timed, Timing, peak_extra_bytes, time_all
from benchmarks.oracle import Oracle
from benchmarks.suite import ERROR, MISSING, OK, missing, run_suite
from reference import grpo_loss

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICE = CUDA if torch.cuda.is_available() else CPU
CASE = Case(4, 6, 97, torch.float32, masked=0.25)
SEQUENCE, CROSS_ENTROPY = {"objective": "sequence"}, {"objective": "cross-entropy"}
NO_ADVANTAGE = {"zero_advantage": 0.5}

# --- the data and the truth -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 97 * 2, 1 << 24])
@pytest.mark.parametrize(
    "case",
    [CASE, replace(CASE, masked=0.0, **SEQUENCE), replace(CASE, dtype=torch.bfloat16, masked=0.5, **SEQUENCE),
     replace(CASE, **NO_ADVANTAGE)],
    ids=lambda case: case.name,
)  # fmt: skip
def test_truth_is_the_reference_on_the_whole_batch(case, chunk, monkeypatch):
    monkeypatch.setattr("benchmarks.cases.ROWS_PER_CHUNK_ELEMENTS", chunk)
    inputs = make_inputs(case, CPU)
    x = inputs.logits.double().requires_grad_()
    whole = grpo_loss(x, inputs.completion_ids, inputs.advantages, old_logps=inputs.old_logps,
                      ref_logps=inputs.ref_logps, completion_mask=inputs.mask, epsilon=0.2,
                      beta=0.0 if case.zero_advantage else 0.04,
                      loss_type="gspo" if case.objective == "sequence" else "grpo")  # fmt: skip
    whole.loss.backward()
    oracle = Oracle(inputs)
    grad = torch.zeros_like(x)
    for t in oracle.truth:
        grad[t.b, t.t] = t.grad
    torch.testing.assert_close(oracle.loss, whole.loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(oracle.logps, whole.logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(oracle.entropies, whole.entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, x.grad, rtol=1e-12, atol=1e-15)
    assert grad.any()


@pytest.mark.parametrize("objective", ["token", "sequence"])
def test_gradients_that_cancel_are_tolerated_as_log_probs_are(objective):
    """Where the clip leaves only a small KL, log-probs that are right to 5e-5 leave few digits of it."""
    inputs = make_inputs(Case(4, 64, 301, torch.float32, objective=objective), CPU)
    oracle = Oracle(inputs)

    def off_by(error):  # as if every log-prob were
        moved = replace(inputs, old_logps=inputs.old_logps - error, ref_logps=inputs.ref_logps - error)
        return eager(moved, inputs.logits)

    assert oracle.check("loss", off_by(5e-5)).passed
    assert not oracle.check("loss", off_by(1e-3)).passed


def test_inputs_clip_one_token_in_32_or_one_sequence_in_four():
    inputs = make_inputs(Case(4, 64, 211, torch.float32), CPU)
    lp = eager_logprobs(inputs, inputs.logits).logps
    log_ratio = lp - inputs.old_logps
    clipped = log_ratio.abs() > 0.11
    assert clipped.sum() == 4 * 64 / 32
    torch.testing.assert_close(log_ratio[clipped], torch.full((8,), 0.5), rtol=1e-4, atol=1e-4)
    assert {-1.0, 1.0} == set(inputs.advantages.sign().tolist())
    assert 0.01 < lp.exp().min() and lp.exp().max() < 0.97  # neither certain nor impossible

    inputs = make_inputs(Case(8, 64, 211, torch.float32, objective="sequence"), CPU)
    clipped = (eager_logprobs(inputs, inputs.logits).logps - inputs.old_logps).mean(1) > 0.18
    assert clipped.tolist() == [False, False, True, False] * 2
    assert (inputs.advantages[clipped] > 0).all()  # so that the clip acts


def test_inputs_without_advantage():
    inputs = make_inputs(Case(8, 4, 97, torch.float32, **NO_ADVANTAGE), CPU)
    assert inputs.advantages.sign().tolist() == [1, 0, -1, 0, 1, 0, -1, 0]
    assert inputs.case.beta == 0.0 and inputs.ref_logps is None
    assert Case(3, 4, 97, torch.float32, zero_advantage=1.0).has_advantage == [False] * 3


def test_minimum_bytes_by_hand():
    case = Case(2, 10, 100, torch.bfloat16, masked=0.25)
    assert case.lengths == [5, 10]
    assert case.logits_bytes == 2 * 11 * 100 * 2
    assert case.minimum_bytes("logprobs") == 15 * 100 * 2
    assert case.minimum_bytes("loss") == case.minimum_bytes("inplace") == 15 * 100 * 2 + 4400
    half = replace(case, masked=0.0, **NO_ADVANTAGE)
    assert half.minimum_bytes("loss") == 10 * 100 * 2 + 4400 and half.minimum_bytes("logprobs") == 20 * 100 * 2
    assert replace(case, masked=0.0, **SEQUENCE).minimum_bytes("loss") == 2 * 20 * 100 * 2 + 4400


def test_inputs_are_left_alone_and_inplace_writes_over_its_buffer():
    before, after = make_inputs(CASE, CPU), make_inputs(CASE, CPU)
    for implementation in (OURS, EAGER):
        for mode in {*CASE.modes, "entropies"} & set(implementation.calls) - {"inplace"}:
            implementation.calls[mode](after, after.logits)
    scratch = after.logits.clone()
    assert ours_inplace(after, scratch).grad.data_ptr() == scratch.data_ptr()
    torch.testing.assert_close(scratch, ours(after, after.logits).grad, rtol=0, atol=0)
    for field in ("logits", "completion_ids", "advantages", "old_logps", "ref_logps", "mask"):
        assert torch.equal(getattr(before, field), getattr(after, field)), field


def test_suites_are_sound():
    for cases in SUITES.values():
        assert len({case.name for case in cases}) == len({case.label for case in cases}) == len(cases)
        for case in cases:
            assert min(case.lengths) >= 0 and max(case.lengths) == case.length and any(case.has_advantage)
    assert SUITES["gpu"][0].second_timer and not any(case.second_timer for case in SUITES["gpu"][1:])  # one is quoted
    assert suite("gpu", CPU) == ("cpu", SUITES["cpu"]) and suite("gpu", CUDA) == ("gpu", SUITES["gpu"])
    assert suite("quick", CPU)[0] == "quick-cpu" and suite("quick", CUDA)[0] == "quick-gpu"


# --- time and memory ---------------------------------------------------------------------------------------


def test_percentiles(monkeypatch):
    times = iter([99.0, *map(float, range(1, 12))])  # the first is the warm-up
    monkeypatch.setattr("benchmarks.measure._cpu_round", lambda *_: Round([next(times)], [0.5]))
    timing = time_all({"x": Timed(lambda: None)}, CPU, 0.0, min_rounds=11)["x"]
    assert timing == Timing(6.0, 3.0, 9.0, 11, host=0.5)


def test_subjects_take_turns_and_one_without_memory_drops_out():
    log = []

    def fails():
        raise torch.OutOfMemoryError("full\ndetails")

    subjects = {"a": Timed(lambda: log.append("a")), "full": Timed(fails)}
    subjects["b"] = Timed(lambda: log.append("b"), prepare=lambda: log.append("prepare b"))
    timings = time_all(subjects, CPU, 0.0, min_rounds=2)
    assert log == ["a", "prepare b", "b"] * 3
    assert timings["full"] == ("out of memory", "full") and timings["b"].repetitions == 2


@pytest.mark.unshifted
def test_peak_memory_counts_what_a_call_allocates_and_frees():
    def allocate():
        torch.ones(8 << 20)  # 32 MiB, freed at once
        return torch.ones(8 << 20)

    peak = peak_extra_bytes(allocate, CPU)
    if peak is None:
        pytest.skip("this system does not tell the peak of the resident memory")
    assert 31 << 20 <= peak <= 48 << 20


def test_cuda_clock(monkeypatch):
    """The order of what is queued, with a stand-in for the GPU."""
    log, late = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 2.5

        def query(self):
            return bool(late) and late.pop(0)

    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"hold {cycles // measure.HOLD_CYCLES}"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(measure, "_sweep_l2", lambda device: log.append("sweep"))
    subject = Timed(lambda: log.append("call"), prepare=lambda: log.append("prepare"))
    timing = time_all({"x": subject}, CUDA, 0.0, min_rounds=1)["x"]
    assert (timing.median, timing.repetitions) == (2.5, 4)
    call = ["prepare", "sweep", "event", "call", "event"]
    first = ["hold 1", "event", *call, "wait"]  # this round warms up
    assert log == [*first, "hold 1", "event", *call * 4, "wait"]

    log.clear()
    late += [True, True, True, False]  # where the host was late the GPU is held up longer, and the round does not count
    timing = time_all({"x": subject}, CUDA, 0.0, min_rounds=1)["x"]
    assert timing.repetitions == 4
    assert [each for each in log if each.startswith("hold")] == ["hold 1", "hold 1", "hold 4", "hold 16"]

    late += [True] * 8  # a call that waits for the GPU is always late
    timing = time_all({"x": subject}, CUDA, 0.0, min_rounds=3)["x"]
    assert timing.repetitions == 12

    monkeypatch.setattr(Event, "elapsed_time", lambda self, end: 500.0)
    timing = time_all({"x": subject}, CUDA, 0.0, min_rounds=2)["x"]
    assert (timing.median, timing.repetitions) == (500.0, 2)  # what takes long is called once a round


# --- peers ----------------------------------------------------------------------------------------------


def cross_entropy_fwd(x, target, return_dx, inplace_backward):
    """In the place of quack's, which needs a GPU: (losses, their gradient)."""
    leaf = x.detach().clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(leaf.float(), target, reduction="none")
    (dx,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), x.copy_(dx) if inplace_backward else dx


@pytest.fixture
def compiled(monkeypatch):
    """What was handed to torch.compile: it runs as it is. quack has a stand-in too."""
    module, compiled = types.ModuleType("quack.cross_entropy"), []
    module.cross_entropy_fwd = cross_entropy_fwd
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", module)
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or f)
    return compiled


PEERS = {"TRL kernel": "trl.kernels", "Liger-Kernel": "liger_kernel", "torch.compile": "torch", "quack": "torch"}
KINDS = [{"masked": 0.0}, {}, SEQUENCE, NO_ADVANTAGE, CROSS_ENTROPY, {"hidden": 16}, {"hidden": 16, **SEQUENCE}]


@pytest.mark.parametrize("name", PEERS)
def test_peers_compute_the_same(name, compiled):
    """In Triton's interpreter, where there is no GPU. Kernels do not read masked rows."""
    pytest.importorskip(PEERS[name])
    peer = next(i for i in implementations("all") if i.name == name)
    checked = []
    for case in (replace(CASE, **what) for what in KINDS if what.get("objective", "token") in peer.objectives):
        inputs = make_linear_inputs(case, DEVICE) if case.hidden else make_inputs(case, DEVICE)
        oracle = LinearOracle(inputs) if case.hidden else Oracle(inputs)
        if not case.hidden and PEERS[name] != "torch":
            inputs.logits[:, :-1][inputs.mask == 0] = float("nan")
        for mode in (mode for mode in case.modes if mode in peer.calls):
            verdict = oracle.check(mode, peer.calls[mode](inputs, None if case.hidden else inputs.logits.clone()))
            assert verdict.passed, f"{case.name}, {mode}: {verdict}"
            checked.append(mode)
    assert set(checked) == set(peer.calls)
    assert len(compiled) == (2 * checked.count("loss") if name == "torch.compile" else 0)  # anew for every case


def test_what_is_not_run_says_why(monkeypatch):
    def broken(name):
        raise RuntimeError(f"{name} wants another torch\nmore")

    assert baselines.missing_module("torch", "torch") is None
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(baselines.importlib, "import_module", broken)
    marked, head, no_kl = (replace(CASE, **what) for what in ({"compiled": True}, {"hidden": 16}, CROSS_ENTROPY))
    for when, name, mode, case, device, reason in (
        ("none", "TRL kernel", "loss", CASE, CPU, "needs a GPU"),
        ("none", "TRL kernel", "loss", CASE, CUDA, "pip install 'trl>=1.16' (not importable: trl.kernels"),
        ("none", "TRL kernel", "linear", head, CUDA, "pip install 'trl>=1.16' (not importable: trl.kernels"),
        ("none", "Liger-Kernel", "loss", CASE, CPU, "needs a GPU"),
        ("none", "Liger-Kernel", "loss", CASE, CUDA, "pip install 'liger-kernel>=0.8' (not importable: liger_kernel"),
        ("none", "Liger-Kernel", "linear", head, CPU, "pip install 'liger-kernel>=0.8' (not importable: liger_kernel"),
        ("none", "Liger-Kernel", "linear", head, CUDA, "not measured; --compile auto"),
        ("none", "quack", "loss", no_kl, CPU, "needs a GPU"),
        ("none", "quack", "loss", no_kl, CUDA, "pip install quack-kernels (not importable: quack"),
        ("none", "torch.compile", "loss", marked, CUDA, "not measured; --compile auto"),
        ("auto", "torch.compile", "loss", marked, CUDA, None),
        ("auto", "torch.compile", "loss", CASE, CUDA, "compiles anew for every shape; --compile all"),
        ("auto", "torch.compile", "loss", marked, CPU, "timed on a GPU only; --compile all"),
        ("all", "torch.compile", "loss", CASE, CPU, None),
    ):
        peer = next(i for i in implementations(when) if i.name == name)
        said = missing(peer, case, mode, device)
        assert said == reason if reason is None else said.startswith(reason), (when, name, mode, device, said)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no compiler found: neither $CXX" in Compiled("all").missing(CASE, CPU)
    assert "no compiler found: neither $CC " in Compiled("auto").missing(marked, CUDA)


def test_cross_entropy_is_a_case_of_its_own():
    rows = {}
    for what in ({}, CROSS_ENTROPY):
        (block,) = run_suite([replace(CASE, **what)], ["loss"], implementations(), CPU, seconds=0.0)
        rows[len(what)] = {row.implementation: row.status for row in block}
    assert rows[1] == {"eager PyTorch": OK, "quack": MISSING}
    assert "quack" not in rows[0] and rows[0]["grpo_kernels"] == OK and ERROR not in rows[0].values()
