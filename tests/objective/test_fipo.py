"""FIPO's influence weight: the discounted sum of the tokens that follow, on both backends."""

import math

import pytest
import torch

from cases import BACKENDS, DEVICE, make_case, on_device, ours
from counting import interpreted, launches
from grpo_kernels import LossConfig, fused_grpo_loss, policy_loss
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.catalogue import TERMS
from grpo_kernels.objective.sequences import suffix_sums
from reference.knobs import Knobs
from reference.terms import Tokens, future_of, term_fipo
from term_tolerance import U, of_fipo, of_future
from tolerance import assert_within, bounds

INF, NAN = math.inf, math.nan
FREE = {"loss_type": "fipo", "fipo_clip_range": None, "fipo_safety_threshold": None}


def losses(r, A, backend, mask=None, cu=None, **kwargs):
    """(ℓ, ∂Σℓ/∂lp, metrics) of tokens with these log ratios."""
    old = torch.full_like(torch.as_tensor(r, dtype=torch.float32), -8.0)
    lp = (torch.as_tensor(r) + old).to(DEVICE).requires_grad_()
    given = {"completion_mask": mask, "cu_seqlens": cu, "old_logps": old, "advantages": torch.as_tensor(A)}
    out = policy_loss(lp, **on_device({k: v for k, v in given.items() if v is not None}), reduction="none",
                      backend=backend, **{**FREE, **kwargs})  # fmt: skip
    (slope,) = torch.autograd.grad(out.loss.sum(), lp)
    return out.loss.detach().cpu(), slope.cpu(), {name: x.item() for name, x in out.metrics.items()}


def near(*values):
    """Exponentials of sums of up to 4, of log ratios that are differences of numbers up to 12."""
    return pytest.approx(values if len(values) > 1 else values[0], rel=64 * U, abs=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", (False, True))
def test_by_hand(packed, backend):
    """γ = ½. r = 1, −, 2, −1 | 4: F = 1 + 2/4 − 1/8, (masked), 2 − ½, −1 | 4: what is masked is a step all the same."""
    r, A = torch.tensor([1.0, NAN, 2.0, -1.0, 4.0, 0.0, 0.0, 0.0]), torch.tensor([-1.0, -2.0])
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    cu = torch.tensor([0, 4, 8], dtype=torch.int32)
    shape = (8,) if packed else (2, 4)
    knobs = {"fipo_decay_rate": 1.0, "epsilon": 0.9}
    loss, slope, metrics = losses(r.view(shape), A, backend, mask.view(shape), cu if packed else None, **knobs)
    F = [1.375, None, 1.5, -1.0, 4.0]
    want = [0.0 if f is None else math.exp(f + x) * a for f, x, a in zip(F, r.tolist(), (1, 1, 1, 1, 2))]
    assert loss.flatten().tolist() == near(*want, 0, 0, 0)
    assert slope.flatten().tolist() == near(*want, 0, 0, 0)
    F = [f for f in F if f is not None]
    assert metrics["fipo/future_kl"] == near(sum(F) / 4)
    assert metrics["fipo/influence_weight"] == near(sum(map(math.exp, F)) / 4)
    assert metrics["fipo/safety_keep"] == 1.0
    # W within [1, 1.5], and within [0.8, 1] where ρ = e², e⁴ > 7
    loss, _, metrics = losses(r.view(shape), A, backend, mask.view(shape), cu if packed else None, **knobs,
                              fipo_clip_range=0.5, fipo_safety_threshold=7.0)  # fmt: skip
    W = (1.5, 0, 1.0, 1.0, 1.0)
    want = [w * math.exp(x) * a if w else 0.0 for w, x, a in zip(W, r.tolist(), (1, 1, 1, 1, 2))]
    assert loss.flatten().tolist() == near(*want, 0, 0, 0)
    assert metrics["fipo/influence_weight"] == near((1.5 + 3) / 4)
    assert metrics["fipo/safety_keep"] == near(2 / 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", (127, 128, 129, 300, 641))
@pytest.mark.parametrize("knobs", ({}, {"delta": 1.2}, {"fipo_decay_rate": 500.0}, {"fipo_gamma": 1.0}), ids=str)
def test_long_sequences(knobs, T, backend):
    """Several blocks of tokens: F, W and ℓ against the double sum of the paper, to what rounding explains."""
    g = torch.Generator().manual_seed(T)
    r, A = 0.1 + 0.1 * torch.randn(3, T, generator=g), torch.randn(3, T, generator=g)  # F up to 50
    mask = torch.rand(3, T, generator=g) < 0.8
    mask[1] = False
    r = (r - 8.0) + 8.0  # as the loss will have them
    k = Knobs(**{**FREE, **knobs})
    tokens = Tokens(*(x.double() for x in (r, r - 8.0, torch.full_like(r, -8.0), A)), mask)
    loss, slope, metrics = losses(r, A, backend, mask, **knobs)
    want = term_fipo(tokens, k).where(mask, 0.0)
    assert_within(loss, want, U * (of_fipo(tokens, k).value + 8) * want.abs(), "loss")
    held = slope == 0.0
    assert_within(slope, want.where(~held, 0.0), U * (of_fipo(tokens, k).slope + 8) * want.abs(), "slope")
    F, allowed = future_of(tokens, k).kl[mask], of_future(tokens, k)[mask]
    assert abs(metrics["fipo/future_kl"] - F.mean().item()) <= U * (allowed.mean().item() + 8 * F.abs().mean().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_nan_reaches(backend):
    """A token's own NaN and that of those it leads to; no other sequence, no token after it, nothing that is masked."""
    r = torch.zeros(3, 200)
    r[0, 150], r[1, 150] = NAN, NAN
    mask = torch.ones(3, 200, dtype=torch.bool)
    mask[1, 150] = False
    loss, slope, _ = losses(r, torch.tensor([-1.0, -1.0, -1.0]), backend, mask)
    for x in (loss, slope):
        assert x[0, :151].isnan().all() and x[0, 151:].isfinite().all() and x[1:].isfinite().all()
    flat = r[:2].flatten()
    cu = torch.tensor([0, 150, 200, 400], dtype=torch.int32)  # the NaN is the first token of its sequence
    loss, _, _ = losses(flat, torch.tensor([-1.0, -1.0, -1.0]), backend, mask[:2].flatten(), cu)
    assert loss.isnan().nonzero().tolist() == [[150]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_ratios(backend):
    """W is at its bound before them, and they never meet a factor of 0; δ leaves them out."""
    r = torch.zeros(2, 300)
    r[0, 299], r[1, 299] = INF, -INF
    A = torch.tensor([1.0, 1.0])
    loss, slope, metrics = losses(r, A, backend, fipo_clip_range=0.25, fipo_decay_rate=1.0)
    assert (loss[0, :299] == -1.25).all() and (loss[1, :299] == -1.0).all()
    assert not loss.isnan().any() and not slope.isnan().any() and metrics["fipo/future_kl"] != metrics["fipo/future_kl"]
    loss, _, _ = losses(r, A, backend, fipo_clip_range=0.25, fipo_decay_rate=1.0, delta=3.0)
    assert (loss[0, :299] == -1.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_policy_it_is_clipped(backend):
    """F = 0 and W = 1, to the bit; the loss takes another launch."""
    case = make_case(seed=3)
    kwargs = {**case.inputs("completion_ids", "completion_mask"), "advantages": case.token_advantages}
    out, grad = ours(case.logits, backend, **kwargs, loss_type="fipo")
    want, want_grad = ours(case.logits, backend, **kwargs, loss_type="fipo", policy_term="clipped")
    allowed = bounds(case.logits, **kwargs, loss_type="fipo", policy_term="clipped")
    assert_within(out.loss, want.loss, allowed.loss, "loss", factor=2)
    assert_within(grad, want_grad, allowed.grad, "gradient", factor=2)
    assert out.metrics["fipo/influence_weight"] == 1.0 and out.metrics["fipo/future_kl"] == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_the_policy_term_leaves_out_are_still_followed(backend):
    """A = 0, a weight of 0, a mask by entropy: the policy has moved there all the same; no KL is multiplied."""
    r = torch.full((1, 2), math.log(1.1))
    one, _, _ = losses(r, [[1.0, 1.0]], backend, fipo_gamma=1.0)
    for kwargs in ({"A": [[1.0, 0.0]]}, {"importance_weights": torch.tensor([[1.0, 0.0]], device=DEVICE)}):
        loss, _, _ = losses(r, kwargs.pop("A", [[1.0, 1.0]]), backend, fipo_gamma=1.0, **kwargs)
        assert loss[0, 0] == one[0, 0] and loss[0, 1] == 0.0
    assert one[0, 0].item() == pytest.approx(-(1.1**3), rel=64 * U)
    ref = torch.full((1, 2), -7.0, device=DEVICE)
    loss, _, _ = losses(r, [[0.0, 1.0]], backend, fipo_gamma=1.0, beta=1.0, kl_estimator="k1", ref_logps=ref)
    assert loss[0, 0].item() == pytest.approx(math.log(1.1) - 1.0, rel=64 * U)


def test_the_torch_form_takes_no_square_of_the_length():
    """A million tokens; T·T numbers would be 8 TB."""
    r = torch.zeros(1, 1_000_000)
    r[0, -1] = 1.0
    F = suffix_sums(r, -1 / 32, Batch(r))[0]
    assert F[[-1, -33, -65, 0]].tolist() == pytest.approx([1.0, 0.5, 0.25, 0.0], rel=1e-12)


@interpreted
@pytest.mark.unshifted
def test_the_kernel_reads_each_token_once():
    r = torch.randn(2, 300)
    old = torch.zeros_like(r)
    with launches() as seen:
        policy_loss(r.requires_grad_(), torch.ones(2), old_logps=old, loss_type="fipo", backend="triton")
    first, second = seen[:2]
    assert (first.name, second.name) == ("suffix_kernel", "sequence_kernel") and first.grid == (2,)
    assert (first.reads(r) == 1).all() and (first.reads(old) == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend):
    r = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    found = [losses(r, torch.ones(3), backend) for _ in range(2)]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_values_of_its_knobs():
    c = TERMS["fipo"].coefficients
    assert c(LossConfig(loss_type="fipo"))[4:] == (1.0, 1.2, 4.0, -1 / 32)
    assert c(LossConfig(loss_type="fipo", fipo_clip_range=0.0, fipo_safety_threshold=None))[4:7] == (0.0, INF, INF)
    assert c(LossConfig(loss_type="fipo", fipo_clip_high_only=False, fipo_gamma=0.25))[4:] == (0.8, 1.2, 4.0, -2.0)
    bad = {"fipo_clip_range": -0.1, "fipo_safety_threshold": 0.0, "fipo_decay_rate": 0.0, "fipo_gamma": 1.5}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            LossConfig(loss_type="fipo", **{name: value})
    with pytest.raises(ValueError, match="fipo_gamma is read by fipo, not by 'clipped'"):
        LossConfig(fipo_gamma=0.5)
    with pytest.raises(TypeError, match="fipo_clip_high_only must be True or False"):
        LossConfig(loss_type="fipo", fipo_clip_high_only=1.0)
    with pytest.raises(ValueError, match="'fipo' has no meaning at importance_sampling_level='sequence'"):
        LossConfig(loss_type="fipo", importance_sampling_level="sequence")


def test_a_sequence_is_skipped_for_the_advantages_of_all_its_tokens():
    case = make_case(B=3, seed=4)
    case.completion_mask[:] = True
    A = torch.tensor([[0.0] * 5, [0.0, 1, 0, 0, 0], [1.0] * 5])
    inputs = {**case.inputs("old_logps"), "completion_ids": case.completion_ids.clamp(min=0), "advantages": A}
    out = fused_grpo_loss(case.logits, **inputs, loss_type="fipo", skip_zero_advantage=True)
    assert out.logps.isnan().tolist() == [[True] * 5, [False] * 5, [False] * 5]
