"""Ratio levels, KL estimators and the bias correction, against numbers worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from kl_table import facts_of_kl
from reference import policy_loss
from reference.kl import KL_ESTIMATORS, estimate_kl
from reference.levels import LEVELS
from reference_cases import F64, INF, NAN, TIGHT, f64, grad

# --- Levels -------------------------------------------------------------------------------------------------

# r of four sequences; the second has a gap, the third no token at all. What is masked is 0, as a level gets it.
R = [[0.1, 0.3, 0.5], [-0.4, 0, 0.2], [0, 0, 0], [0.6, 0, 0]]
MASK = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 0, 0]]).bool()


@pytest.mark.parametrize(
    ("level", "value", "share"),  # share: ∂(r̂_0 + 2·r̂_1 + 3·r̂_2)/∂lp_t for the first two sequences
    [
        ("token", R, [[1, 2, 3], [1, 0, 3]]),
        # s = 0.9/3, −0.2/2: (1 + 2 + 3)/3 for each token; the masked one neither gives nor gets: (1 + 3)/2
        ("sequence", [[0.3] * 3, [-0.1, 0, -0.1], [0] * 3, [0.6, 0, 0]], [[2, 2, 2], [2, 0, 2]]),
        ("sequence_token", [[0.3] * 3, [-0.1, 0, -0.1], [0] * 3, [0.6, 0, 0]], [[1, 2, 3], [1, 0, 3]]),
        ("sequence_sum", [[0.9] * 3, [-0.2, 0, -0.2], [0] * 3, [0.6, 0, 0]], [[6, 6, 6], [4, 0, 4]]),
    ],
)
def test_levels_by_hand(level: str, value: list, share: list):
    old = torch.where(MASK, -1.5, 0.0).double()
    lp = (f64(R) + old).requires_grad_()
    masked = torch.where(MASK, lp, 0)
    r = LEVELS[level](masked, old, MASK)
    torch.testing.assert_close(r.detach(), f64(value), **TIGHT)
    slope = grad((r * f64([1, 2, 3])).sum(), lp)
    torch.testing.assert_close(slope[:2], f64(share), **TIGHT)


def test_sequence_token_survives_a_banned_token():
    """−∞ − (−∞) is NaN: the token has no gradient to hand on, but the sequence has a value, 0 as a ratio."""
    lp = f64([[-INF, -1.0]]).requires_grad_()
    r = LEVELS["sequence_token"](lp, f64([[-1.0, -1.0]]), torch.ones(1, 2).bool())
    assert r.tolist() == [[-INF, -INF]]


def loss_of(r: list, A: list, mask: object = None, **knobs: object) -> tuple[Tensor, Tensor]:
    """Σ w·ℓ and its gradient, for log-probs of −1 under the old policy."""
    lp = (f64(r) - 1).requires_grad_()
    out = policy_loss(lp, f64(A), old_logps=torch.full_like(lp, -1), completion_mask=mask, **knobs)
    return out.loss.item(), grad(out.loss, lp)


def test_gspo_by_hand():
    # s = 0.1 and ρ = e^0.1, in the range. A token's share of −A·ρ/B is w·|y|·ρ·A/|y| = ρA/(2·2).
    loss, slope = loss_of([[0.4, -0.2], [0.5, 0.5]], [2, 1], loss_type="gspo")
    rho = math.exp(0.1)
    assert loss == pytest.approx((-2 * rho - 1.2) / 2, rel=1e-12)
    torch.testing.assert_close(slope, f64([[-rho / 2, -rho / 2], [0, 0]]), **TIGHT)
    # An uneven weight is where the two levels part: A per token, 3 and 1, of which each gets the mean, 2.
    _, spread = loss_of([[0.4, -0.2]], [[3, 1]], loss_type="gspo")
    _, local = loss_of([[0.4, -0.2]], [[3, 1]], loss_type="gspo_token")
    torch.testing.assert_close(spread, f64([[-rho, -rho]]), **TIGHT)
    torch.testing.assert_close(local, f64([[-1.5 * rho, -0.5 * rho]]), **TIGHT)


def test_kimi_by_hand():
    # Σr = 0.2: ℓ = −A·lp + ½·0.2² each; their mean has A·1.8/2 + 0.02. Slopes: −A/2, and the square's 0.2.
    loss, slope = loss_of([[0.4, -0.2, 5.0]], [3], torch.tensor([[1, 1, 0]]), loss_type="kimi")
    assert loss == pytest.approx(3 * 0.9 + 0.02, rel=1e-12)
    torch.testing.assert_close(slope, f64([[-1.5 + 0.2, -1.5 + 0.2, 0]]), **TIGHT)


def test_topr_by_hand():
    # The trajectories' ratios are e^0.2, e^−1 and e^−1: 1 for the good one, e^−1 for the bad one it has left.
    loss, slope = loss_of([[0.4, -0.2], [-0.5, -0.5], [-0.5, -0.5]], [2, -2, 3], loss_type="topr")
    e = math.exp(-1)
    assert loss == pytest.approx((2 * 1.8 - 2 * e * 3 + 3 * 3) / 3, rel=1e-12)
    torch.testing.assert_close(slope, f64([[-2 / 3] * 2, [2 * e / 3] * 2, [-1, -1]]), **TIGHT)


def test_cispo_at_sequence_level_has_a_local_gradient():
    # ρ = e^0.1 for both tokens, but lp is each one's own: −ρ·A_t/2.
    _, slope = loss_of([[0.4, -0.2]], [[3, 1]], loss_type="cispo", importance_sampling_level="sequence")
    torch.testing.assert_close(slope, -math.exp(0.1) / 2 * f64([[3, 1]]), **TIGHT)


def test_vespo_by_hand():
    # Σ over unmasked of r held at ±20: 0.4 − 0.2; + log-weights 0.3 and 0.2: w = e^0.7. φ = exp(3 + 1.4 − 3w).
    mask = torch.tensor([[1, 1, 0]])
    phi = math.exp(4.4 - 3 * math.exp(0.7))
    for weights in ([[0.3, 0.2, 9.0]], [[0.5]], [0.5]):
        more = {"importance_weights": f64(weights).exp(), "loss_type": "vespo"}
        for level in ("token", "sequence", "sequence_token", "sequence_sum"):
            loss, slope = loss_of([[0.4, -0.2, 5.0]], [1], mask, importance_sampling_level=level, **more)
            assert loss == pytest.approx(phi * 1.8 / 2, rel=1e-12)
            torch.testing.assert_close(slope, f64([[-phi / 2, -phi / 2, 0]]), **TIGHT)
    # One token at 30 counts 20, and −25 counts −20: w = 1.
    _, slope = loss_of([[30.0, -25.0]], [1], loss_type="vespo")
    torch.testing.assert_close(slope, f64([[-0.5, -0.5]]), **TIGHT)
    # 25 tokens at −1 stop at log 10⁻⁸, and 25 at 1 at 20, where φ is 0.
    _, slope = loss_of([[-1.0] * 25], [1], loss_type="vespo")
    torch.testing.assert_close(slope, torch.full((1, 25), -1e-16 * math.exp(3 - 3e-8) / 25, dtype=F64), **TIGHT)
    assert not loss_of([[1.0] * 25], [1], loss_type="vespo")[1].any()


def test_gmpo_by_hand():
    # δ = 0.2 (held) and −0.4, mean −0.1; the other sequence is e^0.1 at Ā = −1. Mean over both.
    mask = torch.tensor([[1, 1], [1, 0]])
    loss, slope = loss_of([[0.7, -0.4], [0.1, 5.0]], [2, -1], mask, loss_type="gmpo")
    assert loss == pytest.approx((-2 * math.exp(-0.1) + math.exp(0.1)) / 2, rel=1e-12)
    torch.testing.assert_close(slope, f64([[0, -math.exp(-0.1) / 2], [math.exp(0.1) / 2, 0]]), **TIGHT)


@pytest.mark.parametrize(
    ("clamp", "rho", "moves"),  # r̂ = 0.5 at A = −1, where nothing else holds it
    [(None, 0.5, 1), (0.5, 0.5, 1), (0.3, 0.3, 0), ((-1, 0.3), 0.3, 0), ((0.7, 1.0), 0.7, 0), (INF, 0.5, 1)],
)
def test_log_ratio_clamp_by_hand(clamp: object, rho: float, moves: int):
    loss, slope = loss_of([[0.5]], [-1], log_ratio_clamp=clamp)
    assert loss == pytest.approx(math.exp(rho), rel=1e-12)
    assert slope.item() == pytest.approx(moves * math.exp(rho), rel=1e-12)


def test_log_ratio_clamp_is_the_levels():
    # 3 and −2 at the level of the sequence are 0.5, which a clamp of 1 does not touch.
    loss, _ = loss_of([[3.0, -2.0]], [-1], log_ratio_clamp=1.0, importance_sampling_level="sequence")
    assert loss == pytest.approx(math.exp(0.5), rel=1e-12)


# --- KL estimators ------------------------------------------------------------------------------------------

L = math.log(2)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_by_hand(name: str):
    for u, value, slope in facts_of_kl(name).by_hand:
        lp = f64(0.0).requires_grad_()
        kl = estimate_kl(lp, f64(u), name)
        assert kl.item() == pytest.approx(value, rel=1e-12, abs=1e-12), u
        assert grad(kl, lp).item() == pytest.approx(slope, rel=1e-12, abs=1e-12), u


@pytest.mark.parametrize(
    ("name", "u", "clamp", "value", "slope"),
    [
        # e³ − 4 = 16.1 is held at 10; e² − 3 is not.
        ("k3", 3.0, 10.0, 10.0, 0.0),
        ("k3", 2.0, 10.0, math.exp(2) - 3, 1 - math.exp(2)),
        ("k3", INF, 10.0, 10.0, 0.0),
        ("k1", 3.0, 2.0, -2.0, 0.0),
        ("k1", -3.0, 2.0, 2.0, 0.0),
        ("abs", -3.0, 2.0, 2.0, 0.0),
        ("abs", 2.0, 2.0, 2.0, -1.0),  # a bound belongs to the inside
        ("k2", 2.0, 2.0, 2.0, -2.0),
        ("k2", 2.1, 2.0, 2.0, 0.0),
        # u is held at ±20 first, also where the value would have room.
        ("k1", 30.0, 25.0, -20.0, 0.0),
        ("k3", -30.0, 25.0, math.exp(-20) + 19, 0.0),
        ("k3", -20.0, 25.0, math.exp(-20) + 19, 1 - math.exp(-20)),
        # The borrowed gradient is not held.
        ("k3+", 3.0, 10.0, 10.0, -3.0),
        ("k1+", 30.0, 10.0, -10.0, -30.0),
    ],
)
def test_kl_clamp_by_hand(name: str, u: float, clamp: float, value: float, slope: float):
    lp = f64(0.0).requires_grad_()
    kl = estimate_kl(lp, f64(u), name, clamp)
    assert kl.item() == pytest.approx(value, rel=1e-12)
    assert grad(kl, lp).item() == pytest.approx(slope, rel=1e-12)


def test_kl_estimators_estimate_the_kl():
    """E_π[k1] = E_π[k3] = KL(π‖π_ref), and E_π[∂k2] = ∂KL: exact sums over a vocabulary of 5."""
    x, y = torch.randn(2, 5, dtype=F64)
    x.requires_grad_()
    lp, ref = x.log_softmax(0), y.log_softmax(0)
    p = lp.detach().exp()
    kl = (lp.exp() * (lp - ref)).sum()
    dkl = torch.autograd.grad(kl, x, retain_graph=True)[0]
    for name in KL_ESTIMATORS:
        estimate = (p * estimate_kl(lp, ref, name)).sum()
        if name in ("k1", "k3", "k1+", "k3+"):
            torch.testing.assert_close(estimate, kl, **TIGHT)
        if name in ("k2", "k1+", "k3+"):
            torch.testing.assert_close(torch.autograd.grad(estimate, x, retain_graph=True)[0], dkl, **TIGHT)


@pytest.mark.parametrize(
    ("level", "rho", "slopes"),
    # lp = −1 each, r = (0.6, −0.2), u = (ln 2, 0): k3 = 1 − ln 2 and 0, slopes −1 and 0. Weights ½, β = 1, A = 0.
    [
        # ρ(k + k')
        ("token", (math.exp(0.6), math.exp(-0.2)), (-L * math.exp(0.6) / 2, 0.0)),
        ("sequence_token", (math.exp(0.2),) * 2, (-L * math.exp(0.2) / 2, 0.0)),
        # ρ·w·k' of its own, and of Σ w·k·ρ = ½(1 − ln 2)·ρ each gets a half; with sequence_sum all of it.
        ("sequence", (math.exp(0.2),) * 2, (math.exp(0.2) * (-0.5 + (1 - L) / 4), math.exp(0.2) * (1 - L) / 4)),
        ("sequence_sum", (math.exp(0.4),) * 2, (math.exp(0.4) * (-0.5 + (1 - L) / 2), math.exp(0.4) * (1 - L) / 2)),
    ],
)
def test_bias_correction_by_hand(level: str, rho: tuple, slopes: tuple):
    lp = f64([[-1.0, -1.0, NAN]]).requires_grad_()
    out = policy_loss(
        lp,
        f64([0]),
        old_logps=f64([[-1.6, -0.8, NAN]]),
        ref_logps=f64([[-1 + L, -1, NAN]]),
        completion_mask=torch.tensor([[1, 1, 0]]),
        importance_sampling_level=level,
        use_bias_correction_kl=True,
        beta=1.0,
        delta=0.5,  # not for the KL's ρ
    )
    kl = (1 - L) * rho[0]
    torch.testing.assert_close(out.kl, f64([[kl, 0, 0]]), **TIGHT)
    torch.testing.assert_close(out.metrics["kl"], f64(kl / 2), **TIGHT)
    torch.testing.assert_close(out.loss.detach(), f64(kl / 2), **TIGHT)
    torch.testing.assert_close(grad(out.loss, lp), f64([[*slopes, 0]]), **TIGHT)
