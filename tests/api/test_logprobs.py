"""`token_logprobs`: values and gradients against float64 autograd."""

import pytest
import torch

from cases import BACKENDS, DEVICE, make_case
from grpo_kernels import fused_grpo_loss, token_logprobs
from tolerance import assert_within, bounds, logprob_bounds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference_logprobs(logits, ids, mask, temperature):
    lp = (logits.double() / temperature).log_softmax(-1)
    zero = torch.zeros((), dtype=torch.float64)
    safe = ids.where(mask, torch.zeros_like(ids)).long()
    return lp.gather(-1, safe[..., None])[..., 0].where(mask, zero), -(lp.exp() * lp).sum(-1).where(mask, zero)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", (2, 131, 9000))
@pytest.mark.parametrize("extra", (0, 1))
@pytest.mark.parametrize("use", ("logps", "entropy", "both"))
def test_values_and_gradients(use, extra, V, dtype, backend):
    case = make_case(B=3, T=4, V=V, dtype=dtype, extra=extra, spread=2.0)
    ids, mask = case.completion_ids.to(DEVICE), case.completion_mask.to(DEVICE)
    leaf = case.logits.to(DEVICE).clone().requires_grad_()
    out = token_logprobs(leaf, ids, mask=mask, temperature=0.9, return_entropy=use != "logps", backend=backend)
    x = case.logits.double().requires_grad_()
    lp, H = reference_logprobs(x[:, :4], case.completion_ids, case.completion_mask, 0.9)
    g, h = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    g, h = g if use != "entropy" else 0 * g, h if use != "logps" else 0 * h
    allowed = logprob_bounds(case.logits, case.completion_ids, case.completion_mask, 0.9,
                             lambda lp, H: (lp * g).sum() + (H * h).sum())  # fmt: skip
    assert_within(out.logps, lp, allowed.logps, "logps")
    if use == "logps":
        assert out.entropy is None
    else:
        assert_within(out.entropy, H, allowed.entropy, "entropy")

    got = (out.logps * g.to(DEVICE)).sum() if use != "entropy" else 0.0
    want = (lp * g).sum() if use != "entropy" else 0.0
    if use != "logps":
        got, want = got + (out.entropy * h.to(DEVICE)).sum(), want + (H * h).sum()
    got.backward()
    want.backward()
    assert_within(leaf.grad, x.grad, allowed.grad, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_objective_equals_the_built_in(backend):
    """Any objective is token_logprobs and torch: REINFORCE written out has fused_grpo_loss's gradient."""
    case = make_case(seed=1)
    ids, mask, adv = (x.to(DEVICE) for x in (case.completion_ids, case.completion_mask, case.advantages))
    a, b = (case.logits.to(DEVICE).clone().requires_grad_() for _ in range(2))
    lp = token_logprobs(a, ids, mask=mask, backend=backend).logps
    (-(lp * adv[:, None] * mask).sum() / mask.sum()).backward()
    fused_grpo_loss(b, ids, adv, completion_mask=mask, loss_type="bnpo", backend=backend).loss.backward()
    inputs = case.inputs("completion_ids", "completion_mask", "advantages")
    allowed = bounds(case.logits, **inputs, loss_type="bnpo")
    assert_within(a.grad, b.grad, allowed.grad, "gradient", factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad(backend):
    case = make_case(seed=2)
    with torch.no_grad():
        out = token_logprobs(case.logits.to(DEVICE).requires_grad_(), case.completion_ids.to(DEVICE),
                             mask=case.completion_mask.to(DEVICE), return_entropy=True, backend=backend)  # fmt: skip
    assert not out.logps.requires_grad and not out.entropy.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "both"))
@pytest.mark.parametrize("per_row", (False, True), ids=("number", "tensor"))
def test_large_logits_lose_nothing_to_a_temperature(per_row, entropy, backend):
    """Logits near 2^20, a multiple of 1/8 apart: their differences are exact, and are what is divided."""
    g = torch.Generator().manual_seed(4)
    x = (torch.randn(2, 3, 50, generator=g) * 16).round() / 8
    ids, mask = torch.randint(50, (2, 3), generator=g), torch.ones(2, 3, dtype=torch.bool)
    temperature = torch.full((2, 3), 0.7, device=DEVICE) if per_row else 0.7
    leaf = (x + 2.0**20).to(DEVICE).requires_grad_()
    out = token_logprobs(leaf, ids.to(DEVICE), temperature=temperature, return_entropy=entropy, backend=backend)
    (out.logps + (out.entropy if entropy else 0.0)).sum().backward()
    wanted = x.double().requires_grad_()
    lp, H = reference_logprobs(wanted, ids, mask, 0.7)
    (lp + (H if entropy else 0.0)).sum().backward()
    depth = (x.amax(-1) - x.amin(-1)).max() / 0.7 + 4.0  # the largest number that is rounded; log 50 < 4
    allowed = 8 * torch.finfo(torch.float32).eps * depth.double()
    assert_within(out.logps, lp, allowed, "logps")
    if entropy:
        assert_within(out.entropy, H, allowed, "entropy")
    assert_within(leaf.grad, wanted.grad, allowed * depth / 0.7, "gradient")
