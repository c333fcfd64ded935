"""Rows that start anywhere, as an odd vocabulary makes them: which accesses are chosen, and that the ends are right."""

import pytest
import torch

from cases import make_case
from counting import interpreted, launches
from grpo_kernels import fused_grpo_loss
from grpo_kernels.triton_backend.launch import _tile
from grpo_kernels.triton_backend.shapes import gradient_shape
from tolerance import assert_within, bounds


def rows_at(first, B, T, V, dtype, spare=0):
    """Uninitialised logits [B, T, V] that start ``first`` entries behind a boundary of 16 bytes."""
    memory = torch.empty(B * (T * V + spare) + first, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory.new_empty(0).set_(memory.untyped_storage(), first, (B, T, V), (T * V + spare, V, 1))


class Model(torch.autograd.Function):
    """Logits as a model hands them over: no leaf, no view."""

    @staticmethod
    def forward(ctx, x, first, spare):
        return rows_at(first, *x.shape, x.dtype, spare).copy_(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


@interpreted
@pytest.mark.unshifted
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("spare", (0, 1, 8))
@pytest.mark.parametrize(("V", "first"), [(5, 1), (5, 7), (37, 0), (37, 3), (131, 5), (1027, 2), (4113, 1)])
def test_every_start(V, first, spare, inplace, dtype):
    """Every entry of every row is read and written once per pass, and what lies between rows is left alone."""
    case = make_case(2, 3, V, dtype=dtype, seed=V)
    case.completion_ids.clamp_(min=0)
    case.completion_mask[:] = True
    leaf = case.logits[:, :3].clone().requires_grad_()
    kwargs = {**case.inputs("completion_ids", "advantages"), "entropy_coef": 0.1, "return_entropy": True}
    want = fused_grpo_loss(leaf, **kwargs, backend="torch")
    (want_grad,) = torch.autograd.grad(want.loss, leaf)

    y = Model.apply(leaf, first, spare)
    between = y.detach().as_strided((spare,), (1,), first + 3 * V).fill_(7.0)
    with launches() as seen:
        out = fused_grpo_loss(y, **kwargs, inplace=inplace, backend="triton")
        (grad,) = torch.autograd.grad(out.loss, y)
    (launch,) = [each for each in seen if each.touches(y)]
    assert (launch.writes(grad) >= 1).all() and launch.writes(grad).sum(-1).max() == V + 1  # the token's own, twice
    assert (launch.reads(y) >= 2).all() and launch.reads(y).sum(-1).max() == 2 * V + 1
    assert (between == 7.0).all()
    allowed = bounds(case.logits[:, :3], **kwargs)
    assert_within(out.loss, want.loss, allowed.loss, "loss", factor=2)
    assert_within(out.entropy, want.entropy, allowed.entropy, "entropy", factor=2)
    assert_within(grad, want_grad, allowed.grad, "gradient", factor=2)


@pytest.mark.unshifted
def test_accesses_are_as_wide_as_both_rows_allow():
    def chosen(V, *tensors):
        found = _tile(gradient_shape, V, *tensors)
        return found["W"], found["ALIGNED"]

    bf16, odd = rows_at(0, 2, 3, 64, torch.bfloat16), rows_at(0, 2, 3, 37, torch.bfloat16)
    assert chosen(64, bf16) == chosen(64, bf16, bf16.clone()) == (8, True)
    assert chosen(64, bf16.float()) == chosen(64, bf16.float(), bf16) == (4, True)
    assert chosen(37, odd.float(), odd) == (1, False)  # of two dtypes: their rows end at different places
    assert chosen(37, odd) == chosen(37, odd, odd) == chosen(37, odd, odd.clone()) == (8, False)
    assert chosen(37, bf16[..., :37]) == (8, False)  # rows start on a boundary, and do not end on one
    later = rows_at(1, 2, 3, 37, torch.bfloat16)
    assert chosen(37, later) == (8, False) and chosen(37, later, odd) == (1, False)
    assert chosen(37, later[:, :-1], torch.empty(2, 2, 37, dtype=torch.bfloat16)) == (1, False)  # other strides
    assert chosen(37, odd[:1, :1], odd.view(-1)[: 37 * 3].view(1, 3, 37)[:, :1]) == (8, False)  # of size 1: no matter
