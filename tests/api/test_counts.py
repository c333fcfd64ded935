"""Counts and single numbers: 0, NumPy's, and tensors that nobody reads."""

import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import reference
from cases import BACKENDS, DEVICE, make_case, on_device
from grpo_kernels import (
    LossConfig,
    fused_grpo_loss,
    fused_linear_grpo_loss,
    group_advantages,
    microbatch,
    token_logprobs,
)
from grpo_kernels.objective.aggregations import AGGREGATIONS
from grpo_kernels.objective.config import resolve_config
from linear_tolerance import linear_bounds
from tolerance import assert_within, bounds, logprob_bounds

NAMES = ("completion_ids", "completion_mask", "old_logps", "advantages")
# the count -> the aggregations that read it
COUNTS = {
    "num_items_in_batch": ("global-tokens",),
    "global_batch_size": ("seq-mean-token-sum", "seq-mean-token-mean"),
    "max_completion_length": ("constant", "seq-mean-token-sum-norm"),
}
READ = [(name, mode) for name, modes in COUNTS.items() for mode in modes]
FORMS = {
    "float": float,
    "NumPy float32": np.float32,
    "NumPy int64": np.int64,
    "int tensor": lambda n: torch.tensor(int(n), device=DEVICE),
    "double tensor": lambda n: torch.tensor(float(n), dtype=torch.float64, device=DEVICE),
}


def loss_of(case, backend="torch", **kwargs):
    x = case.logits.to(DEVICE).requires_grad_()
    out = fused_grpo_loss(x, **on_device(case.inputs(*NAMES)), backend=backend, **kwargs)
    return out.loss.detach(), torch.autograd.grad(out.loss, x)[0]


def assert_same(found, want, case, **kwargs):
    """Two (loss, gradient), which went two ways to the same numbers."""
    allowed = bounds(case.logits, **case.inputs(*NAMES), **kwargs)
    for x, y, most, name in zip(found, want, (allowed.loss, allowed.grad), ("loss", "gradient")):
        assert_within(x, y, most, name, factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "mode"), READ)
def test_counts(name, mode, backend):
    """0 counts as 1, and every form of a number is the same number; so says the reference."""
    case = make_case(V=37, T=3)
    for count in (0, 7):
        kwargs = {"loss_agg_mode": mode, name: count}
        loss, gradient = loss_of(case, backend, **kwargs)
        want = reference.grpo_loss(case.logits.double(), **case.inputs(*NAMES), **kwargs).loss
        assert_within(loss, want, bounds(case.logits, **case.inputs(*NAMES), **kwargs).loss, "loss")
        at_least_1 = loss_of(case, backend, **{**kwargs, name: max(count, 1)})
        for form in FORMS.values() if backend == "torch" else (FORMS["int tensor"],):
            # factor/count on the host, or on the device
            assert_same(loss_of(case, backend, **{**kwargs, name: form(count)}), (loss, gradient), case, **kwargs)
        torch.testing.assert_close(at_least_1, (loss, gradient), rtol=0, atol=0)


@pytest.mark.parametrize("masked", (False, True))
def test_two_counts_as_tensors(masked):
    case = make_case(V=37, T=3)
    if not masked:
        case.completion_ids.clamp_(min=0)
        case.completion_mask[:] = True
    for sequences, length in ((3, 5), (0, 5), (3, 0), (None, 5), (3, None)):
        given = {"global_batch_size": sequences, "max_completion_length": length}
        as_tensors = {name: None if n is None else torch.tensor(n, device=DEVICE) for name, n in given.items()}
        for mode in ("seq-mean-token-sum-norm", "seq-mean-token-mean"):
            want = loss_of(case, loss_agg_mode=mode, **given)
            found = loss_of(case, loss_agg_mode=mode, **as_tensors)
            assert_same(found, want, case, loss_agg_mode=mode, **given)


@pytest.mark.parametrize("name", COUNTS)
def test_bad_counts(name):
    case = make_case(V=37)
    for value in (-5, -0.5, np.int64(-1), float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            loss_of(case, **{name: value})
    for value in ("7", True, [7]):
        with pytest.raises(TypeError, match=f"{name} must be"):
            loss_of(case, **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be a number or a 0-d tensor"):
        loss_of(case, **{name: torch.ones(1)})
    with pytest.raises(ValueError, match=f"{name} requires grad"):
        loss_of(case, **{name: torch.ones((), requires_grad=True)})


def test_tensors_are_not_read():
    """Neither a config nor a call looks at a count or a coefficient: a fake tensor has no value to give."""
    with FakeTensorMode():
        num_items, *others = (torch.empty(()) for _ in range(4))
        tensors = dict(zip(("global_batch_size", "max_completion_length", "entropy_coef"), others))
        x, advantages = torch.empty(2, 3, 5).requires_grad_(), torch.empty(2)
        ids, mask = torch.empty(2, 3, dtype=torch.long), torch.empty(2, 3, dtype=torch.bool)
        config = LossConfig(**tensors)
        assert hash(config) == hash(config) and resolve_config(config, {"beta": 0.0}) is not config
        for mode in AGGREGATIONS:
            for given in (None, mask):
                out = fused_grpo_loss(x, ids, advantages, completion_mask=given, num_items_in_batch=num_items,
                                      loss_scale=num_items, **tensors, loss_agg_mode=mode)  # fmt: skip
                out.loss.backward()
                sizes = dict.fromkeys(("tokens", "total_tokens", "sequences", "total_sequences"), num_items)
                microbatch(dataclasses.replace(config, loss_agg_mode=mode), **sizes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", (False, True))
def test_a_temperature_of_one_number(packed, backend):
    case = make_case(V=37, T=3)
    if packed:
        case.logits, case.completion_ids = case.logits.flatten(0, 1), case.completion_ids.flatten()
        case.completion_mask = case.completion_mask.flatten()
    forms = (*FORMS.values(), lambda n: torch.tensor(n, dtype=torch.bfloat16, device=DEVICE))
    for form in forms if backend == "torch" else forms[-2:]:
        kwargs = {"mask": case.completion_mask.to(DEVICE), "return_entropy": True, "backend": backend}
        logits, ids = case.logits.to(DEVICE), case.completion_ids.to(DEVICE)
        want = token_logprobs(logits, ids, temperature=2.0, **kwargs)
        found = token_logprobs(logits, ids, temperature=form(2), **kwargs)
        allowed = logprob_bounds(case.logits, case.completion_ids, case.completion_mask, 2.0, lambda lp, H: lp.sum())
        assert_within(found.logps, want.logps, allowed.logps, "logps", factor=2)
        assert_within(found.entropy, want.entropy, allowed.entropy, "entropy", factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temperature_of_one_number_in_every_loss(backend):
    case = make_case(V=37, T=3)
    for loss_type in ("grpo", "gspo"):
        want, heated = (loss_of(case, backend, temperature=t, loss_type=loss_type) for t in (0.5, torch.tensor(0.5)))
        assert_same(heated, want, case, temperature=0.5, loss_type=loss_type)
        g = torch.Generator().manual_seed(0)
        weight, inputs = torch.randn(37, 8, generator=g), on_device(case.inputs(*NAMES))
        hidden = torch.randn(4, 3, 8, generator=g).to(DEVICE)
        found = [
            fused_linear_grpo_loss(hidden, weight.to(DEVICE), **inputs, temperature=t, logit_scale=s, backend=backend,
                                   loss_type=loss_type, chunk_bytes=5 * 37 * 4).loss
            for t, s in ((0.5, 2.0), (torch.tensor(0.5), np.float32(2)))
        ]
        head = {"hidden": hidden, "weight": weight}
        allowed, _ = linear_bounds(head, case.inputs(*NAMES), temperature=0.5, logit_scale=2.0, loss_type=loss_type)
        assert_within(found[1], found[0], allowed.loss, "loss", factor=2)
    for wrong in (torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(torch.nan)):
        with pytest.raises(ValueError, match=r"temperature must be (a finite number )?above 0"):
            loss_of(case, temperature=wrong)
    with pytest.raises(TypeError, match="temperature must be a number, or a tensor of them"):
        loss_of(case, temperature="hot")


def test_numpy_scalars_are_numbers():
    """In a config they become Python's: it compares, hashes and prints as with those."""
    config = LossConfig(beta=np.float32(0.5), epsilon=np.int64(1), log_ratio_clamp=np.float16(2.0), delta=np.float64(2))
    plain = LossConfig(beta=0.5, epsilon=1, log_ratio_clamp=2.0, delta=2.0)
    assert config == plain and hash(config) == hash(plain) and repr(config) == repr(plain)
    assert LossConfig(log_ratio_clamp=(np.float32(-1), np.int32(1))) == LossConfig(log_ratio_clamp=(-1.0, 1))
    case = make_case(V=37)
    want = loss_of(case, loss_scale=0.5, beta=0.0, epsilon=0.25, entropy_coef=0.5)
    found = loss_of(case, loss_scale=np.float32(0.5), beta=np.int64(0), epsilon=np.float16(0.25),
                    entropy_coef=np.float64(0.5))  # fmt: skip
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert torch.equal(group_advantages(case.rewards, np.int64(2)), group_advantages(case.rewards, 2))
    for wrong in (np.bool_(True), np.array([0.5])):
        with pytest.raises(TypeError, match="beta must be a number"):
            LossConfig(beta=wrong)
