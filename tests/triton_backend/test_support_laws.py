"""Laws of rows that are restricted: launches, no host sync, 64-bit offsets, torch.compile."""

import pytest
import torch

from cases import BACKENDS, DEVICE, make_case, ours
from counting import Device, bare_ops, interpreted, launches
from grpo_kernels import Support, fused_grpo_loss, token_logprobs
from support_cases import make_rows, make_support, restricted
from tolerance import assert_within, bounds

B, T, V = 8, 32, 64


def on_meta(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


def support_on_meta(form):
    if form == "mask":
        return on_meta(B, T, V, dtype=torch.bool)
    return Support(on_meta(B * T * 3, dtype=torch.int64), on_meta(B * T + 1, dtype=torch.int64))


@interpreted
@pytest.mark.parametrize("form", ("lists", "mask"))
@pytest.mark.parametrize("kwargs", ({}, {"inplace": True}, {"loss_type": "gspo"}, {"entropy_coef": 0.1}), ids=str)
def test_few_launches_and_no_host_sync(kwargs, form):
    """On tensors without data, whose ops raise where a GPU would be waited for."""
    x, support = on_meta(B, T, V).requires_grad_() * 1, support_on_meta(form)
    with bare_ops(), launches(run=False) as seen, Device() as device:
        out = fused_grpo_loss(x, on_meta(B, T, dtype=torch.int64), on_meta(B), support=support, backend="triton",
                              **kwargs)  # fmt: skip
        torch.autograd.grad(out.loss, x, out.loss.new_empty(()))
    rows = [max(y.numel() for y in launch.tensors) >= x.numel() for launch in seen]
    assert sum(rows) == 2  # twice the rows; or once, and the gradient times what comes from upstream
    assert len(device.ops) + rows.count(False) <= 8 and all(size <= B * T for _, size in device.ops), device.ops


@interpreted
@pytest.mark.parametrize("form", ("lists", "mask"))
def test_log_probabilities_launch_twice(form):
    x, support, ids, up = on_meta(B, T, V).requires_grad_(), support_on_meta(form), on_meta(B, T).long(), on_meta(B, T)
    with bare_ops(), launches(run=False) as seen, Device() as device:
        out = token_logprobs(x, ids, support=support, backend="triton")
        torch.autograd.grad(out.logps, x, up)
    assert len(seen) == 2 and len(device.ops) <= 8 and all(size <= B * T for _, size in device.ops)


@interpreted
@pytest.mark.parametrize("form", ("Support", "mask"))
@pytest.mark.parametrize("inplace", (False, True))
def test_rows_beyond_two_to_the_31_elements(inplace, form, tmp_path):
    """Four rows 2³⁰ elements apart, in a file of holes."""
    stride, V = 2**30 + 8, 40
    size = (3 * stride + V) * 2
    with open(tmp_path / "logits", "wb") as file:
        file.truncate(size)
    storage = torch.UntypedStorage.from_file(str(tmp_path / "logits"), shared=True, nbytes=size)
    far = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (4, 1, V), (stride, stride, 1))
    case = make_case(4, 1, V, dtype=torch.bfloat16)
    case.completion_mask[:] = True
    case.completion_ids.clamp_(min=0)
    rows = make_rows(case, V, seed=2)
    support = make_support(form, rows, (4, 1, V), case.completion_mask)
    inputs = dict(completion_ids=case.completion_ids, advantages=case.advantages)
    _, want = ours(case.logits, "triton", support=support, **inputs)
    far.copy_(case.logits)
    far.requires_grad_()
    with launches():  # an address outside of the file fails, rather than crashing
        if inplace:
            x = _Alias.apply(far.detach(), torch.zeros((), requires_grad=True))
        else:
            x = far
        out = fused_grpo_loss(x, backend="triton", support=support, inplace=inplace, **inputs)
        (grad,) = torch.autograd.grad(out.loss, x)
    allowed = bounds(restricted(case.logits, case, rows), **inputs).grad
    assert_within(grad, want, allowed, "gradient", factor=2)


class _Alias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, parameter):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, None


@pytest.mark.unshifted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ("Support", "mask"))
def test_compiled_is_eager(form, backend):
    """torch.compile(fullgraph=True), for supports of several sizes, once."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, support, ids, advantages):
        out = fused_grpo_loss(x * 1, ids, advantages, support=support, entropy_coef=0.1, backend=backend)
        return out.loss + token_logprobs(x * 1, ids, support=support, backend=backend).logps.exp().sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(4):
        case = make_case(2, 4, 37, seed=seed)
        case.completion_mask[:] = True
        case.completion_ids.clamp_(min=0)
        rows = make_rows(case, 37, seed)
        support = make_support(form, rows, (2, 4, 37), case.completion_mask)
        x = case.logits.to(DEVICE).requires_grad_()
        given = (support, case.completion_ids.to(DEVICE), case.advantages.to(DEVICE))
        (want,) = torch.autograd.grad(step(x, *given), x)
        (got,) = torch.autograd.grad(compiled(x, *given), x)
        assert torch.equal(got, want)
    assert counter.frame_count <= 2
    torch._dynamo.reset()
