"""A sampler that truncates, and its kept sets in the loss: its ratio to the sampler is then 1 at the first update."""

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from grpo_kernels.trainer import cli, loop
from grpo_kernels.trainer.options import Options
from grpo_kernels.trainer.scoring import completion_logits
from grpo_kernels.trainer.tokenizer import character_tokenizer
from tolerance import U
from trainer_cases import TASK, run, saved_model, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = character_tokenizer(TASK.alphabet)
GROUPS, G = 3, 8
MEAN, LEAST, MOST, OFF = (f"sampling/{name}" for name in (
    "importance_sampling_ratio/mean", "importance_sampling_ratio/min", "importance_sampling_ratio/max",
    "sampling_logp_difference/max"))  # fmt: skip
# Logits of a few units, whose last bits depend on the cache that generate keeps: some roundings of theirs, in the
# logits and in both log-sum-exps.
ROUNDING = 64 * U
TRUNCATIONS = {"top p": {"top_p": 0.8}, "top k": {"top_k": 3}, "both": {"top_k": 6, "top_p": 0.9}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return tiny_llama(TOKENIZER).eval()


def sampled(policy, temperature=1.0, **truncation):
    torch.manual_seed(1)
    return loop.sample(policy, TOKENIZER, TASK, TASK.train[:GROUPS], G, temperature, **truncation)


def step(policy, rollout, rate=0.1, **options):
    """(the row, the weights after it)"""
    moved = copy.deepcopy(policy)
    options = Options(**{"batch_size": GROUPS, "num_generations": G, "beta": 0.0, "temperature": 0.7, **options})
    optimizer = torch.optim.SGD(moved.parameters(), rate)
    reference = policy if options.beta else None
    return loop.step_on(moved, reference, rollout, optimizer, options.loss_config(4), options), moved


def earning(rollout, fits):
    """With rewards that differ inside of the groups."""
    return dataclasses.replace(rollout, rewards=fits(rollout).float())


def first_token(rollout):
    return rollout.completion_ids[:, 0] % 3


# --- what is written down -------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", TRUNCATIONS.values(), ids=TRUNCATIONS)
def test_kept_sets_are_the_sampler_s(policy, truncation):
    """Those that transformers' warpers leave of the logits, computed anew, and the log-probabilities over them."""
    rollout = sampled(policy, 0.7, **truncation)
    batch, length = rollout.completion_ids.shape
    scores = completion_logits(policy, rollout)[:, :length].detach().flatten(0, 1)
    scores = TemperatureLogitsWarper(0.7)(None, scores)
    if "top_k" in truncation:
        scores = TopKLogitsWarper(truncation["top_k"])(None, scores)
    if "top_p" in truncation:
        scores = TopPLogitsWarper(truncation["top_p"])(None, scores)
    mask, support = rollout.completion_mask, rollout.support
    assert len(support) == batch * length and not mask.all()
    for n, counts in enumerate(mask.flatten().tolist()):
        ids = support.ids[support.first[n] : support.last[n]].tolist()
        assert ids == ((scores[n] > -torch.inf).nonzero()[:, 0].tolist() if counts else [])
    wanted = scores.log_softmax(-1).view(batch, length, -1).gather(2, rollout.completion_ids[..., None])[..., 0]
    torch.testing.assert_close(rollout.sampling_logps, wanted.masked_fill(~mask, 0.0), rtol=ROUNDING, atol=ROUNDING)


def test_the_draws_are_those_of_generate(policy):
    """The same random numbers give the same tokens as transformers' own top-k and top-p."""
    rollout = sampled(policy, 0.7, top_k=6, top_p=0.9)
    prompts = [problem.prompt for problem in TASK.train[:GROUPS] for _ in range(G)]
    encoded = TOKENIZER(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(1)
    ids = policy.generate(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=4,
                          do_sample=True, temperature=0.7, top_k=6, top_p=0.9)  # fmt: skip
    assert torch.equal(ids[:, encoded["input_ids"].shape[1] :], rollout.completion_ids)


def test_nothing_is_written_down_without_truncation(policy):
    assert sampled(policy).support is None and sampled(policy).sampling_logps is None
    greedy = loop.sample(policy, TOKENIZER, TASK, TASK.train[:3], temperature=None, top_k=3)
    assert greedy.support is None


def test_rows_of_a_rollout_keep_their_sets(policy):
    rollout = sampled(policy, 0.7, top_p=0.8)
    length = rollout.completion_ids.shape[1]
    part = rollout.rows(torch.tensor([5, 2]))
    for n in range(2 * length):
        own = (5, 2)[n // length] * length + n % length
        assert part.support.ids[part.support.first[n] : part.support.last[n]].equal(
            rollout.support.ids[rollout.support.first[own] : rollout.support.last[own]])
    assert part.sampling_logps.equal(rollout.sampling_logps[[5, 2]])


# --- the ratio at the first update ----------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"num_iterations": 1}, {}, {"num_minibatches": 2, "gradient_accumulation_steps": 2}, {"loss_path": "linear"},
    {"backend": "reference"}, {"beta": 0.1, "loss_type": "gspo"}, {"mask_truncated_completions": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("truncation", TRUNCATIONS.values(), ids=TRUNCATIONS)
def test_the_ratio_to_the_sampler_is_one_with_replay(policy, truncation, options):
    rollout = earning(sampled(policy, 0.7, **truncation), first_token)
    row, _ = step(policy, rollout, **options)
    assert row[OFF] <= ROUNDING
    assert max(abs(row[name] - 1.0) for name in (MEAN, LEAST, MOST)) <= ROUNDING
    row, _ = step(policy, rollout, replay=False, **options)
    # The sampler's probability is 1/Z of the whole vocabulary's.
    assert row[MEAN] < 0.97 and row[LEAST] < 0.93 and row[MOST] <= 1.0 + ROUNDING


def test_triton_replays(policy):
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    rollout = earning(sampled(policy, 0.7, top_p=0.8), first_token)
    torch_row, torch_weights = step(policy, rollout, backend="torch")
    for loss_path in ("logits", "linear"):
        row, weights = step(policy, rollout, backend="triton", loss_path=loss_path)
        assert row[OFF] <= ROUNDING and row["entropy"] == pytest.approx(torch_row["entropy"], rel=ROUNDING)
        for a, b in zip(weights.parameters(), torch_weights.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_every_pass_is_over_the_same_sets(policy):
    """Old, ref and update: the policy is the reference, so that with equal sets there is no KL at the first update."""
    rollout = earning(sampled(policy, 0.7, top_k=3), first_token)
    row, _ = step(policy, rollout, rate=0.0, beta=0.1)
    assert abs(row["kl"]) <= ROUNDING and abs(row["ratio/max"] - 1.0) <= ROUNDING
    free, _ = step(policy, rollout, rate=0.0, beta=0.1, replay=False)
    assert row["entropy"] < free["entropy"] - 0.1  # of 3 tokens, at most log 3
    assert row["entropy"] <= torch.tensor(3.0).log()


def test_what_could_not_be_drawn_does_not_move(policy):
    """The gradient of a logit outside of every kept set is 0: its row of an untied head stays, bit by bit."""
    rollout = earning(sampled(policy, 0.7, top_k=2), first_token)
    never = sorted(set(range(len(TOKENIZER))) - set(rollout.support.ids.tolist()))
    assert never
    before = policy.lm_head.weight[never]
    _, replayed = step(policy, rollout, rate=10.0)
    _, free = step(policy, rollout, rate=10.0, replay=False)
    assert torch.equal(replayed.lm_head.weight[never], before)
    assert not torch.equal(free.lm_head.weight[never], before)


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_replays_unless_told_not_to(tmp_path):
    model = saved_model(tmp_path / "model")
    settings = {"model": model, "top_k": 4, "samples_every": 0, "reward": ("trainer_cases:starts_even",),
                "learning_rate": 0.01, "steps": 2}  # fmt: skip
    for replay in (True, False):
        rows = [row for row in run(tmp_path / str(replay), replay=replay, **settings)[1] if "loss" in row]
        assert len(rows) == 2
        assert all((row[OFF] <= ROUNDING) == replay and (row[MEAN] < 0.97) != replay for row in rows)
    without = run(tmp_path / "whole", **settings | {"top_k": 0})[1]
    assert not any(name.startswith("sampling/") for row in without for name in row)
