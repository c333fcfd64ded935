"""Parity with TRL itself: its unpatched ``GRPOTrainer._compute_loss``, in float64, against the fused loss.

The fused loss is configured by ``LossConfig.from_trl`` from the same arguments, so that is tested too.
"""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from cases import BACKENDS, make_case, ours
from grpo_kernels import LossConfig
from tolerance import assert_within, bounds

pytest.importorskip("trl", reason="parity needs TRL 1.16, which needs Python 3.11")
from trl_oracle import trl_args, trl_loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
POLICY = ("old_logps", "ref_logps")


def both(case, *, given=(), trl=None, fused=None, **args):
    """TRL's loss and ours of either backend.

    ``given``: names of the case for both; ``trl`` and ``fused``: for one of them; ``args``: TRL's.
    """
    mask, ids = case.completion_mask, case.completion_ids.clamp(min=0)
    inputs = {"advantages": case.advantages, **case.inputs(*given)}
    x = case.logits.double().requires_grad_()
    theirs = {name: value.double() for name, value in {**inputs, **(trl or {})}.items() if torch.is_tensor(value)}
    rest = {name: value for name, value in (trl or {}).items() if not torch.is_tensor(value)}
    loss, metrics = trl_loss(x, ids, theirs.pop("advantages"), completion_mask=mask, **theirs, **rest, **args)
    loss.backward()
    config = LossConfig.from_trl(trl_args(**{**args, "temperature": 1.0}))  # any other is the call's
    allowed = bounds(
        case.logits, case.completion_ids, completion_mask=mask, **{**inputs, **(fused or {})}, config=config,
        temperature=args.get("temperature", 1.0),
    )  # fmt: skip
    logged = metrics.keys() - {"policy_loss", "entropy_coef"}  # before accumulation; the setting itself
    for backend in BACKENDS:
        out, grad = ours(
            case.logits, backend, completion_ids=case.completion_ids, completion_mask=mask,
            **{**inputs, **(fused or {})}, config=config, return_entropy=True,
            temperature=args.get("temperature", 1.0),
        )  # fmt: skip
        assert_within(out.loss, loss, allowed.loss, "loss")
        assert_within(grad, x.grad, allowed.grad, "gradient")
        assert logged <= out.metrics.keys(), logged - out.metrics.keys()
        for name in logged:
            value = metrics[name]
            if value == value:
                assert_within(out.metrics[name], torch.tensor(value, dtype=torch.float64), allowed.metrics[name], name)


def mismatched(case):
    """The sampler's log-probs, NaN at a token it could not score."""
    noise = torch.randn(case.old_logps.shape, generator=torch.Generator().manual_seed(1))
    out = case.old_logps + 0.2 * noise
    out[0, 0] = math.nan
    return out


KNOBS = {
    "on-policy": lambda c: dict(temperature=0.7),
    "old": lambda c: dict(given=POLICY[:1]),
    "KL": lambda c: dict(given=POLICY, beta=0.04, use_bias_correction_kl=False),
    "bias-corrected KL": lambda c: dict(given=POLICY, beta=0.04),
    "clip higher": lambda c: dict(given=POLICY[:1], epsilon=0.1, epsilon_high=0.28),
    "delta": lambda c: dict(given=POLICY[:1], delta=1.05),
    "token advantages": lambda c: dict(
        given=POLICY, beta=0.04, trl={"advantages": c.token_advantages}, fused={"advantages": c.token_advantages}
    ),
    "weights per token": lambda c: weighted(c, c.importance_weights),
    "weights per sequence": lambda c: weighted(c, c.importance_weights[:, :1]),
    "off-policy mask": lambda c: dict(
        given=POLICY, beta=0.04, off_policy_mask_threshold=0.02, trl={"sampling_per_token_logps": mismatched(c)},
        fused={"sampling_logps": mismatched(c)},
    ),
    "entropy quantile": lambda c: dict(given=POLICY, beta=0.04, top_entropy_quantile=0.3, entropy_coef=0.05),
    "entropy bonus": lambda c: dict(entropy_coef=0.05),
    "accumulation": lambda c: dict(
        given=POLICY, beta=0.04, entropy_coef=0.01, gradient_accumulation_steps=4, steps_per_generation=8,
        trl={"num_items_in_batch": 300, "num_processes": 2},
        fused={"loss_scale": 1 / 4, "num_items_in_batch": 300 / (2 * 8)},
    ),
    "evaluation": lambda c: dict(
        given=POLICY, beta=0.04, entropy_coef=0.01, gradient_accumulation_steps=4, steps_per_generation=8,
        trl={"num_items_in_batch": 300, "num_processes": 2, "training": False}, fused={"num_items_in_batch": 150},
    ),
}  # fmt: skip


def weighted(case, weights):
    """TRL's weights are 1 where masked, and its vespo relies on that."""
    mask = case.completion_mask if weights.shape[1] > 1 else torch.ones_like(weights, dtype=torch.bool)
    weights = torch.where(mask, weights, 1.0)
    return dict(given=POLICY, beta=0.04, trl={"importance_sampling_ratio": weights},
                fused={"importance_weights": weights})  # fmt: skip


@pytest.mark.parametrize("knob", KNOBS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_parity(loss_type, level, knob):
    case = make_case(B=4, T=8, V=31, seed=1)
    kwargs = KNOBS[knob](case)
    kwargs.setdefault("max_completion_length", 8)
    # TRL rounds SAPO's temperature to float32, and 1.0625 is the same there
    both(case, loss_type=loss_type, importance_sampling_level=level, sapo_temperature_neg=1.0625, **kwargs)


@pytest.mark.parametrize("seed", range(3))
def test_parity_on_other_shapes_and_seeds(seed):
    for loss_type in LOSS_TYPES:
        case = make_case(B=3 + seed, T=2 + 4 * seed, V=9 + 40 * seed, seed=seed, spread=1 + seed)
        both(case, given=POLICY, loss_type=loss_type, beta=0.1, max_completion_length=64,
             importance_sampling_level=LEVELS[seed % 2], sapo_temperature_neg=1.0625, temperature=0.9)  # fmt: skip


def test_from_trl_takes_over_every_argument():
    args = trl_args(
        loss_type="sapo", beta=0.1, epsilon=0.3, epsilon_high=0.4, delta=2.0, importance_sampling_level="sequence",
        max_completion_length=99, entropy_coef=0.1, top_entropy_quantile=0.2, off_policy_mask_threshold=0.5,
        sapo_temperature_pos=2.0, sapo_temperature_neg=3.0, vespo_k_pos=1.0, vespo_lambda_pos=1.5, vespo_k_neg=2.5,
        vespo_lambda_neg=3.5, scale_rewards="batch", use_vllm=True, vllm_importance_sampling_mode="token_mask",
        vllm_importance_sampling_clip_max=2.0, vllm_importance_sampling_clip_min=0.5,
        multi_objective_aggregation="normalize_then_sum", reward_weights=[1.0, 0.5],
    )  # fmt: skip
    assert LossConfig.from_trl(args) == LossConfig(
        loss_type="sapo", beta=0.1, epsilon=0.3, epsilon_high=0.4, importance_sampling_level="sequence",
        use_bias_correction_kl=True, max_completion_length=99, entropy_coef=0.1, top_entropy_quantile=0.2,
        off_policy_mask_threshold=0.5, sapo_temperature_pos=2.0, sapo_temperature_neg=3.0, vespo_k_pos=1.0,
        vespo_lambda_pos=1.5, vespo_k_neg=2.5, vespo_lambda_neg=3.5, scale_rewards="batch",
        sampling_correction="token_mask", sampling_correction_max=2.0, sampling_correction_min=0.5,
        advantage_estimator="gdpo", reward_weights=(1.0, 0.5),
    )  # fmt: skip


def test_from_trl_says_where_the_temperature_goes():
    with pytest.warns(UserWarning, match="pass temperature=0.7 to fused_grpo_loss") as caught:
        config = LossConfig.from_trl(trl_args(temperature=0.7))
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LossConfig.from_trl(trl_args(temperature=1.0)) == config


def test_from_trl_defaults():
    """TRL's own: dapo, the bias-corrected KL, and no correction without vLLM."""
    config = LossConfig.from_trl(trl_args())
    assert (config.loss_type, config.use_bias_correction_kl, config.sampling_correction) == ("dapo", True, None)
    assert LossConfig.from_trl(trl_args(scale_rewards=False)).scale_rewards == "none"
    assert LossConfig.from_trl(trl_args(delta=2.0)).delta == 2.0


@pytest.mark.parametrize(("args", "bound"), [({}, 0.2), ({"epsilon": 0.3}, 0.3), ({"epsilon_high": 5.0}, 5.0)])
def test_from_trl_reads_cispo_as_trl_does(args, bound):
    """epsilon_high is the raw bound of the ratio; unset it falls back to epsilon."""
    assert LossConfig.from_trl(trl_args(loss_type="cispo", **args)).cispo_max == bound


def test_from_trl_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match=r"use_adaptive_entropy.*each step's coefficient"):
        LossConfig.from_trl(trl_args(use_adaptive_entropy=True))
    with pytest.raises(ValueError, match="loss_type='sft'"):
        LossConfig.from_trl(trl_args(loss_type="sft"))


def test_the_adaptive_coefficient_reads_no_masked_entropy():
    from grpo_kernels.integrations.trl import _adapt_entropy_coef

    accelerator = SimpleNamespace(sync_gradients=False)
    trainer = SimpleNamespace(top_entropy_quantile=1.0, accelerator=accelerator, _entropy_window_stats=None)
    _adapt_entropy_coef(trainer, torch.tensor([[1.5, math.nan]]), torch.tensor([[1, 0]]))
    assert trainer._entropy_window_stats.tolist() == [1.5, 1.0]
