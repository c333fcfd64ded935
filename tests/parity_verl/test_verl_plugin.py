"""The plugin inside verl: `fused_x` from verl's own registry, called as verl's actor calls it, against verl's `x`.

Every loss that the installed verl has; `test_verl_next.py` does the same for what later ones bring.
"""

import functools
import importlib
import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from cases import BACKENDS

try:
    importlib.metadata.version("verl")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("verl is not installed; it gets an environment of its own: make test-verl", allow_module_level=True)
from omegaconf import OmegaConf
from verl_oracle import POLICY_LOSS_REGISTRY, RolloutCorrectionConfig, actor_config, verl_loss

from grpo_kernels import policy_loss
from grpo_kernels.integrations import verl as plugin
from tolerance import assert_within, bounds_of
from verl_calls import CLIP, GLOBAL, MODES, SETTINGS, allowed_to, assert_same, call, check, is_weights, make_batch

losses = pytest.mark.parametrize("name", [name for name in SETTINGS if name in POLICY_LOSS_REGISTRY])
some_losses = pytest.mark.parametrize("name", ("vanilla", "geo_mean", "dro"))


# --- Which losses there are ------------------------------------------------------------------------------


def test_every_loss_of_verl_is_served_or_listed():
    verls = {name for name in POLICY_LOSS_REGISTRY if not name.startswith("fused_")}
    fused = {name.removeprefix("fused_") for name in POLICY_LOSS_REGISTRY if name.startswith("fused_")}
    assert fused == {*SETTINGS, "bypass_mode"} & verls
    assert verls == fused | set(plugin.NOT_SERVED)


def test_imported_again():
    before = set(POLICY_LOSS_REGISTRY)
    importlib.reload(plugin)
    assert set(POLICY_LOSS_REGISTRY) == before


# --- As verl's actor calls them: ppo_loss ----------------------------------------------------------------


@pytest.mark.parametrize("extras", (False, True), ids=("alone", "with entropy, KL and weights"))
@losses
def test_in_ppo_loss(name, extras):
    """verl adds entropy bonus and KL to the loss in place, and logs all of it."""
    g = torch.Generator().manual_seed(2)
    batch = make_batch(seed=2)
    mask = batch["response_mask"]
    logits = torch.randn(*mask.shape, 31, generator=g)
    ids = torch.randint(31, mask.shape, generator=g)
    lp = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    arguments = {"old_logps": lp + batch["old_log_prob"] - batch["log_prob"], **SETTINGS[name], **GLOBAL}
    if extras:
        arguments |= {"rollout_is_weights": is_weights(batch).double(), "ref_logps": lp - 0.3, "use_kl_loss": True,
                      "kl_loss_coef": 0.1, "entropy_coeff": 0.05}  # fmt: skip

    def run(loss_mode, x):
        loss, logged = verl_loss(x, ids, batch["advantages"].double(), completion_mask=mask, loss_mode=loss_mode,
                                 **arguments)  # fmt: skip
        (grad,) = torch.autograd.grad(loss, x)
        logged = {key: torch.tensor(value).double() for key, value in logged.items()}
        return {" loss": loss.detach().double(), " grad": grad, **logged}

    got, want = (run(loss_mode, logits.double().requires_grad_()) for loss_mode in (f"fused_{name}", name))
    allowed = bounds_of(lambda x: run(name, x), {"x": logits})
    assert got.keys() == want.keys() >= {"actor/pg_loss"}
    for key in want:
        assert_within(got[key], want[key], allowed[key], key)


# --- Every setting, on the registered functions ----------------------------------------------------------


@losses
@pytest.mark.parametrize("batch", ({}, GLOBAL), ids=("alone", "part of a global batch"))
@pytest.mark.parametrize("mode", MODES)
def test_aggregation(mode, batch, name):
    check(name, make_batch(seed=3), mode=mode, **batch)


@pytest.mark.parametrize("norm", (True, False))
def test_counts_that_are_left_out(norm):
    """As older trainers fill global_batch_info."""
    info = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
    check("vanilla", make_batch(seed=3), mode="seq-mean-token-sum-norm", **info, loss_scale_factor=7 if norm else None)


@pytest.mark.parametrize("mode", ("token-mean", "seq-mean-token-mean"))
@losses
def test_weights_of_the_rollout(name, mode):
    batch = make_batch(seed=4)
    check(name, batch, mode=mode, weights=is_weights(batch))


@losses
def test_log_ratios_beyond_the_clamps(name):
    check(name, make_batch(seed=5, far=True), **({"clip_ratio_c": 3.0} if "clip_ratio_c" in SETTINGS[name] else {}))


@losses
def test_verls_own_defaults(name):
    """ε = 0.2 on either side, c = 3."""
    settings = {"dro_beta": 0.3} if name == "dro" else {}
    batch = make_batch(seed=6)
    assert_same(call(f"fused_{name}", batch, torch.float32, **settings), call(name, batch, **settings),
                allowed_to(name, batch, **settings))  # fmt: skip


@pytest.mark.parametrize("name", ("vanilla", "gspo", "cispo", "geo_mean", "dppo_tv"))
def test_one_bound_for_both(name):
    """clip_ratio, where low and high are not set."""
    batch = make_batch(seed=7)
    settings = {"clip_ratio": 0.1, "clip_ratio_low": None, "clip_ratio_high": None}
    assert_same(call(f"fused_{name}", batch, torch.float32, **settings), call(name, batch, **settings),
                allowed_to(name, batch, **settings))  # fmt: skip


def test_cispo_without_a_lower_bound():
    check("cispo", make_batch(seed=8), clip_ratio_low=10.0)


@losses
def test_on_policy(name):
    batch = make_batch(seed=9)
    check(name, {**batch, "old_log_prob": batch["log_prob"].clone()})


@losses
def test_one_token_each(name):
    check(name, make_batch(T=1, seed=10))


@pytest.mark.parametrize("kind", (torch.float32, torch.int64), ids=str)
@some_losses
def test_masks_of_other_dtypes(name, kind):
    batch = make_batch(seed=11)
    check(name, {**batch, "response_mask": batch["response_mask"].to(kind)})


@losses
def test_bf16_log_probs(name):
    """Log-probs of a model under autocast; the others are fp32. All arithmetic is in fp32."""
    batch = make_batch(seed=12)
    batch["log_prob"] = batch["log_prob"].bfloat16()
    settings = SETTINGS[name]
    args = {**batch, "log_prob": batch["log_prob"].detach().clone().requires_grad_()}
    loss, metrics = POLICY_LOSS_REGISTRY[f"fused_{name}"](**args, config=actor_config(name, **settings))
    loss.backward()
    mode = plugin.LOSSES[name].default_mode
    allowed = allowed_to(name, batch, mode=mode, **settings)
    assert_same((loss.detach(), args["log_prob"].grad, metrics), call(name, batch, mode=mode, **settings), allowed,
                torch.bfloat16)  # fmt: skip
    if not name.startswith("dppo"):  # which decide in bf16 there: a token near the bound may fall on the other side
        args = {**batch, "log_prob": batch["log_prob"].detach().clone().requires_grad_()}
        want, want_metrics = POLICY_LOSS_REGISTRY[name](**args, config=actor_config(name, **settings))
        assert_within(loss, want.float(), allowed[" loss"], "loss", factor=2)
        assert metrics.keys() == want_metrics.keys()
        for key, value in want_metrics.items():
            assert_within(torch.tensor(metrics[key]), torch.tensor(value), allowed[key], key, factor=2)


@losses
def test_padding_may_hold_anything(name):
    """NaN there must not spread; verl's own cannot always say that, so the answer is that of zeros there."""
    batch = make_batch(seed=13)
    gaps = ~batch["response_mask"]
    dirty = {**batch, **{key: batch[key].masked_fill(gaps, torch.nan) for key in ("log_prob", "old_log_prob")}}
    ours = call(f"fused_{name}", dirty, torch.float32, **SETTINGS[name])
    assert_same(ours, call(name, batch, **SETTINGS[name]), allowed_to(name, batch, **SETTINGS[name]))


@losses
def test_nothing_unmasked_in_a_part(name):
    """A micro-batch of a global batch: loss, gradient and metrics 0."""
    batch = make_batch(seed=14)
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    check(name, batch, **GLOBAL)


@pytest.mark.parametrize("backend", BACKENDS)
@losses
def test_backends(name, backend, monkeypatch):
    """The kernels, which a GPU would run, and the CPU's own path."""
    monkeypatch.setattr(plugin, "policy_loss", functools.partial(policy_loss, backend=backend))
    batch = make_batch(seed=15)
    check(name, batch, weights=is_weights(batch), **GLOBAL)


@losses
def test_config_of_omegaconf(name):
    """verl's functions take either."""
    batch, settings = make_batch(seed=17), {**CLIP, "clip_ratio": 0.2, "tau_pos": 1.0, "tau_neg": 1.05}
    given = {**settings, "policy_loss": {"dro_beta": 0.3}, "global_batch_info": {**GLOBAL}}
    loss, metrics = POLICY_LOSS_REGISTRY[f"fused_{name}"](**batch, config=OmegaConf.create(given))
    config = actor_config(name, dro_beta=0.3, **settings)
    config.global_batch_info.update(GLOBAL)
    assert (loss, metrics) == POLICY_LOSS_REGISTRY[f"fused_{name}"](**batch, config=config)


# --- bypass_mode -----------------------------------------------------------------------------------------

CORRECTIONS = {
    "no correction": {"rollout_is": None},
    "truncated": {"rollout_is": "token", "rollout_is_threshold": 1.3},
    "normalised": {"rollout_is": "sequence", "rollout_is_batch_normalize": True},
    "rejecting": {"rollout_is": "token", "rollout_rs": "token_k1", "rollout_rs_threshold": "0.5_1.5"},
}


@pytest.mark.parametrize("correction", CORRECTIONS.values(), ids=CORRECTIONS)
@pytest.mark.parametrize("loss_type", ("ppo_clip", "reinforce"))
def test_bypass_mode(loss_type, correction):
    check("bypass_mode", make_batch(seed=16), mode="seq-mean-token-sum", **CLIP,
          rollout_correction=RolloutCorrectionConfig(loss_type=loss_type, **correction))  # fmt: skip


# --- Errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode", "settings", "message"),
    [
        ("vanilla", "token-mean", {"dp_size": 2}, "batch_num_tokens"),
        ("gspo", "seq-mean-token-sum", {"dp_size": 2}, "global_batch_size"),
        ("vanilla", "mean", {}, "seq-mean-token-sum-norm"),
        ("dppo_tv", "token-mean", {"clip_ratio_c": 1.0}, "clip_ratio_c"),
        ("dro", "token-mean", {"dro_beta": None}, "dro_beta"),
        ("bypass_mode", "token-mean", {"rollout_correction": RolloutCorrectionConfig(loss_type="x")}, "ppo_clip"),
    ],
)
def test_errors(name, mode, settings, message):
    with pytest.raises(ValueError, match=message):
        call(f"fused_{name}", make_batch(), torch.float32, mode=mode, **settings)


@pytest.mark.parametrize("config", (None, SimpleNamespace(clip_ratio=0.2)))
def test_needs_the_actors_config(config):
    with pytest.raises(TypeError, match="ActorConfig"):
        POLICY_LOSS_REGISTRY["fused_vanilla"](**make_batch(), config=config)


def test_names():
    """What shows in a traceback and in verl's log."""
    function = POLICY_LOSS_REGISTRY["fused_gspo"]
    assert function.__name__ == "compute_policy_loss_fused_gspo" and "gspo" in function.__doc__
