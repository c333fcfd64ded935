"""Terms and KL estimators: hand-worked numbers, and both derivatives against float64 autograd."""

import dataclasses
import functools
import itertools
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DEVICE
from grpo_kernels import LossConfig
from grpo_kernels.objective import language
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.catalogue import KL_ESTIMATORS, TERMS
from grpo_kernels.objective.language import jit, on_torch, tl
from grpo_kernels.objective.sequences import suffix_sums
from grpo_kernels.objective.terms import Clip, Gmpo, Vespo, clipped, clipped_region, gmpo_statistic, vespo_phi
from grpo_kernels.objective.token import Limits, limited_ratio, log_ratio, token_objective, weight
from kl_table import facts_of_kl
from pretend_gpu import pretended
from reference.kl import estimate_kl
from reference.knobs import TERM_LEVELS, Knobs
from reference.terms import TERMS as REFERENCE_TERMS
from reference.terms import Tokens, policy_term
from term_table import Row, facts, rows_by_hand

INF, E = math.inf, math.e
NONE = Limits(-INF, INF, INF, INF)
NEAR_1 = (-1.0, -0.3, -0.12, 0.0, 0.05, 0.15, 0.25, 0.5, 1.0)  # log ratios on both sides of the settings' bounds
OWN = tuple(name for name, term in TERMS.items() if term.statistic is not None)


@pytest.fixture(autouse=True)
def double_precision(monkeypatch):
    """A choice between two coefficients is in fp32 otherwise."""
    monkeypatch.setattr(language, "NUMBERS", torch.float64)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at(term: str, c, row: Row) -> tuple[float, ...]:
    """(ℓ, ∂ℓ/∂r, ∂ℓ/∂lp) of a term with the coefficients c, at the first token of its sequence."""
    lp, old, A = row[:3]
    entry, r = TERMS[term], log_ratio_of(lp, old)
    if entry.statistic is None:
        W = influence_of(term, c, (r.item(), *row.after), A)
        return tuple(float(W * x) for x in on_torch(entry.function)(r, f64(lp), f64(old), f64(A), c))
    x, slope = on_torch(entry.statistic.function)(r, f64(A), c)
    loss, d_x, d_lp = on_torch(entry.function)(x, f64(lp), f64(old), f64(A), c)
    return float(loss), float(d_x * slope) if entry.statistic.spreads else 0.0, float(d_lp)


def influence_of(term: str, c, r: tuple[float, ...], A: float) -> torch.Tensor | float:
    """What multiplies the loss of the first of some tokens; 1 of a term without a suffix."""
    if (suffix := TERMS[term].suffix) is None:
        return 1.0
    x, log2_decay = on_torch(suffix.function)(f64(*r)[None], c)
    future = suffix_sums(x, log2_decay, Batch(x))[0, 0]
    return on_torch(suffix.influence)(future, f64(r[0]), f64(A), c)[0]


def log_ratio_of(lp: float, old: float) -> torch.Tensor:
    return on_torch(log_ratio)(f64(lp), f64(old))


def coefficients(term: str, **knobs) -> tuple:
    return TERMS[term].coefficients(LossConfig(policy_term=term, **knobs))


# --- every term, by tests/helpers/term_table.py --------------------------------------------------


@pytest.mark.parametrize("term", TERMS)
def test_the_reference_has_the_term_and_its_knobs(term):
    where = {"TERMS in reference/terms.py": REFERENCE_TERMS, "TERM_LEVELS in reference/knobs.py": TERM_LEVELS}
    missing = [f"{term!r} in {table}" for table, entries in where.items() if term not in entries]
    known = {field.name for field in dataclasses.fields(Knobs)}
    missing += [f"the field {knob!r} of Knobs in reference/knobs.py" for knob in TERMS[term].knobs if knob not in known]
    assert not missing, f"the reference of {term!r} lacks {', '.join(missing)}"


@pytest.mark.parametrize("term", TERMS)
def test_the_table_knows_the_terms_knobs(term):
    known, entry = facts(term), TERMS[term]
    assert set(known.knobs) == set(entry.knobs), f"settings of {term!r} in tests/helpers/term_table.py"
    assert bool(known.slopes) != bool(known.of_sequence) and bool(known.of_sequence) == bool(entry.statistic)
    assert bool(known.influences) == bool(entry.suffix)
    assert known.levels == entry.levels


@pytest.mark.parametrize(("term", "row"), rows_by_hand())
def test_terms_by_hand(term, row):
    got = at(term, coefficients(term, **row.knobs), row)
    assert got == pytest.approx(row.want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("term", TERMS)
def test_the_numbers_by_hand_notice_what_could_be_wrong(term):
    """Two coefficients swapped, a knob that nobody reads, a derivative of the wrong sign: some row tells each."""
    known, entry = facts(term), TERMS[term]
    around = [Row(-1.0, -1.0 - r, A, knobs, ()) for knobs in known.settings for A in (1.0, -1.0) for r in NEAR_1]

    def right(row) -> tuple:
        return at(term, coefficients(term, **row.knobs), row)

    def swapped(row, a: str, b: str) -> tuple:
        c = coefficients(term, **row.knobs)
        return at(term, c._replace(**{a: getattr(c, b), b: getattr(c, a)}), row)

    def without(row, knob: str) -> tuple:
        return right(row._replace(knobs={k: v for k, v in row.knobs.items() if k != knob}))

    def differ(rows, wrong) -> bool:
        return any(wrong(row) != pytest.approx(right(row), rel=1e-6, abs=1e-12) for row in rows)

    unseen = []
    for a, b in itertools.combinations(entry.kind._fields, 2):
        wrong = functools.partial(swapped, a=a, b=b)
        if differ(around, wrong) and not differ(known.by_hand, wrong):  # else it is the same function
            unseen.append(f"{a} and {b} swapped")
    for knob in entry.knobs:
        if not differ(known.by_hand, functools.partial(without, knob=knob)):
            unseen.append(f"{knob} dropped")
    for sign, (place, name) in itertools.product((1.0, -1.0), ((1, "∂ℓ/∂r"), (2, "∂ℓ/∂lp"))):
        has_one = any(right(row)[place] for row in around if row.A == sign)
        if has_one and not any(row.want[place] for row in known.by_hand if row.A * sign > 0):
            unseen.append(f"{name} of the wrong sign where A is {sign:+.0f}")
    assert not unseen, (
        f"the numbers by hand of {term!r} in tests/helpers/term_table.py do not notice: {', '.join(unseen)}"
    )


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_called_with_its_own_knobs_alone(term):
    """An entry that reads a knob which it does not name cannot be: it gets the values of those it names."""
    only = types.SimpleNamespace(**{knob: getattr(LossConfig(), knob) for knob in TERMS[term].knobs})
    assert TERMS[term].coefficients(only) == coefficients(term)


# --- one by one ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("r", "A", "x", "slope"),
    [(0.1, 1.0, 0.1, 1.0), (0.5, 2.0, 0.3, 0.0), (-0.5, 2.0, -0.5, 1.0), (0.5, -1.0, 0.5, 1.0), (-0.5, -1.0, -0.2, 0.0),
     (0.3, 1.0, 0.3, 1.0), (-0.2, -1.0, -0.2, 1.0), (0.5, 0.0, 0.0, 0.0)],
)  # fmt: skip
def test_gmpo_statistic_by_hand(r, A, x, slope):
    got = on_torch(gmpo_statistic)(f64(r), f64(A), Gmpo(0.2, 0.3))
    assert tuple(float(y) for y in got) == (x, slope)


@pytest.mark.parametrize("term", [name for name, entry in TERMS.items() if not entry.acts_without_advantage])
def test_advantage_zero_is_zero_whatever_the_ratio(term):
    c = coefficients(term)
    for r in (1e4, -1e4, INF, 0.0):
        got = on_torch(TERMS[term].function)(f64(r), f64(-1.0), f64(-1.0), f64(0.0), c)
        assert [float(x) for x in got] == [0.0, 0.0, 0.0]


def at_infinite_ratios(term: str):
    """(r, A, lp, old, coefficients) of tokens whose ratio is infinite, with the term's default knobs and its settings.

    exp(1000) overflows in both precisions. With r = ∞ the old probability is 0.
    """
    for knobs, r, A in itertools.product(({}, *facts(term).settings), (1e3, INF), (-1.0, 0.0, 1.0)):
        yield r, A, -1.0, -1.0 - r, coefficients(term, **knobs)


@pytest.mark.parametrize("term", TERMS)
def test_nothing_is_nan_where_the_ratio_is_infinite(term):
    """The statistic, ℓ, its slopes and the region; infinite they may be."""
    entry = TERMS[term]
    for r, A, lp, old, c in at_infinite_ratios(term):
        x, slope = f64(r), 0.0
        if entry.statistic is not None:
            x, slope = on_torch(entry.statistic.function)(f64(r), f64(A), c)
        for seen in (f64(r), x):
            got = on_torch(entry.function)(seen, f64(lp), f64(old), f64(A), c)
            region = on_torch(entry.region)(f64(r), seen, f64(lp), f64(old), f64(A), c)
            found = [float(y) for y in (x, slope, *got, *region, influence_of(term, c, (r, 1e3, r), A))]
            assert not any(map(math.isnan, found)), f"r = {r}, A = {A}, {c}: {found}"


@jit
def term_kernel(values, out, c, TERM: tl.constexpr):
    """values: r, A, lp, old; out: ℓ, ∂ℓ/∂r, ∂ℓ/∂lp."""
    loss, d_r, d_lp = TERM(tl.load(values), tl.load(values + 2), tl.load(values + 3), tl.load(values + 1), c)
    tl.store(out, loss)
    tl.store(out + 1, d_r)
    tl.store(out + 2, d_lp)


@pytest.mark.skipif(pretended(), reason="a pretended GPU runs no kernels")
@pytest.mark.parametrize("term", TERMS)
def test_no_kernel_makes_nan_where_the_ratio_is_infinite(term):
    for r, A, lp, old, c in at_infinite_ratios(term):
        out = torch.full((3,), math.nan, dtype=torch.float32, device=DEVICE)
        values = torch.tensor((r, A, lp, old), dtype=torch.float32, device=DEVICE)
        term_kernel[(1,)](values, out, c, TERMS[term].function)
        assert not out.isnan().any(), f"r = {r}, A = {A}, {c}: {out.tolist()}"


@pytest.mark.parametrize("A", (1.0, -1.0))
def test_sapo_stays_finite(A):
    for r in (-INF, -1e4, 1e4, INF):
        loss, slope, _ = on_torch(TERMS["sapo"].function)(f64(r), f64(-1.0), f64(-1.0), f64(A), coefficients("sapo"))
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


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_by_hand(estimator):
    by_hand, closed = facts_of_kl(estimator)
    assert any(u > 0 for u, *_ in by_hand), "both signs of u"
    rows = [*by_hand, *((u, *closed(u)) for u in (-3.0, -0.2, 0.1, 2.0))]
    for u, value, slope in rows:
        got = on_torch(KL_ESTIMATORS[estimator])(f64(u), NONE, False)
        assert tuple(x.item() for x in got) == pytest.approx((value, slope), rel=1e-12, abs=1e-12), u


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


def drawn(term: str) -> st.SearchStrategy[dict]:
    """Each knob of a term at its default, or at one of the values that tests/helpers/term_table.py has."""
    return st.fixed_dictionaries(
        {knob: st.sampled_from((getattr(LossConfig(), knob), *values)) for knob, values in facts(term).knobs.items()}
    )


@settings(deadline=None, max_examples=400)
@given(term=st.sampled_from(sorted(set(TERMS) - set(OWN))), lp=st.floats(-3, -0.01), old=st.floats(-3, -0.01),
       r=numbers, ref=numbers, A=numbers, w=st.floats(0.1, 3), beta=st.floats(0, 1), bias=st.booleans(),
       kl=st.sampled_from((None, *KL_ESTIMATORS)), clamp=st.sampled_from((None, 0.4)), data=st.data())  # fmt: skip
def test_derivatives_against_autograd(term, lp, old, r, ref, A, w, beta, bias, kl, clamp, data):
    """∂ℓ/∂r and ∂ℓ/∂lp of the assembled token loss, r and lp taken as separate variables."""
    knobs, entry = data.draw(drawn(term)), TERMS[term]
    c = coefficients(term, **knobs)
    limits = NONE if clamp is None else Limits(-INF, INF, 20.0, clamp)
    kinks = [x for x in c if 0 < x < INF] + [1.0]
    if any(abs(math.exp(x) - kink) < 1e-6 for kink in kinks for x in (r, lp - old)):
        return  # the rule at a kink is tested by hand
    trust = f64(w)[None] * influence_of(term, c, (lp - old,), A)
    r, own, lp_old = (f64(x)[None].requires_grad_() for x in (r, lp, old))
    args = (f64(ref)[None], f64(A)[None], trust, beta, limits, c, on_torch(entry.function))
    with torch.no_grad():
        policy, kl_value, _, d_r, d_lp = on_torch(token_objective)(
            r, torch.ones_like(r), r, own, lp_old, *args, on_torch(KL_ESTIMATORS[kl]) if kl else None, bias,
            False, True, False, clamp is not None,
        )
    k = Knobs(policy_term=term, **knobs)
    mask = torch.ones(1, 1, dtype=torch.bool)
    want = policy_term(Tokens(r, own, lp_old.detach(), args[1], mask, f64(w)[None]), k)
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
    c = coefficients(term)
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
    assert on_torch(weight)(count, f64(1.0)).tolist() == [0.25, 1.0]
