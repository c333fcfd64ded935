"""Every policy term, for one token, against numbers worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from reference import Knobs
from reference.terms import Tokens, policy_term
from reference_cases import INF, NAN, f64, grad
from term_table import Row, facts, rows_by_hand

L = math.log(2)


def one_token(
    rho: float, A: float, p: float = 0.5, p_old: float | None = None, weight: float | None = None,
    after: tuple[float, ...] = (), **knobs: object
) -> tuple[float, float, float]:
    """ℓ, ∂ℓ/∂r̂ and ∂ℓ/∂lp of the first token of a sequence, as if ρ and the probabilities were independent.

    after: log ratios of the tokens that follow, which may say something of the first one.
    """
    more, mask = f64([after]).reshape(1, -1), torch.ones(1, 1 + len(after), dtype=torch.bool)
    r = torch.cat([f64([[rho]]).log(), more], 1).requires_grad_()
    lp = torch.cat([f64([[p]]).log(), more - 1], 1).requires_grad_()
    first = lp.detach()[:, :1] if p_old is None else f64([[p_old]]).log()
    old = torch.cat([first, torch.full_like(more, -1)], 1)
    weights = None if weight is None else f64([[weight]])
    tokens = Tokens(r, lp, old, f64([[A]]).expand(mask.shape), mask, weights)
    loss = policy_term(tokens, Knobs(**knobs))[0, 0]
    slopes = torch.autograd.grad(loss, (r, lp), allow_unused=True)
    return loss.item(), *(0.0 if slope is None else slope[0, 0].item() for slope in slopes)


def assert_is(got: tuple[float, ...], *expected: float) -> None:
    assert got == pytest.approx(expected, rel=1e-12, abs=0)


# --- Every term, by the numbers that the package is held to -------------------------------------------------


@pytest.mark.parametrize(("term", "row"), rows_by_hand())
def test_terms_by_hand(term: str, row: Row):
    p, p_old = math.exp(row.lp), math.exp(row.old)
    got = one_token(p / p_old, row.A, p, p_old, after=row.after, policy_term=term, **row.knobs)
    loss, by_r, by_lp = row.want
    if facts(term).of_sequence:  # its ratio is that of lp
        by_r, by_lp = 0.0, by_r + by_lp
    assert got == pytest.approx((loss, by_r, by_lp), rel=1e-12, abs=1e-12)


# --- Clipped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "A", "knobs", "loss", "slope"),
    [
        # Inside the range both arguments are ρA, and the gradient is −ρA.
        (1.0, 2.0, {}, -2.0, -2.0),
        (1.1, -3.0, {}, 3.3, 3.3),
        # Moved far enough in the direction of the advantage: the clip holds.
        (2.0, 1.0, {}, -1.2, 0.0),
        (0.5, -1.0, {}, 0.8, 0.0),
        # Moved against it: ρA is the smaller one, the gradient pulls back.
        (2.0, -1.0, {}, 2.0, 2.0),
        (0.5, 1.0, {}, -0.5, -0.5),
        # Clip higher: the upper bound is its own, 1.28.
        (1.25, 1.0, {"epsilon_high": 0.28}, -1.25, -1.25),
        (1.5, 1.0, {"epsilon_high": 0.28}, -1.28, 0.0),
        (0.75, -1.0, {"epsilon_high": 0.28}, 0.8, 0.0),
        # δ caps the unbounded side only: A < 0. min(4·−1, 1.2·−1) = −4.
        (3.0, -1.0, {"delta": 4.0}, 3.0, 3.0),
        (5.0, -1.0, {"delta": 4.0}, 4.0, 0.0),
        (5.0, 1.0, {"delta": 4.0}, -1.2, 0.0),
        # δ = 1.1 below 1 + ε_h = 1.2. A < 0, ρ = 1.15: min(−1.1, −1.15) takes the clip, which is inside.
        (1.15, -1.0, {"delta": 1.1}, 1.15, 1.15),
        # A > 0: min(1.1, 1.15) takes the capped one. ρ = 2: min(−1.1, −1.2) takes the clip, which holds.
        (1.15, 1.0, {"delta": 1.1}, -1.1, 0.0),
        (2.0, -1.0, {"delta": 1.1}, 1.2, 0.0),
        (2.0, 1.0, {"delta": 1.1}, -1.1, 0.0),
        # The dual clip: at A < 0 a token costs at most 3·|A|, and is then left alone.
        (2.5, -2.0, {"dual_clip": 3.0}, 5.0, 5.0),
        (5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),
        (5.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0),
        (0.1, 2.0, {"dual_clip": 3.0}, -0.2, -0.2),
        # With δ = 4 as well c binds first; δ = 2.5 comes before it.
        (5.0, -1.0, {"dual_clip": 3.0, "delta": 4.0}, 3.0, 0.0),
        (5.0, -1.0, {"dual_clip": 3.0, "delta": 2.5}, 2.5, 0.0),
        # A = 0 is silence at any ratio.
        (2.0, 0.0, {}, 0.0, 0.0),
        (INF, 0.0, {}, 0.0, 0.0),
        (0.0, 0.0, {}, 0.0, 0.0),
        (NAN, 0.0, {}, 0.0, 0.0),
        # A ratio that overflows is held like any other, and 0·∞ does not get into the gradient.
        (INF, 1.0, {}, -1.2, 0.0),
        (INF, -1.0, {"delta": 4.0}, 4.0, 0.0),
        (INF, -1.0, {"dual_clip": 3.0}, 3.0, 0.0),
        (0.0, -1.0, {}, 0.8, 0.0),
    ],
)
def test_clipped_by_hand(rho: float, A: float, knobs: dict, loss: float, slope: float):
    assert_is(one_token(rho, A, **knobs), loss, slope, 0.0)


@pytest.mark.parametrize(
    ("which", "A", "r"),
    [
        *[(which, A, r) for which in ("bound", "delta") for A in (1.0, -1.0) for r in (0.25, -0.25)],
        *[("bound beyond delta", -1.0, 0.25), ("bound beyond delta", -1.0, -0.25), ("dual", -1.0, 0.25)],
    ],
)
def test_bounds_are_closed(A: float, r: float, which: str):
    """A ratio exactly on a bound still moves. ρ ∈ [½, 2], so ρ − 1 is exact and the bound is ρ to the bit."""
    rho = f64(r).exp().item()
    if which == "delta":
        knobs = {"epsilon": 0.9, "delta": rho}
    elif which == "dual":
        knobs = {"epsilon": 0.1, "dual_clip": rho}
    else:
        knobs = {"epsilon": 1 - rho} if r < 0 else {"epsilon": 0.1, "epsilon_high": rho - 1}
    if which == "bound beyond delta":
        knobs["delta"] = 0.9 * rho
    assert at_log_ratio(r, A, **knobs) == (-A * rho, -A * rho)


def at_log_ratio(r: float, A: float, **knobs: object) -> tuple[float, float]:
    """As `one_token`, for a ratio that is given to the bit."""
    x, zero = f64([[r]]).requires_grad_(), torch.zeros(1, 1, dtype=torch.float64)
    loss = policy_term(Tokens(x, zero, zero, f64([[A]]), zero == 0), Knobs(**knobs))
    return loss.item(), grad(loss.sum(), x).item()


def test_nan_ratio_is_passed_on():
    assert all(math.isnan(x) for x in at_log_ratio(NAN, 1.0))


# --- The policy gradient and its weights --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "rho", "A", "knobs", "loss", "slope"),  # lp = −ln 2; the slope is ∂ℓ/∂lp
    [
        # −A·lp
        ("reinforce", 7.0, 2.0, {}, 2 * L, -2.0),
        ("reinforce", INF, -3.0, {}, -3 * L, 3.0),
        # −clip(ρ)·A·lp: the clip stops at cispo_max = 5 and has no lower end.
        ("cispo", 3.0, 2.0, {}, 6 * L, -6.0),
        ("cispo", 8.0, 2.0, {}, 10 * L, -10.0),
        ("cispo", 8.0, -2.0, {}, -10 * L, 10.0),
        ("cispo", 0.25, -1.0, {}, -0.25 * L, 0.25),
        ("cispo", 0.25, -1.0, {"cispo_min": 0.5}, -0.5 * L, 0.5),
        ("cispo", 1.5, 1.0, {"cispo_min": 0.5, "cispo_max": 1.25}, 1.25 * L, -1.25),
        ("cispo", 8.0, 2.0, {"cispo_max": None}, 16 * L, -16.0),
        ("cispo", INF, 1.0, {}, 5 * L, -5.0),
        ("cispo", INF, 0.0, {"cispo_max": None}, 0.0, 0.0),
        # Good samples count 1, bad ones min(ρ, 1).
        ("topr", 3.0, 2.0, {}, 2 * L, -2.0),
        ("topr", 0.25, 2.0, {}, 2 * L, -2.0),
        ("topr", 3.0, -2.0, {}, -2 * L, 2.0),
        ("topr", 0.25, -2.0, {}, -0.5 * L, 0.5),
        ("topr", INF, -2.0, {}, -2 * L, 2.0),
        ("topr", NAN, 0.0, {}, 0.0, 0.0),
    ],
)
def test_weighted_policy_gradients_by_hand(
    loss_type: str, rho: float, A: float, knobs: dict, loss: float, slope: float
):
    assert_is(one_token(rho, A, loss_type=loss_type, **knobs), loss, 0.0, slope)


@pytest.mark.parametrize(
    ("loss_type", "p", "p_old", "A", "knobs", "weight"),  # ℓ = −A·weight·lp
    [
        # tv: p − p_old = ±¼ against ε = 0.2. It holds p only where p has gone A's way.
        ("dppo_tv", 0.5, 0.25, 1.0, {}, 0.0),
        ("dppo_tv", 0.5, 0.25, 1.0, {"epsilon_high": 0.3}, 2.0),
        ("dppo_tv", 0.5, 0.25, 1.0, {"epsilon": 0.3, "epsilon_high": 0.2}, 0.0),
        ("dppo_tv", 0.5, 0.25, -1.0, {}, 2.0),
        ("dppo_tv", 0.25, 0.5, -1.0, {}, 0.0),
        ("dppo_tv", 0.25, 0.5, -1.0, {"epsilon": 0.3, "epsilon_high": 0.1}, 0.5),
        ("dppo_tv", 0.25, 0.5, 1.0, {}, 0.5),
        # A rare token may grow 30-fold: ρ is capped at 20, or at dual_clip.
        ("dppo_tv", 0.15, 0.005, 1.0, {}, 20.0),
        ("dppo_tv", 0.15, 0.005, -1.0, {}, 20.0),
        ("dppo_tv", 0.15, 0.005, 1.0, {"dual_clip": 3.0}, 3.0),
        # kl, p_old = ¼, p = ½: κ = −¼·ln 2 + ¾·ln 1.5 = 0.131.
        ("dppo_kl", 0.5, 0.25, 1.0, {}, 2.0),
        ("dppo_kl", 0.5, 0.25, 1.0, {"epsilon": 0.125}, 0.0),
        ("dppo_kl", 0.5, 0.25, 1.0, {"epsilon": 0.125, "epsilon_high": 0.135}, 2.0),
        ("dppo_kl", 0.5, 0.25, -1.0, {"epsilon": 0.1}, 2.0),
        # p_old = ½, p = ¼: κ = ½·ln 2 − ½·ln 1.5 = 0.144.
        ("dppo_kl", 0.25, 0.5, -1.0, {}, 0.5),
        ("dppo_kl", 0.25, 0.5, -1.0, {"epsilon": 0.14, "epsilon_high": 0.2}, 0.0),
        ("dppo_kl", 0.25, 0.5, -1.0, {"epsilon": 0.15, "epsilon_high": 0.1}, 0.5),
        ("dppo_kl", 0.25, 0.5, 1.0, {"epsilon": 0.1}, 0.5),
        # κ = −0.005·ln 30 + 0.995·ln(0.995/0.85) = 0.140
        ("dppo_kl", 0.15, 0.005, 1.0, {}, 20.0),
        ("dppo_kl", 0.15, 0.005, 1.0, {"dual_clip": 4.0}, 4.0),
        ("dppo_kl", 0.15, 0.005, 0.0, {}, 0.0),
    ],
)
def test_dppo_by_hand(loss_type: str, p: float, p_old: float, A: float, knobs: dict, weight: float):
    got = one_token(p / p_old, A, p, p_old, loss_type=loss_type, **knobs)
    assert_is(got, -A * weight * math.log(p), 0.0, -A * weight)


@pytest.mark.parametrize(
    ("p", "p_old", "weight", "A", "knobs", "phi"),
    [
        # w = 2: A ≥ 0 has k = 2, λ = 3: φ = e³·2²·e⁻⁶; A < 0 has k = 3, λ = 2: φ = e²·2³·e⁻⁴.
        (0.5, 0.25, None, 1.0, {}, 4 * math.exp(-3)),
        (0.5, 0.25, None, -1.0, {}, 8 * math.exp(-2)),
        # w = ½: e³·¼·e^−1.5 and e²·⅛·e⁻¹
        (0.25, 0.5, None, 1.0, {}, math.exp(1.5) / 4),
        (0.25, 0.5, None, -1.0, {}, math.exp(1) / 8),
        # The weight ½ brings w back to 1, where φ = 1.
        (0.5, 0.25, 0.5, 1.0, {}, 1.0),
        (0.5, 0.25, 0.5, -1.0, {}, 1.0),
        (0.5, 0.25, None, 1.0, {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5}, 2 * math.exp(-0.5)),
        (0.5, 0.25, None, -1.0, {"vespo_k_neg": 1.0, "vespo_lambda_neg": 0.5}, 2 * math.exp(-0.5)),
        # λ is at least 10⁻⁴.
        (0.5, 0.25, None, 1.0, {"vespo_lambda_pos": 0.0}, 4 * math.exp(-1e-4)),
        # A weight 0 is 10⁻⁸, and so is all of w: 2·10⁻⁸ times it would be, but for its own bound.
        (0.5, 0.5, 0.0, 1.0, {}, 1e-16 * math.exp(3 - 3e-8)),
        (0.25, 0.5, 0.0, 1.0, {}, 1e-16 * math.exp(3 - 3e-8)),
        # w = e²⁰ is far beyond: φ = 0.
        (0.5, 0.5, 1e300, 1.0, {}, 0.0),
        # r is held at 20 before the weight is added: e²⁰·10⁻⁸ = 4.85.
        (0.5, 1e-30, 0.0, 1.0, {"vespo_lambda_pos": 1.0}, None),
    ],
)
def test_vespo_by_hand(p: float, p_old: float, weight: float | None, A: float, knobs: dict, phi: float | None):
    if phi is None:
        w = math.exp(20) * 1e-8
        phi = math.exp(1 - w) * w**2
    got = one_token(NAN, A, p, p_old, weight, loss_type="vespo", **knobs)  # whatever ρ is: φ has its own
    assert got == pytest.approx((-A * phi * math.log(p), 0.0, -A * phi), rel=1e-12, abs=0)


# --- Other shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "A", "knobs", "loss", "slope"),
    [
        # At ρ = 1 the gate is ½·4/τ, and its slope is τ's whatever τ: −A.
        (1.0, 1.0, {}, -2.0, -1.0),
        (1.0, -1.0, {}, 2 / 1.05, 1.0),
        (1.0, 3.0, {"sapo_temperature_pos": 2.0}, -3.0, -3.0),
        # τ(ρ−1) = ln 3: σ = ¾, σ' = 3/16. ℓ = −A·3/τ, slope −4A·ρ·3/16.
        (1 + math.log(3), 2.0, {}, -6.0, -1.5 * (1 + math.log(3))),
        (1 + math.log(3) / 2, -1.0, {"sapo_temperature_neg": 2.0}, 1.5, 0.75 * (1 + math.log(3) / 2)),
        # The ends: σ(−τ) at ρ = 0, and 1 at ∞, where the gate no longer moves.
        (0.0, 1.0, {}, -4 / (1 + math.e), 0.0),
        (INF, 1.0, {}, -4.0, 0.0),
        (1e300, 1.0, {}, -4.0, 0.0),
        (INF, -1.0, {"sapo_temperature_neg": 2.0}, 2.0, 0.0),
        (INF, 0.0, {}, 0.0, 0.0),
    ],
)
def test_sapo_by_hand(rho: float, A: float, knobs: dict, loss: float, slope: float):
    assert_is(one_token(rho, A, loss_type="sapo", **knobs), loss, slope, 0.0)


@pytest.mark.parametrize(
    ("r", "A", "knobs", "loss", "dr", "dlp"),
    [
        # −A·lp + ½·β·r̂², lp = −ln 2. The spring pulls where A = 0 too.
        (0.5, 2.0, {}, 2 * L + 0.125, 0.5, -2.0),
        (-0.5, -2.0, {"dro_beta": 4.0}, -2 * L + 0.5, -2.0, 2.0),
        (0.5, 0.0, {}, 0.125, 0.5, 0.0),
        (0.0, 1.0, {}, L, 0.0, -1.0),
    ],
)
def test_dro_by_hand(r: float, A: float, knobs: dict, loss: float, dr: float, dlp: float):
    assert_is(one_token(math.exp(r), A, loss_type="dro", **knobs), loss, dr, dlp)


def gmpo(r: list[float], A: list[float], weights: Tensor | None = None, **knobs: float) -> tuple[Tensor, Tensor]:
    """Losses of one sequence whose last token is masked, and the gradient of their mean over its tokens."""
    lp = f64([r]).requires_grad_()
    mask = torch.ones(1, len(r), dtype=torch.bool)
    mask[0, -1] = False
    zero = torch.zeros_like(lp)
    tokens = Tokens(lp.detach(), torch.where(mask, lp, 0), zero, torch.where(mask, f64([A]), 0), mask, weights)
    loss = policy_term(tokens, Knobs(loss_type="gmpo", **knobs))[0]
    return loss.detach(), grad(loss.sum() / (len(r) - 1), lp)[0]


@pytest.mark.parametrize(
    ("r", "A", "knobs", "G", "moves"),
    [
        # A > 0 clips r from above at ε_h: δ = 0.1, 0.2, −0.6: mean −0.1. The second token is held.
        ([0.1, 0.5, -0.6, 9], [2, 2, 2, 7], {}, math.exp(-0.1), [1, 0, 1]),
        ([0.1, 0.5, -0.6, 9], [2, 2, 2, 7], {"epsilon_high": 0.4}, math.exp(-0.1 / 3), [1, 0, 1]),
        # A < 0 clips from below at −ε_l: δ = 0.1, 0.5, −0.3: mean 0.1.
        ([0.1, 0.5, -0.6, 9], [-2, -2, -2, 7], {"epsilon": 0.3, "epsilon_high": 0.1}, math.exp(0.1), [1, 1, 0]),
        # Each token is clipped on its own side; A = 0 has δ = 0 and no loss, but counts as a token.
        ([0.5, -0.5, 0.7, 9], [1, -1, 0, 7], {}, 1.0, [0, 0, 0]),
        ([-0.5, 0.8, 0.7, 9], [1, -1, 0, 7], {}, math.exp(0.1), [1, 1, 0]),
        # The bounds belong to the inside.
        ([0.2, -0.2, 0.0, 9], [1, -1, 1, 7], {}, 1.0, [1, 1, 1]),
    ],
)
def test_gmpo_by_hand(r: list, A: list, knobs: dict, G: float, moves: list):
    loss, slope = gmpo(r, A, **knobs)
    expected = [-a * G for a in A[:3]] + [0.0]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    # ∂(−Ā·G)/∂r_t = −Ā·G/|y| where δ_t moves, with Ā the mean advantage
    mean = -sum(A[:3]) / 3 * G / 3
    assert slope.tolist() == pytest.approx([mean * move for move in moves] + [0.0], rel=1e-12, abs=1e-16)


def test_gmpo_takes_importance_weights_by_their_geometric_mean():
    plain, slope = gmpo([0.1, 0.5, -0.6, 9], [2, 2, 2, 7])
    # (2·4·1)^⅓ = 2, whatever the masked one is; one weight per sequence is its own mean.
    for weights in (f64([[2, 4, 1, NAN]]), f64([[2]])):
        loss, weighted_slope = gmpo([0.1, 0.5, -0.6, 9], [2, 2, 2, 7], weights)
        torch.testing.assert_close(loss, 2 * plain)
        torch.testing.assert_close(weighted_slope, 2 * slope)


def test_gmpo_is_silent_where_the_advantage_is_zero():
    # The second token carries the sequence to ∞; the first has no say in it.
    loss, slope = gmpo([0.1, 2000.0, 0.0, 9], [0, -1, 1, 7])
    assert loss[0] == 0 and slope[0] == 0
