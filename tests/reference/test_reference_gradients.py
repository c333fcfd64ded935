"""The reference's gradients against the closed forms."""

import math

import pytest
import torch
from torch import Tensor

from kl_table import facts_of_kl
from reference import LOSS_TYPES, Knobs, grpo_loss, policy_loss, token_logprobs
from reference.kl import KL_ESTIMATORS
from reference.knobs import TERM_LEVELS
from reference.weights import WEIGHTS
from reference_cases import TIGHT, f64, grad, noise, random_batch, random_logps
from term_table import facts, unnoticed

# --- ∂loss/∂lp: every term at every level -------------------------------------------------------------------
#
# Closed forms, token by token in plain numbers: those of tests/helpers/term_table.py.


def closed_gradient(batch: dict, k: Knobs, w: Tensor, weights: Tensor) -> Tensor:
    """∂ Σ w·(term·is_weight + β·kl)/∂lp, sequence by sequence."""
    expected, known, level, bias = torch.zeros_like(w), facts(k.term), k.level, k.use_bias_correction_kl
    lp, ref = batch["logps"].detach(), batch["ref_logps"]
    for b, mask in enumerate(batch["completion_mask"]):
        ts = mask.nonzero().flatten().tolist()
        n = len(ts)
        r = [(lp - batch["old_logps"])[b, t].item() for t in ts]
        A = [batch["advantages"][b, t].item() for t in ts]
        w_b, is_b = w[b, ts].tolist(), weights[b, ts].tolist()
        total = {"sequence": sum(r) / max(n, 1), "sequence_token": sum(r) / max(n, 1), "sequence_sum": sum(r)}
        rho = [math.exp(total.get(level, x)) for x in r]
        through_r, local = [0.0] * n, known.of_sequence(k, w_b, r, A, is_b) if known.of_sequence else [0.0] * n
        if known.influences:
            is_b = [x * y for x, y in zip(is_b, known.influences(k, r, A, ts))]
        for i, t in enumerate(ts):
            if known.slopes:
                p, old = lp[b, t].exp().item(), batch["old_logps"][b, t].exp().item()
                dr, dlp = known.slopes(k, rho[i], A[i], p, old)
                through_r[i], local[i] = w_b[i] * is_b[i] * dr, w_b[i] * is_b[i] * dlp
            if k.beta:
                kl, slope = facts_of_kl(k.kl_estimator).closed((ref - lp)[b, t].item())
                local[i] += k.beta * w_b[i] * slope * (rho[i] if bias else 1)
                through_r[i] += k.beta * w_b[i] * kl * rho[i] * bias
        for i, t in enumerate(ts):
            spread = {"sequence": sum(through_r) / n, "sequence_sum": sum(through_r)}
            expected[b, t] = local[i] + spread.get(level, through_r[i])
    return expected


PAIRS = [(term, level) for term, levels in TERM_LEVELS.items() for level in levels]


def rare_tokens(**kwargs) -> dict[str, Tensor]:
    """`random_logps` of probabilities around 0.004, which the settings of tests/helpers/term_table.py are for."""
    batch = random_logps(**kwargs)
    lower = {name: batch[name].detach() - 4 for name in ("logps", "old_logps", "ref_logps")}
    return {**batch, **lower, "logps": lower["logps"].requires_grad_()}


@pytest.mark.parametrize(("term", "level"), PAIRS)
@pytest.mark.parametrize("per_token", [False, True])
def test_gradient_of_every_term_at_every_level(term: str, level: str, per_token: bool):
    batch = rare_tokens(B=12)
    wide = noise(12, 7, seed=9) if per_token else batch["advantages"][:, None].expand(12, 7)
    weights = noise(12, 7, seed=8).mul(0.3).exp()
    common = {"policy_term": term, "importance_sampling_level": level, "loss_agg_mode": "sequence-mean"}
    for setting in facts(term).settings:
        knobs = {**common, **setting}
        out = policy_loss(
            **{**batch, "advantages": wide if per_token else batch["advantages"]},
            importance_weights=weights,
            loss_scale=0.7,
            **knobs,
        )
        expected = closed_gradient({**batch, "advantages": wide}, Knobs(**knobs), out.weights, weights)
        assert expected.any()
        torch.testing.assert_close(grad(out.loss, batch["logps"]), expected, **TIGHT)


@pytest.mark.parametrize("term", TERM_LEVELS)
def test_the_settings_bite(term: str):
    """On this data, two knobs that are swapped or one that is dropped would show in the gradient."""
    batch = rare_tokens(B=12)

    def evaluate(knobs: dict) -> list[float]:
        loss = policy_loss(**batch, policy_term=term, **knobs).loss
        return grad(loss, batch["logps"]).flatten().tolist()

    assert not (unseen := unnoticed(term, evaluate)), f"settings of {term!r} in tests/helpers/term_table.py: {unseen}"


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("level", TERM_LEVELS["clipped"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradient_of_every_kl_at_every_level(estimator: str, level: str, bias: bool):
    batch = random_logps(B=6)
    knobs = {"importance_sampling_level": level, "kl_estimator": estimator, "use_bias_correction_kl": bias, "beta": 0.3}
    # global-tokens, so that a long sequence weighs more than a short one
    knobs |= {"loss_agg_mode": "global-tokens", "epsilon": 0.1, "epsilon_high": 0.2}
    out = policy_loss(**batch, **knobs)
    wide = {**batch, "advantages": batch["advantages"][:, None].expand(6, 7)}
    expected = closed_gradient(wide, Knobs(**knobs), out.weights, torch.ones(6, 7).double())
    torch.testing.assert_close(grad(out.loss, batch["logps"]), expected, **TIGHT)


# --- ∂loss/∂logits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_of_the_logits(loss_type: str):
    """∂loss/∂logits = [g·(onehot − p) + h·p·(x̄ − x)]/τ, row by row, with g = ∂loss/∂lp and h = ∂loss/∂H."""
    batch = random_batch(B=4)
    tau, coef, scale = 0.7, 0.05, 0.25
    B, T, V = batch["logits"].shape
    mask, x = batch["completion_mask"], batch["logits"].detach() / tau
    kwargs = {"loss_type": loss_type, "beta": 0.3, "loss_scale": scale, "max_completion_length": 20}
    out = grpo_loss(**batch, **kwargs, temperature=tau, entropy_coef=coef)

    lp = out.logps.clone().requires_grad_()
    rest = {name: value for name, value in batch.items() if name not in ("logits", "completion_ids")}
    g = grad(policy_loss(lp, **rest, **kwargs).loss, lp)
    h = -scale * coef / mask.sum().item()
    expected = torch.zeros(B, T, V).double()
    for b, t in mask.nonzero().tolist():
        p = x[b, t].softmax(0)
        onehot = torch.eye(V).double()[batch["completion_ids"][b, t]]
        expected[b, t] = (g[b, t] * (onehot - p) + h * p * ((p * x[b, t]).sum() - x[b, t])) / tau
    torch.testing.assert_close(grad(out.loss, batch["logits"]), expected, rtol=1e-10, atol=1e-14)


# --- What a gradient is for ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_gradient_is_reinforce(loss_type: str):
    """At ρ = 1 every member of the family has the gradient of −A·log π."""
    batch = random_batch()
    del batch["old_logps"]
    batch["advantages"] = f64([1, -1, 1, -1])
    batch["completion_mask"] = torch.ones(4, 5)
    out = grpo_loss(**batch, loss_type=loss_type)
    lp = token_logprobs(batch["logits"], batch["completion_ids"]).logps
    # A sum over a sequence's tokens, of which there are 5, or a mean.
    tokens = 5 if LOSS_TYPES[loss_type].aggregation == "sequence-sum" else 1
    reinforce = -(batch["advantages"][:, None] * lp).mean() * tokens
    torch.testing.assert_close(grad(out.loss, batch["logits"]), grad(reinforce, batch["logits"]), **TIGHT)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_makes_rewarded_tokens_likelier(loss_type: str):
    batch = random_batch()
    batch["old_logps"] = None
    dx = grad(grpo_loss(**batch, loss_type=loss_type).loss, batch["logits"])
    after = token_logprobs(batch["logits"] - 0.1 * dx, batch["completion_ids"]).logps
    before = token_logprobs(batch["logits"], batch["completion_ids"]).logps
    mask = batch["completion_mask"]
    signs = batch["advantages"].sign()[:, None].expand_as(mask)
    assert torch.equal((after - before).sign()[mask], signs[mask])


@pytest.mark.parametrize("agg", WEIGHTS)
@pytest.mark.parametrize("level", TERM_LEVELS["clipped"])
def test_micro_batches_add_up(agg: str, level: str):
    """With what each weighting needs to know of the whole batch. The bonus wants loss_scale = N_j/N, as only
    batch-tokens does."""
    whole = random_logps(B=12)
    N = whole["completion_mask"].sum().item()
    nonempty = whole["completion_mask"].any(1).sum().item()
    knobs = {"loss_agg_mode": agg, "importance_sampling_level": level, "beta": 0.1, "max_completion_length": 9}
    whole["entropy"].requires_grad_()
    if agg == "batch-tokens":
        knobs["entropy_coef"] = 0.1
    expected = grads(policy_loss(**whole, **knobs).loss, whole)
    pieces = []
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        part = {name: value.detach()[rows] for name, value in whole.items()}
        tokens, sequences = part["completion_mask"].sum().item(), part["logps"].shape[0]
        for name in ("logps", "entropy"):
            part[name].requires_grad_()
        by_sequence = {"loss_scale": sequences / 12}
        extra = {
            "sequence-mean": by_sequence,
            "sequence-sum": by_sequence,
            "constant": by_sequence,
            "batch-tokens": {"loss_scale": tokens / N},
            "global-tokens": {"num_items_in_batch": N},
            "token-mean": {"num_items_in_batch": N},
            "token-sum": {},
            "seq-mean-token-sum": {"global_batch_size": nonempty},
            "seq-mean-token-mean": {"global_batch_size": nonempty},
            "seq-mean-token-sum-norm": {"global_batch_size": nonempty},
        }
        if agg not in extra:
            pytest.fail(f"test_micro_batches_add_up does not know what makes parts of {agg!r} add up", pytrace=False)
        pieces.append(grads(policy_loss(**part, **knobs, **extra[agg]).loss, part))
    for got, want in zip(zip(*pieces), expected):
        torch.testing.assert_close(torch.cat(got), want, **TIGHT)


def grads(loss: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    inputs = batch["logps"], batch["entropy"]
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
