"""Parity with verl itself: its unpatched `ppo_loss`, in float64, against the reference and the fused loss."""

import dataclasses
import importlib.metadata
import math

import pytest
import torch

import reference
from cases import BACKENDS, DEVICE, expected, make_case, on_device, ours
from grpo_kernels import group_advantages, policy_loss
from tolerance import advantage_error, assert_within, bounds

try:
    importlib.metadata.version("verl")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("verl is not installed; it gets an environment of its own: make test-verl", allow_module_level=True)
from verl_oracle import verl_advantages, verl_loss, verl_rollout_is_weights

# verl's 1e-8 beside a token count, 1e-10 beside a weight; elsewhere float64 agrees to its last digits.
TIGHT = 3e-8
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5}
PROBABILITY_CLIP = {"clip_ratio_low": 0.03, "clip_ratio_high": 0.1, "clip_ratio_c": 1.5}
LOSSES = {
    "vanilla": CLIP,
    "gspo": {**CLIP, "loss_agg_mode": "seq-mean-token-mean"},
    "sapo": {"tau_pos": 1.2, "tau_neg": 1.6, "loss_agg_mode": "seq-mean-token-mean"},
    "cispo": CLIP,
    "geo_mean": {**CLIP, "loss_agg_mode": "seq-mean-token-mean"},
    "dppo_tv": PROBABILITY_CLIP,
    "dppo_kl": PROBABILITY_CLIP,
    "gpg": {},
    "dro": {"dro_beta": 0.3},
}
# verl's clip fractions under our names. Its cispo and geo_mean count every ratio out of bounds, ours those
# that the advantage pushes further out; the other terms clip nothing.
CLIPPED = {"actor/pg_clipfrac": "clip_ratio/region_mean"}
CLIPPED_AND_CAPPED = {**CLIPPED, "actor/pg_clipfrac_lower": "clip_ratio/dual_mean"}
CLIP_FRACTIONS = {
    "vanilla": CLIPPED_AND_CAPPED,
    "gspo": CLIPPED,
    "dppo_tv": CLIPPED_AND_CAPPED,
    "dppo_kl": CLIPPED_AND_CAPPED,
}

backends = pytest.mark.parametrize("backend", ("reference", *BACKENDS))
losses = pytest.mark.parametrize("loss_mode", LOSSES)


# --- verl's configuration in our words --------------------------------------------------------------


def from_verl(
    *,
    loss_mode="vanilla",
    loss_agg_mode="token-mean",
    clip_ratio_low=0.2,
    clip_ratio_high=0.2,
    clip_ratio_c=3.0,
    tau_pos=1.0,
    tau_neg=1.05,
    dro_beta=None,
    entropy_coeff=0.0,
    use_kl_loss=False,
    kl_loss_coef=0.001,
    kl_loss_type="low_var_kl",
    loss_scale_factor=None,
    dp_size=1,
    batch_num_tokens=None,
    global_batch_size=None,
) -> dict:
    """Our keywords for `ActorConfig`'s, its defaults included."""
    clip = {"epsilon": clip_ratio_low, "epsilon_high": clip_ratio_high}
    dual = {"dual_clip": clip_ratio_c}
    safe = {"log_ratio_clamp": 20.0}
    term = {
        "vanilla": {"policy_term": "clipped", **clip, **dual, **safe},
        "gspo": {
            "policy_term": "clipped",
            "importance_sampling_level": "sequence_token",
            "log_ratio_clamp": (-math.inf, 10.0),
            **clip,
        },
        "sapo": {"policy_term": "sapo", "sapo_temperature_pos": tau_pos, "sapo_temperature_neg": tau_neg, **safe},
        "cispo": {"policy_term": "cispo", "cispo_min": 1 - clip_ratio_low, "cispo_max": 1 + clip_ratio_high, **safe},
        "geo_mean": {"policy_term": "gmpo", **clip},
        "dppo_tv": {"policy_term": "dppo_tv", **clip, **dual, **safe},
        "dppo_kl": {"policy_term": "dppo_kl", **clip, **dual, **safe},
        "gpg": {"policy_term": "reinforce"},
        "dro": {"policy_term": "dro", "dro_beta": dro_beta},
    }[loss_mode]
    if loss_mode == "geo_mean":  # always the mean over the sequences of the call
        weights = {}
    else:
        weights = {"loss_agg_mode": loss_agg_mode, "loss_scale": dp_size}
        if loss_agg_mode == "token-mean":
            weights["num_items_in_batch"] = batch_num_tokens
        if loss_agg_mode.startswith("seq-mean"):
            weights["global_batch_size"] = global_batch_size
        if loss_agg_mode == "seq-mean-token-sum-norm":
            weights["max_completion_length"] = loss_scale_factor
    kl = {}
    if use_kl_loss:
        names = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
        base = kl_loss_type.removesuffix("+")
        estimator = names.get(base, base)
        plus = "+" if kl_loss_type.endswith("+") and estimator != "k2" else ""  # k2's gradient is k2's own
        kl = {"beta": kl_loss_coef, "kl_estimator": estimator + plus}
        if estimator == "k3":
            kl["kl_clamp"] = 10.0
    bonus = {"entropy_coef": entropy_coeff} if entropy_coeff else {}
    return {**term, **weights, **kl, **bonus}


# --- Batches ------------------------------------------------------------------------------------------


def with_logps(case, lp, old, ref=None):
    """The case with logits that give its ids the log-probs lp, and with these old and, if given, ref."""
    ids = case.completion_ids.clamp(min=0)[..., None]
    logits = case.logits.double()
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    odds = lp.double() - torch.log(-torch.expm1(lp.double()))
    logits = logits.scatter(-1, ids, odds[..., None] + others).float()
    ref = case.ref_logps if ref is None else ref
    return dataclasses.replace(case, logits=logits, old_logps=old.float(), ref_logps=ref.float())


def usual(B=5, *, T=12, seed=0):
    """Probabilities of all sizes, ratios on both sides of every clip, one sequence fully masked."""
    case = make_case(B=B, T=T, V=31, seed=seed)
    g = torch.Generator().manual_seed(seed + 100)
    odds = 1.5 * torch.randn(B, T, generator=g)
    drift = 0.5 * torch.randn(B, T, generator=g) + torch.linspace(-1.2, 1.2, B)[:, None]
    lp, old = (torch.nn.functional.logsigmoid(x) for x in (odds, odds + drift))
    # k3's value reaches 10 at u = 2.61 and at u = −11
    u = torch.tensor([-25.0, -12.0, -10.0, -1.0, -0.1, 0.1, 1.0, 2.5, 2.7, 12.0, 25.0])
    return with_logps(case, lp, old, lp + u[torch.randint(len(u), (B, T), generator=g)])


def far_off(*, T=12, seed=0):
    """Log ratios far outside every clamp, within a sequence and as a sequence's mean."""
    case = make_case(B=5, T=T, V=31, seed=seed)
    g = torch.Generator().manual_seed(seed + 200)
    lp = -0.2 - torch.rand(5, T, generator=g)
    old = lp - 0.2 * torch.rand(5, T, generator=g)
    far = 11 + 18 * torch.rand(5, T, generator=g)
    far[0, ::2] = 0
    lp[0, 1::4] -= far[0, 1::4]  # the sequence's log ratios: small, −11 ... −29, small, 11 ... 29
    old[0, 3::4] -= far[0, 3::4]
    old[1] -= far[1]
    lp[4] -= far[4]
    for i in (0, 1, 4):  # no token left out; padding's id is no id
        case.completion_mask[i] = True
        case.completion_ids[i].clamp_(min=0)
    return with_logps(case, lp, old)


def check(case, backend, *, advantages=None, on_policy=False, with_is_weights=False, run=ours, **verl) -> None:
    """Loss, gradient and clip fractions of verl's keywords against those of ours."""
    mask = case.completion_mask
    advantages = case.token_advantages if advantages is None else advantages
    verls_advantages = (advantages[:, None] if advantages.dim() == 1 else advantages) * mask
    tensors = {"old_logps": None if on_policy else case.old_logps}
    if verl.get("use_kl_loss"):
        tensors["ref_logps"] = case.ref_logps
    weights = case.importance_weights if with_is_weights else None

    x = case.logits.double().requires_grad_()
    double = {name: None if t is None else t.double() for name, t in tensors.items()}
    loss, logged = verl_loss(
        x, case.completion_ids, verls_advantages.double(), completion_mask=mask,
        rollout_is_weights=None if weights is None else weights.double(), **double, **verl,
    )  # fmt: skip
    loss.backward()

    keywords = {**case.inputs("completion_ids", "completion_mask"), **tensors, **from_verl(**verl)}
    out = compare(case, backend, loss, x.grad, run=run, advantages=advantages, importance_weights=weights, **keywords)
    for name, our_name in CLIP_FRACTIONS.get(verl.get("loss_mode", "vanilla"), {}).items():
        assert out.metrics[our_name].item() == pytest.approx(logged[name], abs=1e-6), name


def compare(case, backend, loss, grad, *, run=ours, **keywords):
    if backend == "reference":
        out, actual = expected(case.logits, **keywords)
        torch.testing.assert_close(out.loss, loss, rtol=TIGHT, atol=1e-12)
        torch.testing.assert_close(actual, grad, rtol=TIGHT, atol=1e-12 * grad.abs().max().item())
    else:
        out, actual = run(case.logits, backend, **keywords)
        allowed = bounds(case.logits, **keywords)
        assert_within(out.loss, loss, allowed.loss + TIGHT * loss.detach().abs(), "loss")
        assert_within(actual, grad, allowed.grad + TIGHT * grad.abs(), "gradient")
    return out


def ours_from_logps(logits, backend, *, completion_ids, **keywords):
    """`ours` for `policy_loss`, which gets what verl's losses get: log-probs."""
    x = logits.double().requires_grad_()
    logps = x.log_softmax(-1).gather(-1, completion_ids.clamp(min=0)[..., None])[..., 0]
    out = policy_loss(logps.float().to(DEVICE), backend=backend, **on_device(keywords))
    out.loss.backward()
    return out, x.grad.float()


# --- Tests ---------------------------------------------------------------------------------------------


@backends
@losses
def test_policy_losses(loss_mode, backend):
    check(usual(), backend, loss_mode=loss_mode, **LOSSES[loss_mode])


@pytest.mark.parametrize("backend", BACKENDS)
@losses
def test_policy_losses_of_logps(loss_mode, backend):
    check(usual(seed=12), backend, run=ours_from_logps, loss_mode=loss_mode, **LOSSES[loss_mode])


@backends
@losses
def test_log_ratios_beyond_the_clamps(loss_mode, backend):
    check(far_off(), backend, loss_mode=loss_mode, **{**LOSSES[loss_mode], "clip_ratio_c": 3.0})


@backends
@pytest.mark.parametrize("loss_mode", ("vanilla", "dppo_tv", "dppo_kl"))
def test_clamps_show_where_no_other_bound_does(loss_mode, backend):
    check(far_off(), backend, loss_mode=loss_mode, **{**LOSSES[loss_mode], "clip_ratio_c": 1e30})


@backends
@losses
def test_on_policy(loss_mode, backend):
    check(usual(seed=1), backend, loss_mode=loss_mode, on_policy=True, **LOSSES[loss_mode])


@backends
@losses
def test_rollout_is_weights(loss_mode, backend):
    check(usual(seed=2), backend, loss_mode=loss_mode, with_is_weights=True, **LOSSES[loss_mode])


@backends
@pytest.mark.parametrize("threshold", (2.0, "0.5_2.0"), ids=("truncate", "mask"))
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_rollout_is_weights_made_here(level, threshold, backend):
    """verl's rollout_is: an upper bound truncates, two bounds mask."""
    case = usual(seed=11)
    mask, lp = case.completion_mask, case.old_logps
    g = torch.Generator().manual_seed(11)
    rollout = lp + 0.5 * torch.randn(lp.shape, generator=g)
    rollout[0] = lp[0] - 30  # beyond verl's ±20
    weights = verl_rollout_is_weights(lp.double(), rollout.double(), mask, level=level, threshold=threshold)
    assert 0 < (weights[mask] == (2 if threshold == 2.0 else 0)).sum() < mask.sum()  # some are out of bounds
    x = case.logits.double().requires_grad_()
    loss, _ = verl_loss(
        x, case.completion_ids, case.token_advantages.double() * mask, completion_mask=mask,
        old_logps=lp.double(), rollout_is_weights=weights, **CLIP,
    )  # fmt: skip
    loss.backward()
    compare(
        case, backend, loss, x.grad, advantages=case.token_advantages, sampling_logps=rollout,
        sampling_correction=f"{level}_{'truncate' if threshold == 2.0 else 'mask'}", sampling_correction_max=2.0,
        sampling_correction_min=None if threshold == 2.0 else 0.5,
        **case.inputs("completion_ids", "completion_mask", "old_logps"), **from_verl(**CLIP),
    )  # fmt: skip


@backends
@losses
def test_sequence_advantages(loss_mode, backend):
    """verl spreads an outcome's advantage over the tokens; here it may stay (B,)."""
    case = usual(seed=3)
    check(case, backend, loss_mode=loss_mode, advantages=case.advantages, **LOSSES[loss_mode])


GLOBAL = {"dp_size": 2, "batch_num_tokens": 150, "global_batch_size": 16, "loss_scale_factor": 20}


@backends
@pytest.mark.parametrize("batch", ({}, GLOBAL), ids=("alone", "part of a global batch"))
@pytest.mark.parametrize(
    "mode", ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
)
def test_aggregation(mode, batch, backend):
    """The KL is aggregated as the policy loss is."""
    kl = {"use_kl_loss": True, "kl_loss_coef": 0.1}
    check(usual(seed=4), backend, loss_agg_mode=mode, **CLIP, **kl, **batch)


@backends
@pytest.mark.parametrize("loss_mode", [name for name in LOSSES if name not in ("vanilla", "geo_mean")])
def test_global_batch(loss_mode, backend):
    check(usual(seed=5), backend, loss_mode=loss_mode, **LOSSES[loss_mode], **GLOBAL)


@backends
@pytest.mark.parametrize(
    "name", ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "kl+", "k1+", "mse+", "k2+", "low_var_kl+", "k3+")
)
def test_kl_penalties(name, backend):
    check(usual(seed=6), backend, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type=name, **CLIP)


@backends
@pytest.mark.parametrize("loss_mode", ("gspo", "sapo", "dppo_kl", "dro"))
def test_kl_beside_other_losses(loss_mode, backend):
    kl = {"use_kl_loss": True, "kl_loss_coef": 0.1}
    check(usual(seed=7), backend, loss_mode=loss_mode, with_is_weights=True, **LOSSES[loss_mode], **kl)


@backends
def test_kl_beside_geo_mean(backend):
    """geo_mean is a mean over all sequences of the call; so is verl's KL, if told to count the empty ones."""
    kl = {"use_kl_loss": True, "kl_loss_coef": 0.1, "global_batch_size": 5}
    check(usual(B=5, seed=7), backend, loss_mode="geo_mean", with_is_weights=True, **LOSSES["geo_mean"], **kl)


@backends
def test_entropy_bonus(backend):
    check(usual(seed=8), backend, entropy_coeff=0.05, **CLIP)


@backends
@pytest.mark.parametrize("norm", (True, False))
def test_advantages(norm, backend):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    rewards[4:8] = 0.75  # a group without spread
    mask = torch.ones(12, 3, dtype=torch.bool)
    wanted = verl_advantages(rewards, 4, mask, norm_adv_by_std_in_grpo=norm)[:, 0]
    keywords = {"scale_rewards": "group" if norm else "none", "eps": 1e-6}
    if backend == "reference":
        actual = reference.group_advantages(rewards, 4, **keywords)
        torch.testing.assert_close(actual, wanted, rtol=TIGHT, atol=1e-12)
    else:
        actual = group_advantages(rewards.float(), 4, **keywords)
        std = rewards.view(-1, 4).std(-1).repeat_interleave(4) if norm else 1.0
        assert_within(actual, wanted, advantage_error(rewards, wanted, std) + TIGHT * wanted.abs(), "advantages")


@backends
@pytest.mark.parametrize("norm", (True, False))
def test_loss_from_rewards(norm, backend):
    case = usual(B=8, seed=10)
    mask = case.completion_mask
    advantages = verl_advantages(case.rewards.double(), 4, mask, norm_adv_by_std_in_grpo=norm)
    x = case.logits.double().requires_grad_()
    loss, _ = verl_loss(
        x, case.completion_ids, advantages, completion_mask=mask, old_logps=case.old_logps.double(), **CLIP
    )
    loss.backward()
    compare(
        case, backend, loss, x.grad, rewards=case.rewards, num_generations=4, advantage_eps=1e-6,
        scale_rewards="group" if norm else "none", **case.inputs("completion_ids", "completion_mask", "old_logps"),
        **from_verl(**CLIP),
    )  # fmt: skip
