"""The reference's gradients against the closed forms, and what no input may break."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reference import group_advantages, grpo_loss, token_logprobs
from tests.reference_cases import F64, INF, NAN, TIGHT, f64, grad, random_batch

# --- Gradients against the closed forms ---------------------------------------------------------------------


def closed_slope(rho: float, A: float, lo: float, hi: float, delta: float) -> float:
    """∂ℓ/∂lp of the clipped term, from the table of its branches."""
    if min(rho, delta) * A <= min(max(rho, lo), hi) * A:
        return -rho * A if rho <= delta else 0.0
    return -rho * A if lo <= rho <= hi else 0.0


def closed_kl_slope(u: float, estimator: str) -> float:
    return {"k1": 1.0, "k2": -u, "k3": 1 - math.exp(u)}[estimator]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("delta", [None, 1.05, 1.5])
def test_gradient_is_the_closed_form(loss_type: str, estimator: str, delta: float | None):
    """∂loss/∂logits = [g·(onehot − p) + h·p·(x̄ − x)]/τ, row by row."""
    batch = random_batch()
    tau, beta, coef, scale = 0.7, 0.3, 0.05, 0.25
    B, T, V = batch["logits"].shape
    mask, x = batch["completion_mask"], batch["logits"].detach() / tau
    weights = 0.5 + torch.rand(B, T, dtype=F64)
    lp = x.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    noise = torch.linspace(-0.5, 0.5, B * T, dtype=F64).reshape(T, B).T  # ρ from 0.6 to 1.6 in every sequence
    batch["old_logps"], batch["ref_logps"] = lp + noise, lp - 0.7 * noise
    out = grpo_loss(
        **batch,
        loss_type=loss_type,
        kl_estimator=estimator,
        delta=delta,
        epsilon=0.1,
        epsilon_high=0.2,
        beta=beta,
        entropy_coef=coef,
        temperature=tau,
        loss_scale=scale,
        importance_weights=weights,
        max_completion_length=20,
    )
    expected = torch.zeros(B, T, V, dtype=F64)
    for b, t in mask.nonzero().tolist():
        n = mask[b].sum().item()
        w = {"grpo": 1 / (n * B), "dr_grpo": 1 / (B * 20)}.get(loss_type, 1 / mask.sum().item())
        rho = math.exp(lp[b, t] - batch["old_logps"][b, t])
        u = (batch["ref_logps"] - lp)[b, t].item()
        A = batch["advantages"][b].item()
        slope = weights[b, t] * closed_slope(rho, A, 0.9, 1.2, delta or INF)
        slope += beta * closed_kl_slope(u, estimator)
        p = x[b, t].softmax(0)
        onehot = torch.eye(V, dtype=F64)[batch["completion_ids"][b, t]]
        entropy_slope = -coef / mask.sum().item() * p * ((p * x[b, t]).sum() - x[b, t])
        expected[b, t] = scale / tau * (w * slope * (onehot - p) + entropy_slope)
    torch.testing.assert_close(grad(out.loss, batch["logits"]), expected, rtol=1e-10, atol=1e-14)


def test_on_policy_gradient_is_reinforce():
    """Without old_logps the loss is Σ w·(−A), here 0, and its gradient is that of −A·log π, which is not."""
    batch = random_batch()
    del batch["old_logps"]
    batch["advantages"] = f64([1, -1, 1, -1])
    batch["completion_mask"] = torch.ones(4, 5)
    out = grpo_loss(**batch)
    assert out.loss.item() == pytest.approx(0, abs=1e-15)
    lp = token_logprobs(batch["logits"], batch["completion_ids"]).logps
    reinforce = -(batch["advantages"][:, None] * lp).mean()
    torch.testing.assert_close(grad(out.loss, batch["logits"]), grad(reinforce, batch["logits"]), **TIGHT)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_a_step_makes_rewarded_tokens_likelier(loss_type: str):
    batch = random_batch()
    batch["old_logps"] = None
    dx = grad(grpo_loss(**batch, loss_type=loss_type).loss, batch["logits"])
    after = token_logprobs(batch["logits"] - 0.1 * dx, batch["completion_ids"]).logps
    before = token_logprobs(batch["logits"], batch["completion_ids"]).logps
    mask = batch["completion_mask"]
    signs = batch["advantages"].sign()[:, None].expand_as(mask)
    assert torch.equal((after - before).sign()[mask], signs[mask])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_micro_batches_add_up(loss_type: str):
    whole = random_batch(B=8)
    N = whole["completion_mask"].sum().item()
    knobs = {"loss_type": loss_type, "beta": 0.1, "max_completion_length": 9}
    expected = grad(grpo_loss(**whole, **knobs).loss, whole["logits"])
    pieces = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        part = {name: value.detach()[rows] for name, value in whole.items()}
        part["logits"].requires_grad_()
        tokens, sequences = part["completion_mask"].sum().item(), part["logits"].shape[0]
        extra = {
            "bnpo": {"loss_scale": tokens / N},
            "dapo": {"num_items_in_batch": N},
        }.get(loss_type, {"loss_scale": sequences / 8})
        pieces.append(grad(grpo_loss(**part, **knobs, **extra).loss, part["logits"]))
    torch.testing.assert_close(torch.cat(pieces), expected, **TIGHT)


# --- Edges --------------------------------------------------------------------------------------------------


def test_masked_positions_may_hold_anything():
    clean = random_batch()
    advantages = clean["advantages"][:, None].expand(4, 5).clone()
    kwargs = {"beta": 0.1, "entropy_coef": 0.1, "importance_weights": torch.rand(4, 5, dtype=F64)}
    a = grpo_loss(**{**clean, "advantages": advantages}, **kwargs)
    da = grad(a.loss, clean["logits"])

    off = ~clean["completion_mask"]
    dirty = {name: value.detach().clone() for name, value in clean.items()}
    dirty["advantages"] = advantages
    for name in ("logits", "advantages", "old_logps", "ref_logps"):
        dirty[name][off] = NAN
    dirty["completion_ids"][off] = -100
    kwargs["importance_weights"] = kwargs["importance_weights"].masked_fill(off, INF)
    extra = torch.full((4, 1, 7), NAN, dtype=F64)
    dirty["logits"] = torch.cat([dirty["logits"], extra], dim=1).requires_grad_()  # (B, T+1, V)
    b = grpo_loss(**dirty, **kwargs)
    db = grad(b.loss, dirty["logits"])
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(da, db[:, :-1]) and not db[:, -1].any() and not db[:, :-1][off].any()
    for field in ("logps", "entropy", "per_token_loss", "kl", "weights"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert {k: v.item() for k, v in a.metrics.items()} == {k: v.item() for k, v in b.metrics.items()}


def test_nan_in_an_unmasked_row_is_passed_on_even_if_its_advantage_is_zero():
    batch = random_batch()
    x = batch["logits"].detach().clone()
    batch["completion_mask"][1, 2] = True
    x[1, 2, 0] = NAN
    batch["logits"] = x.requires_grad_()
    batch["advantages"] = f64([1, 0, 1, 1])
    out = grpo_loss(**batch)
    dx = grad(out.loss, x)
    assert out.loss.isnan() and dx[1, 2].isnan().all()
    assert dx.isnan().sum() == x.shape[-1], "the other rows stay clean"


def test_all_masked_batch():
    batch = random_batch()
    batch["completion_mask"] = torch.zeros(4, 5)
    for loss_type in ("grpo", "bnpo", "dapo", "dr_grpo"):
        out = grpo_loss(**batch, loss_type=loss_type, beta=0.1, entropy_coef=0.1)
        assert out.loss == 0 and not grad(out.loss, batch["logits"]).any()
    assert out.metrics["entropy"] == 0 and out.metrics["clip_ratio/low_min"].isnan()
    assert out.metrics["ratio/min"].isnan()


def test_zero_advantage_is_silent_at_any_ratio():
    batch = random_batch()
    batch["old_logps"][0], batch["old_logps"][1] = -INF, INF
    batch["advantages"] = torch.zeros(4)
    out = grpo_loss(**batch)
    assert out.loss == 0 and not grad(out.loss, batch["logits"]).any()


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


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"loss_type": "gpro"}, ValueError, "loss_type='gpro'.*'dapo'"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator='k4'.*'k3'"),
        ({"importance_sampling_level": "word"}, ValueError, "importance_sampling_level"),
        ({"reduction": "sum"}, ValueError, "reduction='sum'"),
        ({"beta": 0.1, "ref_logps": None}, ValueError, "ref_logps"),
        ({"advantages": None}, ValueError, "advantages, or rewards"),
        ({"rewards": torch.ones(4)}, ValueError, "advantages, or rewards"),
        ({"advantages": None, "rewards": torch.ones(4)}, ValueError, "num_generations"),
        ({"advantages": None, "rewards": torch.ones(4), "num_generations": 3}, ValueError, "do not divide"),
        ({"advantages": None, "rewards": torch.ones(4), "num_generations": 1}, ValueError, "two completions"),
        ({"epsilom": 0.2}, TypeError, "epsilom"),
    ],
)
def test_errors(change: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        grpo_loss(**{**random_batch(), **change})
    with pytest.raises(ValueError, match="scale_rewards='std'"):
        group_advantages(torch.ones(4), 2, scale_rewards="std")


def test_reference_stands_alone():
    """It is the second statement of the mathematics only as long as it does not use the first."""
    code = "import sys; sys.modules['grpo_kernels'] = sys.modules['triton'] = None; import reference"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)
