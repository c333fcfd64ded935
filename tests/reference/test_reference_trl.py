"""The reference against TRL's own `GRPOTrainer._compute_loss`."""

import pytest
import torch
from torch import Tensor

from reference import grpo_loss
from reference_cases import NAN, TIGHT, f64, grad, noise, random_batch

FLAGS = {"rtol": 1e-6, "atol": 1e-7}  # TRL makes its clip flags in float32
NOT_OURS = ("entropy_coef",)  # a setting, logged


@pytest.fixture
def trl_loss():
    pytest.importorskip("trl", reason="parity with TRL needs trl 1.16")
    from trl_oracle import trl_loss

    return trl_loss


def assert_parity(trl_loss, theirs: dict) -> dict[str, Tensor]:
    """Same loss, same gradient, and every metric that TRL logs."""
    theirs = {"use_bias_correction_kl": False, "max_completion_length": 11, **theirs}
    out = grpo_loss(**translated(theirs))
    loss, metrics = trl_loss(**theirs)
    logits = theirs["logits"]
    torch.testing.assert_close(out.loss, loss, **TIGHT)
    torch.testing.assert_close(grad(out.loss, logits), grad(loss, logits), **TIGHT)
    metrics = {name: value for name, value in metrics.items() if name not in NOT_OURS}
    assert "entropy" in metrics and metrics.keys() <= out.metrics.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(out.metrics[name], f64(value), **FLAGS, msg=lambda m, n=name: f"{n}: {m}")
    return out.metrics


def translated(args: dict) -> dict:
    """TRL's arguments as ours."""
    renamed = {"importance_sampling_ratio": "importance_weights", "sampling_per_token_logps": "sampling_logps"}
    args = {renamed.get(name, name): value for name, value in args.items()}
    if args.get("loss_type") == "cispo":
        # TRL's bound is raw, and not ε_h but ε if that is not given.
        high = args.pop("epsilon_high", None)
        args["cispo_max"] = args.get("epsilon", 0.2) if high is None else high
    return args


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
EVERY_LOSS_TYPE = pytest.mark.parametrize("loss_type", [*CLIPPED, "cispo", "sapo", "vespo"])
EVERY_LEVEL = pytest.mark.parametrize("level", ["token", "sequence"])


def batch_of(loss_type: str, level: str, T: int = 6, **more: object) -> dict:
    """Whole sequences drift too, so that either level meets every branch of the clip."""
    batch = random_batch(B=8, T=T)
    batch["old_logps"] = batch["old_logps"] + f64([0.6, 0.8, 0, -0.6, -0.8, -0.3, 0.3, 0.2])[:, None]
    knobs = {"loss_type": loss_type, "importance_sampling_level": level, "temperature": 0.8}
    if loss_type == "cispo":
        knobs |= {"epsilon_high": 1.1}
    elif loss_type == "sapo":
        knobs |= {"sapo_temperature_neg": 1.0625}  # TRL rounds it to float32, where 1.05 is another number
    else:
        knobs |= {"epsilon": 0.05, "epsilon_high": 0.1}
    return {**batch, **knobs, **more}


@EVERY_LOSS_TYPE
@EVERY_LEVEL
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("on_policy", [False, True])
def test_trl_parity(trl_loss, loss_type: str, level: str, beta: float, corrected: bool, on_policy: bool):
    args = batch_of(loss_type, level, beta=beta, use_bias_correction_kl=corrected)
    if on_policy:
        args["old_logps"] = None
    metrics = assert_parity(trl_loss, args)
    if not on_policy:
        clips = {"clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio"} & metrics.keys()
        assert all(0 < metrics[clip] < 1 for clip in clips), "the case is chosen to meet both sides of the clip"


@pytest.mark.parametrize("loss_type", CLIPPED)
@EVERY_LEVEL
@pytest.mark.parametrize("delta", [0.97, 1.02, 1.2])
def test_trl_parity_delta(trl_loss, loss_type: str, level: str, delta: float):
    """δ below, inside and above the clip range, with a KL whose factor ρ it must not touch."""
    args = batch_of(loss_type, level, T=20, beta=0.04, use_bias_correction_kl=True)
    assert_parity(trl_loss, {**args, "delta": delta})


@EVERY_LOSS_TYPE
@EVERY_LEVEL
@pytest.mark.parametrize("shape", ["(B, T)", "(B, 1)"])
def test_trl_parity_importance_weights(trl_loss, loss_type: str, level: str, shape: str):
    args = batch_of(loss_type, level, beta=0.04, entropy_coef=0.01)
    weights = noise(8, 6 if shape == "(B, T)" else 1).exp()
    if shape == "(B, T)":
        weights[~args["completion_mask"]] = 1  # as TRL makes them: vespo sums their logs without a mask
    assert_parity(trl_loss, {**args, "importance_sampling_ratio": weights})


@EVERY_LOSS_TYPE
@EVERY_LEVEL
@pytest.mark.parametrize("shape", ["(B, T)", "(B, 1)"])
def test_trl_parity_advantages_of_other_shapes(trl_loss, loss_type: str, level: str, shape: str):
    args = batch_of(loss_type, level, beta=0.04, use_bias_correction_kl=True)
    args["advantages"] = noise(8, 6 if shape == "(B, T)" else 1)
    args["advantages"][0] = 0
    assert_parity(trl_loss, args)


@EVERY_LOSS_TYPE
@EVERY_LEVEL
@pytest.mark.parametrize("sampler", ["none", "all", "NaN"])
@pytest.mark.parametrize("per_token", [False, True])
def test_trl_parity_off_policy_mask(trl_loss, loss_type: str, level: str, sampler: str, per_token: bool):
    args = batch_of(loss_type, level, beta=0.04, off_policy_mask_threshold=0.02)
    if per_token:
        args["advantages"] = noise(8, 6)
    if sampler != "none":
        args["sampling_per_token_logps"] = args["old_logps"] + 0.3 * noise(8, 6, seed=1)
    if sampler == "NaN":
        args["sampling_per_token_logps"][:, ::2] = NAN
    unmasked = grpo_loss(**translated({**args, "off_policy_mask_threshold": None})).loss
    masked = grpo_loss(**translated(args)).loss
    assert masked != unmasked, "the case is chosen to drop something"
    assert_parity(trl_loss, args)


@EVERY_LOSS_TYPE
@EVERY_LEVEL
@pytest.mark.parametrize("quantile", [0.05, 0.4, 0.9])
def test_trl_parity_entropy_quantile(trl_loss, loss_type: str, level: str, quantile: float):
    args = batch_of(loss_type, level, beta=0.04, top_entropy_quantile=quantile, entropy_coef=0.02)
    weights = noise(8, 1).exp()
    assert_parity(trl_loss, {**args, "importance_sampling_ratio": weights})


@EVERY_LOSS_TYPE
@EVERY_LEVEL
@pytest.mark.parametrize("training", [True, False])
def test_trl_parity_accumulation(trl_loss, loss_type: str, level: str, training: bool):
    """TRL's scaling for 3 accumulation steps, 6 steps per generation and 2 processes, as loss_scale and N."""
    tool_mask = torch.ones(8, 6)
    tool_mask[:, 1] = 0
    N = 93
    args = batch_of(loss_type, level, beta=0.04, entropy_coef=0.01)
    scaling = {"tool_mask": tool_mask, "num_items_in_batch": N, "num_processes": 2}
    scaling |= {"gradient_accumulation_steps": 3, "steps_per_generation": 6, "training": training}
    ours = {"completion_mask": args["completion_mask"] * tool_mask, "num_items_in_batch": N / 2}
    if training:
        ours |= {"loss_scale": 1 / 3, "num_items_in_batch": N / (2 * 6)}
    loss, _ = trl_loss(**args, **scaling, use_bias_correction_kl=False, max_completion_length=11)
    out = grpo_loss(**translated({**args, **ours, "max_completion_length": 11}))
    torch.testing.assert_close(out.loss, loss, **TIGHT)
    torch.testing.assert_close(grad(out.loss, args["logits"]), grad(loss, args["logits"]), **TIGHT)


def test_trl_parity_of_everything_unset(trl_loss):
    """cispo without epsilon_high: TRL's bound is then epsilon, a cap of 0.2 on ρ."""
    args = batch_of("cispo", "token")
    del args["epsilon_high"]
    assert_parity(trl_loss, args)
