"""PPO beside GRPO: PPO's parts are PPO's, both arms get the same, and a run writes what it measured."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from benchmarks.ppo_vs_grpo import __main__ as command
from benchmarks.ppo_vs_grpo import memory, ppo, report
from benchmarks.ppo_vs_grpo.arms import GRPO, PPO, PPOTogether, Settings, completion_logits
from benchmarks.ppo_vs_grpo.runs import StepRow, run_seed
from grpo_kernels import fused_grpo_loss
from grpo_kernels.trainer.loop import sample
from grpo_kernels.trainer.model import tiny_qwen2
from grpo_kernels.trainer.task import addition
from grpo_kernels.trainer.tokenizer import character_tokenizer
from model_tolerance import model_bounds
from tolerance import U, assert_within, near, steps

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = addition()
SMALL = Settings(seeds=(0,), steps=2, prompts=4, num_generations=2, ppo_generations=2, eval_every=2)


@pytest.fixture
def tokenizer():
    return character_tokenizer(TASK.alphabet)


@pytest.fixture
def policy(tokenizer):
    torch.manual_seed(0)
    return tiny_qwen2(tokenizer, TASK.max_completion_length)


@pytest.fixture
def rollout(policy, tokenizer):
    """Its rewards are not all the same."""
    torch.manual_seed(1)
    rollout = sample(policy, tokenizer, TASK, TASK.train[:8], 2, 1.0)
    rollout.rewards.copy_(torch.arange(len(rollout.rewards)) % 3)
    return rollout


# --- PPO's parts ----------------------------------------------------------------------------------


def test_gae_worked_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 9.0]])
    values = torch.tensor([[0.5, 0.25, 0.75], [0.5, 0.25, float("nan")]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    # γ = ½, λ = ¼. First: δ = (½·0.25 − 0.5, ½·0.75 − 0.25, 1 − 0.75) = (−0.375, 0.125, 0.25), and from the end
    # 0.25, 0.125 + 0.25/8 = 0.15625, −0.375 + 0.15625/8. Second: δ = (−0.375, 0.75), so 0.75, −0.375 + 0.75/8.
    wanted = torch.tensor([[-0.35546875, 0.15625, 0.25], [-0.28125, 0.75, 0.0]])
    assert torch.equal(ppo.gae(rewards, values, mask, gamma=0.5, lam=0.25), wanted)


def test_rewards_and_value_loss_worked_by_hand():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    logps = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    ref_logps = torch.tensor([[-1.5, -1.0, float("nan")], [-1.0, -1.0, -3.0]])
    found = ppo.token_rewards(torch.tensor([1.0, 0.5]), logps, ref_logps, mask, beta=0.1)
    wanted = torch.tensor([[-0.05, 1.1, 0.0], [0.0, 0.0, 0.3]])
    assert_within(found, wanted, 8 * U * torch.tensor(3.0), "rewards")  # terms of size 3 and less

    values = torch.tensor([[0.9, 0.6, 5.0], [0.3, 0.0, 0.0]], requires_grad=True)
    old, returns = torch.full((2, 3), 0.5), torch.tensor([[1.0, 1.0, 0.0], [0.9, 0.0, 0.0]])
    # 0.9 is cut to 0.7: max(0.01, 0.09); 0.6 stays: 0.16; 0.3 = 0.5 − 0.2 stays: 0.36. Half their mean.
    loss = ppo.value_loss(values, old, returns, torch.tensor([[True, True, False], [True, False, False]]), clip=0.2)
    assert loss.item() == near((0.09 + 0.16 + 0.36) / 6, 3)
    loss.backward()
    # Nothing where the bound was chosen; (V − R)/3 elsewhere.
    assert values.grad[0, 0] == 0 == values.grad[0, 2] and values.grad[0, 1].item() == near(-0.4 / 3)


def test_whitened_advantages_and_explained_variance():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    white = ppo.whiten(torch.tensor([[1.0, 2.0, 100.0], [5.0, -3.0, 0.5]]), mask)
    assert white[0, 2] == 0 and white[mask].std().item() == near(1, 5)
    assert white[mask].mean().item() == pytest.approx(0, abs=2 * steps(5) * U * white.abs().max().item())
    assert torch.equal(ppo.whiten(torch.full((1, 3), 2.0), torch.ones(1, 3).bool()), torch.zeros(1, 3))

    returns, mask = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[True, True, False]])
    assert ppo.explained_variance(returns.clone(), returns, mask) == 1
    assert ppo.explained_variance(torch.full((1, 3), 0.5), returns, mask) == 0
    assert ppo.explained_variance(returns, torch.ones(1, 3), mask) == 0


def test_value_network(policy, tokenizer):
    """Of the policy's size, 0 everywhere at first, and it sees the tokens before the one that is chosen."""
    network = ppo.ValueNetwork(policy)
    assert sum(p.numel() for p in network.parameters()) == policy.num_parameters() + policy.config.hidden_size + 1
    assert not {p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in policy.parameters()}
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in ("37+48=58", "37+48=38")])
    inputs = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(8).expand(2, 8)}
    assert torch.equal(network(2, input_ids=ids, **inputs), torch.zeros(2, 2))
    torch.nn.init.normal_(network.head.weight)
    one, other = network(2, input_ids=ids, **inputs)  # whose first tokens differ
    assert one[0] == other[0] and one[1] != other[1]


# --- the arms -------------------------------------------------------------------------------------


def test_targets_and_policy_gradient_are_those_of_eager_ppo(policy, rollout):
    arm = PPO(policy, replace(SMALL, lam=1.0, beta=0.5))
    torch.nn.init.normal_(arm.critic.head.weight)  # advantages differ from token to token
    with torch.no_grad():
        for parameter in arm.reference.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    targets, mask = arm.targets(rollout), rollout.completion_mask
    kl = targets.old_logps - arm.logps(arm.reference, rollout)
    # γ = λ = 1: the return of the first token is the reward less β times the whole log ratio.
    wanted = rollout.rewards - 0.5 * (kl * mask).sum(1)
    # sums over the tokens, from the front and from the back, of log-probabilities
    size = 2 + (kl.abs() + targets.old_logps.abs()).where(mask, 0.0).sum(1)
    assert_within(targets.returns[:, 0], wanted, 4 * steps(mask.shape[1]) * U * size, "returns", factor=2)

    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    ratios, A = [], targets.advantages

    def eager(model):
        logps = completion_logits(model, rollout)[:, :-1].log_softmax(-1)
        ratio = (logps.gather(-1, rollout.completion_ids[..., None])[..., 0] - targets.old_logps).exp()
        ratios.append(ratio)
        loss = (torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.2)) * mask).sum() / mask.sum()
        return {" loss": loss, **dict(enumerate(torch.autograd.grad(loss, list(model.parameters()))))}

    wanted, allowed = eager(policy), model_bounds(policy, eager)
    clipped = ((ratios[0] > 1.2) & (A > 0)) | ((ratios[0] < 0.8) & (A < 0))
    assert 0.05 < clipped[mask].float().mean() < 0.95
    loss = arm.policy_loss(rollout, targets)
    loss.backward()
    assert_within(loss, wanted[" loss"], allowed[" loss"], "loss", factor=2)
    for i, parameter in enumerate(policy.parameters()):
        assert_within(parameter.grad, wanted[i], allowed[i], f"gradient of parameter {i}", factor=2)


def test_value_network_learns_the_returns(policy, rollout):
    arm = PPO(policy, replace(SMALL, steps=1000, value_learning_rate=1e-2, value_clip=math.inf))
    rollout.rewards.copy_(torch.arange(len(rollout.rewards)) // 2 % 2)  # a prompt's completions have the same
    targets, critic = arm.targets(rollout), arm.learners[1]
    for _ in range(60):
        arm.value_loss(rollout, targets).backward()
        critic.descend()
        critic.schedule.step()
    values = arm.values(rollout).detach()
    assert ppo.explained_variance(values, targets.returns, rollout.completion_mask) > 0.9


def test_an_update_moves_every_network_and_leaves_no_gradient(tokenizer, rollout):
    """And it is the same with both graphs at once."""
    weights = {}
    for kind in (GRPO, PPO, PPOTogether):
        torch.manual_seed(0)
        arm = kind(tiny_qwen2(tokenizer, 4), SMALL)
        networks = [arm.reference, *(learner.network for learner in arm.learners)]
        before = [[p.clone() for p in network.parameters()] for network in networks]
        arm.update(rollout)
        moved = [any((p != q).any() for p, q in zip(n.parameters(), old)) for n, old in zip(networks, before)]
        assert moved == [False, *[True] * len(arm.learners)] and len(moved) == (2 if kind is GRPO else 3)
        weights[kind] = [p for network in networks for p in network.parameters()]
        assert all(p.grad is None for p in weights[kind])
    assert all(map(torch.equal, weights[PPO], weights[PPOTogether]))


@pytest.mark.parametrize("generations", [2, 1])
def test_both_arms_get_the_same_tokens(generations, policy, tokenizer):
    shown = []
    settings = replace(SMALL, ppo_generations=generations)
    rows = run_seed((GRPO, PPO), policy, tokenizer, TASK, settings, 0, shown.append)
    assert [(row.arm, row.step) for row in rows] == [(a, s) for s in range(3) for a in ("GRPO", "PPO")]
    assert [[row.arm for row in new] for new in shown] == [["GRPO", "PPO"]]
    for grpo, other in (rows[2:4], rows[4:]):
        assert grpo.completions == other.completions == 8
        assert grpo.budget_tokens == other.budget_tokens == 8 * (6 + 4)
        assert grpo.update_ms > 0 and other.sampling_ms > 0
        assert grpo.explained_variance is None and other.explained_variance is not None
    if generations == 2:  # the first rollout is the very same
        assert (rows[2].counted_tokens, rows[2].reward) == (rows[3].counted_tokens, rows[3].reward)
    again = run_seed((PPO, GRPO), policy, tokenizer, TASK, settings, 0, shown.append)
    results, others = (
        {(row.arm, row.step): (row.reward, row.accuracy, row.counted_tokens) for row in each} for each in (rows, again)
    )
    assert results == others


# --- memory, and a run ----------------------------------------------------------------------------


@pytest.mark.unshifted
def test_peak_counts_what_lives_at_once():
    def call():
        a = torch.ones(1_000_000)  # 4 MB
        b = a + 1  # 8 MB
        del a
        c = b * 2  # 8 MB again
        return c.sum()

    cpu, x = torch.device("cpu"), torch.zeros(10)
    for _ in range(2):
        assert memory.peak_allocated(call, cpu) == pytest.approx(8e6, rel=1e-3)
    assert memory.storage_bytes([x, x[2:], x.view(2, 5), torch.zeros(5)]) == 60

    logits = torch.randn(4, 8, 5000, requires_grad=True)
    ids, gradient = torch.zeros(4, 8, dtype=torch.long), 4 * logits.numel()  # of the fused loss too
    fused_grpo_loss(logits, ids, torch.ones(4)).loss.backward()  # the first call of a process allocates more
    logits.grad = None
    peak = memory.peak_allocated(lambda: fused_grpo_loss(logits, ids, torch.ones(4)).loss.backward(), cpu)
    assert gradient <= peak < 3.5 * gradient


def test_a_run_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "WIDE", {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3})
    monkeypatch.setitem(command.QUICK, "warmup_steps", 1)
    out = tmp_path / "here"
    argv = ["--quick", "--seeds", "0", "1", "--steps", "2", "--prompts", "2", "--device", "cpu", "--out", str(out)]
    assert command.main(argv) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if str(out) not in line) <= 80
    assert '"Half the memory"' in printed and "What this does not show" in printed

    results = json.loads((out / "results.json").read_text())
    assert results["environment"]["torch"] == torch.__version__ and results["settings"]["steps"] == 2
    with (out / "results.csv").open(newline="") as file:
        figures = list(csv.DictReader(file))
    assert len(figures) == len(results["figures"]) and figures[0].keys() >= {"metric", "arm", "value", "date", "cpu"}
    with (out / "steps.csv").open(newline="") as file:
        found = {(row["seed"], row["arm"], row["step"]) for row in csv.DictReader(file)}
    assert found == {(seed, arm, step) for seed in "01" for arm in ("GRPO", "PPO") for step in "012"}
    assert (out / "ppo_vs_grpo.png").read_bytes().startswith(b"\x89PNG")

    rows = [memory.MemoryRow(**row) for row in results["memory"]]
    assert [(row.model, row.completions) for row in rows] == [("run's", 16)] * 3 + [("wide", 8)] * 3
    assert rows[3].parameters > 4 * rows[0].parameters
    for grpo, one, both in (rows[:3], rows[3:]):
        weights = 4 * grpo.parameters
        # Weights, the reference's, two moments; and for the value network three more.
        assert grpo.held == pytest.approx(4 * weights, rel=0.02)
        assert one.held == both.held == pytest.approx(7 * weights, rel=0.02)
        assert grpo.peak >= 5 * weights and both.peak >= 9 * weights  # with gradients
        assert grpo.peak < one.peak < both.peak


def step_rows(arm, rewards, accuracies):
    """Of three steps; one list per seed."""
    return [
        StepRow(seed, arm, step, *((rewards[seed][step - 1],) if step else (None,)), accuracies[seed] * step / 3,
                8, 80, 70, 10.0, 30.0 if arm == "PPO" else 20.0, 0.5 if arm == "PPO" and step else None)
        for seed in (0, 1) for step in range(4)
    ]  # fmt: skip


def test_figures_are_what_they_say():
    rows = step_rows("GRPO", ([0.1, 0.2, 0.3], [0.1, 0.4, 0.6]), (0.6, 0.9))
    rows += step_rows("PPO", ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4]), (0.6, 0.75))
    sizes = {"GRPO": (4, 10), "PPO": (7, 16), "PPO, both graphs at once": (7, 20)}
    measured = [memory.MemoryRow("run's", 1000, 8, arm, *(n * 2**20 for n in size)) for arm, size in sizes.items()]
    results = report.Results({}, SMALL, rows, measured)
    found = {(f.metric, f.arm): f for f in report.figures(results)}
    after, last = found["held-out accuracy after", "GRPO"], found["reward, last 3 steps", "GRPO"]
    assert (after.value, after.low, after.high, last.low) == pytest.approx((0.75, 0.6, 0.9, 0.2))
    assert found["memory at its peak, run's model", "PPO"].value == 16
    assert found["peak, both graphs at once, run's model", "PPO"].value == 20
    half, stable, value, time, _ = report.summary(results)[1:]
    assert "0.62 of PPO's" in half and "0.50 where" in half and "0.57" in half
    assert "0.300 (GRPO) and 0.150 (PPO)" in stable and "0.167 (GRPO) and 0.100 (PPO)" in stable
    assert "explained 0.50 of the variance" in value and "1.33 of GRPO's" in time


def test_bad_arguments_are_one_line(capsys):
    for arguments, words in (
        ("--seeds 1 1", "--seeds must be different"),
        ("--steps 0", "--steps must be above 0, got 0"),
        ("--prompts 2 --ppo-generations 5", "--ppo-generations 5 must divide the 16 completions"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments.split())
        assert ended.value.code == 2 and words in capsys.readouterr().err
