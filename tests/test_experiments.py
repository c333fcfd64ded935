"""The candidates of `benchmarks.experiments` against the reference, and what the compiler makes of them."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from benchmarks.experiments import cluster, counter, hints, interleaved, present
from benchmarks.experiments.common import make_job
from cases import DEVICE, assert_grad_close, expected, make_case

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
    if name == "cluster" and DEVICE == "cuda" and (why := cluster.unavailable(torch.device(DEVICE), 0)):
        pytest.skip(why)
    logits = (case.logits if dirty is None else dirty).to(DEVICE).clone()
    given = [x.to(DEVICE) for x in (case.completion_ids, case.completion_mask, case.old_logps, case.advantages)]
    job = make_job(logits, *given, epsilon=EPSILON, temperature=temperature)
    before = logits.clone()
    out = logits if inplace else torch.empty_like(logits)
    logps = module.launch(job, out, **setting)
    if not inplace:
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)  # the logits are left alone
    return out.cpu(), logps.cpu()


def truth(case, **kwargs):
    out, grad = expected(
        case.logits, loss_type="grpo", epsilon=EPSILON, **kwargs,
        **case.inputs("completion_ids", "completion_mask", "advantages", "old_logps"),
    )  # fmt: skip
    return grad, out.logps


def check(name, case, **kwargs):
    temperature = kwargs.get("temperature", 1.0)
    grad, logps = run(name, case, **kwargs)
    want, want_logps = truth(case, temperature=temperature)
    assert grad.dtype == case.logits.dtype
    assert_grad_close(grad, want, grad.dtype)
    torch.testing.assert_close(logps.double(), want_logps, rtol=1e-5, atol=1e-5)
    return grad, logps


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("V", (2, 131, 640, 1000))
def test_candidates(V, dtype, inplace, name):
    """V below a tile, not a multiple of 16, whole tiles, and several tiles with a rest; a masked sequence in each."""
    case = make_case(B=3, T=4, V=V, dtype=dtype, extra=1, seed=V, spread=3.0)
    grad, logps = check(name, case, inplace=inplace)
    off = ~case.completion_mask
    assert (grad[:, :-1][off] == 0).all() and (grad[:, -1] == 0).all() and (logps[off] == 0).all()


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
    assert_grad_close(grad, want, grad.dtype)
    torch.testing.assert_close(logps.double(), want_logps, rtol=1e-5, atol=1e-5)
    assert (grad[0] == 0).all()  # advantage 0


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("banned", (slice(0, 500), slice(500, None), slice(1, None, 2)), ids=str)
def test_banned_tokens(banned, dtype, name):
    """−inf logits, whole tiles and parts of them included, beside others far below 0."""
    case = make_case(B=2, T=3, V=1000, dtype=dtype, seed=2)
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
    case = make_case(B=3, T=4, V=1000, seed=4)
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
