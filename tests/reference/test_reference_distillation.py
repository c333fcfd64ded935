"""The reference's distillation losses: numbers by hand, TRL's own function, infinities."""

import math

import pytest
import torch

from reference import TopK, distillation_loss
from reference_cases import NAN, TIGHT, f64, grad

INF = math.inf
BETAS = (0.0, 0.3, 0.5, 1.0)
P, Q = (0.5, 0.3, 0.2), (0.1, 0.3, 0.6)


def logs(*rows):
    """(1, T, V) logits of distributions."""
    return f64([rows]).log().requires_grad_()


def numerically(f, x, eps=1e-6):
    """Gradient of f by central differences."""
    flat, out = x.detach().flatten(), torch.zeros(x.numel(), dtype=torch.float64)
    for i in range(x.numel()):
        step = torch.zeros_like(flat)
        step[i] = eps
        out[i] = (f((flat + step).view(x.shape)) - f((flat - step).view(x.shape))) / (2 * eps)
    return out.view(x.shape)


# --- by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "wanted"),
    [
        (0.0, 0.1 * math.log(0.1 / 0.5) + 0.6 * math.log(0.6 / 0.2)),
        (1.0, 0.5 * math.log(0.5 / 0.1) + 0.2 * math.log(0.2 / 0.6)),
        (  # m = 0.75·p + 0.25·q = (0.4, 0.3, 0.3)
            0.25,
            0.25 * (0.1 * math.log(0.1 / 0.4) + 0.6 * math.log(0.6 / 0.3))
            + 0.75 * (0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.3)),
        ),
    ],
)
def test_divergences_by_hand(beta, wanted):
    out = distillation_loss(logs(P), logs(Q), beta=beta)
    assert out.loss.item() == pytest.approx(wanted, rel=1e-12)
    assert out.metrics["entropy"].item() == pytest.approx(-sum(p * math.log(p) for p in P), rel=1e-12)
    assert out.metrics["teacher_entropy"].item() == pytest.approx(-sum(q * math.log(q) for q in Q), rel=1e-12)


def test_gradients_by_hand():
    """Forward p − q; reverse p·(log p − log q − KL)."""
    x = logs(P)
    forward = distillation_loss(x, logs(Q), beta=0.0).loss
    torch.testing.assert_close(grad(forward, x), f64([[[0.4, 0.0, -0.4]]]), **TIGHT)
    kl = 0.5 * math.log(5) + 0.2 * math.log(1 / 3)
    wanted = [[[0.5 * (math.log(5) - kl), 0.3 * (0 - kl), 0.2 * (math.log(1 / 3) - kl)]]]
    torch.testing.assert_close(grad(distillation_loss(x, logs(Q), beta=1.0).loss, x), f64(wanted), **TIGHT)


def test_temperature_divides_both_and_no_square_of_it_is_made_up_for():
    x = logs(P)
    out = distillation_loss(2.0 * x, 2.0 * logs(Q), beta=0.0, temperature=2.0)
    torch.testing.assert_close(out.loss, distillation_loss(x, logs(Q), beta=0.0).loss, **TIGHT)
    torch.testing.assert_close(grad(out.loss, x), f64([[[0.4, 0.0, -0.4]]]), **TIGHT)  # 2 · ½


def test_equal_models_are_at_distance_zero():
    for beta in BETAS:
        x = logs(P, Q)
        out = distillation_loss(x, x.detach(), beta=beta)
        assert out.loss.abs() < 1e-15 and grad(out.loss, x).abs().max() < 1e-15


def test_the_mixture_tends_to_zero_and_not_to_the_kl():
    near, at = (distillation_loss(logs(P), logs(Q), beta=b).loss.item() for b in (1e-6, 0.0))
    assert near < 1e-5 < at


TOP = TopK(torch.tensor([[[2, 0]]]), f64([[[0.6, 0.1]]]).log())


@pytest.mark.parametrize(
    ("tail", "wanted"),
    [
        (True, 0.6 * math.log(0.6 / 0.2) + 0.1 * math.log(0.1 / 0.5) + 0.3 * math.log(0.3 / 0.3)),
        (False, 6 / 7 * math.log((6 / 7) / (2 / 7)) + 1 / 7 * math.log((1 / 7) / (5 / 7))),
        (None, 0.6 * math.log(0.6 / 0.2) + 0.1 * math.log(0.1 / 0.5)),
    ],
    ids=str,
)
def test_two_tokens_by_hand(tail, wanted):
    assert distillation_loss(logs(P), TOP, beta=0.0, tail=tail).loss.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("tail", "wanted"),
    [
        (True, [-0.1 + 0.5, 0.3 * (-0.3 / 0.3 + 1), -0.6 + 0.2]),
        (False, [-1 / 7 + 5 / 7, 0.0, -6 / 7 + 2 / 7]),
        (None, [-0.1 + 0.5 * 0.7, 0.3 * 0.7, -0.6 + 0.2 * 0.7]),
    ],
    ids=str,
)
def test_gradients_of_two_tokens_by_hand(tail, wanted):
    x = logs(P)
    torch.testing.assert_close(grad(distillation_loss(x, TOP, beta=0.0, tail=tail).loss, x), f64([[wanted]]), **TIGHT)


@pytest.mark.parametrize("beta", BETAS)
def test_all_tokens_are_the_whole_teacher(beta):
    x, z = logs(P, Q), logs(Q, (0.2, 0.7, 0.1))
    every = TopK(torch.tensor([[[1, 2, 0, -1]] * 2]), z.detach()[..., [1, 2, 0, 0]].where(f64([1, 1, 1, 0]) > 0, NAN))
    whole = distillation_loss(x, z, beta=beta).loss
    whole_grad = grad(whole, x)
    for tail in (False, None):
        some = distillation_loss(x, every, beta=beta, tail=tail).loss
        torch.testing.assert_close(some, whole, **TIGHT)
        torch.testing.assert_close(grad(some, x), whole_grad, **TIGHT)


# --- derivatives -----------------------------------------------------------------------------------


def random_pair(B=3, T=4, V=9):
    g = torch.Generator().manual_seed(1)
    x, z = (1.5 * torch.randn(B, T, V, generator=g, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), z


def topk_of(z, K, temperature=1.0):
    logps, ids = torch.log_softmax(z / temperature, -1).topk(K)
    return TopK(ids, logps)


@pytest.mark.parametrize("teacher", ("whole", True, False, None), ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_the_derivative(beta, teacher):
    x, z = random_pair()
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    kwargs = dict(beta=beta, temperature=1.7, completion_mask=mask, loss_agg_mode="sequence-mean", loss_scale=0.5)
    if teacher != "whole":
        kwargs["tail"], z = teacher, topk_of(z, 4, 1.7)

    def loss(y):
        return distillation_loss(y, z, **kwargs).loss

    torch.testing.assert_close(grad(loss(x), x), numerically(loss, x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("beta", BETAS)
def test_the_closed_form_by_outcome(beta):
    """c_j − p_j·Σc, where c is −q, p·(log p − log q) or (1−β)·p·(log p − log m)."""
    x, z = random_pair()
    lp, lq = torch.log_softmax(x, -1), torch.log_softmax(z, -1)
    p, q = lp.exp(), lq.exp()
    m = (1 - beta) * p + beta * q
    c = -q if beta == 0 else p * (lp - lq) if beta == 1 else (1 - beta) * p * (lp - m.log())
    got = grad(distillation_loss(x, z, beta=beta, loss_agg_mode="token-sum").loss, x)
    torch.testing.assert_close(got, (c - p * c.sum(-1, keepdim=True)).detach(), **TIGHT)


# --- infinities ------------------------------------------------------------------------------------


def banned(x, *places):
    x = x.detach().clone()
    for place in places:
        x[place] = -INF
    return x.requires_grad_()


def test_what_the_student_cannot_say_is_infinitely_far_in_the_forward_kl_with_a_finite_gradient():
    x = banned(logs(P, P), (0, 0, 0))
    out = distillation_loss(x, logs(Q, Q), beta=0.0, reduction="none")
    assert out.loss[0, 0] == INF and out.loss[0, 1].isfinite()
    wanted = f64([[[0.0 - 0.1, 0.6 - 0.3, 0.4 - 0.6], [0.4, 0.0, -0.4]]])
    torch.testing.assert_close(grad(out.loss.sum(), x), wanted, **TIGHT)


def test_what_the_teacher_cannot_say_adds_nothing_to_the_forward_kl():
    x = logs(P)
    out = distillation_loss(x, banned(logs(Q), (0, 0, 0)), beta=0.0)
    assert out.loss.item() == pytest.approx(1 / 3 * math.log(1 / 0.9) + 2 / 3 * math.log(2 / 3 / 0.2), rel=1e-12)
    torch.testing.assert_close(grad(out.loss, x), f64([[[0.5, 0.3 - 1 / 3, 0.2 - 2 / 3]]]), **TIGHT)


def test_what_the_teacher_cannot_say_makes_the_reverse_kl_infinite_and_its_gradient_row_nan():
    x = logs(P, P)
    out = distillation_loss(x, banned(logs(Q, Q), (0, 0, 0)), beta=1.0, reduction="none")
    assert out.loss[0, 0] == INF and out.loss[0, 1].isfinite()
    got = grad(out.loss.sum(), x)
    assert got[0, 0].isnan().all() and got[0, 1].isfinite().all()


@pytest.mark.parametrize("beta", (0.3, 0.5, 1.0))
def test_what_neither_can_say_adds_nothing(beta):
    keep = f64([1, 1, 0, 1]).bool()
    x, z = logs((*P, 0.1)), logs((*Q, 0.2))
    few = x[..., keep].detach().requires_grad_()
    want = distillation_loss(few, z[..., keep], beta=beta).loss
    x = banned(x, (0, 0, 2))
    out = distillation_loss(x, banned(z, (0, 0, 2)), beta=beta)
    torch.testing.assert_close(out.loss, want, **TIGHT)
    got = grad(out.loss, x)
    assert got[0, 0, 2] == 0
    torch.testing.assert_close(got[..., keep], grad(want, few), **TIGHT)


@pytest.mark.parametrize("of", ("student", "teacher"))
def test_between_everything_is_finite(of):
    x, z = logs(P), logs(Q)
    if of == "student":
        x = banned(x, (0, 0, 0))
    else:
        z = banned(z, (0, 0, 0))
    out = distillation_loss(x, z, beta=0.5)
    assert out.loss.isfinite() and grad(out.loss, x).isfinite().all()


def test_a_share_of_one_is_clamped_without_a_gradient_of_the_rest():
    """Both tokens have everything: the rest is taken to be 1e-7, and is constant."""
    x = f64([[[0.3, 0.0, -80.0]]]).requires_grad_()
    out = distillation_loss(x, TopK(torch.tensor([[[0, 1]]]), f64([[[0.5, 0.5]]]).log()), beta=1.0)
    p = x.detach().softmax(-1)[0, 0]
    wanted = p[:2] * (2 * p[:2]).log()
    assert out.loss.item() == pytest.approx(wanted.sum().item(), rel=1e-9)
    c = wanted + p[:2]
    torch.testing.assert_close(grad(out.loss, x)[0, 0, :2], c - p[:2] * c.sum(), **TIGHT)


def test_the_rest_is_at_least_1e_7():
    x = f64([[[0.0, 0.0, -80.0]]]).requires_grad_()
    out = distillation_loss(x, TopK(torch.tensor([[[0, 1]]]), f64([[[0.5, 0.4]]]).log()), beta=0.0)
    assert out.loss.item() == pytest.approx(0.4 * math.log(0.8) + 0.1 * math.log(0.1 / 1e-7), rel=1e-6)


@pytest.mark.parametrize("tail", (True, False, None), ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_a_row_without_a_token_is_at_distance_zero(beta, tail):
    x = logs(P, P)
    top = TopK(torch.tensor([[[-1, -100], [0, 1]]]), f64([[[-1.0, -1.0], [-1.0, -1.0]]]))
    out = distillation_loss(x, top, beta=beta, tail=tail, reduction="none")
    got = grad(out.loss.sum(), x)
    assert abs(out.loss[0, 0]) < 1e-15 and got[0, 0].abs().max() < 1e-15 and got[0, 1].abs().max() > 0


def test_masked_rows_may_hold_anything():
    x, z = logs(P, P), logs(Q, Q)
    mask = torch.tensor([[1, 0]])
    with torch.no_grad():
        x[0, 1], z[0, 1] = NAN, NAN
    for beta in BETAS:
        out = distillation_loss(x, z, beta=beta, completion_mask=mask)
        assert out.loss.isfinite() and (grad(out.loss, x)[0, 1] == 0).all()
    top = TopK(torch.tensor([[[0], [10**6]]]), f64([[[-1.0], [NAN]]]))
    assert grad(distillation_loss(x, top, completion_mask=mask).loss, x)[0, 1].eq(0).all()


# --- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ("global-tokens", "sequence-mean", "seq-mean-token-sum", "batch-tokens"))
@pytest.mark.parametrize("tail", ("whole", True), ids=str)
def test_packed_input_gives_what_padded_input_gives(mode, tail):
    x, z = random_pair()
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    kwargs = {"loss_agg_mode": mode, "beta": 0.3, "num_items_in_batch": 7}
    teacher = z if tail == "whole" else topk_of(z, 3)
    padded = distillation_loss(x, teacher, completion_mask=mask, **kwargs)
    flat = teacher[mask] if tail == "whole" else TopK(*(y[mask] for y in teacher))
    packed = distillation_loss(x[mask], flat, cu_seqlens=torch.tensor([0, 4, 6, 9]), **kwargs)
    torch.testing.assert_close(packed.loss, padded.loss, **TIGHT)
    torch.testing.assert_close(grad(packed.loss, x), grad(padded.loss, x), **TIGHT)
    torch.testing.assert_close(packed.divergence, padded.divergence[mask], **TIGHT)


def test_the_last_position_of_a_causal_model_is_ignored():
    x, z = random_pair()
    mask = torch.ones(3, 3)
    want = distillation_loss(x[:, :3], z[:, :3], completion_mask=mask)
    got = distillation_loss(x, z, completion_mask=mask)
    assert torch.equal(got.loss, want.loss) and torch.equal(grad(got.loss, x), grad(want.loss, x))


# --- TRL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", (None, 5.0))
@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("beta", BETAS)
def test_parity_with_trl(beta, temperature, softcap):
    """`ChunkedDivergenceFunction` with heads that are the unit matrix: hidden states are logits; it works in fp32."""
    chunked = pytest.importorskip("trl.kernels.chunked_divergence", reason="parity with TRL needs trl 1.16")
    x, z = random_pair()
    N, V = 12, 9
    up = torch.linspace(0.5, 1.5, N)
    h = x.detach().float().view(N, V).requires_grad_()
    eye = torch.eye(V)
    theirs, entropy = chunked.ChunkedDivergenceFunction.apply(
        h, eye, None, z.float().view(N, V), eye, None, beta, temperature, 1.0, softcap, 1.0, softcap
    )
    (their_grad,) = torch.autograd.grad((theirs * up).sum(), h)
    cap = (lambda y: y) if softcap is None else (lambda y: softcap * torch.tanh(y / softcap))
    out = distillation_loss(cap(x), cap(z), beta=beta, temperature=temperature, reduction="none")
    our_grad = grad((out.loss.view(N) * up.double()).sum(), x).view(N, V)
    fp32 = {"rtol": 0, "atol": 64 * 2.0**-24 * 8}  # logits below 8, 64 roundings
    torch.testing.assert_close(out.loss.view(N), theirs.double(), **fp32)
    torch.testing.assert_close(our_grad, their_grad.double(), **fp32)
    torch.testing.assert_close(out.entropy.view(N), entropy.double(), **fp32)


@pytest.mark.parametrize("wrong", ({"beta": 1.5}, {"reduction": "sum"}, {"loss_agg_mode": "mean"}))
def test_unknown_choices_raise(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        distillation_loss(logs(P), logs(Q), **wrong)
