"""Sampling corrections, off-policy mask and entropy quantile, against numbers worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from reference import LOSS_TYPES, LossOutput, policy_loss
from reference_cases import F64, NAN, TIGHT, f64, grad, noise, random_logps

# --- Sampling corrections -----------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
# exp d = exp(old − samp): 2, 3 and one that the sampler could not score | ½, ¼ and a masked one | masked ones
D = f64([[2, 3, NAN], [0.5, 0.25, 1e9], [NAN, 7, 7]]).log()


def corrected(mode: str, d: Tensor = D, on_policy: bool = False, **bounds: float | None) -> tuple[LossOutput, Tensor]:
    """reinforce with A = 1 and lp = −1, so that ℓ is the weight."""
    lp = torch.full((3, 3), -1.0, dtype=F64).requires_grad_()
    out = policy_loss(
        lp,
        torch.ones(3),
        old_logps=None if on_policy else lp.detach(),
        sampling_logps=lp.detach() - d,
        completion_mask=MASK,
        loss_type="reinforce",
        sampling_correction=mode,
        **{f"sampling_correction_{name}": value for name, value in bounds.items()},
    )
    return out, grad(out.loss, lp)


@pytest.mark.parametrize(
    ("mode", "bounds", "expected"),
    [
        ("token_truncate", {}, [[2, 3, 1], [0.5, 0.25, 0]]),
        ("token_truncate", {"max": 2.5}, [[2, 2.5, 1], [0.5, 0.25, 0]]),
        ("token_truncate", {"min": 0.3, "max": None}, [[2, 3, 1], [0.5, 0.3, 0]]),
        ("token_mask", {"max": 2.5}, [[2, 0, 1], [0.5, 0.25, 0]]),
        ("token_mask", {"min": 0.3, "max": None}, [[2, 3, 1], [0.5, 0, 0]]),
        # Products: 6 and 1/8; the default bound is 3.
        ("sequence_truncate", {}, [[3, 3, 3], [0.125, 0.125, 0]]),
        ("sequence_truncate", {"min": 0.2, "max": None}, [[6, 6, 6], [0.2, 0.2, 0]]),
        ("sequence_mask", {}, [[0, 0, 0], [0.125, 0.125, 0]]),
        ("sequence_mask", {"min": 0.2, "max": None}, [[6, 6, 6], [0, 0, 0]]),
        # Geometric means: 6^⅓ = 1.82, over three tokens, and 8^−½ = 0.35. What is kept is not truncated.
        ("seq_mask_tis", {}, [[2, 3, 1], [0.5, 0.25, 0]]),
        ("seq_mask_tis", {"max": 1.8}, [[0, 0, 0], [0.5, 0.25, 0]]),
        ("seq_mask_tis", {"min": 0.36, "max": 1.9}, [[2, 3, 1], [0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("on_policy", [False, True])
def test_sampling_correction_by_hand(mode: str, bounds: dict, expected: list, on_policy: bool):
    out, slope = corrected(mode, on_policy=on_policy, **bounds)
    expected = f64([*expected, [0] * 3])
    torch.testing.assert_close(out.importance_weights, expected, **TIGHT)
    torch.testing.assert_close(out.per_token_loss, expected, **TIGHT)
    torch.testing.assert_close(slope, -out.weights * expected, **TIGHT)  # the weight has no gradient


@pytest.mark.parametrize("mode", ["token_mask", "sequence_mask", "seq_mask_tis"])
def test_sampling_bounds_are_inclusive(mode: str):
    d = torch.full((3, 3), 0.25, dtype=F64)  # exact, and so are its sums
    edge = f64(0.75 if mode == "sequence_mask" else 0.25).exp().item()
    assert corrected(mode, d, min=edge, max=edge)[0].importance_weights[0].all()
    assert not corrected(mode, d, max=edge * (1 - 1e-12))[0].importance_weights[0].any()
    assert not corrected(mode, d, min=edge * (1 + 1e-12), max=None)[0].importance_weights[0].any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "seq_mask_tis"])
def test_a_correction_is_the_importance_weights_that_it_makes(loss_type: str, mode: str):
    """One per sequence for the sequence modes: vespo counts those once."""
    batch = random_logps()
    samp = batch["old_logps"] + 0.2 * noise(6, 7, seed=7)
    bounds = {"sampling_correction_min": 0.6, "sampling_correction_max": 1.4}
    if loss_type == "gmpo":
        bounds = {"sampling_correction_max": 100.0}  # a weight of 0 makes its whole sequence 0
    a = policy_loss(**batch, sampling_logps=samp, loss_type=loss_type, sampling_correction=mode, **bounds)
    weights = a.importance_weights
    if mode.startswith("sequence"):
        weights = weights.amax(dim=1, keepdim=True)
    b = policy_loss(**batch, importance_weights=weights, loss_type=loss_type)
    torch.testing.assert_close(a.loss, b.loss, **TIGHT)
    torch.testing.assert_close(grad(a.loss, batch["logps"]), grad(b.loss, batch["logps"]), **TIGHT)
    assert a.loss != policy_loss(**batch, loss_type=loss_type).loss


def test_sampling_weights_do_not_touch_the_kl():
    batch = random_logps()
    knobs = {"sampling_logps": batch["old_logps"] - 5, "sampling_correction": "sequence_mask"}
    out = policy_loss(**batch, **knobs, beta=0.3)
    assert not out.importance_weights.any()
    torch.testing.assert_close(out.per_token_loss, 0.3 * out.kl, **TIGHT)


# --- Off-policy mask ----------------------------------------------------------------------------------------

DRIFT = f64([[0.5, 0.25, NAN], [0.5, 0.25, 99], [0.5, 0.25, 99], [NAN, NAN, 99]])
DRIFT_MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]])


def off_policy(A: list, threshold: float, given: str, **knobs: object) -> tuple[list, Tensor]:
    """Which tokens are kept, with log π_θ = −2 and a policy loss that is nowhere 0."""
    lp = torch.full((4, 3), -2.0, dtype=F64).requires_grad_()
    drifted = lp.detach() + DRIFT
    sources = {
        "sampler": {"sampling_logps": drifted, "old_logps": lp.detach() + 9},
        "old": {"old_logps": torch.where(DRIFT.isnan(), lp.detach(), drifted)},
    }
    out = policy_loss(lp, f64(A), completion_mask=DRIFT_MASK, loss_type="reinforce",
                      off_policy_mask_threshold=threshold, **sources[given], **knobs)  # fmt: skip
    slope = grad(out.loss, lp)
    assert torch.equal(slope != 0, out.per_token_loss != 0)
    return (out.per_token_loss != 0).int().tolist(), slope


@pytest.mark.parametrize("given", ["sampler", "old"])
@pytest.mark.parametrize(
    ("threshold", "kept"),
    [
        # Means: 0.75/3 (the unscored token counts), 0.75/2, none needed at A > 0, and 0.
        (0.25, [[1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 1, 0]]),
        (0.24, [[0, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 0]]),
        (0.375, [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]]),
        (-0.1, [[0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]]),
    ],
)
def test_off_policy_mask_by_hand(given: str, threshold: float, kept: list):
    assert off_policy([-1, -1, 1, -1], threshold, given)[0] == kept


def test_off_policy_mask_keeps_a_zero_advantage():
    """Which only shows where A = 0 has a loss."""
    lp = torch.full((1, 2), -2.0, dtype=F64)
    knobs = {"sampling_logps": lp + 1, "off_policy_mask_threshold": 0.5, "old_logps": lp - 1}
    for A, loss in ((0, 0.5), (-1, 0)):
        out = policy_loss(lp, f64([A]), loss_type="dro", **knobs)
        assert out.per_token_loss.tolist() == [[loss, loss]]


def test_off_policy_mask_is_per_token_if_the_advantages_are():
    A = [[-1, 1, -1], [1, -1, 1], [-1, -1, 1], [-1, -1, 1]]
    assert off_policy(A, 0.3, "sampler")[0] == [[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]


def test_off_policy_mask_leaves_the_kl_and_the_weights():
    batch = random_logps()
    a = policy_loss(**batch, beta=0.3)
    b = policy_loss(**batch, beta=0.3, off_policy_mask_threshold=-9)
    dropped = (batch["advantages"] < 0)[:, None] & batch["completion_mask"]
    torch.testing.assert_close(b.per_token_loss[dropped], 0.3 * b.kl[dropped], **TIGHT)
    assert torch.equal(b.per_token_loss[~dropped], a.per_token_loss[~dropped])
    assert torch.equal(a.weights, b.weights) and dropped.any()


def test_off_policy_mask_without_old_logps_keeps_all():
    batch = random_logps()
    batch["old_logps"] = None
    out = policy_loss(**batch, off_policy_mask_threshold=0.0)
    assert torch.equal(out.per_token_loss, policy_loss(**batch).per_token_loss)


# --- Entropy quantile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entropy", "top", "kept"),
    [
        # Five tokens; the quantile 1 − top lies at rank 4·(1 − top) of them, between two by interpolation.
        ([[1, 2, 3], [4, 5, 9]], 1.0, [[1, 1, 1], [1, 1, 0]]),
        ([[1, 2, 3], [4, 5, 9]], 0.5, [[0, 0, 1], [1, 1, 0]]),  # rank 2: 3
        ([[1, 2, 3], [4, 5, 9]], 0.45, [[0, 0, 0], [1, 1, 0]]),  # rank 2.2: 3.2
        ([[5, 2, 3], [4, 1, 9]], 0.3, [[1, 0, 0], [1, 0, 0]]),  # rank 2.8: 3.8
        ([[5, 2, 3], [4, 1, NAN]], 0.2, [[1, 0, 0], [0, 0, 0]]),  # rank 3.2: 4.2
        ([[5, 2, 3], [4, 1, 9]], 0.0, [[1, 0, 0], [0, 0, 0]]),  # the largest
        ([[1, 1, 1], [1, 2, 9]], 0.3, [[1, 1, 1], [1, 1, 0]]),  # rank 2.8: 1, and ties stay
        ([[1, 1, 1], [1, 2, 9]], 0.2, [[0, 0, 0], [0, 1, 0]]),  # rank 3.2: 1.2
    ],
)
def test_entropy_quantile_by_hand(entropy: list, top: float, kept: list):
    mask, kept = torch.tensor([[1, 1, 1], [1, 1, 0]]), f64(kept)
    lp = torch.full((2, 3), -2.0, dtype=F64).requires_grad_()
    H = f64(entropy).requires_grad_()
    more = {"ref_logps": lp.detach() + 1, "beta": 0.1, "loss_scale": 0.5, "loss_type": "reinforce"}
    out = policy_loss(
        lp,
        f64([1, -3]),
        entropy=H,
        completion_mask=mask,
        top_entropy_quantile=top,
        entropy_coef=0.2,
        **more,
    )
    # The KL stays; the weights are not renormalised; the bonus is the mean over what is kept.
    kl = (math.e - 2) * mask.double()
    expected = kept * f64([[2], [-6]]) + 0.1 * kl
    torch.testing.assert_close(out.per_token_loss, expected, **TIGHT)
    n, seen = kept.sum(), f64(entropy).nan_to_num()
    bonus = 0.5 * 0.2 * (kept * seen).sum() / n
    torch.testing.assert_close(out.loss.detach(), 0.5 / 5 * expected.sum() - bonus, **TIGHT)
    torch.testing.assert_close(grad(out.loss, H), -0.1 / n * kept, **TIGHT)
    # The metric is over all unmasked tokens.
    torch.testing.assert_close(out.metrics["entropy"], (seen * mask).sum() / 5, **TIGHT)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masks_and_weights_multiply(loss_type: str):
    """ℓ_policy = term·off_policy_mask·entropy_mask·is_weight, each as if alone."""
    batch = random_logps()
    off_policy, quantile = {"off_policy_mask_threshold": 0.1}, {"top_entropy_quantile": 0.6}
    weights = noise(6, 7, seed=3).exp()
    plain = policy_loss(**batch, loss_type=loss_type).per_token_loss
    a = policy_loss(**batch, loss_type=loss_type, **off_policy).per_token_loss
    b = policy_loss(**batch, loss_type=loss_type, **quantile).per_token_loss
    weighted = policy_loss(**batch, loss_type=loss_type, importance_weights=weights).per_token_loss
    if loss_type not in ("vespo", "gmpo"):
        torch.testing.assert_close(weighted, plain * weights, **TIGHT)
    every = policy_loss(
        **batch, loss_type=loss_type, importance_weights=weights, **off_policy, **quantile
    ).per_token_loss
    assert ((a == 0) & (plain != 0)).any() and ((b == 0) & (plain != 0)).any()
    torch.testing.assert_close(every, torch.where((a != 0) & (b != 0), weighted, 0), **TIGHT)
