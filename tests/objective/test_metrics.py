"""Metrics by hand, and that the sums of parts give the metrics of the whole."""

import math

import pytest
import torch

from cases import BACKENDS, make_case, on_device
from grpo_kernels import fused_grpo_loss
from grpo_kernels.objective.catalogue import TERMS
from grpo_kernels.objective.metrics import METRIC_NAMES, combine
from term_table import facts
from tolerance import U, assert_within, bounds, near


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Two sequences over a uniform distribution: lp = −log 4 everywhere, ratios chosen through old."""
    logits, ids = torch.zeros(2, 2, 4), torch.zeros(2, 2, dtype=torch.long)
    ratio = torch.tensor([[2.0, 1.0], [0.5, 9.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    old = -math.log(4) - ratio.log()
    ref = torch.full((2, 2), -math.log(4)) + math.log(2)
    out = fused_grpo_loss(
        **on_device(dict(logits=logits, completion_ids=ids, completion_mask=mask, old_logps=old, ref_logps=ref)),
        **on_device(dict(rewards=torch.tensor([1.0, 0.0]))), num_generations=2, advantage_eps=0.0, beta=0.5,
        return_entropy=True, backend=backend,
    )  # fmt: skip
    # A = ±1/√2. Token (0,0): ρ = 2, A > 0: clipped high. Token (1,0): ρ = 0.5, A < 0: clipped low.
    a, kl = 1 / math.sqrt(2), 2 - math.log(2) - 1
    want = {
        "kl": kl,
        "entropy": math.log(4),
        "clip_ratio/low_mean": 1 / 3, "clip_ratio/low_min": 0.0,
        "clip_ratio/high_mean": 1 / 3, "clip_ratio/high_max": 0.5, "clip_ratio/region_mean": 2 / 3,
        "ratio/mean": 3.5 / 3, "ratio/min": 0.5, "ratio/max": 2.0,
        "approx_kl": ((1 - math.log(2)) + 0 + (-0.5 + math.log(2))) / 3,
        "reward": 0.5, "reward_std": 1 / math.sqrt(2), "frac_reward_zero_std": 0.0,
        "reward_not_finite": 0.0,
        # sequence 0: (−1.2a − 1.0a)/2; sequence 1: 0.8a; mean of the two, plus β·kl
        "policy_loss": ((-1.2 * a - a) / 2 + 0.8 * a) / 2 + 0.5 * kl,
    }  # fmt: skip
    without = {"clip_ratio/dual_mean", *(name for name in METRIC_NAMES if name.startswith(("sampling/", "fipo/")))}
    assert out.metrics.keys() == want.keys() == set(METRIC_NAMES) - without
    allowed = bounds(logits, ids, completion_mask=mask, old_logps=old, ref_logps=ref, rewards=torch.tensor([1.0, 0.0]),
                     num_generations=2, advantage_eps=0.0, beta=0.5)  # fmt: skip
    for name, value in want.items():
        # old and ref are fp32, and so are the ratios that they are made of
        assert_within(out.metrics[name], torch.tensor(value).double(), allowed.metrics[name], name, factor=2)


@pytest.mark.parametrize("term", TERMS)
def test_which_metrics_a_term_has(term):
    case = make_case()
    inputs = case.inputs("completion_ids", "completion_mask", "old_logps", "advantages")
    known = facts(term)
    got = fused_grpo_loss(case.logits, **inputs, policy_term=term, **known.settings[0], backend="torch").metrics
    every = {"policy_loss", "ratio/mean", "ratio/min", "ratio/max", "approx_kl"}
    assert got.keys() == every | known.metrics


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_parts_give_the_metrics_of_the_whole(backend):
    case = make_case(B=8, T=6, seed=1)
    names = ("completion_ids", "completion_mask", "old_logps", "ref_logps", "rewards")
    kwargs = dict(num_generations=2, beta=0.1, return_entropy=True, backend=backend, loss_type="dapo")
    N = case.completion_mask.sum()
    whole = fused_grpo_loss(**on_device({"logits": case.logits, **case.inputs(*names)}), **kwargs, num_items_in_batch=N)
    parts = []
    for part in (slice(0, 2), slice(2, 6), slice(6, 8)):
        mine = on_device({"logits": case.logits[part], **{k: v[part] for k, v in case.inputs(*names).items()}})
        parts.append(fused_grpo_loss(**mine, **kwargs, num_items_in_batch=N).sums)
    joined = combine(parts)
    assert joined.keys() == whole.metrics.keys()
    allowed = bounds(case.logits, **case.inputs(*names), **kwargs, num_items_in_batch=N).metrics
    for name, value in whole.metrics.items():
        assert_within(joined[name], value, allowed[name], name, factor=2)


def test_empty_parts_do_not_disturb():
    case = make_case(B=4, seed=2)
    names = ("completion_ids", "completion_mask", "old_logps", "advantages")
    full = fused_grpo_loss(case.logits, **case.inputs(*names))
    inputs = case.inputs(*names) | {"completion_mask": torch.zeros_like(case.completion_mask)}
    empty = fused_grpo_loss(case.logits, **inputs)
    joined = combine([full.sums, empty.sums])
    for name in ("ratio/min", "ratio/max", "clip_ratio/low_min", "clip_ratio/high_max", "ratio/mean"):
        assert joined[name].item() == near(full.metrics[name].item(), 20), name


def test_combine_errors():
    case = make_case()
    names = ("completion_ids", "completion_mask", "old_logps", "advantages")
    a = fused_grpo_loss(case.logits, **case.inputs(*names))
    b = fused_grpo_loss(case.logits, **case.inputs(*names), ref_logps=case.ref_logps)
    with pytest.raises(ValueError, match="at least one"):
        combine([])
    with pytest.raises(ValueError, match="different configurations"):
        combine([a.sums, b.sums])
    with pytest.raises(ValueError, match=r"Pass out\.sums of each call, not out\.metrics"):
        combine([a.metrics])
    with pytest.raises(TypeError, match=r"got one dict. Put it in a list: \[out\.sums\]"):
        combine(a.sums)
    with pytest.raises(TypeError, match=r"sums that are tensors: out\.sums"):
        combine([{name: value.item() for name, value in a.sums.items()}])


@pytest.mark.parametrize("backend", BACKENDS)
def test_reward_std_of_large_rewards(backend):
    """Σ R² is kept in fp64: a spread of 0.1 around 1000 survives."""
    case = make_case(B=4, seed=3)
    rewards = torch.tensor([1000.0, 1000.125, 1000.25, 1000.125])
    out = fused_grpo_loss(**on_device({"logits": case.logits, **case.inputs("completion_ids", "completion_mask")}),
                          rewards=on_device({"r": rewards})["r"], num_generations=2, backend=backend)  # fmt: skip
    assert out.metrics["reward_std"].item() == pytest.approx(rewards.double().std().item(), rel=8 * U)
    assert out.metrics["reward"].item() == near(1000.125, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("term", "level"), [(t, level) for t in TERMS for level in ("token", "sequence") if level in TERMS[t].levels]
)
def test_sums_of_parts_for_every_term(term, level, backend):
    """Quotients per token and per sequence, and metrics of other names, come together exactly."""
    case = make_case(B=6, T=5, seed=2)
    names = ("completion_ids", "completion_mask", "old_logps", "advantages")
    config = {"policy_term": term, "importance_sampling_level": level, **facts(term).settings[-1]}
    kwargs = {**config, "backend": backend}
    whole = fused_grpo_loss(**on_device({"logits": case.logits, **case.inputs(*names)}), **kwargs)
    parts = []
    for part in (slice(0, 2), slice(2, 6)):
        mine = on_device({"logits": case.logits[part], **{k: v[part] for k, v in case.inputs(*names).items()}})
        parts.append(fused_grpo_loss(**mine, **kwargs).sums)
    joined = combine(parts)
    assert joined.keys() == whole.metrics.keys()
    allowed = bounds(case.logits, **case.inputs(*names), **config).metrics
    for metric, value in whole.metrics.items():
        if metric != "policy_loss":  # depends on the weights, which these parts do not share
            assert_within(joined[metric], value, allowed[metric], metric, factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_metrics_of_a_sequence_level_are_means_over_sequences(backend):
    """As TRL: one value per sequence, those without tokens included; with advantages per token, over tokens."""
    logits, ids = torch.zeros(3, 2, 4), torch.zeros(3, 2, dtype=torch.long)
    old = -math.log(4) - torch.tensor([[2.0, 2.0], [1.0, 1.0], [1.0, 1.0]]).log()
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    inputs = on_device(dict(logits=logits, completion_ids=ids, completion_mask=mask, old_logps=old))
    adv = on_device({"advantages": torch.ones(3)})["advantages"]
    one = fused_grpo_loss(**inputs, advantages=adv, loss_type="gspo", backend=backend).metrics
    assert one["clip_ratio/high_mean"].item() == near(1 / 3, 6)
    per_token = adv[:, None].expand(3, 2)
    many = fused_grpo_loss(**inputs, advantages=per_token, loss_type="gspo", backend=backend).metrics
    assert many["clip_ratio/high_mean"].item() == near(2 / 3, 6)
    assert one["clip_ratio/high_max"].item() == many["clip_ratio/high_max"].item() == 1.0
    assert one["ratio/mean"].item() == near(5 / 3, 6)  # over tokens, at every level
