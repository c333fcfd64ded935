"""Terms and KL estimators: hand-worked numbers, and both derivatives against float64 autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kernels.jit import on_torch
from grpo_kernels.kl import k1, k2, k3
from grpo_kernels.objective import log_ratio, token_objective, weight
from grpo_kernels.terms import Clip, clipped, clipped_region

INF = math.inf


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def value_at(rho: float, A: float, lo=0.8, hi=1.2, delta=INF) -> tuple[float, float]:
    """(ℓ, ∂ℓ/∂r) of the clipped term at a ratio."""
    loss, slope, d_lp = on_torch(clipped)(f64(rho).log(), f64(-1.0), f64(A), Clip(lo, hi, delta))
    assert d_lp == 0.0
    return loss.item(), slope.item()


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
        (1.25, 1.0, {"hi": 1.28}, -1.25, -1.25),
        # δ caps the free branch: A < 0, ρ = 5 > δ = 3: min(−3, −1.2) = −3, flat
        (5.0, -1.0, {"delta": 3.0}, 3.0, 0.0),
        # δ below the upper bound, A < 0, ρ = 1.15: min(−1.1, −1.15) = −1.15: the clip branch, and it is not flat
        (1.15, -1.0, {"delta": 1.1}, 1.15, 1.15),
        # ... and beyond the upper bound it is: min(−1.1, −1.2) = −1.2
        (1.3, -1.0, {"delta": 1.1}, 1.2, 0.0),
        # advantage 0: nothing
        (1.3, 0.0, {}, 0.0, 0.0),
    ],
)
def test_clipped_by_hand(rho, A, knobs, loss, slope):
    assert value_at(rho, A, **knobs) == pytest.approx((loss, slope), abs=1e-12)


def test_clipped_overflow_without_advantage_is_zero():
    for r in (1e4, -1e4, INF):
        loss, slope, _ = on_torch(clipped)(f64(r), f64(-1.0), f64(0.0), Clip(0.8, 1.2, INF))
        assert loss.item() == 0.0 and slope.item() == 0.0


def test_clipped_bounds_are_closed():
    """At a bound the min ties, takes its first argument, and keeps its slope."""
    c = Clip(0.5, 2.0, INF)  # exact in binary
    for rho, A in ((2.0, 1.0), (0.5, -1.0)):
        _, slope, _ = on_torch(clipped)(f64(rho).log(), f64(0.0), f64(A), c)
        assert slope.item() == pytest.approx(-rho * A)


@pytest.mark.parametrize(
    ("rho", "A", "delta", "want"),
    [(0.7, -1.0, INF, (1, 0)), (0.7, 1.0, INF, (0, 0)), (1.3, 1.0, INF, (0, 1)), (1.3, -1.0, INF, (0, 0)),
     (1.3, 0.0, INF, (0, 0)), (1.3, 1.0, 1.1, (0, 0))],
)  # fmt: skip
def test_clipped_region(rho, A, delta, want):
    low, high = on_torch(clipped_region)(f64(rho).log(), f64(A), Clip(0.8, 1.2, delta))
    assert (low.item(), high.item()) == want


@pytest.mark.parametrize(
    ("estimator", "u", "value", "slope"),
    [
        (k1, 0.5, -0.5, 1.0),
        (k2, 0.5, 0.125, -0.5),
        (k3, 0.5, math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
        (k3, 0.0, 0.0, 0.0),
        (k3, -1.0, math.exp(-1), 1 - math.exp(-1)),
    ],
)
def test_kl_by_hand(estimator, u, value, slope):
    got = on_torch(estimator)(f64(u))
    assert tuple(x.item() for x in got) == pytest.approx((value, slope), abs=1e-12)


numbers = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))


@settings(deadline=None, max_examples=200)
@given(lp=numbers, old=numbers, ref=numbers, A=numbers, w=st.floats(0.1, 3), beta=st.floats(0, 1),
       lo=st.sampled_from((0.5, 0.8, 1.0)), hi=st.sampled_from((1.0, 1.3, 2.0)), delta=st.sampled_from((INF, 1.1, 1.7)),
       kl=st.sampled_from((None, k1, k2, k3)))  # fmt: skip
def test_derivatives_against_autograd(lp, old, ref, A, w, beta, lo, hi, delta, kl):
    """∂ℓ/∂r and ∂ℓ/∂lp of the assembled token loss, r and lp taken as separate variables."""
    c = Clip(lo, hi, delta)
    r = f64(lp - old).requires_grad_()
    own = f64(lp).requires_grad_()
    args = (f64(ref), f64(A), f64(w), beta, c, on_torch(clipped), on_torch(kl) if kl else None)
    kinks = [lo, hi, delta]
    if any(abs(math.exp(lp - old) - k) < 1e-6 for k in kinks):
        return  # the branch rule at a kink is tested by hand
    with torch.no_grad():
        _, _, d_r, d_lp = on_torch(token_objective)(r, own, *args)
    ratio = r.exp()
    free = ratio.clamp(max=delta) * A
    loss = -torch.minimum(free, ratio.clamp(lo, hi) * A) * w
    if kl is not None:
        u = f64(ref) - own
        loss = loss + beta * {k1: -u, k2: u**2 / 2, k3: u.exp() - u - 1}[kl]
    want_r, want_lp = torch.autograd.grad(loss.sum(), (r, own), allow_unused=True)
    assert d_r.item() == pytest.approx(want_r.item(), rel=1e-10, abs=1e-10)
    want_lp = 0.0 if want_lp is None else want_lp.item()
    assert float(d_lp) == pytest.approx(want_lp, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("place", ("r", "lp", "A"))
def test_nan_is_passed_on(place):
    args = {"r": f64(0.0), "lp": f64(-1.0), "A": f64(1.0)} | {place: f64(math.nan)}
    policy, _, d_r, d_lp = on_torch(token_objective)(
        args["r"], args["lp"], f64(0.0), args["A"], f64(1.0), 0.0, Clip(0.8, 1.2, INF), on_torch(clipped), None
    )
    assert policy.isnan() and (d_r + d_lp).isnan()


def test_log_ratio_of_equals_is_zero():
    lp = f64(-1.0, -INF, math.nan)
    assert on_torch(log_ratio)(lp, lp)[:2].tolist() == [0.0, 0.0]
    assert on_torch(log_ratio)(lp, lp)[2].isnan()
    assert on_torch(log_ratio)(lp, f64(-2.0, -2.0, 0.0))[0].item() == 1.0


def test_weight_by_hand():
    count = f64(4.0, 0.0)
    assert on_torch(weight)(count, 0.5, f64(2.0)).tolist() == [0.25, 1.0]
