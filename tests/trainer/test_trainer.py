"""The minimal trainer's parts: task, tokenizer, sampling, one GRPO step, warm-up."""

import io
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from rich.console import Console
from transformers import AutoTokenizer

from grpo_kernels import LossConfig, token_logprobs
from grpo_kernels.trainer import loop, warmup
from grpo_kernels.trainer.build import build
from grpo_kernels.trainer.console import Reporter
from grpo_kernels.trainer.model import tiny_qwen2
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.task import addition, exact_match
from grpo_kernels.trainer.tokenizer import character_tokenizer
from model_tolerance import model_bounds
from tolerance import assert_within, near
from trainer_cases import rollout_of

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = addition()


@pytest.fixture
def tokenizer():
    return character_tokenizer(TASK.alphabet)


@pytest.fixture
def policy(tokenizer):
    torch.manual_seed(0)
    return tiny_qwen2(tokenizer, TASK.max_completion_length)


def test_a_policy_of_another_width(tokenizer):
    """--hidden-size 128: four times the weights, and as large logits at the start as at 64."""
    wide, usual = (build(Options(hidden_size=size), torch.device("cpu")).policy for size in (128, None))
    sizes = [sum(weight.numel() for weight in each.parameters()) for each in (wide, usual)]
    assert wide.config.hidden_size == 128 and usual.config.hidden_size == 64 and 3.9 < sizes[0] / sizes[1] < 4.1
    ids = torch.tensor([tokenizer("37+48=")["input_ids"]])
    spread, wanted = (each(ids).logits.std().item() for each in (wide, usual))
    assert 0.5 < spread / wanted < 2
    for given, said in (({"hidden_size": 72}, "multiple of 16"), ({"hidden_size": 128, "model": "x"}, "its own")):
        with pytest.raises(OptionError, match=said):
            Options(**given)


# --- task -----------------------------------------------------------------------------------------


def test_reward_is_exact():
    completions = ["58", "85", "580", "5", "", "58<pad>", " 58"]
    n = len(completions)
    assert exact_match(["37+48="] * n, completions, ["58"] * n) == [1.0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="shorter"):
        exact_match(["37+48="] * 2, ["58"] * 2, ["58"])


def test_problems_are_all_the_two_digit_sums_and_right():
    problems = TASK.train + TASK.held_out
    assert len(problems) == len(set(problems)) == 90 * 90
    assert len(TASK.held_out) == 500
    for problem in problems:
        a, b = problem.prompt.removesuffix("=").split("+")
        assert len(a) == len(b) == 2
        assert int(problem.answer[::-1]) == int(a) + int(b)


def test_no_held_out_problem_is_a_training_problem_turned_round():
    train = {problem.prompt for problem in TASK.train}
    for problem in TASK.held_out:
        a, b = problem.prompt.removesuffix("=").split("+")
        assert not train & {f"{a}+{b}=", f"{b}+{a}="}


def test_split_does_not_depend_on_the_seed():
    random.seed(7)
    assert addition().held_out == TASK.held_out


def test_batches_go_through_all_problems_before_any_comes_again():
    problems = TASK.train[:10]
    drawn = loop.batches(problems, 4, seed=1)
    flat = [problem for _ in range(5) for problem in next(drawn)]
    assert sorted(flat[:10]) == sorted(flat[10:]) == sorted(problems)
    again = loop.batches(problems, 4, seed=1)
    assert flat[:4] == next(again)
    assert flat[:4] != next(loop.batches(problems, 4, seed=2))


def test_batch_larger_than_the_problems():
    assert len(next(loop.batches(TASK.train[:3], 8, seed=0))) == 8


# --- tokenizer ------------------------------------------------------------------------------------


def test_tokenizer_round_trip(tokenizer, tmp_path):
    text = "37+48=58"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids) == text
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    assert loaded(text + "<eos>")["input_ids"] == [*ids, 1]
    assert loaded("3x\n")["input_ids"] == [ids[0], 2, 2]


def test_tokenizer_pads_on_the_left(tokenizer):
    encoded = tokenizer(["3+4=", "37+48="], padding=True)
    assert encoded["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
    assert encoded["attention_mask"][0] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("alphabet", ["", "0120"])
def test_tokenizer_wants_each_character_once(alphabet):
    with pytest.raises(ValueError, match="once"):
        character_tokenizer(alphabet)


# --- sampling -------------------------------------------------------------------------------------


def test_mask_ends_with_the_first_end_of_sequence():
    ids = torch.tensor([[5, 1, 1, 7], [5, 6, 7, 8], [1, 5, 1, 0], [5, 6, 7, 1]])
    wanted = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(loop.mask_after_eos(ids, 1), wanted)


def test_logits_score_the_completion_whatever_the_padding(policy, tokenizer):
    prompts, completions = ["3+4=", "37+48="], [[10, 1, 0], [8, 11, 1]]
    rollout = rollout_of(tokenizer, prompts, completions, [0.0, 0.0])
    logits = loop.completion_logits(policy, rollout)
    assert logits.shape == (2, 4, len(tokenizer))
    logps = token_logprobs(logits, rollout.completion_ids, mask=rollout.completion_mask).logps
    allowed = model_bounds(policy, lambda model: {"logps": token_logprobs(
        loop.completion_logits(model, rollout), rollout.completion_ids, mask=rollout.completion_mask).logps})["logps"]
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        ids = torch.tensor([tokenizer(prompt)["input_ids"] + completion])
        alone = policy(input_ids=ids).logits.log_softmax(-1)
        for t, token in enumerate(completion):
            wanted = alone[0, len(prompt) - 1 + t, token] if rollout.completion_mask[i, t] else torch.tensor(0.0)
            # fp32 through two layers of attention, whose sums run over differently padded rows
            assert_within(logps[i, t], wanted, allowed[i, t], "logps", factor=2)


def test_sampled_log_probabilities_are_those_of_the_sampler(policy, tokenizer):
    torch.manual_seed(3)
    problems = TASK.train[:4]
    rollout = loop.sample(policy, tokenizer, TASK, problems, num_generations=3, temperature=0.7)
    assert rollout.rewards.shape == (12,)
    assert torch.equal(rollout.prompt_ids[0], rollout.prompt_ids[2])
    assert not torch.equal(rollout.prompt_ids[0], rollout.prompt_ids[3])

    def logps_of(model):
        logits = loop.completion_logits(model, rollout)
        return token_logprobs(logits, rollout.completion_ids, mask=rollout.completion_mask, temperature=0.7).logps

    with torch.no_grad():
        logps = logps_of(policy)
    torch.manual_seed(3)
    generated = policy.generate(
        input_ids=rollout.prompt_ids, attention_mask=rollout.prompt_mask, max_new_tokens=4, do_sample=True,
        temperature=0.7, top_k=0, top_p=1.0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(generated.sequences[:, rollout.prompt_ids.shape[1] :], rollout.completion_ids)
    scores = torch.stack(generated.scores, dim=1).log_softmax(-1)
    wanted = scores.gather(-1, rollout.completion_ids[..., None])[..., 0] * rollout.completion_mask
    allowed = model_bounds(policy, lambda model: {"logps": logps_of(model)})["logps"]
    assert_within(logps, wanted, allowed, "logps", factor=2)


def test_special_tokens_in_a_completion_make_it_wrong(tokenizer):
    problem = next(problem for problem in TASK.train if len(problem.answer) == 2)
    digits = tokenizer(problem.answer)["input_ids"]
    pad, eos, unk = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    completions = torch.tensor(
        [[*digits, eos, pad], [digits[0], pad, digits[1], eos], [*digits, unk, eos], [*digits, pad, pad],
         [eos, pad, pad, pad]]
    )  # fmt: skip
    prompt = torch.tensor(tokenizer(problem.prompt)["input_ids"])
    stub = SimpleNamespace(
        device=torch.device("cpu"),
        generate=lambda input_ids, **_: torch.cat([prompt.expand(len(completions), -1), completions], dim=1),
    )
    rollout = loop.sample(stub, tokenizer, TASK, [problem], num_generations=len(completions), temperature=1.0)
    assert rollout.rewards.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert rollout.ended.tolist() == [True, True, True, False, True]
    lengths = loop.length_metrics(rollout)
    assert lengths["completions/mean_length"] == pytest.approx((3 + 4 + 4 + 4 + 1) / 5)
    assert lengths["completions/mean_terminated_length"] == pytest.approx((3 + 4 + 4 + 1) / 4)
    assert lengths["completions/clipped_ratio"] == pytest.approx(1 / 5)


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_step_makes_the_rewarded_completion_likelier(policy, tokenizer, iterations):
    rollout = rollout_of(tokenizer, ["37+48="] * 4, [[8, 11, 1]] + [[9, 3, 1]] * 3, [1.0, 0.0, 0.0, 0.0])

    def logps():
        with torch.no_grad():
            return token_logprobs(loop.completion_logits(policy, rollout), rollout.completion_ids).logps.sum(1)

    before = logps()
    row = loop.step_on(
        policy, None, rollout, torch.optim.SGD(policy.parameters(), 0.05), LossConfig(),
        Options(num_generations=4, num_iterations=iterations),
    )  # fmt: skip
    change = logps() - before
    assert change[0] > 0 > change[1]
    assert row["reward"] == 0.25
    assert row["reward_std"] == pytest.approx(0.5)
    assert row["grad_norm"] > 0
    if iterations == 1:
        assert abs(row["loss"]) < 1e-6  # centred advantages of equally long completions
        assert row["ratio/min"] == row["ratio/max"] == 1.0
    else:
        assert row["ratio/min"] < 1.0 < row["ratio/max"]


def test_equal_rewards_teach_nothing(policy, tokenizer):
    rollout = rollout_of(tokenizer, ["37+48="] * 2, [[8, 11, 1], [9, 3, 1]], [1.0, 1.0])
    before = [p.clone() for p in policy.parameters()]
    row = loop.step_on(
        policy, None, rollout, torch.optim.SGD(policy.parameters(), 1.0), LossConfig(), Options(num_generations=2)
    )
    assert row["frac_reward_zero_std"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_warm_up_learns_answers_not_prompts(policy, tokenizer):
    problems = list(TASK.train[:3])
    loss = warmup.answer_loss(policy, tokenizer, problems)
    total, count = 0.0, 0
    for problem in problems:
        prompt, answer = (tokenizer(text)["input_ids"] for text in (problem.prompt, problem.answer))
        logps = policy(input_ids=torch.tensor([[*prompt, *answer, 1]])).logits.log_softmax(-1)[0]
        for t, token in enumerate([*answer, 1]):
            total, count = total - logps[len(prompt) - 1 + t, token].item(), count + 1
    assert loss.item() == near(total / count, 40)


def test_warm_up_goes_back_when_it_overshoots(policy, tokenizer, monkeypatch):
    accuracies = iter([0.0, 0.2, 0.9, 0.3, 0.38])
    weights = []

    def evaluate(policy, *_):
        weights.append(policy.model.embed_tokens.weight.detach().clone())
        return next(accuracies)

    monkeypatch.setattr(warmup, "evaluate", evaluate)
    monkeypatch.setattr(warmup, "BATCH_SIZE", 8)
    shown = []
    result = warmup.warm_up(policy, tokenizer, TASK, Options(), lambda step, accuracy: shown.append((step, accuracy)))
    assert result == warmup.WarmUp(12, 0.38, True)
    assert shown == [(5, 0.2), (10, 0.9), (11, 0.3), (12, 0.38)]
    # one step from the snapshot is nearer to it than the overshoot of five is
    assert (weights[3] - weights[1]).norm() < 0.5 * (weights[2] - weights[1]).norm()


def test_warm_up_that_does_not_get_there_says_so(policy, tokenizer):
    options = Options(warmup_steps=2, warmup_accuracy=0.9)
    result = warmup.warm_up(policy, tokenizer, TASK, options, lambda step, accuracy: None)
    assert result.steps == 2
    assert not result.reached
    console = Console(file=io.StringIO(), width=80)
    with Reporter(options, console) as reporter:
        reporter.warmed_up(result)
    assert "below the 0.9 aimed at" in console.file.getvalue()
