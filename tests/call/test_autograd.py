"""How the loss sits in an autograd graph: upstream, second backward, in-place safety, streams, graphs."""

import pytest
import torch

from cases import BACKENDS, DEVICE, make_case, on_device
from grpo_kernels import fused_grpo_loss, token_logprobs
from tolerance import U, assert_within, logprob_bounds

KW = ("completion_ids", "completion_mask", "old_logps", "advantages")
CUDA = torch.cuda.is_available()


def setup(seed=0, dtype=torch.float32, extra=0):
    case = make_case(seed=seed, dtype=dtype, extra=extra)
    return case.logits.to(DEVICE).requires_grad_(), on_device(case.inputs(*KW))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_double_backward_raises(reduction, inplace, backend):
    leaf, kwargs = setup()
    out = fused_grpo_loss(leaf * 1, **kwargs, backend=backend, inplace=inplace, reduction=reduction)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(out.loss.sum(), leaf, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_of_logprobs_raises(backend):
    leaf, kwargs = setup()
    lp = token_logprobs(leaf, kwargs["completion_ids"], mask=kwargs["completion_mask"], backend=backend).logps
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(lp.sum(), leaf, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("inplace", (False, True))
def test_second_backward_is_right(inplace, dtype, backend):
    """retain_graph: each backward gives its own multiple, and what it returned before stays as it was."""
    leaf, kwargs = setup(dtype=dtype)
    out = fused_grpo_loss(leaf * 1, **kwargs, backend=backend, inplace=inplace and dtype != torch.float16)
    (one,) = torch.autograd.grad(out.loss, leaf, retain_graph=True)
    kept = one.clone()
    (two,) = torch.autograd.grad(2 * out.loss, leaf, retain_graph=True)
    (three,) = torch.autograd.grad(-out.loss, leaf)
    assert torch.equal(one, kept) and torch.equal(three, -kept)
    # fp16 is scaled before it is rounded, so that subnormal numbers keep more of the doubled gradient
    torch.testing.assert_close(two, 2 * kept, rtol=0.0, atol=2**-23 if dtype == torch.float16 else 0.0)
    assert kept.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_backward_after_the_gradient_overwrote_the_logits_raises(backend):
    """Two launches in place: the backward takes the logits' memory, so it can run once."""
    leaf, kwargs = setup()
    out = fused_grpo_loss(leaf * 1, **kwargs, backend=backend, inplace=True, reduction="none")
    loss = out.loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_inplace_is_refused_to_a_graph_that_needs_the_logits(reduction, backend):
    """exp saves its output: overwriting that must raise, not give garbage."""
    leaf, kwargs = setup()
    logits = leaf.exp()
    out = fused_grpo_loss(logits, **kwargs, backend=backend, inplace=True, reduction=reduction)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_takes_the_logits_memory(backend):
    leaf, kwargs = setup()
    logits = leaf * 1
    seen = []
    logits.register_hook(seen.append)
    fused_grpo_loss(logits, **kwargs, backend=backend, inplace=True).loss.backward()
    assert seen[0].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_logits_survive_unless_inplace(reduction, backend):
    leaf, kwargs = setup()
    logits = leaf * 1
    fused_grpo_loss(logits, **kwargs, backend=backend, reduction=reduction).loss.sum().backward()
    assert torch.equal(logits, leaf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaf_logits_accumulate(backend):
    leaf, kwargs = setup()
    for _ in range(2):
        fused_grpo_loss(leaf, **kwargs, backend=backend).loss.backward()
    (once,) = torch.autograd.grad(fused_grpo_loss(leaf, **kwargs, backend=backend).loss, leaf)
    assert torch.equal(leaf.grad, 2 * once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_joins_other_losses(backend):
    """The scaled sum of this loss and another term has the sum of their gradients."""
    leaf, kwargs = setup(extra=1)
    (alone,) = torch.autograd.grad(fused_grpo_loss(leaf, **kwargs, backend=backend).loss, leaf)
    logits = leaf * 1
    total = 0.5 * fused_grpo_loss(logits, **kwargs, backend=backend).loss + logits.square().mean()
    total.backward()
    parts = 0.5 * alone, 2 * leaf.detach() / leaf.numel()
    allowed = sum(part.double().abs() for part in parts) * 4 * U  # halved, squared, averaged, added up
    assert_within(leaf.grad, sum(parts), allowed, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_can_be_divided_in_place(backend):
    leaf, kwargs = setup()
    loss = fused_grpo_loss(leaf, **kwargs, backend=backend).loss
    want = loss.item() / 4
    loss /= 4
    loss.backward()
    assert loss.item() == want and leaf.grad.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_loss_is_differentiable(backend):
    leaf, kwargs = setup()
    out = fused_grpo_loss(leaf, **kwargs, backend=backend, return_entropy=True)
    assert out.loss.requires_grad and not out.logps.requires_grad and not out.entropy.requires_grad
    assert not any(v.requires_grad for v in (*out.metrics.values(), *out.sums.values()))
    assert all(v.dim() == 0 and v.device == leaf.device for v in (*out.metrics.values(), *out.sums.values()))


def test_fresh_memory_of_a_leaf_is_poisoned_too():
    """torch's checkpoints make leaves by torch.empty; conftest.py fills them behind autograd's back."""
    x = torch.empty(2, device=DEVICE, requires_grad=True)
    assert x.is_leaf and x.requires_grad and x.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend):
    leaf, kwargs = setup()

    def block(x):
        return fused_grpo_loss(x * 1, **kwargs, backend=backend, inplace=True).loss

    (want,) = torch.autograd.grad(block(leaf), leaf)
    (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, leaf, use_reentrant=False), leaf)
    assert torch.equal(want, got)


@pytest.mark.unshifted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", (False, True))
def test_opcheck(inplace, backend):
    """torch's own checks of the registrations: schema, aliasing, fakes."""
    from grpo_kernels.call import ops
    from grpo_kernels.objective.batch import Batch
    from grpo_kernels.objective.plan import Plan

    leaf, kwargs = setup()
    batch = Batch(kwargs["completion_ids"], kwargs["completion_mask"], kwargs["old_logps"],
                  adv=kwargs["advantages"][:, None], term=(0.8, 1.2, 1e30, 1e30))  # fmt: skip
    args = (*batch.pack(), Plan(term="clipped").key(), True, backend)
    op = ops.loss_op_ if inplace else ops.loss_op
    torch.library.opcheck(op, (leaf.detach().clone(), *args), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("inplace", (False, True))
def test_cuda_graph_capture_and_replay(inplace):
    leaf, kwargs = setup(seed=1)
    static = leaf.detach().clone().requires_grad_()
    step = lambda x: fused_grpo_loss(x * 1, **kwargs, inplace=inplace).loss  # noqa: E731
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(step(static), static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(static)
        (grad,) = torch.autograd.grad(loss, static)
    fresh, _ = setup(seed=2)
    with torch.no_grad():
        static.copy_(fresh)
    graph.replay()
    want = step(fresh)
    (want_grad,) = torch.autograd.grad(want, fresh)
    assert torch.equal(loss, want) and torch.equal(grad, want_grad)


@pytest.mark.skipif(not CUDA, reason="streams need a CUDA device")
def test_second_stream():
    leaf, kwargs = setup()
    want = fused_grpo_loss(leaf, **kwargs).loss
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = fused_grpo_loss(leaf, **kwargs).loss
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(want, got)


@pytest.fixture
def memory_given_back():
    """Ten gigabytes, that the processes beside this one may need."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.skipif(not CUDA, reason="logits of over 2^31 entries need a CUDA device")
@pytest.mark.parametrize("shape", [(2, 8192, 151936), (1, 65537, 33000)], ids=str)
@pytest.mark.usefixtures("memory_given_back")
def test_more_than_2_to_the_31_logits(shape):
    B, T, V = shape
    logits = torch.randn(B, T, V, device="cuda", dtype=torch.bfloat16).requires_grad_()
    ids = torch.randint(0, V, (B, T), device="cuda")
    out = fused_grpo_loss(logits, ids, torch.ones(B, device="cuda"), loss_type="bnpo")
    out.loss.backward()
    for b, t in ((0, 0), (B - 1, T - 1), (B - 1, T // 2)):
        x = logits[b, t].detach().double().requires_grad_()
        lp = x.log_softmax(-1)[ids[b, t]]
        (want,) = torch.autograd.grad(-lp / (B * T), x)
        mask = torch.ones(1, 1, dtype=torch.bool)
        allowed = logprob_bounds(x.detach().cpu()[None, None].bfloat16(), ids[b, t].cpu().view(1, 1), mask, 1.0,
                                 lambda lp, H: -lp.sum() / (B * T))  # fmt: skip
        assert_within(out.logps[b, t], lp, allowed.logps[0, 0], "logps")
        assert_within(logits.grad[b, t], want, allowed.grad[0, 0], "gradient")
