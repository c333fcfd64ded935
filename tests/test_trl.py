"""Parity with TRL itself: its unpatched ``GRPOTrainer._compute_loss``, in float64, against the fused loss."""

import pytest
import torch

from cases import BACKENDS, GRAD_ATOL, make_case, ours

pytest.importorskip("trl", reason="parity needs TRL 1.16, which needs Python 3.11")
from trl_oracle import trl_loss

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def both(case, backend, *, trl: dict, fused: dict, loss_type: str, **knobs):
    x = case.logits.double().requires_grad_()
    inputs = {k: v.double() if v.is_floating_point() else v
              for k, v in case.inputs("completion_ids", "completion_mask").items()}  # fmt: skip
    ids = inputs["completion_ids"].clamp(min=0)
    loss, metrics = trl_loss(
        x, ids, trl.pop("advantages", case.advantages).double(), completion_mask=inputs["completion_mask"],
        loss_type=loss_type, use_bias_correction_kl=False, **trl, **knobs,
    )  # fmt: skip
    loss.backward()
    out, grad = ours(
        case.logits, backend, **case.inputs("completion_ids", "completion_mask"),
        **{"advantages": case.advantages, **fused}, loss_type=loss_type, **knobs,
    )  # fmt: skip
    torch.testing.assert_close(out.loss.double().cpu(), loss.detach(), **ROUNDING)
    atol = max(GRAD_ATOL[torch.float32], 1e-6 * x.grad.abs().max().item())
    torch.testing.assert_close(grad.double(), x.grad, rtol=1e-5, atol=atol)
    for name, value in metrics.items():
        if name in out.metrics and name != "policy_loss" and value == value:
            assert out.metrics[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "bnpo", "dapo", "dr_grpo"))
@pytest.mark.parametrize("beta", (0.0, 0.04))
@pytest.mark.parametrize("clip", [{}, {"epsilon_high": 0.28}, {"delta": 1.5}, {"delta": 1.05}], ids=str)
def test_loss_types(clip, beta, loss_type, backend):
    case = make_case(B=4, T=12, V=31, seed=1)
    old = {"old_logps": case.old_logps, "ref_logps": case.ref_logps}
    both(case, backend, trl={k: v.double() for k, v in old.items()}, fused=old, loss_type=loss_type, beta=beta,
         max_completion_length=12, **clip)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "dapo"))
def test_on_policy_and_token_advantages(loss_type, backend):
    case = make_case(B=4, T=12, V=31, seed=2)
    adv = {"advantages": case.token_advantages}
    both(case, backend, trl=dict(adv), fused=adv, loss_type=loss_type, temperature=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "bnpo", "dapo", "dr_grpo"))
def test_gradient_accumulation(loss_type, backend):
    """loss_scale = 1/ga, num_items_in_batch = N/(processes·steps_per_generation), for every loss type."""
    case = make_case(B=4, T=12, V=31, seed=3)
    both(
        case, backend, loss_type=loss_type, max_completion_length=12,
        trl={"gradient_accumulation_steps": 4, "steps_per_generation": 8, "num_items_in_batch": 300,
             "num_processes": 2},
        fused={"loss_scale": 1 / 4, "num_items_in_batch": 300 / (2 * 8)},
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ("(B, T)", "(B, 1)"))
def test_sampler_mismatch_weights(shape, backend):
    case = make_case(B=4, T=12, V=31, seed=4)
    w = case.importance_weights if shape == "(B, T)" else case.importance_weights[:, :1]
    old = {"old_logps": case.old_logps}
    both(case, backend, trl={"importance_sampling_ratio": w.double(), "old_logps": case.old_logps.double()},
         fused={"importance_weights": w, **old}, loss_type="dapo")  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "dapo"))
def test_entropy_bonus(loss_type, backend):
    case = make_case(B=4, T=12, V=31, seed=5)
    both(case, backend, trl={}, fused={"return_entropy": True}, loss_type=loss_type, entropy_coef=0.05)
