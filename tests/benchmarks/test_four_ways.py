"""`python -m benchmarks.four_ways`: one start, the same problems, and files that say what was measured."""

import csv
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from benchmarks import four_ways
from benchmarks.four_ways import GRPO, PPO, START, TEACHER, WAYS, Distillation, Plan, Point, Results, Supervised
from grpo_kernels.trainer.loop import evaluate, sample
from grpo_kernels.trainer.model import tiny_qwen2
from grpo_kernels.trainer.scoring import completion_logits
from grpo_kernels.trainer.task import addition
from grpo_kernels.trainer.tokenizer import character_tokenizer
from grpo_kernels.trainer.warmup import answer_loss

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = addition()
TASK = replace(FULL, train=FULL.train[:64], held_out=FULL.held_out[:6])
SMALL = Plan(seeds=(0,), steps=3, prompts=4, eval_every=2, eval_samples=8, warmup_steps=1, teacher_steps=2,
             teacher_prompts=8, teacher_hidden_size=32)  # fmt: skip
NAMES = [kind.name for kind in WAYS]


@pytest.fixture
def tokenizer():
    return character_tokenizer(TASK.alphabet)


def tiny(tokenizer, seed, hidden_size=16):
    torch.manual_seed(seed)
    return tiny_qwen2(tokenizer, TASK.max_completion_length, hidden_size=hidden_size)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


# --- the ways -------------------------------------------------------------------------------------


def test_all_ways_get_the_same_start_and_the_same_problems(tokenizer, monkeypatch):
    policy, teacher, seen, started = tiny(tokenizer, 0), tiny(tokenizer, 1, 32), {name: [] for name in NAMES}, {}
    for kind in WAYS:
        method = "learn" if kind is Supervised else "update"
        act = getattr(kind, method)

        def spied(self, *args, kind=kind, act=act):
            started.setdefault(kind.name, weights(self.policy))
            last = args[-1]  # problems, or a rollout
            prompts = [p.prompt for p in last] if kind is Supervised else list(last.prompts)
            seen[kind.name].append((prompts, None if kind is Supervised else last.completion_ids))
            return act(self, *args)

        monkeypatch.setattr(kind, method, spied)
    before, taught = weights(policy), weights(teacher)
    points = four_ways.run_seed(policy, teacher, tokenizer, TASK, SMALL, 0, lambda new: None)

    for name in NAMES:
        assert all(map(torch.equal, started[name], before)), name
        for step in range(SMALL.steps):
            shown = seen[name][step][0]
            groups = shown if name == Supervised.name else shown[:: SMALL.num_generations]
            assert groups == seen[Supervised.name][step][0] and len(groups) == SMALL.prompts
            assert name == Supervised.name or len(shown) == SMALL.completions
    first = [seen[name][0][1] for name in NAMES[1:]]  # the same policy with the same random numbers
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    assert all(map(torch.equal, weights(policy), before)) and all(map(torch.equal, weights(teacher), taught))

    assert [(p.arm, p.step) for p in points] == [(START, 0), *((n, s) for s in (0, 2, 3) for n in NAMES)]
    assert len({(p.accuracy, p.pass_1, p.pass_k) for p in points if p.step == 0}) == 1
    seconds = {(p.arm, p.step): p.seconds for p in points}
    assert all(0 == seconds[n, 0] < seconds[n, 2] < seconds[n, 3] for n in NAMES)


def test_a_point_is_what_it_says(tokenizer, monkeypatch):
    policy, plan = tiny(tokenizer, 0), replace(SMALL, eval_samples=16, temperature=0.7)
    asked, measure = [], four_ways.loop.measure

    def spied(policy, tokenizer, task, options):
        asked.append(options)
        return measure(policy, tokenizer, task, options) | {"eval/pass@1": 0.1, "eval/pass@8": 0.8, "eval/pass@16": 0.9}

    monkeypatch.setattr(four_ways.loop, "measure", spied)
    found = four_ways.point(policy, tokenizer, TASK, plan, 5, "GRPO", 2, 1.5)
    assert found == Point(5, "GRPO", 2, 1.5, evaluate(policy, tokenizer, TASK), 0.1, 0.8)
    assert (asked[0].seed, asked[0].eval_samples, asked[0].temperature) == (5, 16, 0.7)


def test_distillation_comes_nearer_to_the_teacher_by_no_reward(tokenizer):
    teacher, ends = tiny(tokenizer, 1, 32).eval().requires_grad_(False), []

    def reverse_kl(policy, rollout):
        with torch.no_grad():
            p, q = (completion_logits(m, rollout)[:, :-1].log_softmax(-1) for m in (policy, teacher))
        return ((p.exp() * (p - q)).sum(-1) * rollout.completion_mask).sum() / rollout.completion_mask.sum()

    for reward in (0.0, 1.0):
        arm = Distillation(tiny(tokenizer, 0), replace(SMALL, iterations=6, learning_rate=1e-2, steps=1000), teacher)
        arm.learners[0].schedule = None
        for group in arm.learners[0].optimizer.param_groups:
            group["lr"] = 1e-2
        torch.manual_seed(2)
        rollout = sample(arm.policy, tokenizer, TASK, TASK.train[:4], 2, 1.0)
        rollout.rewards.fill_(reward).view(-1)[::2] += 1
        before = reverse_kl(arm.policy, rollout)
        arm.update(rollout)
        assert reverse_kl(arm.policy, rollout) < 0.8 * before
        ends.append(weights(arm.policy))
    assert all(map(torch.equal, *ends))


def test_the_teacher_and_the_supervised_way_learn_the_answers(tokenizer):
    problems = list(TASK.train)
    untaught = tiny(tokenizer, 3, SMALL.teacher_hidden_size)
    plan = replace(SMALL, seeds=(3,), teacher_steps=30, teacher_prompts=32)
    teacher, taught = four_ways.trained_teacher(tokenizer, TASK, plan)
    assert answer_loss(teacher, tokenizer, problems) < 0.8 * answer_loss(untaught, tokenizer, problems)
    assert teacher.config.hidden_size == 32 and not any(p.requires_grad for p in teacher.parameters())
    assert (taught.arm, taught.step, taught.seed) == (TEACHER, 30, 3) and taught.seconds > 0

    arm = Supervised(tiny(tokenizer, 0), replace(SMALL, iterations=2))
    taken, descend = [], arm.learners[0].descend
    arm.learners[0].descend = lambda: (taken.append(None), descend())
    arm.learn(tokenizer, problems)
    assert len(taken) == 2 and all(p.grad is None for p in arm.policy.parameters())


# --- what comes out -------------------------------------------------------------------------------


def test_figures_and_table_by_hand():
    points = [Point(0, TEACHER, 9, 50.0, 0.96, 0.9, 0.99)]
    for seed, low in ((0, 0.1), (1, 0.3)):
        points.append(Point(seed, START, 0, 0.0, low, low, 0.5))
        for i, name in enumerate(NAMES):
            points.append(Point(seed, name, 0, 0.0, low, low, 0.5))
            points.append(Point(seed, name, 4, 10.0 + 4 * seed, low + i / 10, 0.5, 0.7))
    results = Results({}, SMALL, {}, points)
    found = {(f.metric, f.arm): f for f in four_ways.figures(results)}
    accuracy = found["greedy accuracy", PPO.name]
    assert (accuracy.value, accuracy.low, accuracy.high) == pytest.approx((0.4, 0.3, 0.5))
    assert found["pass@8", GRPO.name].value == 0.7 and found["pass@8", START].value == 0.5
    assert found["seconds of training", Supervised.name].value == 12
    assert found["greedy accuracy", TEACHER].low is None
    lines = four_ways.table(results).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [START, *NAMES, TEACHER]
    assert max(map(len, lines)) <= 80 and "0.400 (0.300-0.500)" in lines[4] and lines[-1].endswith("50.0")


def test_a_run_writes_its_files(tmp_path, monkeypatch, capsys):
    for name in ("steps", "eval_every", "warmup_steps", "teacher_steps", "prompts"):
        monkeypatch.setitem(four_ways.QUICK, name, getattr(SMALL, name))
    monkeypatch.setattr(four_ways, "addition", lambda: TASK)
    out = tmp_path / "here"
    assert four_ways.main(["--quick", "--seeds", "0", "4", "--steps", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if str(out) not in line) <= 80
    results = json.loads((out / "results.json").read_text())
    assert results["environment"]["torch"] == torch.__version__ and results["settings"]["seeds"] == [0, 4]
    assert results["parameters"]["teacher"] > 3 * results["parameters"]["policy"]
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results["figures"]) == 6 * 4
    assert rows[0].keys() >= {"metric", "arm", "value", "date", "commit"}
    with (out / "points.csv").open(newline="") as file:
        found = {(row["seed"], row["arm"], row["step"]) for row in csv.DictReader(file)}
    assert found >= {(seed, arm, step) for seed in "04" for arm in NAMES for step in "02"}
    assert (out / "four_ways.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_are_one_line(capsys):
    for arguments, words in (
        ("--seeds 1 1", "--seeds must be different"),
        ("--steps 0", "--steps must be above 0, got 0"),
        ("--learning-rate nan", "--learning-rate must be above 0, got nan"),
    ):
        with pytest.raises(SystemExit) as ended:
            four_ways.main(arguments.split())
        assert ended.value.code == 2 and words in capsys.readouterr().err
