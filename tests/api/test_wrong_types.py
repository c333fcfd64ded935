"""An argument of a wrong type raises an error that names it, whatever the argument is."""

import pytest
import torch

from grpo_kernels import (
    distillation_loss,
    fused_grpo_loss,
    fused_linear_distillation_loss,
    fused_linear_grpo_loss,
    group_advantages,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)

B, T, V, H = 2, 3, 7, 4
LOGITS, HIDDEN, WEIGHT = torch.zeros(B, T, V), torch.zeros(B, T, H), torch.zeros(V, H)
IDS, PER_TOKEN, ADVANTAGES = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T), torch.ones(B)
CALLS = {
    "loss": lambda **kw: fused_grpo_loss(LOGITS, IDS, ADVANTAGES, **kw),
    "policy loss": lambda **kw: policy_loss(PER_TOKEN, ADVANTAGES, **kw),
    "linear loss": lambda **kw: fused_linear_grpo_loss(HIDDEN, WEIGHT, IDS, ADVANTAGES, **kw),
    "logprobs": lambda **kw: token_logprobs(LOGITS, IDS, **kw),
    "linear logprobs": lambda **kw: linear_token_logprobs(HIDDEN, WEIGHT, IDS, **kw),
    "distillation": lambda **kw: distillation_loss(LOGITS, LOGITS, **kw),
    "linear distillation": lambda **kw: fused_linear_distillation_loss(
        HIDDEN, WEIGHT, HIDDEN, **{"teacher_weight": WEIGHT} | kw
    ),
    "advantages": lambda **kw: group_advantages(torch.ones(4), 2, **kw),
}
SWITCHES = {
    "loss": ("inplace", "skip_zero_advantage", "return_entropy"),
    "linear loss": ("skip_zero_advantage", "return_entropy", "accumulate_in_fp32", "gather_head"),
    "logprobs": ("return_entropy",),
    "linear logprobs": ("return_entropy", "accumulate_in_fp32", "gather_head"),
    "distillation": ("inplace",),
    "linear distillation": ("accumulate_in_fp32",),
    "advantages": ("unbiased",),
}
OTHERS = {
    "loss": ("data_group", "backend"),
    "policy loss": ("data_group", "backend"),
    "linear loss": ("bias", "data_group", "backend"),
    "logprobs": ("backend",),
    "linear logprobs": ("bias", "backend"),
    "distillation": ("loss_agg_mode", "backend"),
    "linear distillation": ("bias", "teacher_bias", "teacher_weight", "loss_agg_mode", "backend"),
    "advantages": ("data_group", "eps", "reward_weights", "advantage_estimator"),
}


def pairs(table):
    return [(call, name) for call, names in table.items() for name in names]


@pytest.mark.parametrize(("call", "name"), pairs(SWITCHES))
def test_a_switch_is_true_or_false(call, name):
    for value in ("no", None, [], torch.ones(2)):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got {type(value).__name__}"):
            CALLS[call](**{name: value})


@pytest.mark.parametrize(("call", "name"), pairs(OTHERS))
def test_anything_else_is_named(call, name):
    for value in ({}, object()):
        with pytest.raises((TypeError, ValueError), match=f"^{name} "):
            CALLS[call](**{name: value})
