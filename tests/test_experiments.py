"""The candidates of `benchmarks.experiments` against the reference, and what the compiler makes of them."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import triton

from benchmarks import machine_code, report
from benchmarks.experiments import __main__ as command
from benchmarks.experiments import cluster, counter, hints, interleaved, measured, precompiled, present
from benchmarks.experiments.candidates import Candidate, candidates
from benchmarks.experiments.common import make_job
from benchmarks.experiments.measured import PlainCase, best, measure, table
from benchmarks.suite import ERROR, MISSING, OK, WRONG, Budget
from cases import DEVICE, expected, make_case
from tolerance import assert_within, bounds

SMALL = {"K": 1, "warps": 1}  # tiles of 128 fp32 or 256 bf16: a row is several
LAUNCHES = {
    "present": (present, {}),
    "present, small tiles": (present, SMALL),
    "hints": (hints, {"K": 2, "warps": 1, "first": "evict_last", "second": "evict_first"}),
    "interleaved": (interleaved, SMALL),
    "interleaved, staged": (interleaved, {**SMALL, "stages": 3, "per_processor": 2}),
    "counter": (counter, SMALL),
    "counter, one part": (counter, {"K": 8, "warps": 1}),
    "cluster": (cluster, {"warps": 4}),
}
EPSILON, INF, NAN = 0.2, math.inf, math.nan


def run(name, case, *, inplace=False, dirty=None, temperature=1.0):
    """(gradient, log-probabilities) of a candidate; ``dirty``: logits in place of the case's."""
    module, setting = LAUNCHES[name]
    if name == "cluster" and DEVICE == "cuda" and (why := cluster.unavailable(torch.device(DEVICE), 0, torch.float32)):
        pytest.skip(why)
    logits = (case.logits if dirty is None else dirty).to(DEVICE)
    logits = logits.clone() if logits.is_contiguous() else logits
    given = [x.to(DEVICE) for x in (case.completion_ids, case.completion_mask, case.old_logps, case.advantages)]
    job = make_job(logits, *given, epsilon=EPSILON, temperature=temperature)
    before = logits.clone()
    out = logits if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=DEVICE)
    logps = module.launch(job, out, **setting)
    if not inplace:
        assert torch.equal(logits.nan_to_num(), before.nan_to_num())  # the logits are left alone
    return out.cpu(), logps.cpu()


def truth(case, **kwargs):
    out, grad = expected(
        case.logits, loss_type="grpo", epsilon=EPSILON, **kwargs,
        **case.inputs("completion_ids", "completion_mask", "advantages", "old_logps"),
    )  # fmt: skip
    return grad, out.logps


def allowed_to(case, **kwargs):
    given = case.inputs("completion_ids", "completion_mask", "advantages", "old_logps")
    return bounds(case.logits, **given, loss_type="grpo", epsilon=EPSILON, **kwargs)


def check(name, case, **kwargs):
    temperature = kwargs.get("temperature", 1.0)
    grad, logps = run(name, case, **kwargs)
    want, want_logps = truth(case, temperature=temperature)
    assert grad.dtype == case.logits.dtype
    allowed = allowed_to(case, temperature=temperature)
    assert_within(grad, want, allowed.grad, "gradient")
    assert_within(logps, want_logps, allowed.logps, "logps")
    return grad, logps


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("V", (2, 131, 640))
def test_candidates(V, dtype, inplace, name):
    """V below a tile; not a multiple of 16; whole tiles of fp32, and a rest of bf16; a masked sequence in each."""
    case = make_case(B=3, T=2, V=V, dtype=dtype, extra=1, seed=V, spread=3.0)
    grad, logps = check(name, case, inplace=inplace)
    off = ~case.completion_mask
    assert (grad[:, :-1][off] == 0).all() and (grad[:, -1] == 0).all() and (logps[off] == 0).all()


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_rows_of_a_slice(dtype, name):
    """Out of place they start elsewhere than those of the gradient, which is a tensor of its own."""
    case = make_case(B=3, T=2, V=131, dtype=dtype, seed=7)
    whole = torch.full((3, 3, 131), NAN, dtype=dtype, device=DEVICE)
    whole[:, :-1] = case.logits
    check(name, case, dirty=whole[:, :-1])


@pytest.mark.parametrize("name", LAUNCHES)
def test_temperature(name):
    check(name, make_case(B=2, T=3, V=300), temperature=0.7)


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("inplace", (False, True))
def test_rows_that_are_not_read(inplace, name):
    """What masked and unscored rows hold, and their ids, does not show."""
    case = make_case(B=3, T=4, V=300, extra=1, seed=1)
    case.advantages[0] = 0.0
    off = ~case.completion_mask
    dirty = case.logits.clone()
    dirty[:, :-1][off] = NAN
    dirty[:, -1] = NAN
    case.completion_ids[off] = 1 << 40
    case.old_logps[off] = NAN
    want, want_logps = truth(case)
    grad, logps = run(name, case, inplace=inplace, dirty=dirty)
    allowed = allowed_to(case)
    assert_within(grad, want, allowed.grad, "gradient")
    assert_within(logps, want_logps, allowed.logps, "logps")
    assert (grad[0] == 0).all()  # advantage 0


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("banned", (slice(0, 300), slice(300, None), slice(1, None, 2)), ids=str)
def test_banned_tokens(banned, dtype, name):
    """−inf logits, whole tiles and parts of them included, beside others far below 0."""
    case = make_case(B=2, T=3, V=600, dtype=dtype, seed=2)
    case.completion_mask[:] = True
    case.logits -= 200.0
    case.logits[..., banned] = -INF
    allowed = torch.isfinite(case.logits[0, 0].float()).nonzero()[:, 0]
    case.completion_ids[:] = allowed[torch.arange(6).reshape(2, 3) * 37 % len(allowed)]
    lp = torch.log_softmax(case.logits.double(), -1).gather(-1, case.completion_ids[..., None])[..., 0]
    case.old_logps = (lp + 0.1).float()
    grad, _ = check(name, case)
    assert (grad[..., banned] == 0).all()


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("inplace", (False, True))
def test_nan_is_passed_on(inplace, name):
    """To its own row, all of it, and to no other; the same for an id out of range."""
    case = make_case(B=2, T=4, V=300, seed=3)
    case.completion_mask[:] = True
    case.completion_ids.clamp_(min=0)
    clean, _ = check(name, case)
    dirty = case.logits.clone()
    dirty[0, 1, 299] = NAN
    case.completion_ids[1, 0], case.completion_ids[1, 3] = 300, -1
    grad, logps = run(name, case, inplace=inplace, dirty=dirty)
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[0, 1] = bad[1, 0] = bad[1, 3] = True
    assert grad[bad].isnan().all() and logps[bad].isnan().all()
    assert torch.equal(grad[~bad], clean[~bad]) and logps[~bad].isfinite().all()


@pytest.mark.parametrize("name", LAUNCHES)
def test_two_runs_give_the_same_bits(name):
    case = make_case(B=3, T=2, V=600, seed=4)
    (a, lp_a), (b, lp_b) = run(name, case), run(name, case)
    assert torch.equal(a, b) and torch.equal(lp_a, lp_b)


def test_a_counter_that_waits_in_vain_gives_up():
    """One after another, with one launch: the first program of a row finds nobody; NaN instead of a hung GPU."""
    if DEVICE == "cuda":
        pytest.skip("programs run at the same time here, and need not wait in vain")
    case = make_case(B=1, T=2, V=300, seed=5)
    case.completion_mask[:] = True
    case.completion_ids.clamp_(min=0)
    given = case.completion_ids, case.completion_mask, case.old_logps, case.advantages
    out = torch.full_like(case.logits, 7.0)
    logps = counter.launch(make_job(case.logits, *given, epsilon=EPSILON), out, looks=3, together=True, **SMALL)
    assert out[0, 0, :128].isnan().all() and logps[0, 0].isnan()
    assert (out[0, 0, 128:] == 7.0).all() and (out[0, 1] == 7.0).all()  # the others leave at once


@pytest.mark.parametrize(("V", "sizes"), [(1, (1, 1)), (2, (1, 1)), (131, (128, 4)), (151936, (131072, 32768))])
def test_pieces_of_a_row(V, sizes):
    assert cluster.pieces(V) == sizes


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what Triton's interpreter loads and stores")
@pytest.mark.parametrize("name", LAUNCHES)
def test_bytes(name, monkeypatch):
    """Rows that get zeros alone are not read, others at most twice a launch, and all are written once."""
    from triton.runtime.interpreter import interpreter_builder as builder

    loads, stores = torch.zeros(3 * 5, 600), torch.zeros(3 * 5, 600)
    case = make_case(B=3, T=4, V=600, extra=1, seed=6)
    case.advantages[0] = 0.0
    given = case.completion_ids, case.completion_mask, case.old_logps, case.advantages
    job, out = make_job(case.logits, *given, epsilon=EPSILON), torch.empty_like(case.logits)

    def counting(call, counts, x):
        def wrapper(pointers, *rest):
            mask = next((each.data for each in rest if each.data.dtype == bool), True)
            where = (pointers.data[mask].astype("int64") - x.data_ptr()) // 4
            where = torch.from_numpy(where[(where >= 0) & (where < x.numel())].ravel())
            counts.view(-1).index_add_(0, where, torch.ones(len(where)))
            return call(pointers, *rest)

        return wrapper

    monkeypatch.setattr(builder, "create_masked_load", counting(builder.create_masked_load, loads, case.logits))
    monkeypatch.setattr(builder, "create_masked_store", counting(builder.create_masked_store, stores, out))
    LAUNCHES[name][0].launch(job, out, **LAUNCHES[name][1])
    live = torch.zeros(3, 5, dtype=torch.bool)
    live[:, :4] = case.completion_mask
    slope = live & (out != 0).any(-1)
    assert (loads[~live.view(-1)] == 0).all()
    launches = 2 if name.startswith("counter") else 1  # without programs that run at the same time
    passes = 1 if name.startswith(("counter", "cluster")) else 2
    # The token's logit is read once more, and its entry written once more, by whoever forms it.
    assert (loads[slope.view(-1)].median(-1).values == launches * passes).all()
    assert (loads[(live & ~slope).view(-1)].median(-1).values == launches).all()
    assert loads.max() <= launches * (passes + 1)
    assert stores.min() == 1 and stores.max() <= 2 and (stores == 2).sum() <= slope.sum()


# --- what the compiler makes of them ------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Of all candidates but the hints, for sm_90, from a process that does not interpret."""
    folder = tmp_path_factory.mktemp("compiled")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.experiments", "--compile", "--target", "sm_90", "--dtype", "bf16",
         "--out", str(folder), "--cubins", str(folder), "--only", "present", "counter", "cluster", "interleaved"],
        env={**env, "TRITON_CACHE_DIR": str(folder / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "compiled.json").read_text())["rows"], folder


@pytest.mark.parametrize("name", ("counter", "interleaved"))
def test_no_spills(compiled, name):
    """Where a thread may have 128 registers; with 64 it depends on the version of Triton."""
    rows = [row for row in compiled[1] if row["candidate"].startswith(name) and row["maxnreg"] == 128]
    assert len(rows) == 2
    for row in rows:
        assert not row["failed"] and row["spills"] == row["stack"] == 0 and row["wide_loads"], row
        assert 0 < row["row_per_element"] < 30 and 1 <= row["ex2_per_element"] <= 3, row


def test_the_cluster_compiles(compiled):
    if why := cluster.too_old():
        assert all(row["failed"] == why for row in compiled[1] if row["candidate"].startswith("cluster"))
        pytest.skip(why)
    first = next(row for row in compiled[1] if row["candidate"].startswith("cluster"))
    assert not first["failed"] and first["spills"] == 0 and first["num_ctas"] == 8


def test_the_table_fits_80_columns(compiled):
    assert max(map(len, compiled[0].splitlines())) <= 80


def test_the_documented_table_is_what_is_printed(compiled):
    text = (Path(__file__).resolve().parents[1] / "docs" / "candidates.md").read_text()
    block = next(block for block in text.split("```") if "interleaved K4" in block)
    if f"Triton {triton.__version__}" not in text.split("interleaved K4")[0].rsplit("\n\n", 2)[-2]:
        pytest.skip("the page is about another Triton, which compiles to other machine code")
    documented = [line for line in block.splitlines() if line.startswith(("present", "counter", "interleaved"))]
    assert documented and set(documented) <= set(compiled[0].splitlines())


def test_the_shortest_way_that_loads_and_stores():
    """Past the branch that only writes zeros, once through the loop, and out."""
    code = [
        (0, "S2R R0"), (1, "@P0 BRA 0x4"), (2, "STG.E.128 [R2], RZ"), (3, "EXIT"), (4, "LDG.E.128 R4, [R2]"),
        (5, "MUFU.EX2 R4"), (6, "@P1 BRA 0x5"), (7, "@P2 BRA 0xa"), (8, "STG.E.128 [R2], R4"), (9, "EXIT"),
        (10, "FMUL R4"), (11, "FMUL R5"), (12, "STG.E.128 [R2], R4"), (13, "NOP"), (14, "EXIT"),
    ]  # fmt: skip
    jumps = {1: 4, 6: 5, 7: 10}
    assert machine_code.path(code, jumps, {3, 9, 14}) == 11  # 0 1 4 5 6 7 10 11 12 13 14
    assert machine_code.path(code[:4], {}, {3}) is None


def test_parameters_of_a_precompiled_kernel():
    """In the order of the kernel, tuples flat, null pointers for what Triton adds."""
    x = torch.zeros(3)
    about = {"types": ["*fp32", "i64", "i32", "fp32", "fp32", "fp32"], "parameters": 8}
    made = precompiled.parameters((x, 2**40, 7, 0.5, (1.0, INF)), about)
    assert [each.value for each in made] == [x.data_ptr(), 2**40, 7, 0.5, 1.0, INF, 0, 0]
    assert [type(each)._type_ for each in made] == ["L", "l", "i", "f", "f", "f", "L", "L"]
    with pytest.raises(ValueError, match="compile the cubins anew"):
        precompiled.parameters((x,), about)


def test_cubins_are_written(compiled):
    folder = compiled[2]
    if why := cluster.too_old():
        pytest.skip(why)
    first = next(each for each in candidates(torch.bfloat16) if each.name == "cluster")
    path = precompiled.path_of(folder, 151936, torch.bfloat16, first.setting)
    about = json.loads(path.with_suffix(".json").read_text())
    assert path.read_bytes()[:4] == b"\x7fELF" and about["ctas"] == 8 and about["threads"] == 256
    assert about["types"].count("*fp32") == 4 and about["parameters"] >= len(about["types"])


# --- measuring ----------------------------------------------------------------------------------------

TINY = (PlainCase(2, 3, 97, torch.float32), PlainCase(2, 3, 130, torch.float32, masked=0.5))


class Broken:
    """Modules of candidates that are wrong, that raise, and that are not there."""

    @staticmethod
    def launch(job, out, how):
        if how == "raise":
            raise RuntimeError("no such luck")
        logps = hints.launch(job, out, **SMALL)
        out *= 1.01 if how == "scaled" else 1.0
        return logps + (0.01 if how == "shifted" else 0.0)


def test_measuring():
    """On this device: rows of what is right have times, others say why not, and the run goes on."""
    small = [Candidate(name.split(",")[0], *LAUNCHES[name]) for name in ("present", "counter", "present, small tiles")]
    broken = [Candidate("broken", Broken, {"how": how}) for how in ("raise", "scaled", "shifted")]
    blocks = list(measure(TINY, ["present", "counter", "broken"], torch.device(DEVICE), Budget(600, 0.01),
                          all_candidates=lambda dtype: [*broken, *small]))  # fmt: skip
    rows = [row for block in blocks for row in block]
    first, second = ([row for row in rows if row.case == case.name] for case in TINY)
    assert [(row.status, row.inplace) for row in first[:3]] == [(ERROR, True), (WRONG, True), (WRONG, True)]
    assert "no such luck" in first[0].detail and "off by" in first[1].detail and "log-probs" in first[2].detail
    good = [row for row in rows if row.name != "broken"]
    assert all(row.status == OK and row.error_over_tolerance <= 1 and row.copy_multiple > 0 for row in good)
    labels = best(first, "fp32")
    assert len(labels) == 2 and [row.candidate for row in second] == [label for label in labels for _ in range(2)]
    assert [row.inplace for row in second] == [True, False] * 2
    assert max(map(len, table(rows).splitlines())) <= 80 and "no such luck" in table(rows)


def test_nothing_is_measured_without_time():
    (block,) = measure(TINY[:1], ["hints"], torch.device(DEVICE), _Spent(), all_candidates=candidates)
    assert {row.status for row in block} == {MISSING} and len(block) == 3


class _Spent(Budget):
    """No time for candidates, but for the case itself."""

    def __init__(self):
        self.seconds, self.looks = 1.0, 0

    @property
    def spent(self):
        self.looks += 1
        return self.looks > 1


def test_rows_are_written(tmp_path):
    row = measured.Row("c", 97, "fp32", 0.0, "hints", "hints K2", True, WRONG, "off")
    report.write(tmp_path, {"device": "none"}, [row])
    (line,) = csv.DictReader((tmp_path / "results.csv").open())
    assert line["status"] == WRONG and line["candidate"] == "hints K2" and line["device"] == "none"


def test_the_command_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main([])
    assert stopped.value.code == 2 and "needs a GPU" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        command.main(["--compile"])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_labels_tell_candidates_apart():
    for dtype in (torch.float32, torch.bfloat16):
        labels = [each.label for each in candidates(dtype)]
        assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 32
