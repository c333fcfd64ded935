"""Id lists of every length on long rows, in float64: K up to 4096, V up to 151936, both backends."""

import pytest
import torch

import reference
from cases import BACKENDS, DEVICE
from grpo_kernels import Support, fused_grpo_loss
from reference.supports import restrict
from tolerance import assert_within, bounds

KS = (0, 1, 2, 31, 257, 4096)  # 0: the whole vocabulary


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("V", (4099, 32000, 151936))
@pytest.mark.parametrize("inplace", (False, True))
def test_long_rows(inplace, V, dtype, backend):
    g = torch.Generator().manual_seed(V)
    T = len(KS)
    x = (4 * torch.randn(1, T, V, generator=g)).to(dtype)
    ids = torch.randint(V, (1, T), generator=g)
    rows = [torch.randint(V, (K,), generator=g).tolist() for K in KS]  # repeats, with and without the token
    for row, y in zip(rows[::2], ids[0, ::2].tolist()):
        row[:] = [*row, y, y] if row else row
    mask = torch.ones(1, T, dtype=torch.bool)
    banned = restrict(x.double(), ids, mask, rows)
    lp = banned.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old = (lp + torch.linspace(-0.15, 0.15, T)).float()
    kwargs = {"completion_ids": ids, "advantages": torch.ones(1), "old_logps": old, "entropy_coef": 0.1,
              "return_entropy": True}  # fmt: skip
    z = x.double().requires_grad_()
    exact = {k: v for k, v in kwargs.items() if k != "return_entropy"} | {"old_logps": old.double()}
    want = reference.grpo_loss(z, support=rows, **exact)
    (want_grad,) = torch.autograd.grad(want.loss, z)
    leaf = x.to(DEVICE).requires_grad_()
    given = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in kwargs.items()}
    out = fused_grpo_loss(leaf * 1, support=Support.from_lists(rows).to(DEVICE), inplace=inplace, backend=backend,
                          **given)  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, leaf)
    allowed = bounds(banned.to(dtype), **kwargs)
    assert_within(out.loss, want.loss, allowed.loss, "loss")
    assert_within(out.logps, want.logps, allowed.logps, "logps")
    assert_within(out.entropy, want.entropy, allowed.entropy, "entropy")
    assert_within(grad, want_grad, allowed.grad, "gradient")
    assert (grad.cpu()[banned == -torch.inf] == 0).all()
