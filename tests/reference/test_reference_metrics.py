"""What the terms and levels report, against numbers worked by hand."""

import math

import pytest
import torch

from reference import LOSS_TYPES, policy_loss
from reference_cases import F64, NAN, TIGHT, f64, random_logps
from term_table import facts

# Three sequences, of 4, 1 and 0 tokens; ρ and the flags by A:
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
RHO = f64([[4.0, 2.0, 1.0, 0.5], [0.25, 1, 1, 1], [1, 1, 1, 1]])


def metrics_of(A: list, rho: torch.Tensor = RHO, lp: float = -2.0, **knobs: object) -> dict[str, float]:
    logps = torch.full((3, 4), lp, dtype=F64)
    old = torch.where(MASK == 1, logps - rho.log(), NAN)
    out = policy_loss(logps, f64(A), old_logps=old, completion_mask=MASK, **knobs)
    return {name: value.item() for name, value in out.metrics.items()}


def assert_metrics(got: dict[str, float], **expected: float) -> None:
    for name, value in expected.items():
        full = {"dual": "clip_ratio/dual_mean", "phi": "vespo/phi_seq_mean", "cispo": "cispo_clip_ratio"}
        name = full.get(name, f"clip_ratio/{name}")
        assert got[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name


def test_dual_clip():
    # A < 0: ρ = 4 is beyond c = 3, 2 is not. At A > 0 nothing is.
    got = metrics_of([-1, -1, -1], dual_clip=3.0)
    assert_metrics(got, dual=1 / 5, low_mean=2 / 5, low_min=1 / 4, high_mean=0, high_max=0, region_mean=2 / 5)
    assert_metrics(metrics_of([1, 1, 1], dual_clip=3.0), dual=0, high_mean=2 / 5, high_max=1 / 2, low_min=0)
    # δ comes first: what it caps at 2.5 is never beyond 3.
    assert_metrics(metrics_of([-1, -1, -1], dual_clip=3.0, delta=2.5), dual=0)
    assert "clip_ratio/dual_mean" not in metrics_of([-1, -1, -1])


def test_up():
    # A < 0: ρ = 0.5 | 0.25 are below 0.8, ρ = 4 is beyond c = 3. A > 0 holds nothing; its tokens count: 1 of 5.
    got = metrics_of([-1, -1, -1], loss_type="up", dual_clip=3.0)
    assert_metrics(got, dual=1 / 5, low_mean=2 / 5, low_min=1 / 4, high_mean=0, high_max=0, region_mean=2 / 5)
    assert_metrics(metrics_of([1, -1, 1], loss_type="up"), low_mean=1 / 5, low_min=0, high_mean=0, region_mean=1 / 5)
    assert_metrics(metrics_of([1, 1, 1], loss_type="up", dual_clip=3.0), dual=0, low_mean=0, high_mean=0, high_max=0)


def test_fipo():
    # γ = ½, log 2 = 1: F = 2 + ½ + 0 − ⅛, 1 + 0 − ¼, 0 − ½, −1 | −2, W = e^F within [1, 1.5]; ρ = 4 is unsafe at A < 0.
    knobs = {"loss_type": "fipo", "fipo_decay_rate": 1.0, "fipo_clip_range": 0.5, "fipo_safety_threshold": 3.0}
    F = [x * math.log(2) for x in (2.375, 0.75, -0.5, -1, -2)]
    for A, W, safe in ((1, [1.5, 1.5, 1, 1, 1], 1), (-1, [1, 1.5, 1, 1, 1], 4 / 5)):
        got = metrics_of([A] * 3, **knobs)
        assert got["fipo/future_kl"] == pytest.approx(sum(F) / 5, rel=1e-12)
        assert got["fipo/influence_weight"] == pytest.approx(sum(W) / 5, rel=1e-12)
        assert got["fipo/safety_keep"] == safe
    assert_metrics(got, high_mean=0, low_mean=2 / 5, low_min=1 / 4)


def test_cispo():
    assert_metrics(metrics_of([1, 1, 1], loss_type="cispo", cispo_max=1.5), cispo=2 / 5)
    assert_metrics(metrics_of([-1, -1, 1], loss_type="cispo", cispo_max=1.5), cispo=0)
    assert_metrics(metrics_of([1, 1, 1], loss_type="cispo", cispo_max=None), cispo=0)


def test_gmpo():
    # Log ratios 1.39, 0.69, 0, −0.69 | −1.39 against (−1, 0.5)
    bounds = {"epsilon": 1.0, "epsilon_high": 0.5}
    got = metrics_of([1, -1, 1], loss_type="gmpo", **bounds)
    assert_metrics(got, high_mean=2 / 5, high_max=1 / 2, low_mean=1 / 5, low_min=0, region_mean=3 / 5)
    assert_metrics(metrics_of([-1, 1, 1], loss_type="gmpo", **bounds), high_mean=0, low_mean=0, region_mean=0)


def test_topr():
    token = {"loss_type": "topr", "importance_sampling_level": "token"}
    assert_metrics(metrics_of([-1, -1, 1], **token), high_mean=2 / 5, high_max=1 / 2, low_mean=0, low_min=0)
    assert_metrics(metrics_of([1, 1, 1], **token), high_mean=0)
    # The trajectories' ratios are 4 and ¼, the empty one's is 1: one of three.
    assert_metrics(metrics_of([-1, -1, -1], loss_type="topr"), high_mean=1 / 3, high_max=1, low_min=0)


def test_dppo():
    # p = ¼; p_old = p/ρ = 1/16, 1/8, 1/4, 1/2 | 1. p − p_old = .19, .125, 0, −¼ | −¾ against (−0.3, 0.15).
    bounds = {"epsilon": 0.3, "epsilon_high": 0.15, "lp": math.log(0.25), "loss_type": "dppo_tv"}
    got = metrics_of([1, -1, 1], **bounds)
    assert_metrics(got, high_mean=1 / 5, high_max=1 / 4, low_mean=1 / 5, low_min=0, region_mean=2 / 5, dual=0)
    # c = 3 cuts ρ = 4 where that is kept: at A < 0. A = 0 counts as `low`.
    assert_metrics(metrics_of([-1, 0, 1], **bounds, dual_clip=3.0), dual=1 / 5, low_mean=1 / 5, high_mean=0)
    assert_metrics(metrics_of([1, 0, 1], **bounds, dual_clip=3.0), dual=0, low_mean=1 / 5, high_mean=1 / 5)


def test_vespo():
    # w = 4, ¼ and, without tokens, 1: φ = e^λ·w^k·e^−λw with (2, 3) for A ≥ 0, (3, 2) for A < 0.
    phi = math.exp(-9) * 16, math.exp(1.5) / 64, 1.0
    for level in ("token", "sequence"):
        got = metrics_of([1, -1, 1], loss_type="vespo", importance_sampling_level=level)
        assert_metrics(got, phi=sum(phi) / 3)
    # One weight per sequence is in w without tokens too: 2, 4, 2.
    weights = f64([0.5, 16, 2])
    phi = math.exp(-3) * 4, math.exp(2 - 8) * 64, math.exp(-3) * 4
    got = metrics_of([1, -1, 1], loss_type="vespo", importance_weights=weights)
    assert_metrics(got, phi=sum(phi) / 3)
    # With an advantage per token φ has a value per token: the mean is over five.
    wide = [[1, 1, -1, -1], [1, 9, 9, 9], [9] * 4]
    good, bad = math.exp(-9) * 16, math.exp(-6) * 64
    got = metrics_of(wide, loss_type="vespo")
    assert_metrics(got, phi=(2 * good + 2 * bad + math.exp(3 - 0.75) / 16) / 5)


# s = ln(4·2·½)/4 = 0.347 and −1.39: ρ = 1.41 and ¼
@pytest.mark.parametrize("A", [[1, -1, -1], [[1], [-1], [-1]]])
def test_sequence_values_are_averaged_over_sequences(A: list):
    """Empty ones included, as TRL does where a sequence has one ratio and one advantage."""
    got = metrics_of(A, importance_sampling_level="sequence")
    assert_metrics(got, high_mean=1 / 3, high_max=1, low_mean=1 / 3, low_min=0, region_mean=2 / 3)
    # Ratios are reported over tokens: four of 1.41, one of ¼.
    assert got["ratio/mean"] == pytest.approx((4 * math.sqrt(2) + 0.25) / 5)
    assert got["ratio/min"] == pytest.approx(0.25) and got["ratio/max"] == pytest.approx(math.sqrt(2))
    k3 = [math.sqrt(2) - 1 - math.log(2) / 2, 0.25 - 1 + math.log(4)]
    assert got["approx_kl"] == pytest.approx((4 * k3[0] + k3[1]) / 5)
    # ρ = 4, ¼ and 1 for the trajectories.
    got = metrics_of(A, importance_sampling_level="sequence_sum", loss_type="cispo", cispo_max=3.0)
    assert_metrics(got, cispo=1 / 3)
    got = metrics_of(A, importance_sampling_level="sequence_sum", dual_clip=3.0)
    assert_metrics(got, dual=0, high_mean=1 / 3)


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_token_values_are_averaged_over_tokens(level: str):
    """One advantage per token, or gradients of its own: s = 0.347 is clipped for four tokens, −1.39 for one."""
    A = [1, -1, -1]
    if level == "sequence":
        A = [[1, 1, -1, -1], [-1] * 4, [-1] * 4]
    got = metrics_of(A, importance_sampling_level=level)
    high = 4 if level == "sequence_token" else 2
    assert_metrics(got, high_mean=high / 5, high_max=high / 4, low_mean=1 / 5, low_min=0, region_mean=(high + 1) / 5)


def test_low_min_without_any_token():
    """There is nothing to take a minimum of; but a sequence's own flag is there without tokens, and 0."""
    nothing = {"completion_mask": torch.zeros(2, 3), "advantages": torch.ones(2), "logps": torch.zeros(2, 3)}
    assert policy_loss(**nothing).metrics["clip_ratio/low_min"].isnan()
    assert policy_loss(**nothing, loss_type="gspo").metrics["clip_ratio/low_min"] == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_which_metrics_there_are(loss_type: str):
    batch = random_logps()
    out = policy_loss(**batch, loss_type=loss_type, beta=0.1)
    always = {"policy_loss", "entropy", "kl", "ratio/mean", "ratio/min", "ratio/max", "approx_kl"}
    assert out.metrics.keys() == always | facts(LOSS_TYPES[loss_type].term).metrics
    assert all(value.dim() == 0 and not value.requires_grad for value in out.metrics.values())
    torch.testing.assert_close(out.metrics["policy_loss"], out.loss.detach(), **TIGHT)
