"""Terms and KL estimators: hand-worked numbers, and both derivatives against float64 autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kernels import LossConfig
from grpo_kernels.objective.catalogue import KL_ESTIMATORS, TERMS
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.terms import Clip, Gmpo, Vespo, clipped, clipped_region, gmpo_statistic, vespo_phi
from grpo_kernels.objective.token import Limits, limited_ratio, log_ratio, token_objective, weight
from reference.kl import estimate_kl
from reference.knobs import Knobs
from reference.terms import Tokens, policy_term

INF, E = math.inf, math.e
NONE = Limits(-INF, INF, INF, INF)
OWN = tuple(name for name, term in TERMS.items() if term.statistic is not None)


@pytest.fixture(autouse=True)
def double_precision():
    """A choice between two coefficients has torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at(term: str, rho: float, A: float, *, lp: float = -1.0, old: float | None = None, **knobs) -> tuple[float, ...]:
    """(ℓ, ∂ℓ/∂r, ∂ℓ/∂lp) of a term at a ratio, which is that of lp and old unless both are given."""
    entry = TERMS[term]
    old = lp - math.log(rho) if old is None else old
    c = entry.coefficients(LossConfig(policy_term=term, **knobs))
    got = on_torch(entry.function)(f64(rho).log(), f64(lp), f64(old), f64(A), c)
    return tuple(float(x) for x in got)


@pytest.mark.parametrize(
    ("rho", "A", "knobs", "loss", "slope"),
    [
        # inside the interval: ℓ = −ρA, ∂ℓ/∂r = −ρA
        (1.0, 2.0, {}, -2.0, -2.0),
        (1.1, 2.0, {}, -2.2, -2.2),
        (0.9, -1.0, {}, 0.9, 0.9),
        # above, A > 0: min(3.0, 1.2·2) = 2.4, flat
        (1.5, 2.0, {}, -2.4, 0.0),
        # above, A < 0: min(−1.5, −1.2) = −1.5, free
        (1.5, -1.0, {}, 1.5, 1.5),
        # below, A > 0: min(0.5·2, 0.8·2) = 1.0, free
        (0.5, 2.0, {}, -1.0, -1.0),
        # below, A < 0: min(−0.5, −0.8) = −0.8, flat
        (0.5, -1.0, {}, 0.8, 0.0),
        # clip-higher: the upper bound alone moves
        (1.25, 1.0, {"epsilon_high": 0.28}, -1.25, -1.25),
        # δ caps the free branch: A < 0, ρ = 5 > δ = 3: min(−3, −1.2) = −3, flat
        (5.0, -1.0, {"delta": 3.0}, 3.0, 0.0),
        # δ below the upper bound, A < 0, ρ = 1.15: min(−1.1, −1.15) = −1.15: the clip branch, and it is not flat
        (1.15, -1.0, {"delta": 1.1}, 1.15, 1.15),
        # ... and beyond the upper bound it is: min(−1.1, −1.2) = −1.2
        (1.3, -1.0, {"delta": 1.1}, 1.2, 0.0),
        # dual clip: A = −2, ρ = 5: −ρA = 10, held at −cA = 6
        (5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),
        # ... not below c, and not for A > 0
        (2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0),
        (5.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0),
        # δ = 4 comes first: min(ρ, 4)·2 = 8, then 6
        (5.0, -2.0, {"dual_clip": 3.0, "delta": 4.0}, 6.0, 0.0),
        # advantage 0: nothing
        (1.3, 0.0, {}, 0.0, 0.0),
    ],
)
def test_clipped_by_hand(rho, A, knobs, loss, slope):
    assert at("clipped", rho, A, **knobs) == pytest.approx((loss, slope, 0.0), abs=1e-12)


@pytest.mark.parametrize(
    ("term", "rho", "A", "knobs", "want"),
    [
        # ℓ = −clip(ρ)·A·lp with lp = −1: clip(ρ)·A; by lp: −clip(ρ)·A
        ("cispo", 1.5, 2.0, {"cispo_max": 5.0}, (3.0, 0.0, -3.0)),
        ("cispo", 7.0, 2.0, {"cispo_max": 5.0}, (10.0, 0.0, -10.0)),
        ("cispo", 0.5, -1.0, {"cispo_min": 0.8, "cispo_max": 1.2}, (-0.8, 0.0, 0.8)),
        ("cispo", 0.5, -1.0, {"cispo_max": 1.2}, (-0.5, 0.0, 0.5)),
        ("reinforce", 3.0, -2.0, {}, (-2.0, 0.0, 2.0)),
        # A > 0: reinforce; A < 0: ρ held at 1
        ("topr", 3.0, 2.0, {}, (2.0, 0.0, -2.0)),
        ("topr", 3.0, -2.0, {}, (-2.0, 0.0, 2.0)),
        ("topr", 0.25, -2.0, {}, (-0.5, 0.0, 0.5)),
        # −A·lp + ½β·r² with r = 1: 2 + ½·0.6·1; by r: 0.6
        ("dro", E, 2.0, {"dro_beta": 0.6}, (2.3, 0.6, -2.0)),
        ("dro", E, 0.0, {"dro_beta": 0.6}, (0.3, 0.6, 0.0)),
        # ρ = 1: σ(0)·4/τ = 2/τ; slope 4A·σ(0)² = A
        ("sapo", 1.0, 3.0, {"sapo_temperature_pos": 2.0}, (-3.0, -3.0, 0.0)),
        ("sapo", 1.0, -3.0, {"sapo_temperature_neg": 0.5}, (12.0, 3.0, 0.0)),
        # ρ = 2, τ = 1: σ(1) = 0.7310585786, σ' = 0.1966119332
        ("sapo", 2.0, 1.0, {}, (-4 * 0.7310585786300049, -8 * 0.19661193324148185, 0.0)),
        # the ratio of the mean of δ: e^0.1
        ("gmpo", math.exp(0.1), -2.0, {}, (2 * math.exp(0.1), 2 * math.exp(0.1), 0.0)),
    ],
)
def test_terms_by_hand(term, rho, A, knobs, want):
    assert at(term, rho, A, **knobs) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    ("term", "p", "p_old", "A", "factor"),
    [
        # within ±0.2 of where it was: ρ itself
        ("dppo_tv", 0.5, 0.4, 1.0, 1.25),
        ("dppo_tv", 0.7, 0.4, 1.0, 0.0),  # moved by 0.3 the way A pushes
        ("dppo_tv", 0.7, 0.4, -1.0, 1.75),  # against A: kept
        ("dppo_tv", 0.1, 0.4, -1.0, 0.0),
        ("dppo_tv", 0.1, 0.4, 1.0, 0.25),
        ("dppo_tv", 0.21, 0.01, 1.0, 20.0),  # ρ = 21, capped at 20
        # binary KL of (0.4, 0.6) from (0.7, 0.3): 0.4·ln(4/7) + 0.6·ln 2 = 0.19204 ≤ 0.2
        ("dppo_kl", 0.7, 0.4, 1.0, 1.75),
        # from (0.72, 0.28): 0.4·ln(0.5556) + 0.6·ln(2.142857) = 0.22217 > 0.2
        ("dppo_kl", 0.72, 0.4, 1.0, 0.0),
        ("dppo_kl", 0.72, 0.4, -1.0, 1.8),
    ],
)
def test_dppo_by_hand(term, p, p_old, A, factor):
    got = at(term, p / p_old, A, lp=math.log(p), old=math.log(p_old))
    assert got == pytest.approx((-factor * A * math.log(p), 0.0, -factor * A), rel=1e-12, abs=1e-12)


def test_dppo_cap_is_the_dual_clip():
    _, _, slope = at("dppo_tv", 21.0, 1.0, lp=math.log(0.21), old=math.log(0.01), dual_clip=3.0)
    assert slope == pytest.approx(-3.0, rel=1e-12)


def test_vespo_phi_by_hand():
    """φ(1) = 1; at w = e: exp(λ + k − λe); λ is held above 1e-4; log w lies within [log 1e-8, 20]."""
    c = Vespo(2.0, 3.0, 3.0, 2.0)
    phi = on_torch(vespo_phi)
    assert phi(f64(0.0, 0.0), f64(1.0, -1.0), c).tolist() == pytest.approx([1.0, 1.0], rel=1e-12)
    assert phi(f64(1.0), f64(0.0), c).item() == pytest.approx(math.exp(3 + 2 - 3 * E), rel=1e-12)
    assert phi(f64(1.0), f64(-1.0), c).item() == pytest.approx(math.exp(2 + 3 - 2 * E), rel=1e-12)
    assert phi(f64(-50.0), f64(1.0), c).item() == pytest.approx(math.exp(3 + 2 * math.log(1e-8) - 3e-8), rel=1e-12)
    assert phi(f64(50.0), f64(1.0), c).item() == 0.0
    assert phi(f64(800.0), f64(1.0), Vespo(1e6, 1e-4, 1.0, 1.0)).item() == 0.0  # exp overflows: 0
    config = LossConfig(loss_type="vespo", vespo_lambda_pos=-1.0)
    assert TERMS["vespo"].coefficients(config).lambda_pos == 1e-4


@pytest.mark.parametrize(
    ("r", "A", "x", "slope"),
    [(0.1, 1.0, 0.1, 1.0), (0.5, 2.0, 0.3, 0.0), (-0.5, 2.0, -0.5, 1.0), (0.5, -1.0, 0.5, 1.0), (-0.5, -1.0, -0.2, 0.0),
     (0.3, 1.0, 0.3, 1.0), (-0.2, -1.0, -0.2, 1.0), (0.5, 0.0, 0.0, 0.0)],
)  # fmt: skip
def test_gmpo_statistic_by_hand(r, A, x, slope):
    got = on_torch(gmpo_statistic)(f64(r), f64(A), Gmpo(0.2, 0.3))
    assert tuple(float(y) for y in got) == (x, slope)


@pytest.mark.parametrize("term", sorted(set(TERMS) - {"dro"}))
def test_advantage_zero_is_zero_whatever_the_ratio(term):
    c = TERMS[term].coefficients(LossConfig(policy_term=term))
    for r in (1e4, -1e4, INF, 0.0):
        got = on_torch(TERMS[term].function)(f64(r), f64(-1.0), f64(-1.0), f64(0.0), c)
        assert [float(x) for x in got] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("A", (1.0, -1.0))
def test_sapo_stays_finite(A):
    for r in (-INF, -1e4, 1e4, INF):
        loss, slope, _ = on_torch(TERMS["sapo"].function)(
            f64(r), f64(-1.0), f64(-1.0), f64(A), TERMS["sapo"].coefficients(LossConfig(policy_term="sapo"))
        )
        assert loss.isfinite() and slope.item() == 0.0


def test_clipped_bounds_are_closed():
    """At a bound the min ties, takes its first argument, and keeps its slope."""
    c = Clip(0.5, 2.0, INF, INF)  # exact in binary
    for rho, A in ((2.0, 1.0), (0.5, -1.0)):
        _, slope, _ = on_torch(clipped)(f64(rho).log(), f64(0.0), f64(0.0), f64(A), c)
        assert slope.item() == pytest.approx(-rho * A, rel=1e-12)


@pytest.mark.parametrize(
    ("rho", "A", "delta", "dual", "want"),
    [(0.7, -1.0, INF, INF, (1, 0, 0)), (0.7, 1.0, INF, INF, (0, 0, 0)), (1.3, 1.0, INF, INF, (0, 1, 0)),
     (1.3, -1.0, INF, INF, (0, 0, 0)), (1.3, 0.0, INF, INF, (0, 0, 0)), (1.3, 1.0, 1.1, INF, (0, 0, 0)),
     (4.0, -1.0, INF, 3.0, (0, 0, 1)), (4.0, 1.0, INF, 3.0, (0, 1, 0)), (2.0, -1.0, INF, 2.0, (0, 0, 0))],
)  # fmt: skip
def test_clipped_region(rho, A, delta, dual, want):
    r = f64(rho).log()
    got = on_torch(clipped_region)(r, r, r, r, f64(A), Clip(0.8, 1.2, delta, dual))
    assert tuple(int(x) for x in got) == want


@pytest.mark.parametrize(
    ("estimator", "u", "value", "slope"),
    [
        ("k1", 0.5, -0.5, 1.0),
        ("abs", 0.5, 0.5, -1.0),
        ("abs", -0.5, 0.5, 1.0),
        ("abs", 0.0, 0.0, 0.0),
        ("k2", 0.5, 0.125, -0.5),
        ("k3", 0.5, math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
        ("k3", 0.0, 0.0, 0.0),
        ("k3", -1.0, math.exp(-1), 1 - math.exp(-1)),
        ("k1+", 0.5, -0.5, -0.5),
        ("k3+", -1.0, math.exp(-1), 1.0),
    ],
)
def test_kl_by_hand(estimator, u, value, slope):
    got = on_torch(KL_ESTIMATORS[estimator])(f64(u), NONE, False)
    assert tuple(x.item() for x in got) == pytest.approx((value, slope), abs=1e-12)


def test_kl_clamp_by_hand():
    """verl's k3: u within ±20, the value within ±10; e^u − u − 1 = 10 at u = 2.6104."""
    limits = Limits(-INF, INF, 20.0, 10.0)
    k3 = on_torch(KL_ESTIMATORS["k3"])
    values, slopes = k3(f64(2.61, 2.62, 300.0, -30.0, 0.5), limits, True)
    assert values.tolist() == pytest.approx([math.exp(2.61) - 3.61, 10.0, 10.0, 10.0, math.exp(0.5) - 1.5], abs=1e-12)
    assert slopes.tolist() == pytest.approx([1 - math.exp(2.61), 0.0, 0.0, 0.0, 1 - math.exp(0.5)], abs=1e-12)
    value, slope = on_torch(KL_ESTIMATORS["k3+"])(f64(3.0), limits, True)
    assert (value.item(), slope.item()) == (10.0, -3.0)  # straight-through: the value alone is held


def test_log_ratio_limits():
    r, passes = on_torch(limited_ratio)(f64(-3.0, -2.0, 0.5, 2.0, INF, math.nan), Limits(-2.0, 2.0, INF, INF), True)
    assert r[:5].tolist() == [-2.0, -2.0, 0.5, 2.0, 2.0] and r[5].isnan()
    assert passes.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 1.0]


numbers = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))
KNOBS = {
    "clipped": st.fixed_dictionaries(
        {"epsilon": st.sampled_from((0.1, 0.3)), "epsilon_high": st.sampled_from((None, 0.5)),
         "delta": st.sampled_from((None, 1.1, 1.7)), "dual_clip": st.sampled_from((None, 1.5))}
    ),
    "cispo": st.fixed_dictionaries(
        {"cispo_min": st.sampled_from((None, 0.8)), "cispo_max": st.sampled_from((1.2, 5.0))}
    ),
    "sapo": st.fixed_dictionaries(
        {"sapo_temperature_pos": st.floats(0.1, 4), "sapo_temperature_neg": st.floats(0.1, 4)}
    ),
    "dro": st.fixed_dictionaries({"dro_beta": st.floats(0.1, 2)}),
}  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(term=st.sampled_from(sorted(set(TERMS) - set(OWN))), lp=st.floats(-3, -0.01), old=st.floats(-3, -0.01),
       r=numbers, ref=numbers, A=numbers, w=st.floats(0.1, 3), beta=st.floats(0, 1), bias=st.booleans(),
       kl=st.sampled_from((None, *KL_ESTIMATORS)), clamp=st.sampled_from((None, 0.4)), data=st.data())  # fmt: skip
def test_derivatives_against_autograd(term, lp, old, r, ref, A, w, beta, bias, kl, clamp, data):
    """∂ℓ/∂r and ∂ℓ/∂lp of the assembled token loss, r and lp taken as separate variables."""
    knobs = data.draw(KNOBS.get(term, st.just({})))
    entry = TERMS[term]
    c = entry.coefficients(LossConfig(policy_term=term, **knobs))
    limits = NONE if clamp is None else Limits(-INF, INF, 20.0, clamp)
    kinks = [x for x in c if 0 < x < INF] + [1.0]
    if any(abs(math.exp(r) - kink) < 1e-6 for kink in kinks):
        return  # the rule at a kink is tested by hand
    r, own, lp_old = (f64(x)[None].requires_grad_() for x in (r, lp, old))
    args = (f64(ref)[None], f64(A)[None], f64(w)[None], beta, limits, c, on_torch(entry.function))
    with torch.no_grad():
        policy, kl_value, _, d_r, d_lp = on_torch(token_objective)(
            r, torch.ones_like(r), r, own, lp_old, *args, on_torch(KL_ESTIMATORS[kl]) if kl else None, bias,
            False, True, False, clamp is not None,
        )
    k = Knobs(policy_term=term, **knobs)
    mask = torch.ones(1, 1, dtype=torch.bool)
    want = policy_term(Tokens(r, own, lp_old.detach(), args[1], mask, args[2]), k)
    if kl is not None:
        penalty = estimate_kl(own, args[0], kl, clamp)
        want = want + beta * (penalty * r.exp() if bias else penalty)
    slopes = torch.autograd.grad(want.sum(), (r, own), allow_unused=True)
    want_r, want_lp = (0.0 if x is None else x.item() for x in slopes)
    assert (policy + beta * kl_value).item() == pytest.approx(want.item(), rel=1e-10, abs=1e-10)
    assert float(d_r) == pytest.approx(want_r, rel=1e-10, abs=1e-10)
    assert float(d_lp) == pytest.approx(want_lp, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("place", ("r", "lp", "A"))
def test_nan_is_passed_on(place, term):
    entry, own = TERMS[term], term in OWN
    x = {"r": f64(0.0), "lp": f64(-1.0), "A": f64(1.0)} | {place: f64(math.nan)}
    c = entry.coefficients(LossConfig(policy_term=term))
    policy, _, d_term, d_ratio, d_lp = on_torch(token_objective)(
        x["r"], f64(1.0), x["r"], x["lp"], x["lp"], f64(0.0), x["A"], f64(1.0), 0.0, NONE, c,
        on_torch(entry.function), None, False, own, True, False, False,
    )  # fmt: skip
    assert policy.isnan() and (d_term + d_ratio + d_lp).isnan()


@pytest.mark.parametrize("trust", (0.0, INF))
def test_masks_and_weights_of_zero_outdo_infinities(trust):
    """0·∞ is 0: a mask removes an infinite loss, and A = 0 an infinite weight."""
    r, A = (f64(1e4), f64(-1.0)) if trust == 0.0 else (f64(0.0), f64(0.0))
    c = Clip(0.8, 1.2, INF, INF)
    policy, _, d_term, d_ratio, d_lp = on_torch(token_objective)(
        r, f64(1.0), r, f64(-1.0), f64(-1.0), f64(0.0), A, f64(trust), 0.0, NONE, c, on_torch(clipped), None,
        False, False, True, False, False,
    )  # fmt: skip
    assert [float(x) for x in (policy, d_term, d_ratio, d_lp)] == [0.0] * 4


def test_log_ratio_of_equals_is_zero():
    lp = f64(-1.0, -INF, math.nan)
    assert on_torch(log_ratio)(lp, lp)[:2].tolist() == [0.0, 0.0]
    assert on_torch(log_ratio)(lp, lp)[2].isnan()
    assert on_torch(log_ratio)(lp, f64(-2.0, -2.0, 0.0))[0].item() == 1.0


def test_weight_by_hand():
    count = f64(4.0, 0.0)
    assert on_torch(weight)(count, 0.5, f64(2.0)).tolist() == [0.25, 1.0]
