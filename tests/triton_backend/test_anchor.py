"""The sum of a row that is anchored at its token's logit, and the running maximum where that sum is not sound.

Against float64. The allowed error does not depend on the size of the logits, only on their distances.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from cases import DEVICE, make_case
from counting import interpreted, launches
from grpo_kernels import fused_grpo_loss, linear_token_logprobs, token_logprobs
from grpo_kernels.objective.language import constant
from grpo_kernels.triton_backend import row
from grpo_kernels.triton_backend.launch import _tile
from grpo_kernels.triton_backend.shapes import gradient_shape
from linear_tolerance import linear_logprob_bounds
from pretend_gpu import pretended
from tolerance import U, assert_within, bounds, logprob_bounds, steps, written
from tolerance import rows as errors_of

pytestmark = pytest.mark.skipif(pretended(), reason="about the kernels' own numbers: on a pretended GPU torch computes")

INF = math.inf
V = 1043  # a tile and a rest; rows that start anywhere


def rows(size=0.0, dtype=torch.float32, V=V, n=3, seed=0, spread=2.0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(1, n, V, generator=g) * spread + size).to(dtype)
    return x, torch.randint(0, V, (1, n), generator=g)


def exact(x, ids, heat=1.0):
    """(lp, H, ∂lp/∂x, ∂H/∂x, p/heat) in float64, per row."""
    heat = torch.as_tensor(heat, dtype=torch.float64).expand(ids.shape)[..., None]
    z = x.double() / heat
    lp = z.log_softmax(-1)
    p, bounded = lp.exp(), lp.masked_fill(lp == -INF, 0.0)
    H = -(p * bounded).sum(-1)
    onehot = torch.zeros_like(p).scatter_(-1, ids[..., None], 1.0)
    return lp.gather(-1, ids[..., None])[..., 0], H, (onehot - p) / heat, -p * (bounded + H[..., None]) / heat, p / heat


def allowed_lp(x, ids, heat=1.0):
    """Roundings of the depths that enter, in units of log2, of the sum and of the result."""
    lp, *_ = exact(x, ids, heat)
    z = x.double() / torch.as_tensor(heat, dtype=torch.float64).expand(ids.shape)[..., None]
    matters = z.log_softmax(-1) > -25.0  # below that a part is nothing to the sum
    far = (z - z.amax(-1, keepdim=True)).where(matters, 0.0).abs().amax(-1)
    return U * (8 * far + 4 * lp.abs().nan_to_num(0.0, 0.0, 0.0) + 8 + steps(x.shape[-1]))


def allowed_entropy(x, ids, heat=1.0):
    """The same: of distances from the largest logit, or from the token's, whichever the sum is anchored at."""
    z = x.double() / torch.as_tensor(heat, dtype=torch.float64).expand(ids.shape)[..., None]
    z = z.masked_fill(z.log_softmax(-1) < -25.0, -INF)
    at_token = z.gather(-1, ids[..., None])
    anchors = z.amax(-1, keepdim=True), at_token.where(at_token.isfinite(), z.amax(-1, keepdim=True))
    return torch.maximum(*(errors_of(z - anchor, ids, 1.0).d_entropy for anchor in anchors))


def check_rows(x, ids, heat=1.0, entropy=True):
    """Log-probs, entropies and both gradients, in two launches, and in one the loss of ratio 1: g = −1/n."""
    lp, H, d_lp, d_H, p = exact(x, ids, heat)
    n, allowed, of_entropy = ids.numel(), allowed_lp(x, ids, heat), allowed_entropy(x, ids, heat)
    heat = heat.to(DEVICE) if isinstance(heat, torch.Tensor) else heat
    for upstream in ((1.0, 0.0), (0.0, 1.0)) if entropy else ((1.0, 0.0),):
        leaf = x.to(DEVICE).clone().requires_grad_()
        out = token_logprobs(leaf, ids.to(DEVICE), temperature=heat, return_entropy=entropy, backend="triton")
        assert_within(out.logps, lp, allowed, "log-probs")
        assert (out.logps <= 0).all()
        loss = out.logps.sum() * upstream[0]
        if entropy:
            assert_within(out.entropy, H, of_entropy, "entropies")
            loss = loss + out.entropy.sum() * upstream[1]
        (grad,) = torch.autograd.grad(loss, leaf)
        want = upstream[0] * d_lp + upstream[1] * d_H
        within = 4 * allowed[..., None] * (p + want.abs()) + 2 * upstream[1] * of_entropy[..., None] * p
        within = within + written(want, x.dtype)
        assert_within(grad, want, within, "gradient")
    leaf = x.to(DEVICE).clone().requires_grad_()
    out = fused_grpo_loss(leaf, ids.to(DEVICE), torch.ones(1, device=DEVICE), temperature=heat, loss_type="dapo",
                          backend="triton")  # fmt: skip
    assert_within(out.logps, lp, allowed, "log-probs of the loss")
    (grad,) = torch.autograd.grad(out.loss, leaf)
    # Where p is 0: 1/n; 1/heat, log₂ e, ln 2 and the two products; the slope, times 1 − p: 9 roundings.
    within = 4 * allowed[..., None] * p / n + 9 * U * (d_lp / n).abs() + written(d_lp / n, x.dtype)
    assert_within(grad, -d_lp / n, within, "of the loss")


# --- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("V", (V, 4112), ids=("odd", "aligned"))
@pytest.mark.parametrize("heat", (1.0, 0.7), ids=("", "temperature"))
def test_ordinary_rows(heat, V, dtype):
    check_rows(*rows(dtype=dtype, V=V), heat)


@pytest.mark.parametrize("size", (1e4, -1e4, 1e6, -1e6))
@pytest.mark.parametrize("heat", (1.0, 0.7, 1.3))
def test_size_of_the_logits_does_not_matter(heat, size):
    """x·scale is 1.4e6, an ulp of which is 0.125: nothing of that is left."""
    check_rows(*rows(size), heat)


def test_a_temperature_for_each_token():
    x, ids = rows(1e4)
    check_rows(x, ids, torch.tensor([[0.3, 1.0, 4.0]]))


@pytest.mark.parametrize("below", (20.0, 40.0, 45.0, 69.1, 87.3, 92.2, 104.0, 1e4))
@pytest.mark.parametrize("size", (0.0, 1e4))
def test_improbable_tokens(size, below):
    """Of probability 1e-9 to 1e-45 and 0: above and below what the anchored sum, and fp32, can hold."""
    x, ids = rows(size)
    x.scatter_(-1, ids[..., None], size - below)
    check_rows(x, ids)


def test_the_factor_of_the_second_pass_stays_normal():
    """Σ = 2^63 and a weight of 1e-15: −g/Σ is 1e-34."""
    x, ids = rows(spread=0.1)
    x.scatter_(-1, ids[..., None], 7.0 - 63 * math.log(2))
    leaf = x.to(DEVICE).requires_grad_()
    out = fused_grpo_loss(leaf, ids.to(DEVICE), torch.ones(1, device=DEVICE), loss_scale=1e-15, loss_type="dapo",
                          backend="triton")  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, leaf)
    want = exact(x, ids)[2] * -1e-15 / 3
    assert_within(grad, want, want.abs() * (4 * allowed_lp(x, ids)[..., None] + 8 * U), "gradient")


@pytest.mark.parametrize("size", (0.0, 30.0, 1e4, 1e6))
@pytest.mark.parametrize("above", (5.0, 17.0, 40.0, 200.0))
def test_confident_tokens(size, above):
    """Their log-probability is at most 0; the token's own entry, 1 − p, is formed in fp32."""
    x, ids = rows(size)
    x.scatter_(-1, ids[..., None], size + above)
    check_rows(x, ids)


@pytest.mark.parametrize("size", (1e9, -1e9, 1e18, 1e30, 3e38, -3e38))
@pytest.mark.parametrize("heat", (0.5, 1.0, 1.5))
def test_huge_logits(heat, size):
    """Floats so far apart that only equal ones share the row, and products that overflow."""
    x = torch.full((1, 2, V), size * (0.9 if size > 0 else 1.1))
    x[..., [3, 700]] = size
    if size < -1e38:
        x[..., 3:] = -INF
        x[..., [3, 700]] = size
    check_rows(x, torch.tensor([[3, 0]]) if size > -1e38 else torch.tensor([[3, 700]]), heat)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("banned", (slice(0, 9001), slice(300, None), slice(1, None, 2), slice(0, 10003)), ids=str)
def test_banned_entries_and_whole_tiles_of_them(banned, dtype):
    x, ids = rows(dtype=dtype, V=10007, n=2)
    x[..., banned] = -INF
    left = torch.isfinite(x[0, 0]).nonzero()[:, 0]
    check_rows(x, left[ids % len(left)])


def test_what_is_not_finite_is_passed_on():
    x, ids = rows(n=6)
    x[0, 1, 1000] = math.nan
    x[0, 2, 5] = INF
    x[0, 3, ids[0, 3]] = -INF
    x[0, 4, ids[0, 4]] = INF
    leaf = x.to(DEVICE).requires_grad_()
    out = token_logprobs(leaf, ids.to(DEVICE), return_entropy=True, backend="triton")
    _, H, d_lp, *_ = exact(x, ids)
    assert out.logps[0, 3] == -INF and (out.logps.isnan().cpu() == torch.tensor([[0, 1, 1, 0, 1, 0]]).bool()).all()
    for t in (0, 3, 5):
        one = slice(t, t + 1)
        assert_within(out.entropy[0, one], H[0, one], allowed_entropy(x[:, one], ids[:, one])[0], "entropy")
    out.logps.sum().backward()
    assert (leaf.grad.isnan().all(-1).cpu() == out.logps.isnan().cpu()).all()
    for t in (0, 3, 5):
        one = slice(t, t + 1)
        counts = torch.ones_like(ids[:, one], dtype=torch.bool)
        allowed = logprob_bounds(x[:, one], ids[:, one], counts, 1.0, lambda lp, H: lp.sum())
        assert_within(leaf.grad[0, one], d_lp[0, one], allowed.grad[0], "gradient")


@pytest.mark.parametrize("outside", (-1, V, 2**40))
def test_an_id_outside_the_vocabulary_gives_nan(outside, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    x, ids = rows()
    ids[0, 1] = outside
    out = token_logprobs(x.to(DEVICE), ids.to(DEVICE), return_entropy=True, backend="triton")
    assert out.logps.isnan().tolist() == [[False, True, False]] and out.entropy.isfinite().all()


# --- both ways -------------------------------------------------------------------------------------


def loss_of(x, ids, **kwargs):
    """(log-probs, entropies, gradient, reads of each row) of a loss in one launch."""
    y = x.clone().requires_grad_() * 1
    with launches() as seen:
        out = fused_grpo_loss(y, ids, torch.ones(1), entropy_coef=0.1, return_entropy=True, backend="triton", **kwargs)
        (grad,) = torch.autograd.grad(out.loss, y)
    reads = next(each for each in seen if each.touches(y)).reads(y).sum(-1)
    return out.logps, out.entropy, grad, reads


@interpreted
@pytest.mark.unshifted
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kwargs", ({}, {"temperature": torch.tensor([[0.5, 1.0, 2.0]])}), ids=("", "temperatures"))
@pytest.mark.parametrize("V", (V, 4112), ids=("odd", "aligned"))
def test_the_fallback_gives_the_same(V, kwargs, dtype, monkeypatch):
    x, ids = rows(dtype=dtype, V=V, spread=1.0)
    lp, H, grad, reads = loss_of(x, ids, **kwargs)
    assert (reads == 2 * V + 1).all()
    monkeypatch.setattr(row, "MOST_OF_ENTROPIES", constant(0.0))
    lp_again, H_again, grad_again, reads = loss_of(x, ids, **kwargs)
    assert (reads == 3 * V + 1).all()
    allowed = allowed_lp(x, ids, kwargs.get("temperature", 1.0))
    assert_within(lp, lp_again.double(), allowed, "log-probs", factor=2)
    assert_within(H, H_again, allowed_entropy(x, ids, kwargs.get("temperature", 1.0)), "entropies", factor=2)
    of_gradient = bounds(x, ids, advantages=torch.ones(1), entropy_coef=0.1, **kwargs).grad
    assert_within(grad, grad_again, of_gradient, "gradient", factor=2)


@interpreted
@pytest.mark.unshifted
@pytest.mark.parametrize("entropy", (False, True))
@pytest.mark.parametrize(("power", "passes"), [(30, (1, 1)), (40, (1, 2)), (62, (1, 2)), (66, (2, 2)), (140, (2, 2))])
def test_when_a_row_is_read_again(power, passes, entropy):
    """Where Σ is above 2^64, or with entropies 2^32."""
    x, ids = torch.full((1, 2, V), -INF), torch.tensor([[5, 900]])
    x[..., 7] = power * math.log(2)
    x.scatter_(-1, ids[..., None], 0.0)
    with launches() as seen:
        token_logprobs(x, ids, return_entropy=entropy, backend="triton")
    assert (seen[0].reads(x).sum(-1) == passes[entropy] * V + 1).all()
    check_rows(x, ids, entropy=entropy)


@interpreted
def test_a_soft_cap_both_ways(monkeypatch):
    """Hidden states times the identity are the logits."""
    x, ids = rows(V=131)
    want = exact(8.0 * torch.tanh(x.double() / 8.0), ids)
    kwargs = {"softcap": 8.0, "return_entropy": True, "backend": "triton"}

    def score():
        h = x.clone().requires_grad_()
        out = linear_token_logprobs(h, torch.eye(131), ids, **kwargs)
        out.logps.sum().backward()
        return out.logps.detach(), out.entropy.detach(), h.grad

    slack, counts = 1 - torch.tanh(x.double() / 8.0) ** 2, torch.ones_like(ids, dtype=torch.bool)
    head = {"hidden": x, "weight": torch.eye(131)}
    of_both, (of_gradient, _) = linear_logprob_bounds(head, ids, counts, 1.0, lambda lp, H: lp.sum(), softcap=8.0)
    both = [score()]
    monkeypatch.setattr(row, "MOST_OF_ENTROPIES", constant(0.0))
    for lp, H, grad in [*both, score()]:
        # tanh is made of 1 − 2/(1 + 2^…): three roundings of numbers up to 2, times the cap
        assert_within(lp, want[0], allowed_lp(x, ids) + 8 * 8 * U, "log-probs")
        assert_within(H, want[1], of_both.entropy, "entropies")
        assert_within(grad, want[2] * slack, of_gradient, "gradient")


# --- where bodies start ----------------------------------------------------------------------------


@pytest.mark.unshifted
def test_bodies_start_at_lines_where_both_rows_may():
    memory = torch.empty(4096, dtype=torch.bfloat16, device=DEVICE)
    memory = memory[-memory.data_ptr() % 128 // 2 :]
    line = 64 if DEVICE == "cpu" else 128

    def chosen(*firsts):
        found = _tile(gradient_shape, 37, *(memory[first:].as_strided((2, 3, 37), (111, 37, 1)) for first in firsts))
        return found["W"], found["EDGE"] * 2

    assert chosen(0) == chosen(1) == chosen(3, 3) == chosen(1, 1 + line // 2) == (8, line)
    assert chosen(0, 8) == chosen(1, 17) == (8, 16)
    assert chosen(0, 1) == (1, 2)
    aligned = [memory[first:].as_strided((2, 3, 48), (144, 48, 1)) for first in (0, 8)]
    assert {_tile(gradient_shape, 48, *each)["EDGE"] for each in (aligned, aligned[:1])} == {8}  # one kernel for all


def test_cases_of_every_kind_keep_their_gradient_in_place():
    """The second pass runs from the end: over the row itself, and beside it."""
    case = make_case(2, 3, 4113, dtype=torch.bfloat16)
    kwargs = {k: v.to(DEVICE) for k, v in case.inputs("completion_ids", "completion_mask", "advantages").items()}
    grads = []
    for inplace in (False, True):
        leaf = case.logits.to(DEVICE).clone().requires_grad_()
        loss = fused_grpo_loss(leaf * 1, **kwargs, entropy_coef=0.1, inplace=inplace, backend="triton").loss
        grads += torch.autograd.grad(loss, leaf)
    given = case.inputs("completion_ids", "completion_mask", "advantages")
    assert_within(*grads, bounds(case.logits, **given, entropy_coef=0.1).grad, "gradient", factor=2)
