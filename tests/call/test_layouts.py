"""Strides, tails and infinities of the small tensors: what surrounds the logits must not leak into them."""

import math

import pytest
import torch
from torch._subclasses import CrossRefFakeMode

from cases import BACKENDS, DEVICE, make_case, ours
from grpo_kernels import fused_grpo_loss, policy_loss
from grpo_kernels.call.ops import correct_op, segments_op
from grpo_kernels.objective.batch import Batch
from tolerance import U, assert_within, bounds, steps

FULL = ("completion_ids", "completion_mask", "old_logps", "ref_logps")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "gspo"))
def test_strided_and_expanded_rewards(loss_type, backend):
    case = make_case(B=4, T=5, seed=1)
    table = torch.stack([case.rewards, case.rewards + 9.0], 1)
    kwargs = dict(**case.inputs(*FULL), num_generations=2, loss_type=loss_type)
    want, want_grad = ours(case.logits, backend, **kwargs, rewards=case.rewards)
    got, grad = ours(case.logits, backend, **kwargs, rewards=table[:, 0])
    assert torch.equal(got.loss, want.loss) and torch.equal(grad, want_grad)
    flat, _ = ours(case.logits, backend, **kwargs, rewards=torch.tensor(0.7).expand(4))
    assert flat.metrics["reward"].item() == pytest.approx(0.7, rel=steps(4) * 2 * U) and flat.loss == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "gspo"))
def test_strided_bounds(loss_type, backend):
    case = make_case(B=1, T=12, seed=2)
    flat = {name: value[0] for name, value in case.inputs(*FULL).items()}
    cu = torch.tensor([0, 5, 7, 12])
    adv = torch.tensor([1.0, -2.0, 3.0])
    want, want_grad = ours(case.logits[0], backend, **flat, advantages=adv, cu_seqlens=cu, loss_type=loss_type)
    wide = torch.stack([cu, cu + 99], 1)[:, 0]
    got, grad = ours(case.logits[0], backend, **flat, advantages=adv, cu_seqlens=wide, loss_type=loss_type)
    assert torch.equal(got.loss, want.loss) and torch.equal(grad, want_grad)


@pytest.mark.unshifted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_transposed_token_tensors_under_compile(reduction, backend):
    """The ops' results have the strides that their fakes promise, whatever the inputs' are."""
    case = make_case(B=3, T=4, seed=3)
    turned = {name: value.t().contiguous().t().to(DEVICE) for name, value in case.inputs(*FULL).items()}
    kwargs = dict(**turned, advantages=case.advantages.to(DEVICE), loss_type="gspo", reduction=reduction)
    kwargs["backend"] = backend

    def loss(x):
        return fused_grpo_loss(x * 1, **kwargs).loss.sum()

    torch._dynamo.reset()
    x = case.logits.to(DEVICE).requires_grad_()
    (want,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    case_kwargs = case.inputs(*FULL, "advantages") | {"loss_type": "gspo", "reduction": reduction}
    assert_within(got, want, bounds(case.logits, **case_kwargs).grad, "gradient", factor=2)
    torch._dynamo.reset()


@pytest.mark.unshifted  # compares where real tensors and fakes start in their storages
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("loss_type", ("grpo", "gspo"))
def test_a_transposed_mask(loss_type, reduction, backend):
    """As (T, B) data have it; it also asks whether the ops' results have the strides that their fakes promise."""
    case = make_case(B=3, T=4, seed=3)
    kwargs = {"advantages": case.advantages, "loss_type": loss_type, "reduction": reduction, "entropy_coef": 0.1}
    inputs = case.inputs("completion_ids", "old_logps")
    mask = case.completion_mask
    assert 0 < mask.sum() < mask.numel()
    want, want_grad = ours(case.logits, backend, **inputs, completion_mask=mask, **kwargs)
    with CrossRefFakeMode(lambda op: "grpo_kernels" not in str(op)):
        got, grad = ours(case.logits, backend, **inputs, completion_mask=mask.t().contiguous().t(), **kwargs)
    assert torch.equal(got.loss, want.loss) and torch.equal(grad, want_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "gspo"))
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_upstream_gradients_of_masked_tokens_go_nowhere(bad, loss_type, backend):
    case = make_case(B=4, T=5, seed=4)
    up = torch.where(case.completion_mask, 1.0, bad)
    kwargs = dict(**case.inputs(*FULL, "advantages"), loss_type=loss_type, reduction="none")
    _, grad = ours(case.logits, backend, **kwargs, upstream=up)
    assert grad.isfinite().all()
    kwargs.pop("completion_ids")
    logps = case.old_logps.to(DEVICE).clone().requires_grad_()
    inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    policy_loss(logps, **inputs, backend=backend).loss.backward(up.to(DEVICE))
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("keep", (False, True))
def test_an_infinite_upstream_gradient_leaves_masked_rows_alone(keep, inplace, backend):
    case = make_case(B=4, T=5, seed=5)
    x = case.logits.to(DEVICE).requires_grad_() * 1
    inputs = {name: value.to(DEVICE) for name, value in case.inputs(*FULL, "advantages").items()}
    out = fused_grpo_loss(x, **inputs, backend=backend, inplace=inplace)
    (grad,) = torch.autograd.grad(out.loss, x, torch.tensor(math.inf, device=DEVICE), retain_graph=keep)
    assert not grad.cpu()[~case.completion_mask].any() and not grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "gspo", "gmpo"))
def test_packed_tokens_after_the_last_sequence(loss_type, backend, monkeypatch):
    """They belong to none: no loss, no gradient. On the CPU such bounds are refused unless values go unchecked."""
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    case = make_case(B=1, T=10, seed=6)
    flat = {name: value[0] for name, value in case.inputs(*FULL).items()}
    adv, cu = torch.tensor([1.0, -1.0]), torch.tensor([0, 3, 7])
    kwargs = dict(advantages=adv, cu_seqlens=cu, loss_type=loss_type, beta=0.1)
    want, want_grad = ours(case.logits[0, :7], backend, **{k: v[:7] for k, v in flat.items()}, **kwargs)
    got, grad = ours(case.logits[0], backend, **flat, **kwargs)
    allowed = bounds(case.logits[0, :7], **{k: v[:7] for k, v in flat.items()}, **kwargs)
    assert_within(got.loss, want.loss, allowed.loss, "loss", factor=2)
    assert_within(grad[:7], want_grad, allowed.grad, "gradient", factor=2)
    assert not grad[7:].any() and not got.logps[7:].any()
    tokens, _ = ours(case.logits[0], backend, **flat, **kwargs, reduction="none")
    assert tokens.loss.isfinite().all() and not tokens.loss[7:].any()


@pytest.mark.parametrize("bounds", ([0, 4, 9], [-3, 2, 6], [0, 99, 6]))
def test_bounds_outside_of_the_tokens_are_no_addresses(bounds, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    cu = torch.tensor(bounds, device=DEVICE)
    around = torch.full((20,), -7, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(torch, "full", lambda *args, **kwargs: around[:6].fill_(2))
    segments_op(None, cu, 6, "triton")
    assert (around[6:] == -7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_corrections_of_strided_inputs(backend):
    case = make_case(B=3, T=4, seed=7)
    old, sampled = case.old_logps.to(DEVICE), case.ref_logps.to(DEVICE)
    turned = sampled.t().contiguous().t()
    ids = case.completion_ids.to(DEVICE)
    for mode in ("token_truncate", "sequence_mask", "seq_mask_tis"):
        want, got = (correct_op(old, *Batch(ids, sampling=x, correction_high=1.2).pack(), mode, backend)
                     for x in (sampled, turned))  # fmt: skip
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_importance_weight_stays_where_it_acts(backend):
    """NaN at one token: of a term with a local gradient that token alone; with A = 0 nothing; φ counts it 0."""
    case = make_case(B=4, T=5, seed=8)
    case.completion_mask[:] = True
    case.completion_ids.clamp_(min=0)
    weights = torch.ones(4, 5)
    weights[1, 2] = math.nan
    kwargs = dict(**case.inputs(*FULL), importance_weights=weights)
    _, grad = ours(case.logits, backend, **kwargs, advantages=case.advantages, loss_type="topr")
    broken = grad.isnan().any(-1)
    assert broken[1, 2] and broken.sum() == 1
    quiet, grad = ours(case.logits, backend, **kwargs, advantages=case.advantages * torch.tensor([1.0, 0, 1, 1]))
    assert quiet.loss.isfinite() and grad.isfinite().all()
    phi, grad = ours(case.logits, backend, **kwargs, advantages=case.advantages, loss_type="vespo")
    assert phi.loss.isfinite() and not grad[1].any() and grad[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_ratio_against_the_advantage_shows_its_sign(backend):
    """ρ = ∞ with A < 0 is held by nothing: the gradient is infinite, not undefined, and points the right way."""
    logits, ids = torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.long)
    _, grad = ours(logits, backend, completion_ids=ids, advantages=torch.tensor([-1.0]),
                   old_logps=torch.tensor([[-200.0]]))  # fmt: skip
    assert grad[0, 0, 0] == math.inf and (grad[0, 0, 1:] == -math.inf).all()
