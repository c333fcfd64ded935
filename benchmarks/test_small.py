"""A small set for pytest-benchmark: `python -m pytest benchmarks --benchmark-only`.

It is no part of the tests. Results are checked against float64 before they are timed, as in
`python -m benchmarks`, which measures more, and memory too.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines_peers import implementations
from benchmarks.cases import GPT2, MODES, QWEN, Case
from benchmarks.suite import bind, offers, prepare

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cuda":
    CASES = [Case(2, 1024, vocab, torch.bfloat16, compiled=True) for vocab in (GPT2, QWEN)]
    CASES.append(Case(4, 512, QWEN, torch.bfloat16, objective="sequence", compiled=True))
else:
    CASES = [Case(2, 16, 32000, dtype) for dtype in (torch.float32, torch.bfloat16)]
    CASES.append(Case(2, 16, 32000, torch.bfloat16, objective="sequence"))
WHO = implementations("auto")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def prepared(request):
    """(inputs, oracle, buffer)"""
    return prepare(request.param, DEVICE, seed=0)


def finished(call):
    """Until the device is done."""
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(benchmark, subject):
    benchmark.pedantic(finished, args=(subject.call,), setup=subject.prepare, rounds=10, warmup_rounds=2)


def test_copy(benchmark, prepared):
    inputs, _, scratch = prepared
    benchmark.group = inputs.case.name
    benchmark.pedantic(finished, args=(lambda: scratch.copy_(inputs.logits),), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("who", WHO, ids=[i.name.replace(" ", "-") for i in WHO])
def test_small(benchmark, prepared, who, mode):
    inputs, oracle, scratch = prepared
    if not offers(who, inputs.case, mode):
        pytest.skip(f"{who.name} has no mode {mode!r} in this case")
    if reason := who.missing(inputs.case, DEVICE):
        pytest.skip(f"{who.name}: {reason}")

    def refill():  # returns None: pytest-benchmark would take anything else for arguments
        scratch.copy_(inputs.logits)

    subject = bind(who, mode, inputs, scratch, refill)
    if subject.prepare is not None:
        subject.prepare()
    verdict = oracle.check(mode, subject.call())
    assert verdict.passed, f"{verdict.what} off by {verdict.error:.3g} times the tolerance"
    benchmark.group = inputs.case.name
    measure(benchmark, subject)
