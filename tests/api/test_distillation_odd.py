"""Distillation of odd batches: no token, no told token, ids of a narrow dtype, logits far from 0."""

import pytest
import torch

from cases import BACKENDS, DEVICE
from distillation_cases import BETAS, TEACHERS, make_pair, ours, wanted
from grpo_kernels import TopK, distillation_loss, fused_linear_distillation_loss, token_logprobs
from tolerance import U, assert_within


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_the_last_position_of_sequences_without_a_token(reduction, dtype, teacher, backend):
    """(B, T+1, V) with T = 0: all there is of the gradient is what nobody scores."""
    told = torch.zeros(2, 0, 5)
    if teacher != "whole":
        told = TopK(torch.zeros(2, 0, 3, dtype=torch.int64, device=DEVICE), told[..., :3].to(DEVICE))
    else:
        told = told.to(DEVICE)
    x = torch.randn(2, 1, 5, dtype=dtype).to(DEVICE).requires_grad_()
    mask, tail = torch.ones(2, 0, device=DEVICE), {"rest": True, "few": False}.get(teacher)
    for inplace in (False, True):
        out = distillation_loss(
            x * 1, told, tail=tail, completion_mask=mask, reduction=reduction, inplace=inplace, backend=backend
        )
        (grad,) = torch.autograd.grad(out.loss.sum(), x)
        assert torch.equal(grad, torch.zeros_like(x))
        assert not out.loss.any() and out.sums["tokens"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", (True, False, None), ids=str)
def test_a_teacher_that_tells_no_token(tail, beta, backend):
    """K = 0 is as K tokens that are absent."""
    pair = make_pair("rest", completion_mask=None, reduction="none")
    pair.kwargs["tail"] = tail
    pair.teacher.token_ids[:] = -1
    want, want_grad = ours(pair, backend, beta=beta)
    pair.teacher = TopK(*(x[..., :0] for x in pair.teacher))
    out, grad = ours(pair, backend, beta=beta)
    assert torch.equal(out.loss, want.loss) and torch.equal(grad, want_grad)
    assert torch.equal(out.entropy, want.entropy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((2, 3), (2, 0)), ids=str)
@pytest.mark.parametrize("tail", (True, False, None), ids=str)
def test_hidden_states_and_a_teacher_that_tells_no_token(tail, shape, backend):
    leaves = [torch.randn(*size, device=DEVICE, requires_grad=True) for size in ((*shape, 4), (7, 4))]
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=DEVICE)[:, : shape[1]]
    found = []
    for K in (0, 2):
        told = TopK(torch.full((*shape, K), -1, device=DEVICE), torch.zeros(*shape, K, device=DEVICE))
        for kept in (None, mask):
            out = fused_linear_distillation_loss(*leaves, told, tail=tail, completion_mask=kept, backend=backend)
            found.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaves)))
    assert all(map(torch.equal, [*found[0], *found[1]], [*found[2], *found[3]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16), ids=str)
@pytest.mark.parametrize("tail", (True, False, None), ids=str)
def test_ids_of_a_dtype_that_cannot_count_the_vocabulary(tail, dtype, backend):
    pair = make_pair("rest", V=70000, K=5, B=1, T=2, completion_mask=None)
    pair.kwargs["tail"] = tail
    pair.teacher.token_ids[:] = torch.tensor([3, 99, 100, 126, 127])
    want, want_grad = ours(pair, backend)
    pair.teacher = TopK(pair.teacher.token_ids.to(dtype), pair.teacher.logps)
    out, grad = ours(pair, backend)
    assert torch.equal(out.loss, want.loss) and torch.equal(grad, want_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.int8, torch.int16), ids=str)
def test_a_masked_id_beside_narrow_ones(dtype, backend):
    """−100 under the mask; what V becomes in these dtypes, 60, lies below the other ids."""
    ids, mask = torch.tensor([[100, -100, 127]]), torch.tensor([[1, 0, 1]], device=DEVICE)
    for V in (2**16 + 60, 2**8 + 60):
        logits = torch.randn(1, 3, V).to(DEVICE)
        want = token_logprobs(logits, ids.to(DEVICE), mask=mask, backend=backend).logps
        assert torch.equal(token_logprobs(logits, ids.to(DEVICE, dtype), mask=mask, backend=backend).logps, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("far", (2.0**13, -(2.0**13)))
def test_few_logits_far_from_0_lose_nothing(far, beta, backend):
    """What all logits have in common drops out of the K's shares before the temperature rounds it."""
    pair = make_pair("few", temperature=0.7)
    pair.logits = (pair.logits * 64).round() / 64  # exact there too
    want, want_grad = ours(pair, backend, beta=beta)
    _, allowed = wanted(pair, beta=beta)
    pair.logits = pair.logits + far
    out, grad = ours(pair, backend, beta=beta)
    assert_within(out.loss, want.loss, allowed["loss"], "loss", factor=2)
    assert_within(grad, want_grad, allowed["grad"] + U * want_grad.abs(), "gradient", factor=2)
    assert_within(out.entropy, want.entropy, allowed["entropy"], "entropy", factor=2)
