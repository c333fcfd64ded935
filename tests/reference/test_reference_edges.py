"""What no input may break, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reference import LOSS_TYPES, group_advantages, grpo_loss, policy_loss
from reference.knobs import TERM_LEVELS
from reference.levels import ONE_RATIO_PER_SEQUENCE
from reference.terms import SPEAK_WITHOUT_ADVANTAGE, WEIGHTS_INSIDE
from reference_cases import F64, INF, NAN, TIGHT, f64, grad, noise, random_batch, random_logps
from term_table import facts

# --- Edges --------------------------------------------------------------------------------------------------

EVERY_LOSS_TYPE = pytest.mark.parametrize("loss_type", LOSS_TYPES)
SPRINGS = [name for name, v in LOSS_TYPES.items() if v.term in SPEAK_WITHOUT_ADVANTAGE]  # pull where A = 0 too


@EVERY_LOSS_TYPE
@pytest.mark.parametrize("corrected", [False, True])
def test_masked_positions_may_hold_anything(loss_type: str, corrected: bool):
    clean = random_batch()
    clean["advantages"] = clean["advantages"][:, None].expand(4, 5).clone()
    clean["sampling_logps"] = clean["old_logps"] + 0.2 * noise(4, 5)
    kwargs = {"beta": 0.1, "entropy_coef": 0.1, "use_bias_correction_kl": True, "loss_type": loss_type}
    kwargs |= {"off_policy_mask_threshold": 0.1, "top_entropy_quantile": 0.8}
    if corrected:
        kwargs["sampling_correction"] = "token_truncate"
    else:
        clean["importance_weights"] = noise(4, 5, seed=1).exp()
    a = grpo_loss(**clean, **kwargs)
    da = grad(a.loss, clean["logits"])

    off = ~clean["completion_mask"]
    dirty = {name: value.detach().clone() for name, value in clean.items()}
    for name in dirty.keys() - {"completion_mask", "completion_ids"}:
        dirty[name][off] = INF if name == "importance_weights" else NAN
    dirty["completion_ids"][off] = -100
    extra = torch.full((4, 1, 7), NAN, dtype=F64)
    dirty["logits"] = torch.cat([dirty["logits"], extra], dim=1).requires_grad_()  # (B, T+1, V)
    b = grpo_loss(**dirty, **kwargs)
    db = grad(b.loss, dirty["logits"])
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(da, db[:, :-1]) and not db[:, -1].any() and not db[:, :-1][off].any()
    for field in ("logps", "entropy", "per_token_loss", "kl", "weights", "importance_weights"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
        assert not getattr(b, field)[off].any(), field
    assert {k: v.item() for k, v in a.metrics.items()} == {k: v.item() for k, v in b.metrics.items()}


@EVERY_LOSS_TYPE
def test_nan_in_an_unmasked_row_is_passed_on_even_if_its_advantage_is_zero(loss_type: str):
    batch = random_batch()
    x = batch["logits"].detach().clone()
    batch["completion_mask"][1, 2] = True
    x[1, 2, 0] = NAN
    batch["logits"] = x.requires_grad_()
    batch["advantages"] = f64([1, 0, 1, 1])
    out = grpo_loss(**batch, loss_type=loss_type)
    dx = grad(out.loss, x)
    assert out.loss.isnan() and dx[1, 2].isnan().all()
    assert not dx[[0, 2, 3]].isnan().any(), "the other sequences stay clean"
    if loss_type not in SPRINGS or LOSS_TYPES[loss_type].level == "token":  # else one square for the whole sequence
        assert dx.isnan().sum() == x.shape[-1], "so do the other rows"


@EVERY_LOSS_TYPE
def test_nan_is_passed_on_by_every_mask(loss_type: str):
    """A row may not be read, but it may not look clean either."""
    batch = random_logps()
    lp = batch["logps"].detach().clone()
    batch["completion_mask"][1, 2] = True
    lp[1, 2] = NAN
    batch["logps"] = lp.requires_grad_()
    for mask in (
        {"off_policy_mask_threshold": -1e9},
        {"top_entropy_quantile": 0.01},
        {"importance_weights": torch.zeros(6)},
    ):
        out = policy_loss(**batch, loss_type=loss_type, **mask)
        assert out.per_token_loss[1, 2].isnan() and grad(out.loss, lp)[1, 2].isnan()


@EVERY_LOSS_TYPE
def test_all_masked_batch(loss_type: str):
    batch = random_batch()
    batch["completion_mask"] = torch.zeros(4, 5)
    kwargs = {"off_policy_mask_threshold": 0.1, "top_entropy_quantile": 0.5, "beta": 0.1, "entropy_coef": 0.1}
    out = grpo_loss(**batch, **kwargs, loss_type=loss_type)
    assert out.loss == 0 and not grad(out.loss, batch["logits"]).any()
    assert out.metrics["entropy"] == 0 and out.metrics["ratio/min"].isnan()
    if "clip_ratio/low_min" in out.metrics and LOSS_TYPES[loss_type].level not in ONE_RATIO_PER_SEQUENCE:
        assert out.metrics["clip_ratio/low_min"].isnan()


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name not in SPRINGS])
def test_zero_advantage_is_silent_at_any_ratio(loss_type: str):
    batch = random_batch()
    batch["old_logps"][0], batch["old_logps"][1] = -INF, INF
    batch["advantages"] = torch.zeros(4)
    for weights in (None, torch.full((4, 5), INF)):
        out = grpo_loss(**batch, loss_type=loss_type, importance_weights=weights)
        assert out.loss == 0 and not grad(out.loss, batch["logits"]).any()


@EVERY_LOSS_TYPE
@pytest.mark.parametrize("drop", ["off_policy", "entropy", "weight"])
def test_what_is_dropped_is_silent_at_any_ratio(loss_type: str, drop: str):
    """0·∞ is NaN; a token that a mask drops is dropped."""
    batch = random_logps()
    batch["completion_mask"] = torch.ones(6, 7)
    batch["advantages"] = f64([1, -1, 1, 1, 1, 1])
    batch["old_logps"][1] = -INF  # ρ = ∞ at A < 0, where nothing bounds ℓ
    if drop == "off_policy":
        kwargs = {"off_policy_mask_threshold": 0.5, "sampling_logps": batch["logps"].detach().clone()}
        kwargs["sampling_logps"][1] += 1
    elif drop == "entropy":
        batch["entropy"][1] = 0
        kwargs = {"top_entropy_quantile": 0.5}
    else:
        kwargs = {"importance_weights": f64([1, 0, 1, 1, 1, 1])}
    if loss_type == "gmpo" and drop == "weight":
        kwargs["importance_weights"][1] = 1  # its weights are in the exponent, where 0 is −∞
        batch["old_logps"][1] = -2
    out = policy_loss(**batch, **kwargs, loss_type=loss_type)
    slope = grad(out.loss, batch["logps"])
    assert out.loss.isfinite() and slope.isfinite().all() and slope[0].any()
    if not (LOSS_TYPES[loss_type].term in WEIGHTS_INSIDE and drop == "weight"):
        assert not out.per_token_loss[1].any() and not slope[1].any()


def test_a_banned_token_has_no_gradient_and_leaves_entropy_finite():
    batch = random_batch()
    x = batch["logits"].detach().clone()
    banned = (batch["completion_ids"] + 1) % x.shape[-1]
    x.scatter_(-1, banned[..., None], -INF)
    batch["logits"] = x.requires_grad_()
    out = grpo_loss(**batch, entropy_coef=0.1, beta=0.1)
    dx = grad(out.loss, x)
    assert out.loss.isfinite() and out.entropy.isfinite().all() and dx.isfinite().all()
    assert not dx.gather(-1, banned[..., None]).any()


def test_importance_weights_multiply_the_policy_term_alone():
    batch = random_batch()
    policy = grpo_loss(**batch).per_token_loss
    kl = grpo_loss(**batch, beta=0.1).per_token_loss - policy
    per_sequence = f64([2, 0.5, 3, 0])
    for weights in (per_sequence, per_sequence[:, None], per_sequence[:, None].expand(4, 5)):
        out = grpo_loss(**batch, beta=0.1, importance_weights=weights)
        torch.testing.assert_close(out.per_token_loss, per_sequence[:, None] * policy + kl, **TIGHT)


def test_per_token_advantages():
    batch = random_batch()
    wide = {**batch, "advantages": batch["advantages"][:, None].expand(4, 5)}
    assert torch.equal(grpo_loss(**batch).loss, grpo_loss(**wide).loss)
    wide["advantages"] = torch.arange(20, dtype=F64).reshape(4, 5)
    wide["old_logps"] = None
    expected = torch.where(batch["completion_mask"], -wide["advantages"], 0)
    torch.testing.assert_close(grpo_loss(**wide).per_token_loss, expected, **TIGHT)


# --- Errors -------------------------------------------------------------------------------------------------

PACKED = {
    "logits": torch.zeros(3, 2),
    "completion_ids": torch.zeros(3).long(),
    "advantages": torch.ones(2),
    "completion_mask": None,
    "old_logps": None,
    "ref_logps": None,
}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"loss_type": "gpro"}, ValueError, "loss_type='gpro'.*'dapo'"),
        ({"policy_term": "ppo"}, ValueError, "policy_term='ppo'.*'clipped'"),
        ({"kl_estimator": "no_such"}, ValueError, "kl_estimator='no_such'.*'k3'"),
        ({"kl_estimator": "k2+"}, ValueError, "kl_estimator"),
        ({"importance_sampling_level": "word"}, ValueError, "importance_sampling_level"),
        ({"loss_agg_mode": "mean"}, ValueError, "loss_agg_mode='mean'.*'token-mean'"),
        ({"scale_rewards": "std"}, ValueError, "scale_rewards='std'"),
        ({"reduction": "sum"}, ValueError, "reduction='sum'"),
        ({"beta": 0.1, "ref_logps": None}, ValueError, "ref_logps"),
        ({"advantages": None}, ValueError, "advantages, or rewards"),
        ({"rewards": torch.ones(4)}, ValueError, "advantages, or rewards"),
        ({"advantages": None, "rewards": torch.ones(4)}, ValueError, "num_generations"),
        ({"advantages": None, "rewards": torch.ones(4), "num_generations": 3}, ValueError, "do not divide"),
        ({"advantages": None, "rewards": torch.ones(4), "num_generations": 1}, ValueError, "two completions"),
        ({"epsilom": 0.2}, TypeError, "epsilom"),
        # Combinations without a meaning.
        ({"loss_type": "cispo", "epsilon_high": 0.3}, ValueError, "cispo_max"),
        ({"loss_type": "gmpo", "loss_agg_mode": "token-mean"}, ValueError, "gmpo"),
        ({"loss_type": "gmpo", "log_ratio_clamp": 1.0}, ValueError, "log_ratio_clamp"),
        ({"loss_type": "vespo", "log_ratio_clamp": 1.0}, ValueError, "log_ratio_clamp"),
        ({"loss_type": "sapo", "delta": 2.0}, ValueError, "delta"),
        ({"loss_type": "topr", "dual_clip": 2.0}, ValueError, "dual_clip"),
        ({"loss_type": "bnpo", "policy_term": "gmpo"}, ValueError, "gmpo"),
        ({"loss_type": "fipo", "importance_sampling_level": "sequence"}, ValueError, "'fipo'.*'token'"),
        ({"fipo_gamma": 0.5}, ValueError, "fipo_gamma belongs to 'fipo'"),
        ({"loss_type": "fipo", "fipo_gamma": 1.1}, ValueError, "fipo_gamma"),
        ({"fipo_decay_rate": 0.0}, ValueError, "fipo_decay_rate"),
        ({"fipo_safety_threshold": 0.0}, ValueError, "fipo_safety_threshold"),
        ({"fipo_clip_range": -0.1}, ValueError, "fipo_clip_range"),
        ({"sampling_correction": "token_mask"}, ValueError, "needs sampling_logps"),
        (
            {
                "sampling_correction": "token_mask",
                "sampling_logps": torch.zeros(4, 5),
                "importance_weights": torch.ones(4),
            },
            ValueError,
            "not both",
        ),
        ({"sampling_correction": "sequence"}, ValueError, "sampling_correction='sequence'.*'seq_mask_tis'"),
        # Values out of their range.
        ({"delta": 0.0}, ValueError, "delta"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip"),
        ({"kl_clamp": 0.0}, ValueError, "kl_clamp"),
        ({"sapo_temperature_pos": 0.0}, ValueError, "sapo_temperature_pos"),
        ({"top_entropy_quantile": 1.5}, ValueError, "top_entropy_quantile"),
        ({"log_ratio_clamp": -1.0}, ValueError, "log_ratio_clamp"),
        ({"log_ratio_clamp": (1.0, -1.0)}, ValueError, "log_ratio_clamp"),
        ({"loss_type": "cispo", "cispo_min": 6.0}, ValueError, "cispo_min"),
        ({"sampling_correction_min": 4.0}, ValueError, "sampling_correction_min"),
        ({"global_batch_size": -1}, ValueError, "global_batch_size"),
        # Packed input.
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens"),
        (PACKED, ValueError, "cu_seqlens"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 2])}, ValueError, "from 0 to 3"),
        ({**PACKED, "cu_seqlens": torch.tensor([1, 2, 3])}, ValueError, "from 0 to 3"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 4, 3])}, ValueError, "from 0 to 3"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 2, 3]), "loss_type": "dr_grpo"}, ValueError, "max_completion"),
        (
            {**PACKED, "cu_seqlens": torch.tensor([0, 2, 3]), "loss_agg_mode": "seq-mean-token-sum-norm"},
            ValueError,
            "max_completion",
        ),
    ],
)
def test_errors(change: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        grpo_loss(**{**random_batch(), **change})
    with pytest.raises(ValueError, match="scale_rewards='std'"):
        group_advantages(torch.ones(4), 2, scale_rewards="std")


@pytest.mark.parametrize("knobs", [{"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}])
def test_entropy_is_needed_where_it_is_used(knobs: dict):
    batch = random_logps()
    del batch["entropy"]
    assert policy_loss(**batch).entropy is None
    with pytest.raises(ValueError, match="need entropy"):
        policy_loss(**batch, **knobs)


@pytest.mark.parametrize(
    ("term", "level"),
    [(term, level) for term in TERM_LEVELS for level in ("token", "sequence", "sequence_token", "sequence_sum")],
)
def test_levels_that_a_term_has(term: str, level: str):
    knobs = {"policy_term": term, "importance_sampling_level": level}
    if level in facts(term).levels:
        assert policy_loss(**random_logps(), **knobs).loss.isfinite()
    else:
        with pytest.raises(ValueError, match=f"importance_sampling_level='{level}'.*'{term}'"):
            policy_loss(**random_logps(), **knobs)


def test_reference_stands_alone():
    """It is the second statement of the mathematics only as long as it does not use the first."""
    code = "import sys; sys.modules['grpo_kernels'] = sys.modules['triton'] = None; import reference"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
