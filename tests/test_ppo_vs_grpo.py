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

CPU = torch.device("cpu")
TASK = addition()
SMALL = Settings(seeds=(0,), steps=2, prompts=4, num_generations=2, ppo_generations=2, eval_every=2)


@pytest.fixture
def tokenizer():
    return character_tokenizer(TASK.alphabet)


@pytest.fixture
def policy(tokenizer):
    torch.manual_seed(0)
    return tiny_qwen2(tokenizer, TASK.max_completion_length)


# --- PPO's parts ----------------------------------------------------------------------------------


def test_gae_worked_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 9.0]])
    values = torch.tensor([[0.5, 0.25, 0.75], [0.5, 0.25, float("nan")]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    # γ = λ = ½. First: δ = (½·0.25 − 0.5, ½·0.75 − 0.25, 1 − 0.75) = (−0.375, 0.125, 0.25), and from the end
    # 0.25, 0.125 + 0.25/4 = 0.1875, −0.375 + 0.1875/4. Second: δ = (−0.375, 0.75), so 0.75, −0.375 + 0.75/4.
    wanted = torch.tensor([[-0.328125, 0.1875, 0.25], [-0.1875, 0.75, 0.0]])
    assert torch.equal(ppo.gae(rewards, values, mask, 0.5, 0.5), wanted)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 1.0), (0.9, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    """A_t = Σ_k (γλ)^k·δ_{t+k}, summed as it stands."""
    g = torch.Generator().manual_seed(0)
    B, T = 5, 7
    rewards, values = (torch.randn(B, T, generator=g, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([7, 1, 4, 6, 2])
    found = ppo.gae(rewards, values, torch.arange(T) < lengths[:, None], gamma, lam)
    for i, n in enumerate(lengths.tolist()):
        V = [*values[i, :n].tolist(), 0.0]
        delta = [rewards[i, t].item() + gamma * V[t + 1] - V[t] for t in range(n)]
        wanted = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)] + [0.0] * (T - n)
        torch.testing.assert_close(found[i], torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        if lam == 1.0:  # then A + V is the discounted return
            returns = [sum(gamma**k * rewards[i, t + k].item() for k in range(n - t)) for t in range(n)]
            assert (found[i, :n] + values[i, :n]).tolist() == pytest.approx(returns, rel=1e-12)


def test_rewards_of_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    logps = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    ref_logps = torch.tensor([[-1.5, -1.0, float("nan")], [-1.0, -1.0, -3.0]])
    found = ppo.token_rewards(torch.tensor([1.0, 0.5]), logps, ref_logps, mask, beta=0.1)
    wanted = torch.tensor([[-0.05, 1.1, 0.0], [0.0, 0.0, 0.3]])
    assert_within(found, wanted, 8 * U * torch.tensor(3.0), "rewards")  # terms of size 3 and less


def test_value_loss_worked_by_hand():
    values = torch.tensor([[0.9, 0.6, 5.0], [0.3, 0.0, 0.0]], requires_grad=True)
    old, returns = torch.full((2, 3), 0.5), torch.tensor([[1.0, 1.0, 0.0], [0.9, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # 0.9 is cut to 0.7: max(0.01, 0.09); 0.6 stays: 0.16; 0.3 = 0.5 − 0.2 stays: 0.36. Half their mean.
    loss = ppo.value_loss(values, old, returns, mask, clip=0.2)
    assert loss.item() == near((0.09 + 0.16 + 0.36) / 6, 3)
    loss.backward()
    # Nothing where the bound was chosen; (V − R)/3 elsewhere.
    assert values.grad[0, 0] == 0 and values.grad[0, 2] == 0
    assert values.grad[0, 1].item() == near(-0.4 / 3)


def test_whitened_advantages():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    white = ppo.whiten(torch.tensor([[1.0, 2.0, 100.0], [5.0, -3.0, 0.5]]), mask)
    assert white[0, 2] == 0
    assert white[mask].mean().item() == pytest.approx(0, abs=2 * steps(5) * U * white.abs().max().item())
    assert white[mask].std().item() == near(1, 5)
    assert torch.equal(ppo.whiten(torch.full((1, 3), 2.0), torch.ones(1, 3).bool()), torch.zeros(1, 3))


def test_explained_variance():
    returns, mask = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[True, True, False]])
    assert ppo.explained_variance(returns.clone(), returns, mask) == 1
    assert ppo.explained_variance(torch.full((1, 3), 0.5), returns, mask) == 0
    assert ppo.explained_variance(returns, torch.ones(1, 3), mask) == 0


def test_value_network(policy, tokenizer):
    """Of the policy's size, 0 everywhere at first, and it sees the tokens before the one that is chosen."""
    network = ppo.ValueNetwork(policy)
    assert sum(p.numel() for p in network.parameters()) == policy.num_parameters() + policy.config.hidden_size + 1
    assert not {p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in policy.parameters()}
    ids = torch.tensor([tokenizer("37+48=58")["input_ids"]])
    inputs = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(8)[None]}
    assert torch.equal(network(2, input_ids=ids, **inputs), torch.zeros(1, 2))
    torch.nn.init.normal_(network.head.weight)
    values = network(2, input_ids=ids, **inputs)
    other = ids.clone()
    other[0, -2] = ids[0, 0]  # the first token of the completion
    changed = network(2, input_ids=other, **inputs)
    assert changed[0, 0] == values[0, 0] and changed[0, 1] != values[0, 1]


# --- the arms -------------------------------------------------------------------------------------


def rollout_of(policy, tokenizer, prompts=8, generations=2):
    torch.manual_seed(1)
    return sample(policy, tokenizer, TASK, TASK.train[:prompts], generations, 1.0)


def test_policy_gradient_is_that_of_eager_ppo(policy, tokenizer):
    arm = PPO(policy, SMALL)
    torch.nn.init.normal_(arm.critic.head.weight)  # advantages differ from token to token
    rollout = rollout_of(policy, tokenizer)
    targets = arm.targets(rollout)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)

    logps = completion_logits(policy, rollout)[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, rollout.completion_ids[..., None])[..., 0]
    ratio, A, mask = (logps - targets.old_logps).exp(), targets.advantages, rollout.completion_mask
    clipped = ((ratio > 1.2) & (A > 0)) | ((ratio < 0.8) & (A < 0))
    assert 0.05 < clipped[mask].float().mean() < 0.95
    eager = (torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.2)) * mask).sum() / mask.sum()
    wanted = torch.autograd.grad(eager, list(policy.parameters()))

    loss = arm.policy_loss(rollout, targets)
    loss.backward()

    def run(model):
        logps = completion_logits(model, rollout)[:, :-1].log_softmax(-1)
        logps = logps.gather(-1, rollout.completion_ids[..., None])[..., 0]
        ratio = (logps - targets.old_logps).exp()
        loss = (torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.2)) * mask).sum() / mask.sum()
        return {" loss": loss, **dict(enumerate(torch.autograd.grad(loss, list(model.parameters()))))}

    allowed = model_bounds(policy, run)
    assert_within(loss, eager, allowed[" loss"], "loss", factor=2)
    for i, (parameter, gradient) in enumerate(zip(policy.parameters(), wanted)):
        assert_within(parameter.grad, gradient, allowed[i], f"gradient of parameter {i}", factor=2)


def test_targets_are_of_the_rollout(policy, tokenizer):
    arm = PPO(policy, replace(SMALL, lam=1.0, beta=0.5))
    torch.nn.init.normal_(arm.critic.head.weight)
    with torch.no_grad():
        for parameter in arm.reference.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    rollout = rollout_of(policy, tokenizer)
    targets, mask = arm.targets(rollout), rollout.completion_mask
    kl = targets.old_logps - arm.logps(arm.reference, rollout)
    # γ = λ = 1: the return of the first token is the reward less β times the whole log ratio.
    wanted = rollout.rewards - 0.5 * (kl * mask).sum(1)
    # sums over the tokens, from the front and from the back, of log-probabilities
    size = 1 + (kl.abs() + targets.old_logps.abs()).where(mask, 0.0).sum(1)
    assert_within(targets.returns[:, 0], wanted, 4 * steps(mask.shape[1]) * U * size, "returns", factor=2)


def test_value_network_learns_the_returns(policy, tokenizer):
    arm = PPO(policy, replace(SMALL, steps=1000, value_learning_rate=1e-2, value_clip=math.inf))
    rollout = rollout_of(policy, tokenizer, generations=1)
    rollout.rewards.copy_(torch.arange(len(rollout.rewards)) % 2)
    targets, critic = arm.targets(rollout), arm.learners[1]
    for _ in range(60):
        arm.value_loss(rollout, targets).backward()
        critic.descend()
        critic.schedule.step()
    with torch.no_grad():
        values = arm.values(rollout)
    assert ppo.explained_variance(values, targets.returns, rollout.completion_mask) > 0.9


@pytest.mark.parametrize("kind", [GRPO, PPO, PPOTogether])
def test_an_update_moves_every_network_and_leaves_no_gradient(kind, policy, tokenizer):
    arm = kind(policy, SMALL)
    rollout = rollout_of(policy, tokenizer)
    rollout.rewards.copy_(torch.arange(len(rollout.rewards)) % 3)
    before = [[p.clone() for p in learner.network.parameters()] for learner in arm.learners]
    reference = [p.clone() for p in arm.reference.parameters()]
    arm.update(rollout)
    for learner, old in zip(arm.learners, before):
        assert any((p != q).any() for p, q in zip(learner.network.parameters(), old))
        assert all(p.grad is None for p in learner.network.parameters())
    assert all(torch.equal(p, q) for p, q in zip(arm.reference.parameters(), reference))


def test_both_graphs_at_once_is_the_same_update(policy, tokenizer):
    rollout = rollout_of(policy, tokenizer)
    rollout.rewards.copy_(torch.arange(len(rollout.rewards)) % 3)
    weights = []
    for kind in (PPO, PPOTogether):
        torch.manual_seed(0)
        arm = kind(tiny_qwen2(tokenizer, 4), SMALL)
        arm.update(rollout)
        weights.append([p for learner in arm.learners for p in learner.network.parameters()])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("generations", [2, 1])
def test_both_arms_get_the_same_tokens(generations, policy, tokenizer):
    shown = []
    settings = replace(SMALL, ppo_generations=generations)
    rows = run_seed((GRPO, PPO), policy, tokenizer, TASK, settings, 0, shown.append)
    assert [(row.arm, row.step) for row in rows] == [(a, s) for s in range(3) for a in ("GRPO", "PPO")]
    assert [[row.arm for row in new] for new in shown] == [["GRPO", "PPO"]]
    steps = {(row.arm, row.step): row for row in rows}
    for step in (1, 2):
        grpo, ppo_row = steps["GRPO", step], steps["PPO", step]
        assert grpo.completions == ppo_row.completions == 8
        assert grpo.budget_tokens == ppo_row.budget_tokens == 8 * (6 + 4)
        assert grpo.update_ms > 0 and ppo_row.sampling_ms > 0
        assert grpo.explained_variance is None and ppo_row.explained_variance is not None
    if generations == 2:  # the first rollout is the very same
        assert steps["GRPO", 1].counted_tokens == steps["PPO", 1].counted_tokens
        assert steps["GRPO", 1].reward == steps["PPO", 1].reward
    again = run_seed((PPO, GRPO), policy, tokenizer, TASK, settings, 0, shown.append)
    results = {(row.arm, row.step): (row.reward, row.accuracy, row.counted_tokens) for row in rows}
    assert results == {(row.arm, row.step): (row.reward, row.accuracy, row.counted_tokens) for row in again}


def test_completions_must_divide():
    with pytest.raises(ValueError, match="--ppo-generations 3 must divide the 8 completions"):
        replace(SMALL, ppo_generations=3)


# --- memory ---------------------------------------------------------------------------------------


def test_peak_counts_what_lives_at_once():
    def call():
        a = torch.ones(1_000_000)  # 4 MB
        b = a + 1  # 8 MB
        del a
        c = b * 2  # 8 MB again
        return c.sum()

    for _ in range(2):
        assert memory.peak_allocated(call, CPU) == pytest.approx(8e6, rel=1e-3)


def test_peak_sees_inside_the_fused_loss():
    logits = torch.randn(4, 8, 5000, requires_grad=True)
    ids = torch.zeros(4, 8, dtype=torch.long)

    def call():
        fused_grpo_loss(logits, ids, torch.ones(4)).loss.backward()
        logits.grad = None

    gradient = 4 * logits.numel()
    assert gradient <= memory.peak_allocated(call, CPU) < 3.5 * gradient


def test_storages_count_once():
    x = torch.zeros(10)
    assert memory.storage_bytes([x, x[2:], x.view(2, 5), torch.zeros(5)]) == 60


def test_memory_of_the_arms(policy, tokenizer, monkeypatch):
    monkeypatch.setattr(memory, "WIDE", {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3})
    rows = memory.measure_arms((GRPO, PPO, PPOTogether), policy, tokenizer, TASK, SMALL)
    assert [row.model for row in rows] == ["run's"] * 3 + ["wide"] * 3
    for grpo, one, both in (rows[:3], rows[3:]):
        weights = 4 * grpo.parameters
        # Weights, the reference's, two moments; and for the value network three more.
        assert grpo.held == pytest.approx(4 * weights, rel=0.02)
        assert one.held == both.held == pytest.approx(7 * weights, rel=0.02)
        assert grpo.peak >= 5 * weights and both.peak >= 9 * weights  # with gradients
        assert grpo.peak < one.peak < both.peak
    assert rows[3].parameters > 4 * rows[0].parameters
    assert rows[3].completions == 2


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "WIDE", {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3})
    monkeypatch.setitem(command.QUICK, "warmup_steps", 1)
    out = tmp_path / "here"
    argv = ["--quick", "--seeds", "0", "1", "--steps", "2", "--prompts", "2", "--device", "cpu", "--out", str(out)]
    assert command.main(argv) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if str(out) not in line) <= 80
    for words in ('"Half the memory"', '"More stable"', "What this does not show", "held-out accuracy after"):
        assert words in printed

    results = json.loads((out / "results.json").read_text())
    assert results["environment"]["torch"] == torch.__version__ and results["environment"]["date"]
    assert results["environment"]["cpu"] and results["settings"]["steps"] == 2
    assert len(results["memory"]) == 6
    with (out / "results.csv").open(newline="") as file:
        figures = list(csv.DictReader(file))
    assert len(figures) == len(results["figures"]) and figures[0]["torch"] == torch.__version__
    with (out / "steps.csv").open(newline="") as file:
        steps = list(csv.DictReader(file))
    assert {(row["seed"], row["arm"], row["step"]) for row in steps} == {
        (seed, arm, step) for seed in "01" for arm in ("GRPO", "PPO") for step in "012"
    }
    picture = (out / "ppo_vs_grpo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


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
    after = found["held-out accuracy after", "GRPO"]
    assert (after.value, after.low, after.high) == pytest.approx((0.75, 0.6, 0.9))
    width = found["reward: max - min over seeds, mean", "GRPO"].value
    assert width == pytest.approx((0 + 0.2 + 0.3) / 3)
    assert found["reward: max - min over seeds, mean", "PPO"].value == pytest.approx(0.1)
    assert found["reward, last 3 steps", "GRPO"].low == pytest.approx(0.2)
    assert found["time of a step: update", "PPO"].value == 30.0
    assert found["memory at its peak, run's model", "PPO"].value == 16
    assert found["peak, both graphs at once, run's model", "PPO"].value == 20
    half, stable, value, time, _ = report.summary(results)[1:]
    assert "0.62 of PPO's" in half and "0.50 where" in half and "0.57" in half
    assert "0.300 (GRPO) and 0.150 (PPO)" in stable and "0.167 (GRPO) and 0.100 (PPO)" in stable
    assert "explained 0.50 of the variance" in value
    assert "1.33 of GRPO's" in time
    assert max(len(line) for line in report.table(results).splitlines()) <= 80
    assert all(math.isfinite(f.value) for f in found.values())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seeds", "1", "1"], "--seeds must be different"),
        (["--steps", "0"], "--steps must be above 0, got 0"),
        (["--prompts", "2", "--ppo-generations", "5"], "--ppo-generations 5 must divide the 16 completions"),
    ],
)
def test_bad_arguments_are_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(argv)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
