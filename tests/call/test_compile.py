"""torch.compile(fullgraph=True) through the loss: equal to eager, and compiled once for all values."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cases import BACKENDS, DEVICE, assert_outputs, make_case
from counting import INTERPRETED, launches
from grpo_kernels import fused_grpo_loss, token_logprobs
from grpo_kernels.call import ops, sharded
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.catalogue import TERMS
from grpo_kernels.objective.metrics import combine
from grpo_kernels.objective.plan import Plan
from linear_tolerance import assert_gradients, linear_bounds, linear_logprob_bounds
from tolerance import assert_within

pytestmark = pytest.mark.unshifted  # what is compiled does not meet the mode that shifts
H, V = 8, 37
FULL = ("completion_ids", "completion_mask", "old_logps", "ref_logps", "importance_weights")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No graph is left from another test; a frame that is compiled too often raises instead of falling back."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def batch(B=2, T=3, seed=0):
    """(hidden (B, T+1, H), weight (V, H), inputs of the loss), on the device under test."""
    case = make_case(B, T, V, seed=seed)
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(B, T + 1, H, generator=g), torch.randn(V, H, generator=g)
    case.completion_ids.clamp_(min=0)
    inputs = {name: value.to(DEVICE) for name, value in case.inputs(*FULL).items()}
    return hidden.to(DEVICE), weight.to(DEVICE), inputs


def train(hidden, weight, **kwargs):
    """A language-model head and the loss; what a compiled training step holds."""
    return fused_grpo_loss(hidden @ weight.T, **kwargs)


def gradients(step, hidden, weight, **kwargs):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = step(hidden, weight, **kwargs)
    out.loss.sum().backward()
    return out, hidden.grad, weight.grad


def assert_same(step, hidden, weight, **kwargs):
    got, want = gradients(step, hidden, weight, **kwargs), gradients(train, hidden, weight, **kwargs)
    assert all(b.abs().max() > 0 for b in want[1:])
    allowed, of_gradients = allowed_to(hidden, weight, **kwargs)
    assert_gradients(got[1:], want[1:], of_gradients, factor=2)
    assert got[0].metrics.keys() == want[0].metrics.keys() and got[0].sums.keys() == want[0].sums.keys()
    assert_outputs(got[0], want[0], allowed, factor=2)
    assert_outputs(got[0]._replace(metrics=combine([got[0].sums])), want[0], allowed, factor=2)


def allowed_to(hidden, weight, **kwargs):
    """The bounds of one step."""
    upstream = torch.ones(kwargs["completion_ids"].shape) if kwargs.get("reduction") == "none" else None
    return linear_bounds({"hidden": hidden, "weight": weight}, kwargs, upstream=upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_compiled_is_eager(backend, inplace, reduction):
    hidden, weight, inputs = batch()
    step = torch.compile(train, fullgraph=True, backend="aot_eager")
    rewards = torch.tensor([0.0, 1.0], device=DEVICE)
    assert_same(
        step, hidden, weight, **inputs, rewards=rewards, num_generations=2, beta=0.1, entropy_coef=0.01,
        return_entropy=True, inplace=inplace, reduction=reduction, backend=backend,
    )  # fmt: skip


@pytest.mark.skipif(
    DEVICE == "cpu" and not shutil.which(os.environ.get("CXX", "g++")), reason="Inductor needs a C++ compiler"
)
def test_compiled_by_inductor_is_eager():
    """What torch.compile does by default: the head and the loss in one graph, twice, with another value."""
    hidden, weight, inputs = batch()
    step = torch.compile(train, fullgraph=True)
    for loss_scale in (1.0, 0.25, 0.125):
        assert_same(step, hidden, weight, **inputs, advantages=torch.tensor([1.0, -0.5], device=DEVICE), beta=0.1,
                    loss_scale=loss_scale, inplace=True)  # fmt: skip


# Every way through `Objective`: what is spread, masked or corrected.
SEQUENCE_CALLS = {
    "sequence": {"loss_type": "gspo"},
    "per token": {"loss_type": "gspo", "reduction": "none"},
    **{name: {"policy_term": name} for name, term in TERMS.items() if term.of_sequence},
    "quantile": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
    "late": {"sampling_correction": "sequence_mask"},
    "early": {"sampling_correction": "token_truncate", "off_policy_mask_threshold": 0.1},
}


def adapted(inputs, kwargs):
    """The inputs that go with these keywords."""
    inputs = dict(inputs)
    if "sampling_correction" in kwargs:
        inputs["sampling_logps"] = inputs.pop("importance_weights").log() - 3.0
        if kwargs["sampling_correction"] == "sequence_mask":
            del inputs["old_logps"]
    return inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SEQUENCE_CALLS)
def test_compiled_sequence_objectives_are_eager(backend, name):
    hidden, weight, inputs = batch()
    kwargs = SEQUENCE_CALLS[name]
    advantages = torch.tensor([1.0, -0.5], device=DEVICE)
    step = torch.compile(train, fullgraph=True, backend="aot_eager")
    assert_same(step, hidden, weight, **adapted(inputs, kwargs), advantages=advantages, beta=0.1, **kwargs,
                backend=backend)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entropy", (False, True))
def test_compiled_token_logprobs_are_eager(backend, entropy):
    hidden, weight, inputs = batch()

    def objective(hidden, weight):
        out = token_logprobs(hidden @ weight.T, inputs["completion_ids"], return_entropy=entropy, backend=backend)
        return out.logps.exp().sum() + (out.entropy.square().sum() if entropy else 0.0)

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    step = torch.compile(objective, fullgraph=True, backend="aot_eager")
    with launches() if INTERPRETED else contextlib.nullcontext():  # a stray address fails, rather than crashing
        got = torch.autograd.grad(step(*leaves), leaves)
    ids = inputs["completion_ids"].cpu()
    _, allowed = linear_logprob_bounds(
        {"hidden": hidden, "weight": weight}, ids, torch.ones_like(ids, dtype=torch.bool), 1.0,
        lambda lp, H: lp.exp().sum() + (H.square().sum() if entropy else 0.0),
    )  # fmt: skip
    assert_gradients(got, torch.autograd.grad(objective(*leaves), leaves), allowed, factor=2)


# Dynamo compiles a second time when it sees that a constant was none, so a fourth call settles the
# matter; twelve go beyond its limit of eight.
STEPS = {"torch": 12, "triton": 4}


def number_of_compilations(calls, backend):
    """How often a training step is compiled for these calls, each of which must agree with the uncompiled one."""
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(train, fullgraph=True, backend=counter)
    losses = set()
    for hidden, weight, kwargs in itertools.islice(calls, STEPS[backend]):
        out, *_ = gradients(step, hidden, weight, backend=backend, **kwargs)
        with torch.no_grad():
            want = train(hidden, weight, backend="torch", **kwargs)
        assert_within(out.loss, want.loss, allowed_to(hidden, weight, **kwargs)[0].loss, "loss", factor=2)
        losses.add(out.loss.sum().item())
    assert len(losses) > 1
    return counter.frame_count


@pytest.mark.parametrize(("backend", "reduction"), [("torch", "mean"), ("torch", "none"), ("triton", "mean")])
@pytest.mark.parametrize("loss_type", ("dapo", "fipo"))
def test_new_values_do_not_recompile(loss_type, backend, reduction):
    """The first value is a constant, the second makes it a variable, and then nothing is compiled again."""
    hidden, weight, inputs = batch()

    def values(k):
        return {
            "beta": 0.01 * k, "epsilon": 0.1 + 0.01 * k, "epsilon_high": 0.2 + 0.01 * k, "delta": 1.5 + 0.1 * k,
            "temperature": 0.5 + 0.1 * k, "loss_scale": 1 / k, "num_items_in_batch": 100 + k,
            "entropy_coef": 0.001 * k, "advantage_eps": 1e-4 * k, **of_fipo(k),
        }  # fmt: skip

    def of_fipo(k):
        if loss_type != "fipo":
            return {}
        return {"fipo_clip_range": 0.2 + 0.01 * k, "fipo_safety_threshold": 1.0 + 0.1 * k,
                "fipo_gamma" if reduction == "none" else "fipo_decay_rate": 0.05 * k}  # fmt: skip

    rewards = torch.tensor([0.0, 1.0], device=DEVICE)
    fixed = {**inputs, "rewards": rewards, "num_generations": 2, "loss_type": loss_type, "reduction": reduction}
    calls = ((hidden, weight, {**fixed, **values(k)}) for k in range(1, 13))
    assert number_of_compilations(calls, backend) <= 3


COUNTS = {
    "global-tokens": ("num_items_in_batch",),
    "seq-mean-token-sum-norm": ("global_batch_size", "max_completion_length"),
}


@pytest.mark.parametrize(("backend", "mode"), [("torch", mode) for mode in COUNTS] + [("triton", "global-tokens")])
def test_new_tensor_values_do_not_recompile(backend, mode):
    hidden, weight, inputs = batch()
    adv = torch.tensor([1.0, -0.5], device=DEVICE)

    def values(k):
        counts = {name: torch.tensor(100.0 + k) for name in COUNTS[mode]}
        counts |= {"loss_scale": torch.tensor(1 / k), "entropy_coef": torch.tensor(0.01 * k)}
        return {"advantages": adv * k, **{name: value.to(DEVICE) for name, value in counts.items()}}

    calls = ((hidden, weight, {**inputs, **values(k), "loss_agg_mode": mode}) for k in range(1, 13))
    assert number_of_compilations(calls, backend) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_lengths_and_batch_sizes_do_not_recompile(backend):
    def calls():
        for B, T in ((2, 3), (2, 4), (4, 2), (3, 5), (6, 2), (8, 3), (4, 7), (2, 16), (3, 6), (5, 2), (7, 3), (3, 9)):
            hidden, weight, inputs = batch(B, T)
            yield hidden, weight, {**inputs, "advantages": torch.linspace(-1, 1, B, device=DEVICE), "beta": 0.1}

    assert number_of_compilations(calls(), backend) <= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_are_what_they_declare(backend, monkeypatch):
    """Each op's schema names what it mutates, and its fake returns the shapes, strides and dtypes of the real one."""
    calls = []

    def recorded(op):
        def call(*args):
            calls.append((op, [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]))
            return op(*args)

        return call

    names = [name for name, value in vars(ops).items() if isinstance(value, torch._ops.OpOverload)]
    for name in names:
        monkeypatch.setattr(ops, name, recorded(getattr(ops, name)))
    hidden, weight, inputs = batch()
    inputs["advantages"] = torch.tensor([1.0, -0.5], device=DEVICE)
    for options in itertools.product((False, True), ("mean", "none"), (None, 0.1)):
        kwargs = dict(zip(("inplace", "reduction", "entropy_coef"), options), return_entropy=options[2] is not None)
        gradients(train, hidden, weight, **inputs, **kwargs, backend=backend)
    for kwargs in SEQUENCE_CALLS.values():
        gradients(train, hidden, weight, **adapted(inputs, kwargs), **kwargs, backend=backend)
    N = inputs["completion_ids"].numel()
    packed = {name: value.reshape(N) for name, value in inputs.items() if name != "advantages"}
    packed["cu_seqlens"] = torch.tensor([0, 1, N], device=DEVICE)
    for reduction in ("mean", "none"):
        fused_grpo_loss(
            (hidden[:, :-1].reshape(N, H) @ weight.T).requires_grad_(), **packed, advantages=inputs["advantages"],
            loss_type="gspo", reduction=reduction, backend=backend,
        ).loss.sum().backward()  # fmt: skip
    x = (hidden @ weight.T).requires_grad_()
    sizes = torch.tensor([2], device=DEVICE)
    for scale in ("group", "batch"):
        fused_grpo_loss(x, inputs["completion_ids"], rewards=inputs["advantages"], num_generations=sizes,
                        scale_rewards=scale, backend=backend)  # fmt: skip
    fused_grpo_loss(x, inputs["completion_ids"], rewards=torch.rand(2, 3, device=DEVICE), num_generations=sizes,
                    advantage_estimator="gdpo", backend=backend)  # fmt: skip
    loss = fused_grpo_loss(x, inputs["completion_ids"], inputs["advantages"], backend=backend).loss
    for keep in (True, False):
        torch.autograd.grad(loss, x, torch.tensor(2.0, device=DEVICE), retain_graph=keep)
    monkeypatch.setattr(sharded, "gathered", lambda x, group: torch.stack([x, x]))  # two ranks, of the same logits
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 1)
    packed = Batch(inputs["completion_ids"], inputs["completion_mask"]).pack()
    for entropy in (False, True):
        sharded.logprobs(x.detach(), *packed, Plan().key(), entropy, backend, "group")
    rows = torch.arange(inputs["completion_ids"].numel(), device=DEVICE).view_as(inputs["completion_ids"])
    support = {"support": rows.flatten().int() % 3, "support_first": rows, "support_last": rows + 1}
    packed = Batch(inputs["completion_ids"], inputs["completion_mask"], **support).pack()
    sharded.logprobs(x.detach(), *packed, Plan().key(), True, backend, "group")
    assert len({id(op) for op, _ in calls}) == len(names)
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_compiling_warns_of_nothing():
    """Not of what the package keeps between calls, either; Dynamo says everything once per process, so in its own."""
    program = """
import torch
from grpo_kernels import fused_grpo_loss
ids, advantages = torch.zeros(2, 3, dtype=torch.long), torch.ones(2)
step = torch.compile(lambda x: fused_grpo_loss(x, ids, advantages).loss, fullgraph=True, backend="aot_eager")
step(torch.randn(2, 3, 9, requires_grad=True)).backward()
"""
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "cache" not in done.stderr, done.stderr
