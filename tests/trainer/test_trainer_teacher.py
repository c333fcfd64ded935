"""`--teacher`: the policy is pulled towards another model on its own samples; rewards are only looked at."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

import reference
from grpo_kernels.trainer import cli, loop
from grpo_kernels.trainer.arguments import parse
from grpo_kernels.trainer.head import find_head
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.scoring import completion_logits
from grpo_kernels.trainer.teacher import Teacher
from grpo_kernels.trainer.tokenizer import character_tokenizer
from trainer_cases import TASK, rollout_of, run, saved_model, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = character_tokenizer(TASK.alphabet)
UNEVEN = [[5, 6, 1, 0, 0], [7, 1, 0, 0, 0], [5, 5, 6, 7, 1], [6, 7, 8, 9, 4]]


def models():
    torch.manual_seed(0)
    return tiny_llama(TOKENIZER), tiny_llama(TOKENIZER, hidden_size=32).eval().requires_grad_(False)


def rollout(rewards=(1.0, 0.0, 0.0, 1.0)):
    return rollout_of(TOKENIZER, ["1+1=", "1+1=", "23+4=", "23+4="], UNEVEN, list(rewards))


def step(policy, teacher, linear=False, rewards=(1.0, 0.0, 0.0, 1.0), **options):
    """(row, the policy after a step of SGD)"""
    given = {"batch_size": 2, "num_generations": 2, "num_iterations": 1, "teacher": "a folder", "max_grad_norm": 1e6}
    options = Options(**{**given, **options})
    policy = copy.deepcopy(policy)
    head, of_teacher = (find_head(model) if linear else None for model in (policy, teacher))
    row = loop.step_on(policy, None, rollout(rewards), torch.optim.SGD(policy.parameters(), 0.1),
                       options.loss_config(5), options, head, Teacher(teacher, of_teacher))  # fmt: skip
    return row, policy


def weights(policy):
    return torch.cat([x.detach().reshape(-1) for x in policy.parameters()])


@pytest.mark.parametrize("beta", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("linear", (False, True))
def test_a_step_is_the_references(linear, beta):
    policy, teacher = models()
    row, after = step(policy, teacher, linear, teacher_beta=beta, temperature=0.7)
    want, given = copy.deepcopy(policy), rollout()
    out = reference.distillation_loss(
        completion_logits(want, given), completion_logits(teacher, given), beta=beta, temperature=0.7,
        completion_mask=given.completion_mask,
    )  # fmt: skip
    out.loss.backward()
    torch.optim.SGD(want.parameters(), 0.1).step()
    moved = (weights(want) - weights(policy)).abs().max()
    assert moved > 1e-3 and row["loss"] == pytest.approx(out.loss.item(), rel=1e-4)
    assert (weights(after) - weights(want)).abs().max() < 1e-4 * moved
    for name in ("divergence", "entropy", "teacher_entropy"):
        assert row[name] == pytest.approx(out.metrics[name].item(), rel=1e-4)
    assert row["reward"] == 0.5 and "kl" not in row


def test_rewards_move_nothing():
    policy, teacher = models()
    (_, a), (_, b) = (step(policy, teacher, rewards=rewards) for rewards in ((1.0, 0.0, 0.0, 1.0), (0.0,) * 4))
    assert torch.equal(weights(a), weights(b))


def test_parts_of_unequal_length_add_up():
    policy, teacher = models()
    (row, a), (parts, b) = (step(policy, teacher, gradient_accumulation_steps=n) for n in (1, 4))
    moved = (weights(a) - weights(policy)).abs().max()
    assert (weights(a) - weights(b)).abs().max() < 1e-4 * moved
    for name in ("loss", "divergence", "grad_norm"):
        assert parts[name] == pytest.approx(row[name], rel=1e-4)


def test_steps_come_closer_to_the_teacher():
    policy, teacher = models()
    distances = []
    for _ in range(20):
        row, policy = step(policy, teacher)
        distances.append(row["divergence"])
    assert distances[-1] < 0.8 * distances[0]


def test_a_run_goes_on(tmp_path):
    student = saved_model(tmp_path / "student")
    teacher = saved_model(tmp_path / "teacher", hidden_size=32)
    given = {"model": student, "teacher": teacher, "learning_rate": 1e-2, "steps": 8,
             "lr_scheduler_type": "constant"}  # fmt: skip
    _, rows, said = run(tmp_path / "run", **given)
    assert sum("divergence" in row for row in rows) == 8 and "divergence" in said
    assert "divergence from the teacher" in " ".join(said.split()) and "by construction" not in said
    assert not (tmp_path / "run" / "checkpoints" / "reference").exists()
    run(tmp_path / "again", **{**given, "steps": 4})
    _, resumed, _ = run(tmp_path / "again", **given, resume=True)
    assert [row for row in resumed if "loss" in row] == [row for row in rows if "loss" in row]


def test_what_cannot_be_is_refused(tmp_path):
    student = saved_model(tmp_path / "student")
    other = saved_model(tmp_path / "other", alphabet=TASK.alphabet + "xyz")
    for teacher, said in ((str(tmp_path / "nothing"), "could not be loaded"), (other, "has other tokens")):
        with pytest.raises(OptionError, match=said):
            cli.run(Options(output_dir=str(tmp_path / "run"), model=student, teacher=teacher, steps=1))
    assert not (tmp_path / "run").exists()
    with pytest.raises(OptionError, match="--backend reference is for GRPO"):
        Options(teacher="folder", backend="reference")
    with pytest.raises(OptionError, match="--teacher-beta must be from 0 to 1"):
        Options(teacher="folder", teacher_beta=1.5)
    assert parse(["--teacher", "folder", "--teacher-beta", "0"]).teacher_beta == 0.0
