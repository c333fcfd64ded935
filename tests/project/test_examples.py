"""The examples run as they stand, and do what they say: rewards rise, and micro-batches add up to their batch.

`examples/own_objective.py` is run by test_docs.py, `examples/hosts/` by test_hosts.py and its neighbours.
"""

import functools
import re
import runpy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import LlamaForCausalLM

from tolerance import U, assert_within, steps

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state per process, which the next test is not to find."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@functools.cache
def main(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def weights(model: LlamaForCausalLM) -> torch.Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


def assert_same_step(parts: torch.Tensor, whole: torch.Tensor, start: torch.Tensor) -> None:
    """To fp32 rounding of the step, which is far from nothing, and of the weights.

    The step is a sum over parts, tokens, layers: four sums, one inside of the other, of terms as large as its largest.
    """
    step = (whole - start).abs().max().item()
    assert step > 1e-3
    assert_within(parts, whole, 4 * steps(64) * U * step + 4 * U * whole.abs(), "weights", factor=2)


def test_plain_loop(capsys):
    rewards = main("plain_loop")(steps=14)
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.3
    assert capsys.readouterr().out.count("reward") == 4


@pytest.mark.parametrize("name", ("transformers_trainer", "accelerate_loop"))
def test_run_as_scripts(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "gained" in said if name == "transformers_trainer" else said.count("reward") == 5


def test_trainer_prefers_what_was_rewarded():
    assert main("transformers_trainer")()[1] > 0.1


def test_trainer_micro_batches_add_up():
    """The Trainer's four micro-batches of 4 make the step that one batch of 16 makes."""
    run = functools.partial(main("transformers_trainer"), steps=3, optimizer="sgd", learning_rate=0.5)
    (parts, _), (whole, _), (start, _) = run(4), run(1), main("transformers_trainer")(steps=1, learning_rate=0.0)
    assert_same_step(weights(parts), weights(whole), weights(start))


def test_accelerate_reward_rises():
    _, rewards = main("accelerate_loop")(steps=16)
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.15


@pytest.mark.parametrize("loss_type", ("dapo", "grpo", "dr_grpo"))
def test_accelerate_micro_batches_add_up(loss_type):
    """Three micro-batches of other sizes than one another, with other numbers of tokens."""
    run = functools.partial(main("accelerate_loop"), steps=1, loss_type=loss_type, optimizer=torch.optim.SGD)
    (parts, _), (whole, _), (start, _) = run(3, learning_rate=1.0), run(1, learning_rate=1.0), run(1, learning_rate=0.0)
    assert_same_step(weights(parts), weights(whole), weights(start))


def test_trl_trainer_raises_the_reward(capsys):
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    rewards = main("trl_trainer")(steps=14)
    assert rewards[0] < 0.35 and sum(rewards[-2:]) / 2 > rewards[0] + 0.2
    assert "reward" in capsys.readouterr().out


def test_a_loss_of_your_own_in_trl(capsys):
    """The trainer that docs/integrations.md writes out learns what FusedGRPOTrainer learns, and scores as it does."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    page = (EXAMPLES.parent / "docs" / "integrations.md").read_text(encoding="utf-8")
    [source] = re.findall(r"^```text\n(import torch\n.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names = {}
    exec(source, names)

    class Trainer(names["OwnTrainer"]):
        def _compute_loss(self, model, inputs):
            for metric in ("kl", "clip_ratio/region_mean"):  # which the example prints
                self._metrics["train"][metric].append(0.0)
            assert hasattr(self, "_seam")  # the scoring pass is the package's
            return super()._compute_loss(model, inputs)

    try:
        script = runpy.run_path(str(EXAMPLES / "trl_trainer.py"))["main"]
        script.__globals__["FusedGRPOTrainer"] = Trainer
        rewards = script(steps=14)
    finally:
        names["undo"]()
    assert rewards[0] < 0.35 and sum(rewards[-2:]) / 2 > rewards[0] + 0.2
