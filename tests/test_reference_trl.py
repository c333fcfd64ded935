"""The reference against TRL's own `GRPOTrainer._compute_loss`."""

import pytest
import torch

from reference import grpo_loss
from tests.reference_cases import F64, TIGHT, f64, grad, random_batch

FLAGS = {"rtol": 1e-6, "atol": 1e-7}  # TRL makes its clip flags in float32


@pytest.fixture
def trl_loss():
    pytest.importorskip("trl", reason="parity with TRL needs trl 1.16")
    from tests.trl_oracle import trl_loss

    return trl_loss


def assert_parity(ours: dict, theirs: dict, trl_loss) -> None:
    """Same loss, same gradient, and every metric that TRL logs."""
    logits = ours["logits"]
    loss, metrics = trl_loss(**theirs, use_bias_correction_kl=False)
    out = grpo_loss(**ours)
    torch.testing.assert_close(out.loss, loss, **TIGHT)
    torch.testing.assert_close(grad(out.loss, logits), grad(loss, logits), **TIGHT)
    metrics.pop("entropy_coef", None)  # the setting, logged
    assert {"clip_ratio/low_mean", "entropy"} <= metrics.keys() <= out.metrics.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(out.metrics[name], f64(value), **FLAGS, msg=lambda m, n=name: f"{n}: {m}")


LOSS_TYPES = pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])


@LOSS_TYPES
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("delta", [None, 1.05, 1.5])
@pytest.mark.parametrize("on_policy", [False, True])
def test_trl_parity(trl_loss, loss_type: str, beta: float, delta: float | None, on_policy: bool):
    batch = random_batch(T=40)  # long enough to meet every branch of the clip on either side of δ
    if on_policy:
        batch["old_logps"] = None
    knobs = {"loss_type": loss_type, "beta": beta, "delta": delta, "epsilon": 0.1, "epsilon_high": 0.2}
    knobs |= {"temperature": 0.8, "max_completion_length": 11}
    assert_parity({**batch, **knobs}, {**batch, **knobs}, trl_loss)


@LOSS_TYPES
@pytest.mark.parametrize("shape", ["(B, T)", "(B, 1)"])
def test_trl_parity_importance_weights_and_per_token_advantages(trl_loss, loss_type: str, shape: str):
    batch = random_batch()
    weights = torch.rand(4, 5 if shape == "(B, T)" else 1, dtype=F64) + 0.5
    batch["advantages"] = torch.randn(4, 5, dtype=F64)
    knobs = {"loss_type": loss_type, "beta": 0.04, "entropy_coef": 0.01, "max_completion_length": 11}
    ours = {**batch, **knobs, "importance_weights": weights}
    assert_parity(ours, {**batch, **knobs, "importance_sampling_ratio": weights}, trl_loss)


@LOSS_TYPES
@pytest.mark.parametrize("training", [True, False])
def test_trl_parity_accumulation(trl_loss, loss_type: str, training: bool):
    """TRL's scaling for 3 accumulation steps, 6 steps per generation and 2 processes, as loss_scale and N."""
    batch = random_batch()
    tool_mask = torch.ones(4, 5)
    tool_mask[:, 1] = 0
    N = 93
    knobs = {"loss_type": loss_type, "beta": 0.04, "entropy_coef": 0.01, "max_completion_length": 11}
    theirs = {**batch, **knobs, "tool_mask": tool_mask, "num_items_in_batch": N, "num_processes": 2}
    theirs |= {"gradient_accumulation_steps": 3, "steps_per_generation": 6, "training": training}
    ours = {**batch, **knobs, "completion_mask": batch["completion_mask"] * tool_mask}
    if training:
        ours |= {"loss_scale": 1 / 3, "num_items_in_batch": N / (2 * 6)}
    else:
        ours |= {"num_items_in_batch": N / 2}

    logits = batch["logits"]
    loss, _ = trl_loss(**theirs, use_bias_correction_kl=False)
    out = grpo_loss(**ours)
    torch.testing.assert_close(out.loss, loss, **TIGHT)
    torch.testing.assert_close(grad(out.loss, logits), grad(loss, logits), **TIGHT)
