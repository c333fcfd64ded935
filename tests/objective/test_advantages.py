"""Group-relative advantages: hand-worked numbers, NaN, groups without spread, the reference."""

import math

import pytest
import torch

import reference
from cases import BACKENDS, make_case
from cases import check as check_loss
from grpo_kernels import group_advantages
from tolerance import advantage_error, assert_within

NAN = math.nan


def check(found, rewards, wanted, std=1.0):
    assert_within(found, wanted, advantage_error(rewards, wanted, std), "advantages")


def test_by_hand():
    # group (1, 3): mean 2, unbiased std √2; group (0, 0): no spread
    rewards = torch.tensor([1.0, 3.0, 0.0, 0.0])
    s = math.sqrt(2)
    ones = torch.tensor([-1.0, 1.0, 0.0, 0.0])
    check(group_advantages(rewards, 2, eps=0.0), rewards, ones / s, s)
    check(group_advantages(rewards, 2, eps=0.0, unbiased=False), rewards, ones)
    check(group_advantages(rewards, 2, scale_rewards="none"), rewards, ones)
    # the batch: mean 1, Σ(R−1)² = 6, unbiased std √2
    check(group_advantages(rewards, 2, scale_rewards="batch", eps=0.0), rewards, ones / s, s)


def test_eps():
    adv = group_advantages(torch.tensor([0.0, 1.0]), 2, eps=0.5, unbiased=False)
    check(adv, torch.tensor([0.0, 1.0]), torch.tensor([-0.5, 0.5]))


def test_no_spread_is_exactly_zero():
    """Eight rewards of 0.7 have a mean that is not 0.7: dividing the rounding by eps would give 6e-4."""
    for scale in ("group", "batch", "none"):
        assert (group_advantages(torch.full((8,), 0.7), 8, scale_rewards=scale) == 0).all()


def test_nan_rewards_are_left_out():
    rewards = torch.tensor([1.0, NAN, 3.0, NAN, 5.0, NAN, NAN, NAN, NAN])
    adv = group_advantages(rewards, 3, eps=0.0)
    s = math.sqrt(2)
    check(adv, rewards, torch.tensor([-1 / s, 0, 1 / s, 0, 0, 0, 0, 0, 0]), s)


@pytest.mark.parametrize("scale", ("group", "batch", "none"))
@pytest.mark.parametrize("unbiased", (True, False))
def test_against_the_reference(scale, unbiased):
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(24, generator=g, dtype=torch.float64)
    rewards[5] = NAN
    rewards[8:12] = 0.3
    ours = group_advantages(rewards, 4, scale_rewards=scale, unbiased=unbiased)
    want = reference.group_advantages(rewards, 4, scale_rewards=scale, unbiased=unbiased)
    torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)


def test_one_generation_without_scaling_by_the_group():
    assert (group_advantages(torch.randn(4), 1, scale_rewards="none") == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_that_are_nearly_equal(backend):
    """Their mean is rounded as they are, by 3e-5 of how far they lie apart: both advantages of a group are off."""
    case = make_case(T=40, seed=1)
    rewards = torch.tensor([-1.2751998901367188, -1.27729070186615, 1.1263507604598999, -0.6485936641693115])
    given = case.inputs("completion_ids", "old_logps", "ref_logps", "importance_weights", "completion_mask")
    check_loss(case.logits, backend, **given, rewards=rewards, num_generations=2, beta=0.1)
