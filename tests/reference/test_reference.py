"""The reference against numbers worked by hand."""

import math

import pytest
import torch

from reference import LOSS_TYPES, group_advantages, grpo_loss, policy_loss, token_logprobs
from reference_cases import F64, INF, NAN, TIGHT, f64, grad, random_batch

# --- Advantages ---------------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    # [1, 0, 0, 1]: mean 1/2, Σ(R−mean)² = 1, unbiased std √(1/3).
    # [5, 1, 1, 1]: mean 2, Σ = 9 + 3 = 12, std √4 = 2.
    rewards = f64([1, 0, 0, 1, 5, 1, 1, 1])
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    b = 1 / (2 + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4), f64([a, -a, -a, a, 3 * b, -b, -b, -b]), **TIGHT)
    # Biased: std √(1/4) = 1/2 and √(12/4) = √3.
    a, b = 0.5 / (0.5 + 1e-8), 1 / (math.sqrt(3) + 1e-8)
    biased = group_advantages(rewards, 4, unbiased=False, eps=1e-8)
    torch.testing.assert_close(biased, f64([a, -a, -a, a, 3 * b, -b, -b, -b]), **TIGHT)
    # Batch: mean 10/8, Σ R² − 8·mean² = 30 − 12.5 = 17.5, std √(17.5/7) = √2.5; the means are the groups'.
    s = math.sqrt(2.5) + 1e-4
    expected = f64([0.5, -0.5, -0.5, 0.5, 3, -1, -1, -1])
    torch.testing.assert_close(group_advantages(rewards, 4, scale_rewards="batch"), expected / s, **TIGHT)
    torch.testing.assert_close(group_advantages(rewards, 4, scale_rewards="none"), expected, **TIGHT)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_nan_rewards_leave_the_statistics_and_get_zero(scale: str):
    # [1, NaN, 3]: mean 2, Σ = 2, std √(2/1). [NaN, 4, NaN]: one valid. All NaN. Batch of {1, 3, 4}: mean 8/3,
    # Σ = 26 − 64/3 = 14/3, std √(7/3).
    rewards = f64([1, NAN, 3, NAN, 4, NAN, NAN, NAN, NAN])
    divisor = {"group": math.sqrt(2) + 1e-4, "batch": math.sqrt(7 / 3) + 1e-4, "none": 1.0}[scale]
    expected = f64([-1, 0, 1, 0, 0, 0, 0, 0, 0]) / divisor
    torch.testing.assert_close(group_advantages(rewards, 3, scale_rewards=scale), expected, **TIGHT)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_equal_rewards_give_exactly_zero(scale: str, dtype: torch.dtype):
    rewards = torch.tensor([0.7] * 8 + [0.1] * 8, dtype=dtype)
    noise = rewards[:8] - rewards[:8].sum() / 8
    if dtype == torch.float32:
        assert noise.any(), "the case is chosen for its rounding noise"
    assert group_advantages(rewards, 8, scale_rewards=scale).tolist() == [0.0] * 16


def test_reward_dtypes():
    assert group_advantages(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), 2).dtype == torch.float32
    assert group_advantages(f64([1, 2]), 2).dtype == F64


# --- Log-probabilities and entropy --------------------------------------------------------------------------


def test_logprobs_and_entropy_by_hand():
    # softmax(log [1/2, 1/4, 1/4, 0]): H = ½·ln 2 + 2·¼·ln 4 = 1.5·ln 2; the banned token (−∞) adds nothing.
    # At temperature ½ the probabilities are squared, [1/4, 1/16, 1/16] / (3/8) = [2/3, 1/6, 1/6]:
    # H = ⅔·ln 1.5 + ⅓·ln 6.
    logits = f64([[[0.5, 0.25, 0.25, 0.0]]]).log().requires_grad_()
    ids = torch.tensor([[0]])
    out = token_logprobs(logits, ids)
    torch.testing.assert_close(out.logps, f64([[math.log(0.5)]]), **TIGHT)
    torch.testing.assert_close(out.entropy, f64([[1.5 * math.log(2)]]), **TIGHT)
    for half in (0.5, f64([0.5]), f64([[0.5]])):
        out = token_logprobs(logits, ids, half)
        torch.testing.assert_close(out.logps, f64([[math.log(2 / 3)]]), **TIGHT)
        torch.testing.assert_close(out.entropy, f64([[2 / 3 * math.log(1.5) + math.log(6) / 3]]), **TIGHT)
    # ∂lp/∂x = (onehot − p)/τ and ∂H/∂x = p·(x̄ − x)/τ with x the tempered logits; both 0 for the banned token.
    # p = [⅔, ⅙, ⅙], x = 2·ln [½, ¼, ¼] = −ln 4 · [1, 2, 2], x̄ = −ln 4 · 4/3.
    torch.testing.assert_close(grad(out.logps.sum(), logits), f64([[[2 / 3, -1 / 3, -1 / 3, 0]]]), **TIGHT)
    out = token_logprobs(logits, ids, 0.5)
    ln4 = math.log(4)
    dH = f64([[[2 / 3 * (-1 / 3), 1 / 6 * (2 / 3), 1 / 6 * (2 / 3), 0]]]) * ln4 * 2
    torch.testing.assert_close(grad(out.entropy.sum(), logits), dH, **TIGHT)


def test_logprobs_ignore_masked_rows_and_the_extra_position():
    logits = torch.randn(2, 4, 5, dtype=F64)
    ids = torch.tensor([[1, 2, -100], [3, 10**6, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    clean = token_logprobs(logits[:, :3], ids, mask=mask)
    logits[0, 2], logits[1, 1], logits[:, 3] = NAN, INF, NAN
    logits.requires_grad_()
    out = token_logprobs(logits, ids, mask=mask)
    assert torch.equal(out.logps, clean.logps) and torch.equal(out.entropy, clean.entropy)
    assert out.logps[0, 2] == out.entropy[1, 1] == 0
    dx = grad((out.logps + out.entropy).sum(), logits)
    assert dx.isfinite().all()
    assert not dx[0, 2].any() and not dx[1, 1].any() and not dx[:, 3].any() and dx[0, 0].any()


def test_compute_dtype():
    logits = torch.randn(1, 2, 300).bfloat16()
    ids = torch.tensor([[3, 4]])
    out = token_logprobs(logits, ids)
    assert out.logps.dtype == torch.float32
    torch.testing.assert_close(out.logps, token_logprobs(logits.float(), ids).logps, rtol=0, atol=0)
    result = grpo_loss(logits.double(), ids, torch.ones(1), old_logps=torch.zeros(1, 2))
    assert result.loss.dtype == result.logps.dtype == result.weights.dtype == F64
    assert all(value.dtype == F64 and value.dim() == 0 for value in result.metrics.values())


# --- From tokens to the loss --------------------------------------------------------------------------------


MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])  # 4, 1 and 0 tokens


@pytest.mark.parametrize(
    ("loss_type", "kwargs", "first", "second"),  # w of a token of the first and of the second sequence
    [
        ("grpo", {}, 1 / 12, 1 / 3),
        ("bnpo", {}, 1 / 5, 1 / 5),
        ("bnpo", {"num_items_in_batch": 10}, 1 / 5, 1 / 5),
        ("dapo", {}, 1 / 5, 1 / 5),
        ("dapo", {"num_items_in_batch": 10}, 1 / 10, 1 / 10),
        ("dapo", {"num_items_in_batch": torch.tensor(0)}, 1.0, 1.0),
        ("dr_grpo", {}, 1 / 12, 1 / 12),
        ("dr_grpo", {"max_completion_length": 10}, 1 / 30, 1 / 30),
        ("luspo", {}, 1 / 3, 1 / 3),
        # verl's: over the two sequences that have tokens, or over those of the whole batch
        ("token-mean", {}, 1 / 5, 1 / 5),
        ("token-mean", {"num_items_in_batch": 10}, 1 / 10, 1 / 10),
        ("token-mean", {"num_items_in_batch": 0.5}, 1.0, 1.0),
        ("token-sum", {"num_items_in_batch": 10}, 1.0, 1.0),
        ("seq-mean-token-sum", {}, 1 / 2, 1 / 2),
        ("seq-mean-token-sum", {"global_batch_size": 8, "loss_scale": 4}, 1 / 2, 1 / 2),
        ("seq-mean-token-mean", {}, 1 / (2 * (4 + 1e-8)), 1 / (2 * (1 + 1e-8))),
        ("seq-mean-token-mean", {"global_batch_size": 8}, 1 / (8 * (4 + 1e-8)), 1 / (8 * (1 + 1e-8))),
        ("seq-mean-token-sum-norm", {}, 1 / 8, 1 / 8),
        ("seq-mean-token-sum-norm", {"max_completion_length": 10, "global_batch_size": 5}, 1 / 50, 1 / 50),
    ],
)
def test_weights_by_hand(loss_type: str, kwargs: dict, first: float, second: float):
    how = {"loss_type": loss_type} if loss_type in LOSS_TYPES else {"loss_agg_mode": loss_type}
    out = policy_loss(torch.zeros(3, 4, dtype=F64), torch.ones(3), completion_mask=MASK, **how, **kwargs)
    expected = f64([[first] * 4, [0, second, 0, 0], [0] * 4])
    torch.testing.assert_close(out.weights, expected, **TIGHT)
    # On-policy with A = 1 every ℓ is −1.
    torch.testing.assert_close(out.loss, -expected.sum(), **TIGHT)


def worked_batch() -> dict:
    """Two sequences over {a, b, c} with π = [½, ¼, ¼] everywhere; the last token is masked.

    tokens     a     b  |  c     –
    π          ½     ¼     ¼
    π_old      ¼     ¼     ½
    ρ          2     1     ½
    A          1     1    −2
    ℓ_clip   −1.2   −1    1.6         ρ ∈ [0.8, 1.2]
    π_ref      ½     ½     ¼
    k3         0   1−ln 2   0         u = ln 2 at the second token
    """
    log = math.log
    return {
        "logits": f64([[[0.5, 0.25, 0.25]] * 2] * 2).log().requires_grad_(),
        "completion_ids": torch.tensor([[0, 1], [2, -100]]),
        "advantages": f64([1, -2]),
        "old_logps": f64([[log(0.25), log(0.25)], [log(0.5), NAN]]),
        "ref_logps": f64([[log(0.5), log(0.5)], [log(0.25), NAN]]),
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
    }


def test_loss_by_hand():
    batch = worked_batch()
    k3 = 1 - math.log(2)
    out = grpo_loss(**batch, beta=0.1)
    torch.testing.assert_close(out.per_token_loss, f64([[-1.2, -1 + 0.1 * k3], [1.6, 0]]), **TIGHT)
    torch.testing.assert_close(out.kl, f64([[0, k3], [0, 0]]), **TIGHT)
    # grpo: the mean of (−2.2 + 0.1·k3)/2 and 1.6
    torch.testing.assert_close(out.loss, f64((-1.1 + 0.05 * k3 + 1.6) / 2), **TIGHT)
    # Only the second token moves: the others are held by the clip, and their k3 has slope 1 − e⁰ = 0.
    # g = w·(−ρA + β·(1 − e^u)) = ¼·(−1 − 0.1), times onehot(b) − π.
    expected = torch.zeros(2, 2, 3, dtype=F64)
    expected[0, 1] = -1.1 / 4 * (f64([0, 1, 0]) - f64([0.5, 0.25, 0.25]))
    torch.testing.assert_close(grad(out.loss, batch["logits"]), expected, **TIGHT)

    none = grpo_loss(**batch, beta=0.1, reduction="none", loss_scale=7.0, entropy_coef=3.0)
    torch.testing.assert_close(none.loss.detach(), out.per_token_loss, **TIGHT)
    # H = 1.5·ln 2 at each of the three tokens; loss_scale is on the bonus too.
    bonus = grpo_loss(**batch, beta=0.1, loss_scale=0.5, entropy_coef=0.2)
    torch.testing.assert_close(bonus.loss, (out.loss - 0.2 * 1.5 * math.log(2)) / 2, **TIGHT)
    torch.testing.assert_close(bonus.metrics["policy_loss"], out.loss.detach() / 2, **TIGHT)


def test_metrics_by_hand():
    batch = worked_batch()
    del batch["advantages"]
    # Rewards 2 and 0, unscaled: A = ±1, so the clip flags of worked_batch stay.
    out = grpo_loss(**batch, beta=0.1, rewards=f64([2, 0]), num_generations=2, scale_rewards="none")
    ln2 = math.log(2)
    expected = {
        "policy_loss": (-1.1 + 0.05 * (1 - ln2) + 0.8) / 2,
        "kl": (1 - ln2) / 3,
        "entropy": 1.5 * ln2,
        "clip_ratio/low_mean": 1 / 3,
        "clip_ratio/high_mean": 1 / 3,
        "clip_ratio/region_mean": 2 / 3,
        "clip_ratio/low_min": 0.0,  # means of the sequences: 0 and 1
        "clip_ratio/high_max": 0.5,  # ½ and 0
        "ratio/mean": 3.5 / 3,
        "ratio/min": 0.5,
        "ratio/max": 2.0,
        "approx_kl": (3.5 - 3) / 3,  # the logs of 2, 1 and ½ cancel
        "reward": 1.0,
        "reward_std": math.sqrt(2),
        "frac_reward_zero_std": 0.0,
        "reward_not_finite": 0.0,
    }
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(expected, rel=1e-12)
    # The flags see ρ after δ: 2 becomes 1.1, inside.
    capped = grpo_loss(**batch, rewards=f64([2, 0]), num_generations=2, delta=1.1).metrics
    assert capped["clip_ratio/high_mean"] == 0 and capped["ratio/max"] == 2
    assert "kl" in capped  # its reference is watched, beta or not
    # With the signs of A turned round every token has moved against its advantage: nothing is held.
    against = grpo_loss(**batch, rewards=f64([0, 2]), num_generations=2).metrics
    assert all(value == 0 for name, value in against.items() if name.startswith("clip_ratio"))


def test_reward_metrics_by_hand():
    # Groups [1, 1], [0, 2], [NaN, 3], [NaN, NaN]: all but the second teach nothing. Valid: 1, 1, 0, 2, 3:
    # mean 7/5, Σ = 15 − 49/5 = 5.2, std √(5.2/4).
    kwargs = {"logits": torch.zeros(8, 1, 2, dtype=F64), "completion_ids": torch.zeros(8, 1).long()}
    rewards = f64([1, 1, 0, 2, NAN, 3, NAN, NAN])
    metrics = grpo_loss(**kwargs, rewards=rewards, num_generations=2).metrics
    assert metrics["reward"].item() == pytest.approx(1.4)
    assert metrics["reward_std"].item() == pytest.approx(math.sqrt(1.3))
    assert metrics["frac_reward_zero_std"] == 0.75
    # If the batch scales, it is the batch's spread that counts.
    metrics = grpo_loss(**kwargs, rewards=rewards, num_generations=2, scale_rewards="batch").metrics
    assert metrics["frac_reward_zero_std"] == 0
    alone = grpo_loss(**kwargs, rewards=f64([1] + [NAN] * 7), num_generations=2).metrics
    assert alone["reward"] == 1 and alone["reward_std"].isnan() and alone["frac_reward_zero_std"] == 1


def test_rewards_equal_the_advantages_they_stand_for():
    batch = random_batch()
    del batch["advantages"]
    rewards = f64([1, 0, 0.5, NAN])
    for scale in ("group", "batch", "none"):
        A = group_advantages(rewards, 2, scale_rewards=scale, unbiased=False, eps=1e-6)
        a = grpo_loss(**batch, advantages=A)
        r = grpo_loss(
            **batch,
            rewards=rewards,
            num_generations=2,
            scale_rewards=scale,
            advantage_unbiased=False,
            advantage_eps=1e-6,
        )
        assert torch.equal(a.loss, r.loss)
