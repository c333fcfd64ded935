"""The trainer's algorithm: micro-batches, minibatches, old log-probabilities, masks, KL, schedules."""

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from transformers import get_scheduler

from grpo_kernels import group_advantages
from grpo_kernels.objective.catalogue import LOSS_TYPES
from grpo_kernels.trainer import loop, normalise
from grpo_kernels.trainer.options import SCHEDULES, OptionError, Options
from grpo_kernels.trainer.tokenizer import character_tokenizer
from model_tolerance import model_bounds
from tolerance import assert_within, near
from trainer_cases import TASK, TIMES, rollout_of, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = character_tokenizer(TASK.alphabet)
# 2 prompts with 6 completions each, of 1 to 4 tokens; one of each is cut off.
PROMPTS = ["37+48="] * 6 + ["3+4="] * 6
COMPLETIONS = [[8, 11, 1, 0], [9, 3, 5, 7], [1, 0, 0, 0], [8, 1, 0, 0], [4, 5, 6, 1], [8, 11, 1, 0],
               [10, 1, 0, 0], [3, 3, 1, 0], [7, 7, 7, 7], [1, 0, 0, 0], [10, 1, 0, 0], [6, 1, 0, 0]]  # fmt: skip
REWARDS = [1.0, 0.0, 0.5, 0.0, 0.25, 1.0, 1.0, 0.0, 0.0, 0.75, 1.0, float("nan")]
SIZES = {"batch_size": 2, "num_generations": 6}


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return tiny_llama(TOKENIZER)


@pytest.fixture
def rollout():
    return rollout_of(TOKENIZER, PROMPTS, COMPLETIONS, REWARDS)


def step(policy, rollout, *, rate=0.5, reference=None, **options):
    """(the row without its times, what the step has added to the weights) of a copy of the policy"""
    moved = copy.deepcopy(policy)
    options = Options(**SIZES, max_grad_norm=1e6, **options)
    optimizer = torch.optim.SGD(moved.parameters(), rate)
    row = loop.step_on(moved, reference, rollout, optimizer, options.loss_config(4), options)
    row = {name: value for name, value in row.items() if name not in TIMES}
    return row, torch.cat([(a - b).detach().flatten() for a, b in zip(moved.parameters(), policy.parameters())])


# --- micro-batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all", "truncated masked"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up(policy, rollout, loss_type, masked):
    """Weights and metrics are those of the minibatch in one piece, with unequal lengths and a NaN reward."""
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.1)
    options = {"loss_type": loss_type, "beta": 0.1, "entropy_coef": 0.05, "mask_truncated_completions": masked}
    whole, moved = step(policy, rollout, reference=reference, **options)
    assert moved.abs().max() > 1e-2

    def whole_of(model):
        row, moved = step(model, rollout, reference=reference, **options)
        return {"moved": moved, **{name: value for name, value in row.items() if value is not None}}

    allowed = model_bounds(policy, whole_of)
    for parts in (3, 12) if masked else (4,):
        row, other = step(policy, rollout, reference=reference, gradient_accumulation_steps=parts, **options)
        assert_within(other, moved, allowed["moved"], "step", factor=2)
        assert row.keys() == whole.keys()
        for name, value in whole.items():
            assert_within(torch.tensor(row[name]), torch.tensor(value), allowed[name], name, factor=2)


def test_the_share_of_a_part():
    config = Options(loss_type="grpo", entropy_coef=0.1).loss_config(4)
    part, whole = normalise.Whole(2, 3), normalise.Whole(8, 30)
    assert normalise.share(config, part, whole) == {"loss_scale": 0.25, "entropy_coef": pytest.approx(0.1 * 0.1 / 0.25)}
    tokens = Options(loss_type="dapo").loss_config(4)
    assert normalise.share(tokens, part, whole) == {"num_items_in_batch": 30.0}
    empty = normalise.Whole(2, 0)
    bnpo = Options(loss_type="bnpo", entropy_coef=0.1).loss_config(4)
    assert normalise.share(bnpo, empty, empty) == {"loss_scale": 0.0, "entropy_coef": 0.0}
    assert normalise.share(dataclasses.replace(tokens, loss_agg_mode="token-sum"), part, whole) == {}
    verl = dataclasses.replace(tokens, loss_agg_mode="seq-mean-token-mean")
    mask = torch.tensor([[1, 0], [0, 0], [1, 1]])
    found = normalise.share(verl, normalise.Whole.of(mask[:1]), normalise.Whole.of(mask))
    assert found == {"global_batch_size": 2}


# --- minibatches ----------------------------------------------------------------------------------


def watched(monkeypatch, name):
    """The keyword arguments of every call of a function of the loop."""
    calls, real = [], getattr(loop, name)
    monkeypatch.setattr(loop, name, lambda *a, **k: (calls.append(k), real(*a, **k))[1])
    return calls


def test_every_completion_is_used_once_per_epoch(policy, rollout, monkeypatch):
    calls = watched(monkeypatch, "completion_loss")
    torch.manual_seed(3)
    row, _ = step(policy, rollout, num_iterations=3, num_minibatches=4, gradient_accumulation_steps=3, beta=0.0)
    assert len(calls) == 3 * 4 * 3 and all(len(call["advantages"]) == 1 for call in calls)
    every = sorted(group_advantages(rollout.rewards, 6).tolist())
    epochs = [[call["advantages"].item() for call in calls[12 * i : 12 * i + 12]] for i in range(3)]
    assert all(sorted(epoch) == pytest.approx(every) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]  # each shuffled anew
    assert row["ratio/min"] < 1.0 < row["ratio/max"]


@pytest.mark.parametrize(
    ("options", "passes"),
    [({"num_iterations": 1}, 0), ({"num_iterations": 3}, 1), ({"num_iterations": 1, "num_minibatches": 2}, 1)],
    ids=str,
)
def test_old_log_probabilities_are_computed_once_if_needed(policy, rollout, monkeypatch, options, passes):
    asked = watched(monkeypatch, "completion_logps")
    losses = watched(monkeypatch, "completion_loss")
    row, _ = step(policy, rollout, beta=0.0, **options)
    assert len(asked) == passes * options.get("num_minibatches", 1)  # as many rows at once as the loss takes
    assert all((call["old_logps"] is None) == (passes == 0) for call in losses)
    if passes == 0:
        assert row["ratio/min"] == row["ratio/max"] == 1.0


def test_ratios_are_to_the_policy_that_sampled(policy, rollout, monkeypatch):
    losses = watched(monkeypatch, "completion_loss")
    with torch.no_grad():
        options = Options(**SIZES)
        wanted = loop.completion_logps(policy, None, rollout, options, mask=rollout.completion_mask, temperature=1.0)
    step(policy, rollout, num_iterations=3, beta=0.0)
    assert len(losses) == 3
    for call in losses:
        assert torch.equal(call["old_logps"], wanted)


# --- what is learned from -------------------------------------------------------------------------


def test_masked_truncated_completions_take_no_part(policy, rollout):
    cut = ~rollout.ended
    other = dataclasses.replace(rollout, completion_ids=torch.where(cut[:, None], 5, rollout.completion_ids))
    assert not torch.equal(other.completion_ids, rollout.completion_ids)
    same, moved = (step(policy, each, beta=0.0, mask_truncated_completions=True)[1] for each in (rollout, other))
    assert torch.equal(same, moved)
    same, moved = (step(policy, each, beta=0.0)[1] for each in (rollout, other))
    assert not torch.equal(same, moved)


def test_kl_to_the_old_policy_needs_no_reference(policy, rollout):
    row, moved = step(policy, rollout, beta=0.5, kl_to="old")
    free, unbound = step(policy, rollout, beta=0.0)
    assert row["kl"] > 0 and "kl" not in free
    assert not torch.equal(moved, unbound)
    with pytest.raises(OptionError, match=r"--kl-to old acts from the second update on.*--num-iterations"):
        Options(beta=0.5, kl_to="old", num_iterations=1)


def test_entropy_bonus_raises_the_entropy(policy, rollout):
    flat = dataclasses.replace(rollout, rewards=torch.ones(12))
    row, moved = step(policy, flat, beta=0.0, entropy_coef=1.0, num_iterations=5, rate=0.1)
    first, _ = step(policy, flat, beta=0.0, num_iterations=1)
    assert row["entropy"] > first["entropy"] + 1e-3
    assert moved.abs().max() > 0 and first["frac_reward_zero_std"] == 1.0


# By hand: means 2.75/6 and 2.75/5, standard deviations 0.4587 and 0.5123, of all eleven 0.4610; 1e-4 beside each.
@pytest.mark.parametrize(
    ("scale", "least", "largest"), [("group", -1.0733, 1.1806), ("batch", -1.1928, 1.1749), ("none", -0.55, 0.5417)]
)
def test_scale_rewards(policy, rollout, scale, least, largest):
    row, _ = step(policy, rollout, scale_rewards=scale, beta=0.0)
    assert row["advantage/min"] == pytest.approx(least, abs=2e-4)  # by hand, of standard deviations to four places
    assert row["advantage/max"] == pytest.approx(largest, abs=2e-4)


def test_reward_metrics_leave_out_none(policy, rollout):
    row, _ = step(policy, rollout, beta=0.0)
    known = torch.tensor(REWARDS[:-1])
    assert row["reward"] == near(known.mean().item(), 12)
    assert row["reward_std"] == near(known.std().item(), 12)
    assert row["frac_reward_zero_std"] == 0.0


# --- sampling and rates ---------------------------------------------------------------------------


def test_top_p_is_of_the_sampler_alone(policy, monkeypatch):
    problems = TASK.train[:3]
    greedy = loop.sample(policy, TOKENIZER, TASK, problems)
    torch.manual_seed(0)
    nucleus = loop.sample(policy, TOKENIZER, TASK, problems, 4, 1.0, top_p=1e-6)
    assert torch.equal(nucleus.completion_ids[::4], greedy.completion_ids)
    assert torch.equal(nucleus.completion_ids[1::4], greedy.completion_ids)
    torch.manual_seed(0)
    free = loop.sample(policy, TOKENIZER, TASK, problems, 4, 1.0)
    assert not torch.equal(free.completion_ids[::4], greedy.completion_ids)
    losses = watched(monkeypatch, "completion_loss")
    options = Options(batch_size=3, num_generations=4, beta=0.0, num_iterations=1)
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    row = loop.step_on(policy, None, free, optimizer, options.loss_config(4), options)
    assert losses[0]["temperature"] == 1.0 and row["ratio/max"] == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_transformers(name):
    options = Options(lr_scheduler_type=name, steps=20, learning_rate=0.5, lr_warmup_ratio=0.2)
    rate = loop.rate_at(options)
    rates = [rate(step) for step in range(1, 21)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(name, optimizer, 4, 21)
    for mine in rates:
        optimizer.step()
        theirs.step()
        assert mine == pytest.approx(0.5 * theirs.get_last_lr()[0])
        assert mine > 0
    assert rates[3] == pytest.approx(0.5)  # the peak
    assert rates[0] == pytest.approx(0.5 if name == "constant" else 0.125)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_minibatches": 3}, r"--num-minibatches must be a divisor of the 16 completions of a step \(--batch"),
        ({"num_minibatches": 2, "gradient_accumulation_steps": 3}, "--gradient-accumulation-steps .* 8 completions"),
        ({"top_p": 0.0}, "--top-p must be above 0 and at most 1, got 0.0"),
        ({"top_k": -1}, "--top-k must be 0 or more, got -1"),
        ({"lr_scheduler_type": "steep"}, "--lr-scheduler-type must be one of linear, cosine"),
        ({"lr_warmup_ratio": 1.5}, "--lr-warmup-ratio must be from 0 to 1"),
        ({"entropy_coef": float("nan")}, "--entropy-coef must be above -inf and finite"),
        ({"kl_to": "start"}, "--kl-to must be one of reference, old"),
        ({"num_minibatches": 0}, "--num-minibatches must be at least 1"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(options, says):
    with pytest.raises(OptionError, match=says):
        Options(batch_size=2, num_generations=8, **options)
