"""Rewards of the trainer: those built in, a user's own, several with weights, None, and what goes wrong."""

import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from grpo_kernels import group_advantages
from grpo_kernels.trainer import __main__ as entry
from grpo_kernels.trainer import rewards
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.rewards import RewardError, Weighted, advantages_of, score
from grpo_kernels.trainer.rollout import Rollout
from grpo_kernels.trainer.task import Problem, columns_of
from trainer_cases import run

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = '''
"""Rewards of a user's."""

def by_length(prompts, completions, **columns):
    return [None if not text else len(text) / 4 for text in completions]

def knows_columns(prompts, completions, answer, level, **columns):
    return [float(level_ > 1) for level_ in level]

def clumsy(prompts, completions, **columns):
    return [1 / (text != "bad") for text in completions]

def short(prompts, completions, **columns):
    return [0.0] * (len(completions) - 1)

def nothing(prompts, completions, **columns):
    return None

NUMBER = 3
'''


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_rewards", None)


# --- built in -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is <answer> 42 </answer>, or so.", "42"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        (r"so \boxed{-7}.", "-7"),
        ("6 * 7\n#### 42", "42"),
        ("#### $1,234.50.", "1234.5"),
        ("  1,000 ", "1000"),
        ("3.00", "3"),
        ("-0", "-0"),
        ("0.0", "0"),
        (".5", ".5"),
        ("+", "+"),
        ("the whole text", "the whole text"),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert rewards.final_answer(text) == answer


def test_exact_answer():
    wanted = ["He sold 6.\n#### 1,042"] * 4
    completions = ["so #### 1042", "<answer>1042.0</answer>", "1043", "it is 1042"]
    assert rewards.exact_answer([""] * 4, completions, wanted) == [1.0, 1.0, 0.0, 0.0]


def test_format():
    right = "<think>2 and 2\n</think>\n<answer>4</answer>"
    wrong = ["4", right + "!", "<think>a</think>", "<think><think></think><answer>4</answer>",
             "<answer>4</answer><think>a</think>", right + right]  # fmt: skip
    assert rewards.format([""] * 7, [right, *wrong]) == [1.0] + [0.0] * 6


def test_target_length():
    texts = ["a b c d", "a b", "", "a b c d e f g h i"]
    assert rewards.target_length([""] * 4, texts, [4] * 4) == [1.0, 0.5, 0.0, 0.0]
    assert rewards.target_length(["", ""], texts[:2], [None, 2]) == [None, 1.0]
    name, function = rewards.named("target_length=4")
    assert name == "target_length" and function([""] * 4, texts, answer=[""] * 4) == [1.0, 0.5, 0.0, 0.0]


def test_keyword_coherence():
    prompts = ["Why is the SEA salty, the salty sea?", "no"]
    assert rewards.keyword_coherence(prompts, ["It is salty.", "no"]) == [1.0, None]  # "salty" alone has four letters
    keywords = [["sea", "Salt"], []]
    assert rewards.keyword_coherence(prompts, ["the salt of the sea", "x"], keywords=keywords) == [1.0, None]
    assert rewards.keyword_coherence(prompts, ["salty seas", "x"], keywords=keywords) == [0.0, None]


# --- a step's rewards -----------------------------------------------------------------------------

PROBLEMS = [Problem("1+1=", "2", (("level", 1),)), Problem("2+2=", "4", (("level", 2),))]
PROMPTS = [each.prompt for each in PROBLEMS]
COLUMNS = columns_of(PROBLEMS)


def of(*specs, weights=()):
    return rewards.chosen(Options(reward=specs, reward_weights=weights))


def test_weighted_sum_leaves_out_none():
    functions = of("own_rewards:by_length", "exact_answer", weights=(0.5, 2.0))
    total, parts = score(functions, PROMPTS, ["2", ""], COLUMNS)
    assert total.tolist() == [0.125 + 2.0, 0.0]
    assert parts["by_length"][0] == 0.25 and parts["by_length"][1].isnan()
    assert parts["exact_answer"].tolist() == [1.0, 0.0]
    alone, _ = score(functions[:1], PROMPTS, ["2", ""], COLUMNS)
    assert alone[0] == 0.125 and alone[1].isnan()  # nobody has an opinion


def test_a_function_that_changes_its_lists():
    """Another function gets what was sampled all the same, and errors name it."""
    def spoils(prompts, completions, answer, **columns):
        prompts.clear(), completions.sort(), answer.reverse()
        return [0.5, "x"] if not columns["level"] else [0.5, None]

    functions = [rewards.Weighted("spoils", spoils, 1.0), *of("exact_answer")]
    total, _ = score(functions, PROMPTS, ["2", "1"], COLUMNS)
    assert total.tolist() == [1.5, 0.0] and COLUMNS == columns_of(PROBLEMS)
    with pytest.raises(RewardError, match=r"'x' for sample 1 \(prompt '2\+2='"):
        score(functions, PROMPTS, ["2", "1"], {**COLUMNS, "level": []})


def test_functions_get_every_column():
    total, _ = score(of("own_rewards:knows_columns"), PROMPTS, ["", ""], COLUMNS)
    assert total.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("function", "completions", "words"),
    [
        ("clumsy", ["fine", "bad"], ["'clumsy' raised ZeroDivisionError", "sample 1", "'2+2='", "'bad'"]),
        ("short", ["a", "b"], ["'short' returned 1 values for 2 completions", "sample 1", "'b'"]),
        ("nothing", ["a", "b"], ["'nothing' returned a NoneType", "sample 0"]),
    ],
)
def test_a_failing_reward_is_named_with_its_sample(function, completions, words):
    with pytest.raises(RewardError) as caught:
        score(of(f"own_rewards:{function}"), PROMPTS, completions, COLUMNS)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "value",
    [float("inf"), float("nan"), "much", "1", b"1", np.str_("1"), [1.0], 10**400, 1e39],
    ids=lambda value: repr(value)[:12],
)
def test_a_reward_that_is_no_number(value):
    with pytest.raises(RewardError, match=r"'own' returned .* for sample 1 .*Return a finite number, or None"):
        score([Weighted("own", lambda prompts, completions, **_: [0.0, value], 1.0)], PROMPTS, ["a", "b"], COLUMNS)


def test_a_text_is_no_list_of_rewards():
    with pytest.raises(RewardError, match=r"'own' returned '1' for sample 0"):
        score([Weighted("own", lambda prompts, completions, **_: "10", 1.0)], PROMPTS, ["a", "b"], COLUMNS)


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.int64(1), np.bool_(True), torch.tensor(1.0), Fraction(1)])
def test_a_reward_that_is_a_number(value):
    total, _ = score([Weighted("own", lambda prompts, completions, **_: [None, value], 1.0)], PROMPTS, ["a", "b"],
                     COLUMNS)  # fmt: skip
    assert total[1] == 1.0


def test_a_failure_of_the_whole_step_alone():
    def needs_two(prompts, completions, **columns):
        if len(completions) > 1:
            raise KeyError("batch")
        return [0.0]

    with pytest.raises(RewardError, match=r"raised KeyError: 'batch', for the whole step and for no sample alone"):
        score([Weighted("needs_two", needs_two, 1.0)], PROMPTS, ["a", "b"], COLUMNS)


# --- in a run -------------------------------------------------------------------------------------


def test_each_function_is_logged_by_its_name(tmp_path):
    specs = ("own_rewards:by_length", "exact_answer", "target_length=1")
    _, rows, _ = run(tmp_path / "run", reward=specs, reward_weights=(0.0, 2.0, 0.25), steps=1)
    row = rows[1]
    for name in ("by_length", "exact_answer", "target_length"):
        assert {f"rewards/{name}/mean", f"rewards/{name}/std"} <= row.keys()
    assert row["rewards/by_length/mean"] > 0 and row["rewards/target_length/mean"] > 0
    total = 2.0 * row["rewards/exact_answer/mean"] + 0.25 * row["rewards/target_length/mean"]
    assert row["reward"] == pytest.approx(total)


def test_a_run_whose_reward_fails_says_so_in_one_line(tmp_path, capsys):
    arguments = ["--reward", "own_rewards:short", "--warmup-steps", "0", "--steps", "1", "--batch-size", "2"]
    assert entry.main([*arguments, "--output-dir", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: reward 'short' returned") and message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": ("exact",)}, ["--reward exact is not built in", "keyword_coherence", "MODULE:FUNCTION"]),
        ({"reward": ("nowhere:f",)}, ["--reward nowhere:f", "ModuleNotFoundError", "PYTHONPATH"]),
        ({"reward": ("own_rewards:g",)}, ["--reward own_rewards:g", "AttributeError"]),
        ({"reward": ("own_rewards:NUMBER",)}, ["--reward own_rewards:NUMBER is a int"]),
        ({"reward": ("target_length=0",)}, ["--reward target_length=0", "above 0"]),
        ({"reward": ("target_length",)}, ["--reward target_length finds no field", "target_length=80"]),
        ({"reward": ("format", "format")}, ["--reward format comes twice"]),
        ({"reward": ("format",), "reward_weights": (1.0, 2.0)}, ["--reward-weights must be one number per --reward"]),
        ({"reward_weights": (1.0,)}, ["--reward-weights must be one number per --reward, of which there are 0"]),
        ({"reward": ("format",), "reward_weights": (float("nan"),)}, ["--reward-weights must be finite"]),
    ],
    ids=str,
)
def test_unusable_rewards_are_refused_before_anything_is_written(tmp_path, options, words):
    with pytest.raises(OptionError) as caught:
        run(tmp_path / "run", **options)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_gdpo_is_given_each_functions_own_rewards():
    """Others compare the sums."""
    parts = {"solved": torch.tensor([0.0, 1.0, 1.0, 0.0]), "length": torch.tensor([100.0, 200.0, 50.0, 300.0])}
    none = torch.zeros(4, 1, dtype=torch.long)
    rollout = Rollout(none, none, none, none.bool(), none[:, 0].bool(), parts["solved"] + 0.5 * parts["length"],
                      reward_parts=parts)  # fmt: skip
    options = {"num_generations": 2, "reward": ("length", "x:y"), "reward_weights": (1.0, 0.5)}
    for estimator in ("gdpo", "rloo"):
        given = rollout.rewards if estimator == "rloo" else torch.stack([*parts.values()], 1)
        weights = None if estimator == "rloo" else (1.0, 0.5)
        want = group_advantages(given, 2, advantage_estimator=estimator, reward_weights=weights)
        assert torch.equal(advantages_of(rollout, Options(**options, advantage_estimator=estimator)), want)
