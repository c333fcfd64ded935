"""The on-chip kernel: its body on CPU tensors against the reference, and on a GPU itself."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.smoke import errors
from benchmarks.smoke_cases import on_chip_cases
from benchmarks.smoke_job import Job
from cases import check, expected, ours

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with Triton 3.6")

from grpo_kernels import fused_grpo_loss
from grpo_kernels.objective.catalogue import KL_ESTIMATORS
from grpo_kernels.triton_backend import ways
from onchip_chip import BF16, GIVEN, LINE, ODD_ROWS, ON_GPU, Chip, body, case_of, check_case, spoil
from pretend_gpu import pretended
from tolerance import assert_within, bounds

SHAPES = {  # name: slots, lines, lag
    "one slot": (1, 1, 1),
    "two slots": (2, 1, 2),
    "lag 0": (4, 1, 0),
    "lag 1": (3, 2, 1),
    "lag 3": (7, 1, 3),
}


@pytest.fixture
def chip(monkeypatch):
    return Chip(monkeypatch).set()


pytestmark = pytest.mark.unshifted  # rows must start at multiples of 16 bytes


@body
@pytest.mark.parametrize("programs", (1, 3, 40))
@pytest.mark.parametrize("name", SHAPES)
def test_vocabularies_around_the_bounds_of_slots_and_lines(chip, name, programs):
    slots, lines, lag = SHAPES[name]
    chip.set(programs, slots, lines, lag)
    full = slots * lines * LINE
    for V in (full - 8, full, full + 8, full + 2 * LINE + 48, full + 9 * LINE + 16):
        if V > lines * LINE:
            check_case(case_of(V), inplace=programs != 3)
    check_case(case_of(full + 8, extra=1, seed=1))


@body
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("programs", (1, 4, 40))
def test_rows_without_a_gradient_between_live_ones(chip, programs, inplace):
    chip.set(programs)
    case = case_of(B=3, T=4, extra=1)
    given = case.inputs("completion_ids", "advantages", "old_logps")
    given["completion_ids"] = given["completion_ids"].clamp(min=0)
    lone, ones = torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    masks = [lone, ones, torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]).bool()]
    for at in ((0, 0), (2, 3)):
        masks.append(lone.clone())
        masks[-1][at] = True
    for mask in masks:
        logits = case.logits.clone()
        logits[:, :4][~mask] = torch.nan
        logits[:, 4:] = torch.nan
        ids = given["completion_ids"].masked_fill(~mask, 10**12)
        out, grad = ours(logits, "triton", **given | {"completion_ids": ids}, completion_mask=mask, inplace=inplace)
        want, want_grad = expected(case.logits, **given, completion_mask=mask)
        assert (grad[:, :4][~mask] == 0).all() and (grad[:, 4:] == 0).all()
        allowed = bounds(case.logits, **given, completion_mask=mask)
        assert_within(grad, want_grad, allowed.grad, "gradient")
        assert_within(out.logps, want.logps, allowed.logps, "logps")
    given["advantages"] = torch.tensor([1.0, 0.0, -1.0])
    check(case.logits, "triton", **given, inplace=inplace)
    given["advantages"], given["old_logps"] = torch.ones(3), case.old_logps.clone()
    given["old_logps"][:, 1::2] -= 2.0  # clipped
    check(case.logits, "triton", **given, inplace=inplace)


@body
@pytest.mark.parametrize("programs", (2, 40))
def test_every_logit_is_read_once_and_every_gradient_written_once(chip, programs):
    chip.set(programs)
    case = case_of(B=3, T=4, extra=1)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]).bool()
    given = case.inputs("completion_ids", "advantages", "old_logps") | {"completion_mask": mask}
    given["completion_ids"] = given["completion_ids"].clamp(min=0)
    given["old_logps"] = expected(case.logits, **given)[0].logps.float()  # no ratio is clipped
    check(case.logits, "triton", **given)
    V = case.logits.shape[2]
    rows = [m for m in chip.kernel.accesses.values() if m.flat.dtype == BF16]
    reads, writes = (sum(getattr(m, what)[: 15 * V].view(3, 5, V) for m in rows) for what in ("reads", "writes"))
    scored = torch.nn.functional.pad(mask, (0, 1))
    assert (reads[~scored] == 0).all() and (writes[~scored] == 1).all()
    ids = torch.nn.functional.pad(given["completion_ids"], (0, 1))[scored]
    token = torch.nn.functional.one_hot(ids, V)
    assert torch.equal(reads[scored].long(), 1 + token) and torch.equal(writes[scored].long(), 1 + token)


FULL = ("completion_ids", "old_logps", "ref_logps", "importance_weights", "completion_mask")
OBJECTIVES = {
    "on-policy": (("completion_ids", "advantages"), {}),
    "token advantages": (("completion_ids", "token_advantages", "old_logps"), {}),
    "rewards": ((*FULL, "rewards"), {"num_generations": 2, "beta": 0.1}),
    "rewards, batch": ((*FULL, "rewards"), {"num_generations": 2, "scale_rewards": "batch"}),
    "rewards, rloo": ((*FULL, "rewards"), {"num_generations": 2, "advantage_estimator": "rloo"}),
    "rewards, gdpo": ((*FULL, "rewards"), {"num_generations": 2, "advantage_estimator": "gdpo"}),
    "group sizes": ((*FULL, "rewards"), {"num_generations": torch.tensor([3, 1])}),
    "entropy": ((*FULL, "advantages"), {"return_entropy": True}),
    "bonus": ((*FULL, "advantages"), {"entropy_coef": 0.02, "beta": 0.1}),
    "skip": (GIVEN, {"skip_zero_advantage": True}),
    "temperature": ((*FULL, "advantages"), {"temperature": 0.7, "beta": 0.1}),
    "cispo": ((*FULL, "advantages"), {"loss_type": "cispo"}),
    "up": ((*FULL, "advantages"), {"loss_type": "up", "dual_clip": 1.05, "epsilon": 0.05}),
    "sapo": ((*FULL, "advantages"), {"loss_type": "sapo"}),
    "dr_grpo": ((*FULL, "advantages"), {"loss_type": "dr_grpo", "max_completion_length": 7}),
    "dapo": ((*FULL, "advantages"), {"loss_type": "dapo", "loss_scale": 0.5}),
}


@body
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_input_of_the_loss_kernel(chip, name, inplace):
    names, kwargs = OBJECTIVES[name]
    case = case_of(extra=1)
    given = case.inputs(*names)
    if "token_advantages" in given:
        given["advantages"] = given.pop("token_advantages")
    if "completion_mask" not in given:
        given["completion_ids"] = given["completion_ids"].clamp(min=0)
    if name == "skip":
        given["advantages"] = torch.tensor([1.0, 0.0, -1.0, 0.5])
        out, grad = ours(case.logits, "triton", **given, **kwargs, inplace=inplace)
        _, want = expected(case.logits, **given)
        assert_within(grad, want, bounds(case.logits, **given).grad, "gradient")
        assert torch.equal(out.logps.isnan()[1], case.completion_mask[1])
        return
    check(case.logits, "triton", **given, **kwargs, inplace=inplace)


@body
@pytest.mark.parametrize("kl", KL_ESTIMATORS)
def test_kl_estimators(chip, kl):
    check_case(case_of(), *FULL, "advantages", beta=0.1, kl_estimator=kl)


@body
@pytest.mark.parametrize("bonus", (0.0, 0.02))
def test_temperatures_of_tokens_and_packed_rows(chip, bonus):
    """One sequence is empty."""
    case = case_of(B=1, T=11)
    given = {name: x[0] for name, x in case.inputs(*FULL).items()}
    given["completion_mask"] = torch.arange(11) % 4 != 2
    given["completion_ids"] = given["completion_ids"].clamp(min=0)
    given["cu_seqlens"] = torch.tensor([0, 4, 4, 7, 11], dtype=torch.int32)
    given["advantages"] = torch.tensor([1.0, 0.3, -1.0, 0.5])
    check(case.logits[0], "triton", **given, temperature=torch.linspace(0.5, 2.0, 11), entropy_coef=bonus)


@body
@pytest.mark.parametrize("case", [each for each in on_chip_cases() if each.V == 151936], ids=lambda each: each.what)
def test_smoke_cases(chip, case):
    """What `benchmarks.smoke` runs on a GPU, at a small vocabulary; that it is the on-chip kernel which runs."""
    monkeypatch, small = chip.monkeypatch, dataclasses.replace(case, V=3 * LINE + 40, tokens=8)
    monkeypatch.delenv(ways.VARIABLE)
    job = Job(small, torch.device("cpu"))
    assert max(errors(job.run(job.fresh()), job.truth()))[0] <= 1
    assert chip.kernel.accesses and ways.VARIABLE not in os.environ


@body
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("entropy", (False, True))
@pytest.mark.parametrize("name", ODD_ROWS)
def test_rows_whose_sum_has_another_anchor(chip, name, entropy, inplace):
    """Every third row is such a one; ours against the Triton kernel's, interpreted."""
    case = case_of(B=3, T=4)
    ids = case.completion_ids.clamp(min=0)
    spoil(case, ids, name)
    given = {"completion_ids": ids, "advantages": torch.tensor([1.0, -1.0, 0.5]), "return_entropy": entropy}
    if name in ("banned entries", "huge logits") or name.startswith("token below"):
        _, grad = check(case.logits, "triton", **given, inplace=inplace)
        if name == "huge logits" and not entropy:  # its bound goes by the largest logit, the kernel by distances
            near = case.logits.double() - case.logits.double().amax(-1, keepdim=True)
            allowed = bounds(near, **given, dtype=BF16).grad
            assert_within(grad, expected(case.logits, **given)[1], allowed, "gradient")
        return
    out, grad = ours(case.logits, "triton", **given, inplace=inplace)
    chip.monkeypatch.setenv(ways.VARIABLE, "triton")
    want, want_grad = ours(case.logits, "triton", **given)
    allowed = bounds(case.logits, **given)
    assert_within(grad, want_grad, allowed.grad, "gradient", factor=2)
    assert_within(out.logps, want.logps, allowed.logps, "logps", factor=2)


@body
@pytest.mark.parametrize("at", (0, 1, 3 * LINE - 1, 3 * LINE, 4 * LINE + 39, 4 * LINE + 38))
def test_token_anywhere_in_the_row(chip, at):
    case = case_of(4 * LINE + 40)
    given = case.inputs("advantages", "old_logps") | {"completion_ids": torch.full((4, 5), at)}
    check(case.logits, "triton", **given, inplace=True)


@body
def test_ids_outside_the_vocabulary_turn_their_row_nan(chip, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    case = case_of()
    ids = case.completion_ids.clamp(min=0)
    ids[0, 0], ids[3, 2] = -1, 2**40
    monkeypatch.setattr("grpo_kernels.call.checks.validates", lambda device: False)
    _, grad = ours(case.logits, "triton", completion_ids=ids, advantages=case.advantages)
    bad = (ids < 0) | (ids >= case.logits.shape[2])
    assert torch.equal(grad.isnan().all(-1), bad) and torch.equal(grad.isnan().any(-1), bad)


WRONG_WAITS = {
    "no wait": {"wait_group": lambda copies: lambda left: None},
    "a wait too late by one": {"wait_group": lambda copies: lambda left: copies.wait(left + 1)},
    "no groups": {"commit_group": lambda copies: lambda: None},
}


@body
@pytest.mark.parametrize("name", WRONG_WAITS)
def test_a_wrong_wait_is_seen(chip, name):
    """Each of these reads a slot before its copy is done."""
    case = case_of()
    chip.set(**WRONG_WAITS[name])
    with pytest.raises(AssertionError, match=r"on its way|on their way"):
        ours(case.logits, "triton", **case.inputs(*GIVEN))


# Forms that come closest to a spill with one of the Tritons from 3.6 to 3.9, targets, and how many kernels they are.
TIGHT = (
    (32000, "bf16", "full$", "sm_90", 1),
    (151936, "bf16", "bonus$", "sm_90 sm_100", 2),
    (262144, "bf16", "packed$", "sm_100", 1),
    (151936, "fp32", "cispo $", "sm_90", 1),
)


@pytest.mark.parametrize(("V", "dtype", "forms", "targets", "many"), TIGHT)
def test_it_compiles_for_gpus_that_need_not_be_there(V, dtype, forms, targets, many):
    """Without spills and, in bf16, with two exponentials per entry; the report has all forms."""
    command = ["-m", "benchmarks.onchip_report", "--vocab", str(V), "--dtype", dtype, "--target", *targets.split(),
               "--only", forms]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("sm_")]
    assert len(lines) == many and "0 of them spill" in done.stdout
    assert dtype == "fp32" or all(float(line.split()[-1]) == 2 for line in lines)


# --- on a GPU ------------------------------------------------------------------------------------------------------

TOKENS = {32000: 120, 36872: 40, 151936: 40}  # V: tokens of each of four sequences, more than there are programs


@pytest.fixture
def real_chip(monkeypatch):
    if not ON_GPU or pretended() or ways.device_obstacle(torch.empty(0, device="cuda")):
        pytest.skip("needs an NVIDIA GPU, sm_90 or newer with 227 KB of shared memory")
    monkeypatch.setenv(ways.VARIABLE, "onchip")


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("V", TOKENS)
def test_the_kernel_itself(real_chip, V, inplace):
    case = case_of(V, B=4, T=TOKENS[V], extra=1)
    check_case(case, inplace=inplace)


# For the longest rows what their way through the chip depends on: the rest is the objective's, whatever V.
EVERY_INPUT = [(32000, name) for name in OBJECTIVES]
EVERY_INPUT += [(151936, name) for name in ("entropy", "bonus", "temperature", "rewards")]


@pytest.mark.parametrize(("V", "name"), EVERY_INPUT)
def test_the_kernel_itself_with_every_input(real_chip, V, name):
    names, kwargs = OBJECTIVES[name]
    case = case_of(V, B=4, T=TOKENS[V])
    given = case.inputs(*names)
    given["advantages"] = given.pop("token_advantages", given.get("advantages"))
    given = {key: value for key, value in given.items() if value is not None}
    if "completion_mask" not in given:
        given["completion_ids"] = given["completion_ids"].clamp(min=0)
    if name != "skip":  # of unread rows the reference has log-probabilities
        check(case.logits, "triton", **given, **kwargs, inplace=True)


@pytest.mark.parametrize("name", ODD_ROWS)
def test_the_kernel_itself_where_the_sum_has_another_anchor(real_chip, monkeypatch, name):
    case = case_of(32000, B=3, T=150)
    ids = case.completion_ids.clamp(min=0)
    spoil(case, ids, name)
    given = {"completion_ids": ids, "advantages": torch.tensor([1.0, -1.0, 0.5])}
    out, grad = ours(case.logits, "triton", **given, inplace=True)
    monkeypatch.setenv(ways.VARIABLE, "triton")
    want, want_grad = ours(case.logits, "triton", **given)
    allowed = bounds(case.logits, **given)
    assert_within(grad, want_grad, allowed.grad, "gradient", factor=2)
    assert_within(out.logps, want.logps, allowed.logps, "logps", factor=2)


def test_two_runs_give_the_same_bits_and_a_graph_does_too(real_chip):
    case = case_of(32000, B=4, T=300)
    given = {name: x.cuda() for name, x in case.inputs(*GIVEN).items()}
    logits = case.logits.cuda().requires_grad_()

    def step():
        return torch.autograd.grad(fused_grpo_loss(logits, **given).loss, logits)[0]

    first = step()
    assert torch.equal(first, step())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured.zero_()
    graph.replay()
    assert torch.equal(first, captured)
