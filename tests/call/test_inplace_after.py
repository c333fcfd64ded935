"""Logits that are used after `inplace=True` has overwritten them: what GRPO_KERNELS_VALIDATE=1 says of it."""

import pytest
import torch

from cases import BACKENDS, DEVICE, make_case, on_device
from grpo_kernels import fused_grpo_loss
from pretend_gpu import pretended

# A tensor that refuses operations is a subclass, and so is what stands for a tensor of a pretended GPU.
pytestmark = pytest.mark.skipif(pretended(), reason="two kinds of subclasses do not meet in one tensor")

GONE = "these logits are gone, inplace=True"
LOSSES = ({}, {"loss_type": "gspo"}, {"reduction": "none"})


@pytest.fixture
def validated(monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "1")


def setup(seed=0, **shape):
    """(hidden states, head, the rest of a call)"""
    case = make_case(seed=seed, **shape)
    kwargs = on_device(case.inputs("completion_ids", "completion_mask", "old_logps", "advantages"))
    h = torch.randn(*case.completion_ids.shape, 7, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return h.requires_grad_(), torch.randn(131, 7, device=DEVICE, requires_grad=True), kwargs


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_built_afterwards_raises(backend, validated):
    h, W, kwargs = setup()
    z = h @ W.T
    loss = fused_grpo_loss(z, **kwargs, inplace=True, backend=backend).loss
    uses = (lambda: z.logsumexp(-1), lambda: torch.softmax(z, -1), lambda: 2 * z, lambda: z[0], lambda: z.data,
            lambda: z.T, lambda: z.detach(), lambda: torch.nn.functional.log_softmax(z, -1), lambda: z.sum(),
            lambda: fused_grpo_loss(z, **kwargs, backend=backend), lambda: z.add_(1.0), lambda: z.clone())  # fmt: skip
    for use in uses:
        with pytest.raises(RuntimeError, match=GONE):
            use()
    assert z.shape == (4, 5, 131) and z.requires_grad and z.numel() == 4 * 5 * 131 and z.dtype == torch.float32
    loss.backward()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", LOSSES, ids=str)
def test_the_gradient_is_the_same(kwargs, backend, monkeypatch):
    """One launch, two, and per token; after the backward the logits are gone in all of them."""
    grads = []
    for setting in ("", "1"):
        monkeypatch.setenv("GRPO_KERNELS_VALIDATE", setting)
        torch.manual_seed(0)
        h, W, inputs = setup()
        z = h @ W.T
        fused_grpo_loss(z, **inputs, **kwargs, inplace=True, backend=backend).loss.sum().backward()
        grads.append((h.grad, W.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    with pytest.raises(RuntimeError, match=GONE):
        z.sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_two_launches_the_logits_live_until_the_backward(backend, validated):
    h, W, kwargs = setup()
    z = h @ W.T
    loss = fused_grpo_loss(z, **kwargs, loss_type="gspo", inplace=True, backend=backend).loss
    aux = z.logsumexp(-1).mean()
    assert torch.equal(aux.detach(), (h.detach() @ W.detach().T).logsumexp(-1).mean())  # of the same bits
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        aux.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_a_graph_built_before_raises(reduction, backend, validated):
    h, W, kwargs = setup()
    z = h @ W.T
    aux = z.logsumexp(-1).mean()
    loss = fused_grpo_loss(z, **kwargs, reduction=reduction, inplace=True, backend=backend).loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        aux.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_views_of_the_memory_read_nan(backend, validated):
    """And what the loss has not been given is as it was."""
    h, W, kwargs = setup(T=5)
    longer = torch.cat([h, h[:, :2]], 1) @ W.T
    view = longer[:, :5]
    before = longer.detach()[:, 5:].clone()
    fused_grpo_loss(view, **kwargs, inplace=True, backend=backend).loss.backward()
    with pytest.raises(RuntimeError, match=GONE):
        view.sum()
    assert longer[:, :5].isnan().all() and torch.equal(longer[:, 5:], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend, validated):
    h, W, kwargs = setup()
    mask = kwargs.pop("completion_mask")
    packed = {name: kwargs[name][mask] for name in ("completion_ids", "old_logps")}
    cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    z = h[mask] @ W.T
    fused_grpo_loss(z, **packed, advantages=kwargs["advantages"], cu_seqlens=cu, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match=GONE):
        z.logsumexp(-1)


def test_nothing_of_it_without_a_gradient_or_validation(monkeypatch):
    h, W, kwargs = setup()
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "1")
    with torch.no_grad():
        z = h @ W.T
        fused_grpo_loss(z, **kwargs, inplace=True)
        assert torch.equal(z, h @ W.T)
    monkeypatch.delenv("GRPO_KERNELS_VALIDATE")
    z = h @ W.T
    fused_grpo_loss(z, **kwargs, inplace=True)
    assert type(z) is torch.Tensor and not z.isnan().any()
