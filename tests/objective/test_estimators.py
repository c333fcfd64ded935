"""Advantage estimators and several rewards per completion: by hand, against the reference, in the losses of both."""

import math

import pytest
import torch

import reference
from cases import BACKENDS, DEVICE, check, make_case, on_device
from grpo_kernels import LossConfig, fused_grpo_loss, fused_linear_grpo_loss, group_advantages, policy_loss
from grpo_kernels.objective.advantages import ESTIMATORS

INF, NAN = math.inf, math.nan
NEW = tuple(name for name in ESTIMATORS if name != "group")
GIVEN = ("completion_ids", "completion_mask", "old_logps")


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def of(rewards, G, estimator, **kwargs) -> list:
    return group_advantages(rewards, G, advantage_estimator=estimator, **kwargs).tolist()


# --- by hand ---------------------------------------------------------------------------------------


def test_rloo_by_hand():
    # (1, 2, 6): less the mean of the others, 4, 3.5, 1.5; (1, NaN, 5): -4, 0, 4; one valid: 0; no spread: 0
    rewards = f64(1, 2, 6, 1, NAN, 5, 7, NAN, INF, 0.7, 0.7, 0.7)
    assert of(rewards, 3, "rloo") == pytest.approx([-3, -1.5, 4.5, -4, 0, 4, 0, 0, 0, 0, 0, 0], rel=1e-12)
    assert of(rewards[:3], [2, 1], "rloo") == pytest.approx([-1, 1, 0], rel=1e-12)


def test_maxrl_by_hand():
    # (0, 0, 3): mean 1; (1, NaN, 3): mean 2; all 0: 0; one valid: 0
    rewards = f64(0, 0, 3, 1, NAN, 3, 0, 0, 0, 5, NAN, NAN)
    a, b = 1 / (1 + 1e-6), 1 / (2 + 1e-6)
    assert of(rewards, 3, "maxrl") == pytest.approx([-a, -a, 2 * a, -b, 0, b, 0, 0, 0, 0, 0, 0], rel=1e-12)


def test_gdpo_by_hand():
    # groups of 2; z of the first reward: (-s, s), (0, 0); of the second, of weight 2: (-s, s), (s, -s), s = 1/sqrt 2.
    # y = (-3s, 3s, 2s, -2s): mean 0, sum of squares 26 s^2 = 13, std sqrt(13/3)
    rewards = torch.stack([f64(0, 8, 5, 5), f64(1, 3, 0.2, 0.1)], 1)
    s, std = math.sqrt(0.5), math.sqrt(13 / 3)
    want = [-3 * s / std, 3 * s / std, 2 * s / std, -2 * s / std]
    assert of(rewards, 2, "gdpo", reward_weights=[1, 2], eps=0.0) == pytest.approx(want, rel=1e-12)
    assert of(rewards, [2, 2], "gdpo", reward_weights=f64(1, 2), eps=0.0) == pytest.approx(want, rel=1e-12)
    # eps in both: z = (-1, 1)/(sqrt 2 + 1), y as z, std of (-t, t) sqrt 2·t
    t = 1 / (math.sqrt(2) + 1)
    want = [-t / (math.sqrt(2) * t + 1), t / (math.sqrt(2) * t + 1)]
    assert of(f64(1, 3), 2, "gdpo", eps=1.0) == pytest.approx(want, rel=1e-12)


def test_gdpo_as_trl_writes_it():
    """With the mean subtracted, which is 0; of what is there in each."""
    rewards = torch.rand(12, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rewards[3], rewards[5, 1] = NAN, NAN
    groups = rewards.view(3, 4, 3)
    off = groups - groups.nanmean(1, keepdim=True)
    count = (~off.isnan()).sum(1, keepdim=True)
    z = off / (off.nan_to_num().square().sum(1, keepdim=True).div(count - 1).sqrt() + 1e-4)
    y = (z.view(12, 3) * torch.tensor([1.0, 0.5, 2.0])).nansum(1)
    y = y[there := [i for i in range(12) if i != 3]]
    got = torch.tensor(of(rewards.to(DEVICE), 4, "gdpo", reward_weights=(1.0, 0.5, 2.0)))
    torch.testing.assert_close(got[there], ((y - y.mean()) / (y.std() + 1e-4)).float(), rtol=1e-6, atol=1e-6)
    assert got[3] == 0


def test_gdpo_leaves_out_what_is_not_finite():
    # the second row has the second reward alone; the third none: it leaves, and gets 0.
    # z1: (-s, ., ., s); z2 of (1, 3, ., 5): (-1, 0, ., 1): y = (-s-1, 0, ., s+1), mean 0, std s+1
    rewards = torch.stack([f64(0, NAN, INF, 2), f64(1, 3, NAN, 5)], 1)
    assert of(rewards, 4, "gdpo", eps=0.0) == pytest.approx([-1, 0, 0, 1], rel=1e-12)
    assert of(f64(0.7, 0.7, 0.1, 0.1), 2, "gdpo") == [0.0] * 4


@pytest.mark.parametrize("estimator", ("group", "rloo", "maxrl"))
def test_the_weighted_sum_comes_first(estimator):
    rewards = torch.stack([f64(0, 2, NAN, NAN, 1, 4), f64(1, 0, 3, INF, 0.5, 1)], 1)
    total = f64(0.5, 2, 1.5, NAN, 1.25, 4.5)
    want = of(total, 3, estimator)
    assert of(rewards, 3, estimator, reward_weights=(1, 0.5)) == pytest.approx(want, rel=1e-12)
    known = rewards.nan_to_num(0, 0)
    assert of(known, 3, estimator) == pytest.approx(of(known.sum(1), 3, estimator), rel=1e-12)


# --- against the reference -------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sizes", (4, [4, 2, 1, 5]), ids=str)
@pytest.mark.parametrize("unbiased", (True, False))
def test_against_the_reference(estimator, sizes, unbiased):
    rewards = torch.rand(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[1, 0], rewards[8], rewards[4:6] = NAN, INF, 0.3
    kwargs = {"advantage_estimator": estimator, "reward_weights": (1.0, 0.5, 2.0), "unbiased": unbiased}
    got = group_advantages(rewards.to(DEVICE), sizes, **kwargs).cpu()
    torch.testing.assert_close(got, reference.group_advantages(rewards, sizes, **kwargs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", ({"beta": 0.1}, {"loss_type": "gspo"}, {"loss_type": "vespo"}), ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("K", (None, 2))
def test_losses(estimator, kwargs, backend, K):
    """One launch and two; equal groups and sizes; a reward that is not finite, a group without spread."""
    case = make_case(B=8, seed=4)
    rewards = torch.rand(8, K or 1, generator=torch.Generator().manual_seed(1))
    rewards[1], rewards[4:6] = NAN, 0.25
    given = case.inputs(*GIVEN, *(("ref_logps",) if "beta" in kwargs else ()))
    weights = {} if K is None else {"reward_weights": (1.0, 0.5)}
    for sizes in (2, [4, 2, 2]):
        check(case.logits, backend, **given, rewards=rewards[:, 0] if K is None else rewards, num_generations=sizes,
              advantage_estimator=estimator, **weights, **kwargs)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", NEW)
def test_rows_of_no_advantage_are_skipped(estimator, backend):
    case = make_case(B=4)
    given = on_device({"logits": case.logits, **case.inputs(*GIVEN), "rewards": torch.tensor([0.0, 1.0, NAN, 0.5])})
    kwargs = {"num_generations": 2, "advantage_estimator": estimator, "backend": backend}
    whole = fused_grpo_loss(**given, **kwargs)
    for level in ("token", "sequence"):
        skipped = fused_grpo_loss(**given, **kwargs, skip_zero_advantage=True, importance_sampling_level=level)
        live = case.completion_mask
        assert skipped.logps.cpu()[2:][live[2:]].isnan().all() and not skipped.logps.cpu()[:2].isnan().any()
    assert whole.metrics["reward"].item() == 0.5 and whole.metrics["reward_not_finite"].item() == 1


def test_policy_loss_and_packed():
    case = make_case(B=4)
    given = on_device(case.inputs(*GIVEN))
    rewards = torch.rand(4, 2, device=DEVICE)
    for estimator in ESTIMATORS:
        kwargs = {"num_generations": 2, "advantage_estimator": estimator}
        whole = fused_grpo_loss(case.logits.to(DEVICE), **given, rewards=rewards, **kwargs)
        rest = {name: x for name, x in given.items() if name != "completion_ids"}
        torch.testing.assert_close(policy_loss(whole.logps, **rest, rewards=rewards, **kwargs).loss, whole.loss)
        mask = case.completion_mask
        cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(DEVICE)
        packed = {name: given[name][mask.to(DEVICE)] for name in ("completion_ids", "old_logps")}
        out = fused_grpo_loss(case.logits[mask].to(DEVICE), **packed, cu_seqlens=cu, rewards=rewards, **kwargs)
        torch.testing.assert_close(out.loss, whole.loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_from_hidden_states_and_compiled(estimator, backend):
    case = make_case(B=4, V=33)
    given = on_device({**case.inputs(*GIVEN), "rewards": torch.rand(4, 2)})
    kwargs = {"num_generations": 2, "advantage_estimator": estimator, "reward_weights": (1.0, 0.5), "backend": backend}
    logits = case.logits.to(DEVICE)
    want = fused_grpo_loss(logits, **given, **kwargs).loss
    linear = fused_linear_grpo_loss(logits, torch.eye(33, device=DEVICE), **given, **kwargs, chunk_bytes=4000)
    torch.testing.assert_close(linear.loss, want)
    compiled = torch.compile(lambda x: fused_grpo_loss(x, **given, **kwargs).loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(logits), want)


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "kwargs", "words"),
    [
        ([1, -1], {"advantage_estimator": "maxrl"}, "must not be negative"),
        ([1, 1], {"advantage_estimator": "ppo"}, "one of 'group', 'rloo'"),
        ([1, 1], {"reward_weights": [1.0]}, r"go with rewards \(B, 1\)"),
        ([[1, 1, 1], [1, 1, 1]], {"reward_weights": [1.0]}, r"reward_weights are 1"),
        ([[], []], {}, r"rewards must be \(B,\)"),
        ([[[1]], [[1]]], {}, r"rewards must be \(B,\)"),
    ],
)  # fmt: skip
def test_what_is_refused(rewards, kwargs, words, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "1")
    rewards = f64(*rewards)
    with pytest.raises(ValueError, match=words):
        group_advantages(rewards, 2, **kwargs)
    if kwargs.get("advantage_estimator") != "ppo":
        case = make_case(B=2)
        with pytest.raises(ValueError, match=r"negative|reward_weights|rewards must be"):
            fused_grpo_loss(case.logits.to(DEVICE), **on_device(case.inputs(*GIVEN)), rewards=rewards.float(),
                            num_generations=2, **kwargs)  # fmt: skip


def test_config():
    config = LossConfig(advantage_estimator="gdpo", reward_weights=[1, 2.0])
    assert config.reward_weights == (1, 2.0) and hash(config) == hash(LossConfig(**vars(config)))
    with pytest.raises(ValueError, match="advantage_estimator='x' is not available"):
        LossConfig(advantage_estimator="x")
    for wrong, error in (([], TypeError), ("1", TypeError), ([INF], ValueError)):
        with pytest.raises(error, match="reward_weights"):
            LossConfig(reward_weights=wrong)
