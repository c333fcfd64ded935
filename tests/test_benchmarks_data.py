"""The benchmarks' data, truth, clocks and peers."""

from dataclasses import replace

import pytest
import torch

from benchmarks import baselines, baselines_peers, measure
from benchmarks.baselines import eager, eager_logprobs, ours, ours_inplace
from benchmarks.baselines_peers import EAGER, OURS, Compiled, implementations, missing_compiler
from benchmarks.cases import SUITES, Case, make_inputs, suite
from benchmarks.measure import Timed, peak_extra_bytes, time_all
from benchmarks.oracle import Oracle
from reference import grpo_loss

CPU = torch.device("cpu")
CASE = Case(2, 5, 97, torch.float32, masked=0.2)

# --- the data and the truth -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 97 * 2, 1 << 24])
@pytest.mark.parametrize(
    "case",
    [
        CASE,
        Case(4, 5, 97, torch.float32, objective="sequence"),
        Case(4, 5, 97, torch.bfloat16, masked=0.5, objective="sequence"),
        Case(4, 5, 97, torch.float32, zero_advantage=0.5),
    ],
    ids=lambda case: case.name,
)
def test_truth_is_the_reference_on_the_whole_batch(case, chunk, monkeypatch):
    monkeypatch.setattr("benchmarks.cases.ROWS_PER_CHUNK_ELEMENTS", chunk)
    inputs = make_inputs(case, CPU)
    x = inputs.logits.double().requires_grad_()
    whole = grpo_loss(
        x,
        inputs.completion_ids,
        inputs.advantages,
        old_logps=inputs.old_logps,
        ref_logps=inputs.ref_logps,
        completion_mask=inputs.mask,
        loss_type="gspo" if case.objective == "sequence" else "grpo",
        beta=0.0 if case.zero_advantage else 0.04,
        epsilon=0.2,
    )
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


def test_objectives_differ():
    """Else a peer that ignores the objective would pass."""
    truth = {}
    for objective in ("token", "sequence"):
        inputs = make_inputs(Case(4, 8, 97, torch.float32, objective=objective), CPU)
        truth[objective] = ours(inputs, inputs.logits).grad
        other = {"token": "sequence", "sequence": "token"}[objective]
        wrong = make_inputs(Case(4, 8, 97, torch.float32, objective=other), CPU)
        assert not Oracle(inputs).check("loss", ours(wrong, wrong.logits)).passed


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


def test_inputs_clip_a_sequence():
    inputs = make_inputs(Case(8, 64, 211, torch.float32, objective="sequence"), CPU)
    log_ratio = (eager_logprobs(inputs, inputs.logits).logps - inputs.old_logps).mean(1)
    clipped = log_ratio > 0.18
    assert clipped.tolist() == [False, False, True, False] * 2
    assert (inputs.advantages[clipped] > 0).all()  # so that the clip acts


def test_inputs_without_advantage():
    case = Case(8, 4, 97, torch.float32, zero_advantage=0.5)
    inputs = make_inputs(case, CPU)
    assert inputs.advantages.sign().tolist() == [1, 0, -1, 0, 1, 0, -1, 0]
    assert case.beta == 0.0 and inputs.ref_logps is None
    assert Case(3, 4, 97, torch.float32, zero_advantage=1.0).has_advantage == [False] * 3
    assert Case(3, 4, 97, torch.float32).has_advantage == [True] * 3


def test_minimum_bytes_by_hand():
    case = Case(2, 10, 100, torch.bfloat16, masked=0.25)
    assert case.lengths == [5, 10]
    assert case.logits_bytes == 2 * 11 * 100 * 2
    assert case.minimum_bytes("logprobs") == 15 * 100 * 2
    assert case.minimum_bytes("loss") == case.minimum_bytes("inplace") == 15 * 100 * 2 + 4400
    half = Case(2, 10, 100, torch.bfloat16, zero_advantage=0.5)
    assert half.minimum_bytes("loss") == 10 * 100 * 2 + 4400
    assert half.minimum_bytes("logprobs") == 20 * 100 * 2
    sequence = Case(2, 10, 100, torch.bfloat16, objective="sequence")
    assert sequence.minimum_bytes("loss") == 2 * 20 * 100 * 2 + 4400


def test_inputs_are_left_alone():
    before, after = make_inputs(CASE, CPU), make_inputs(CASE, CPU)
    for mode in CASE.modes:
        for implementation in (OURS, EAGER):
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
    for cases in SUITES.values():
        assert len({case.name for case in cases}) == len({case.label for case in cases}) == len(cases)
        for case in cases:
            assert min(case.lengths) >= 0 and max(case.lengths) == case.length
            assert any(case.has_advantage) and case.modes[0] == ("linear" if case.hidden else "loss")


def test_gpu_suite_covers_what_it_should():
    cases = SUITES["gpu"]
    assert {case.vocab for case in cases} == {151936, 128256, 262144, 50257, 32000}
    rows = [case.batch * case.length for case in cases]
    assert (min(rows), max(rows)) == (512, 32768)
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16}
    assert {case.masked for case in cases} == {case.zero_advantage for case in cases} == {0.0, 0.5}
    assert {case.objective for case in cases} == {"token", "sequence", "cross-entropy"}


def test_gpu_suite_begins_with_what_the_readme_quotes():
    first = SUITES["gpu"][:8]
    assert all(case.batch * case.length == 8192 for case in first)
    assert [(c.vocab, c.dtype) for c in first[:5]] == [(v, torch.bfloat16) for v in (151936, 128256, 50257, 262144)] + [
        (151936, torch.float32)
    ]
    assert [(c.objective, c.masked, c.hidden) for c in first[5:]] == [
        ("sequence", 0, 0),
        ("token", 0.5, 0),
        ("token", 0, 4096),
    ]
    assert first[0].second_timer and not any(case.second_timer for case in SUITES["gpu"][1:])


def test_suite_falls_back_to_the_cpu():
    assert suite("gpu", CPU) == ("cpu", SUITES["cpu"])
    assert suite("gpu", torch.device("cuda")) == ("gpu", SUITES["gpu"])
    assert suite("quick", CPU)[0] == "quick-cpu" and suite("quick", torch.device("cuda"))[0] == "quick-gpu"
    assert suite("cpu", torch.device("cuda"))[0] == "cpu"


# --- time and memory ---------------------------------------------------------------------------------------


def test_percentiles(monkeypatch):
    times = iter([99.0, *map(float, range(1, 12))])  # the first is the warm-up
    monkeypatch.setattr("benchmarks.measure._cpu_ms", lambda subject, device, calls: [next(times)])
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
    assert timings["a"] == ("out of memory", "full") and timings["b"].repetitions >= 5


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
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 2.5

    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("hold"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(measure, "_sweep_l2", lambda device: log.append("sweep"))
    subject = Timed(lambda: log.append("call"), prepare=lambda: log.append("prepare"))
    timing = time_all({"x": subject}, torch.device("cuda"), 0.0, min_rounds=1)["x"]
    assert (timing.median, timing.repetitions) == (2.5, 4)
    call = ["prepare", "sweep", "event", "call", "event"]
    assert log == ["hold", *call, "wait", "hold", *call * 4, "wait"]  # the first round warms up

    log.clear()
    monkeypatch.setattr(Event, "elapsed_time", lambda self, end: 500.0)
    timing = time_all({"x": subject}, torch.device("cuda"), 0.0, min_rounds=2)["x"]
    assert (timing.median, timing.repetitions) == (500.0, 2)  # what takes long is called once a round


# --- peers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, name", [("trl.kernels", "TRL kernel"), ("liger_kernel", "Liger-Kernel")])
@pytest.mark.parametrize("what", [{}, {"masked": 0.25}, {"zero_advantage": 0.5}, {"objective": "sequence"}], ids=str)
def test_peers_compute_the_same(module, name, what):
    """In Triton's interpreter, where there is no GPU. Masked rows are not read."""
    pytest.importorskip(module)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make_inputs(Case(4, 6, 97, torch.float32, **what), device)
    (peer,) = (i for i in implementations() if i.name == name)
    oracle = Oracle(inputs)
    poisoned = inputs.logits.clone()
    poisoned[:, :-1][inputs.mask == 0] = float("nan")
    for mode, call in peer.calls.items():
        if mode not in inputs.case.modes:
            continue
        verdict = oracle.check(mode, call(inputs, poisoned.clone()))
        assert verdict.passed, f"{mode}: {verdict}"


def test_compiled_computes_the_same(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: made.append(f) or f)  # what is compiled, without the compiler
    compiled = Compiled("all")
    for case in (CASE, Case(4, 6, 97, torch.float32, objective="sequence")):
        inputs = make_inputs(case, CPU)
        oracle = Oracle(inputs)
        assert oracle.check("loss", compiled.loss(inputs, inputs.logits)).passed
        assert oracle.check("logprobs", compiled.logprobs(inputs, inputs.logits)).passed
    assert len(made) == 4  # loss and log-probs, once per case


def test_compile_says_why_it_is_not_run(monkeypatch):
    cuda, marked = torch.device("cuda"), Case(2, 5, 97, torch.float32, compiled=True)
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert Compiled("auto").missing(marked, cuda) is None is Compiled("all").missing(CASE, CPU)
    assert "every shape" in Compiled("auto").missing(CASE, cuda)
    assert Compiled().missing(marked, cuda) == "not measured; --compile auto"
    assert "on a GPU" in Compiled("auto").missing(marked, CPU)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no compiler" in missing_compiler(CPU) and "$CXX" in Compiled("all").missing(CASE, CPU)
    assert "$CC" in Compiled("auto").missing(marked, cuda)


def test_peers_that_are_not_there_say_so(monkeypatch):
    def broken(name):
        raise RuntimeError(f"{name} wants another torch\nmore")

    monkeypatch.setattr(baselines.importlib, "import_module", broken)
    for peer in (baselines_peers.trl_missing, baselines_peers.liger_missing, baselines_peers.quack_missing):
        assert peer(CASE, CPU) == "needs a GPU"
        reason = peer(CASE, torch.device("cuda"))
        assert reason.startswith("pip install") and reason.endswith("wants another torch)")
