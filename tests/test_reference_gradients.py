"""The reference's gradients against the closed forms."""

import math

import pytest
import torch
from torch import Tensor

from reference import LOSS_TYPES, grpo_loss, policy_loss, token_logprobs
from reference.kl import KL_ESTIMATORS
from reference.knobs import TERM_LEVELS
from reference.weights import WEIGHTS
from reference_cases import INF, TIGHT, f64, grad, noise, random_batch, random_logps

# --- ∂loss/∂lp: every term at every level -------------------------------------------------------------------
#
# Closed forms, token by token in plain numbers. A term gives (∂ℓ/∂r̂, ∂ℓ/∂lp) as functions of ρ, A, p, p_old.

LOW, HIGH, DELTA, DUAL = 0.1, 0.2, 1.25, 1.15
SAPO, DRO, CISPO = (0.8, 1.3), 0.7, (0.85, 1.1)
KNOBS = {
    "clipped": {"epsilon": LOW, "epsilon_high": HIGH},
    "cispo": {"cispo_min": CISPO[0], "cispo_max": CISPO[1]},
    "sapo": {"sapo_temperature_pos": SAPO[0], "sapo_temperature_neg": SAPO[1]},
    "vespo": {},
    "reinforce": {},
    "gmpo": {"epsilon": LOW, "epsilon_high": HIGH},
    "dppo_tv": {"epsilon": 0.03, "epsilon_high": 0.05, "dual_clip": DUAL},
    "dppo_kl": {"epsilon": 0.003, "epsilon_high": 0.005, "dual_clip": DUAL},
    "topr": {},
    "dro": {"dro_beta": DRO},
}


def clipped_slope(rho: float, A: float, delta: float = INF, dual: float = INF) -> float:
    low, high = 1 - LOW, 1 + HIGH
    free, clip = min(rho, delta) * A, min(max(rho, low), high) * A
    if A < 0 and -min(free, clip) > -dual * A:
        return 0.0
    if free <= clip:
        return -rho * A if rho <= delta else 0.0
    return -rho * A if low <= rho <= high else 0.0


def sapo_slope(rho: float, A: float) -> float:
    gate = 1 / (1 + math.exp(-SAPO[A <= 0] * (rho - 1)))
    return -4 * A * rho * gate * (1 - gate)


def dppo_weight(term: str, rho: float, A: float, p: float, old: float) -> float:
    if term == "dppo_tv":
        keep = p - old <= 0.05 if A > 0 else p - old >= -0.03
    else:
        kl = old * math.log(old / p) + (1 - old) * math.log((1 - old + 1e-8) / (1 - p + 1e-8))
        keep = (kl <= 0.005 or p <= old) if A > 0 else (kl <= 0.003 or p >= old)
    return min(rho, DUAL) * keep


def slopes_of(term: str, rho: float, A: float, p: float, old: float) -> tuple[float, float]:
    if term == "dro":
        return DRO * math.log(rho), -A
    if A == 0:
        return 0.0, 0.0
    return {
        "clipped": lambda: (clipped_slope(rho, A), 0.0),
        "cispo": lambda: (0.0, -min(max(rho, CISPO[0]), CISPO[1]) * A),
        "sapo": lambda: (sapo_slope(rho, A), 0.0),
        "reinforce": lambda: (0.0, -A),
        "topr": lambda: (0.0, -A if A > 0 else -min(rho, 1) * A),
        "dppo_tv": lambda: (0.0, -A * dppo_weight(term, rho, A, p, old)),
        "dppo_kl": lambda: (0.0, -A * dppo_weight(term, rho, A, p, old)),
    }[term]()


def vespo_slope(r: list[float], weights: list[float], A: float) -> float:
    log_w = sum(r) + sum(math.log(w) for w in weights)
    k, rate = (2, 3) if A >= 0 else (3, 2)
    return -A * math.exp(rate + k * log_w - rate * math.exp(log_w))


def gmpo_slopes(r: list[float], A: list[float], weights: list[float]) -> list[float]:
    """Of −Ā·exp(mean δ)·exp(mean log weight), not yet divided by B."""
    n = len(r)
    delta = [min(x, HIGH) if a > 0 else max(x, -LOW) if a < 0 else 0.0 for x, a in zip(r, A)]
    loss = -sum(A) / n * math.exp((sum(delta) + sum(map(math.log, weights))) / n)
    return [loss / n * ((a > 0 and x <= HIGH) or (a < 0 and x >= -LOW)) for x, a in zip(r, A)]


def kl_of(u: float, estimator: str) -> tuple[float, float]:
    """Value and slope."""
    value = {"k1": -u, "abs": abs(u), "k2": u * u / 2, "k3": math.exp(u) - u - 1}[estimator.rstrip("+")]
    slopes = {"k1": 1.0, "abs": -math.copysign(1, u), "k2": -u, "k3": 1 - math.exp(u), "k1+": -u, "k3+": -u}
    return value, slopes[estimator]


def closed_gradient(batch: dict, term: str, level: str, w: Tensor, weights: Tensor, beta: float = 0.0,
                    estimator: str = "k3", bias: bool = False) -> Tensor:  # fmt: skip
    """∂ Σ w·(term·is_weight + β·kl)/∂lp, sequence by sequence."""
    expected = torch.zeros_like(w)
    lp, ref = batch["logps"].detach(), batch["ref_logps"]
    for b, mask in enumerate(batch["completion_mask"]):
        ts = mask.nonzero().flatten().tolist()
        n = len(ts)
        r = [(lp - batch["old_logps"])[b, t].item() for t in ts]
        A = [batch["advantages"][b, t].item() for t in ts]
        w_b, is_b = w[b, ts].tolist(), weights[b, ts].tolist()
        total = {"sequence": sum(r) / max(n, 1), "sequence_token": sum(r) / max(n, 1), "sequence_sum": sum(r)}
        rho = [math.exp(total.get(level, x)) for x in r]
        through_r, local = [0.0] * n, [0.0] * n
        for i, t in enumerate(ts):
            if term == "vespo":
                local[i] = w_b[i] * vespo_slope(r, is_b, A[i])
            elif term == "gmpo":  # w is the mean over the B sequences' tokens: w·n = 1/B
                local[i] = w_b[i] * n * gmpo_slopes(r, A, is_b)[i]
            else:
                p, old = lp[b, t].exp().item(), batch["old_logps"][b, t].exp().item()
                dr, dlp = slopes_of(term, rho[i], A[i], p, old)
                through_r[i], local[i] = w_b[i] * is_b[i] * dr, w_b[i] * is_b[i] * dlp
            if beta:
                kl, slope = kl_of((ref - lp)[b, t].item(), estimator)
                local[i] += beta * w_b[i] * slope * (rho[i] if bias else 1)
                through_r[i] += beta * w_b[i] * kl * rho[i] * bias
        for i, t in enumerate(ts):
            spread = {"sequence": sum(through_r) / n, "sequence_sum": sum(through_r)}
            expected[b, t] = local[i] + spread.get(level, through_r[i])
    return expected


PAIRS = [(term, level) for term, levels in TERM_LEVELS.items() for level in levels]


@pytest.mark.parametrize(("term", "level"), PAIRS)
@pytest.mark.parametrize("per_token", [False, True])
def test_gradient_of_every_term_at_every_level(term: str, level: str, per_token: bool):
    batch = random_logps(B=12)
    wide = noise(12, 7, seed=9) if per_token else batch["advantages"][:, None].expand(12, 7)
    weights = noise(12, 7, seed=8).mul(0.3).exp()
    knobs = {"policy_term": term, "importance_sampling_level": level, "loss_agg_mode": "sequence-mean"}
    out = policy_loss(
        **{**batch, "advantages": wide if per_token else batch["advantages"]},
        importance_weights=weights,
        loss_scale=0.7,
        **knobs,
        **KNOBS[term],
    )
    expected = closed_gradient({**batch, "advantages": wide}, term, level, out.weights, weights)
    assert expected.any()
    torch.testing.assert_close(grad(out.loss, batch["logps"]), expected, **TIGHT)


@pytest.mark.parametrize("level", TERM_LEVELS["clipped"])
@pytest.mark.parametrize(("delta", "dual"), [(DELTA, None), (None, DUAL), (DELTA, 1.3)])
def test_gradient_of_the_capped_clip(level: str, delta: float | None, dual: float | None, monkeypatch):
    batch = random_logps(B=12)
    ones = torch.ones(12, 7).double()
    out = policy_loss(
        **batch,
        importance_sampling_level=level,
        delta=delta,
        dual_clip=dual,
        **KNOBS["clipped"],
    )
    assert (out.metrics["ratio/max"] > (delta or 0)) and (out.metrics["ratio/max"] > (dual or 0))
    plain = clipped_slope
    monkeypatch.setitem(globals(), "clipped_slope", lambda rho, A: plain(rho, A, delta or INF, dual or INF))
    wide = {**batch, "advantages": batch["advantages"][:, None].expand(12, 7)}
    expected = closed_gradient(wide, "clipped", level, out.weights, ones)
    torch.testing.assert_close(grad(out.loss, batch["logps"]), expected, **TIGHT)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("level", TERM_LEVELS["clipped"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradient_of_every_kl_at_every_level(estimator: str, level: str, bias: bool):
    batch = random_logps(B=6)
    knobs = {"importance_sampling_level": level, "kl_estimator": estimator, "use_bias_correction_kl": bias}
    # global-tokens, so that a long sequence weighs more than a short one
    out = policy_loss(**batch, **knobs, beta=0.3, loss_agg_mode="global-tokens", **KNOBS["clipped"])
    wide = {**batch, "advantages": batch["advantages"][:, None].expand(6, 7)}
    ones = torch.ones(6, 7).double()
    expected = closed_gradient(wide, "clipped", level, out.weights, ones, 0.3, estimator, bias)
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
    # luspo and topr are sums over a sequence's tokens, of which there are 5.
    tokens = {"luspo": 5, "topr": 5}.get(loss_type, 1)
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
        }.get(agg, {"global_batch_size": nonempty})
        pieces.append(grads(policy_loss(**part, **knobs, **extra).loss, part))
    for got, want in zip(zip(*pieces), expected):
        torch.testing.assert_close(torch.cat(got), want, **TIGHT)


def grads(loss: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    inputs = batch["logps"], batch["entropy"]
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
