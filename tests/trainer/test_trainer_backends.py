"""Whatever computes the loss, the training curve is the same: torch, interpreted Triton, reference/, either path."""

import sys

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from safetensors.torch import load_file

from grpo_kernels.trainer import cli, scoring
from grpo_kernels.trainer.options import OptionError, Options
from model_tolerance import assert_same_run, nudged_policies, nudged_run
from trainer_cases import run, saved_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


SETTINGS = {"steps": 4, "batch_size": 2, "num_generations": 4, "num_minibatches": 2, "gradient_accumulation_steps": 2,
            "learning_rate": 0.01, "entropy_coef": 0.01, "beta": 0.1, "samples_every": 0,
            "reward": ("trainer_cases:starts_even",)}  # fmt: skip


def curve(directory, model, **options):
    """(rows, weights)"""
    result, rows, _ = run(directory, model=model, **SETTINGS | options)
    return rows, load_file(result.model / "model.safetensors")


def nudged(want, directory, model, **options):
    """The same from weights that are off by a rounding."""

    def make(seed):
        with nudged_policies(seed):
            return curve(directory / str(seed), model, **options)

    return nudged_run(want, make)


def compare(one, other, off):
    """Every number of every row, and the weights."""
    assert_same_run(other, one, off)
    assert max(row.get("grad_norm", 0.0) for row in one[0]) > 1e-2


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo", "cispo"])
def test_reference_and_torch(tmp_path, model, monkeypatch, loss_type):
    """The loss and the gradient are the float math of reference/: nothing of the package computes them."""
    torch_curve = curve(tmp_path / "torch", model, backend="torch", loss_type=loss_type)
    off = nudged(torch_curve, tmp_path / "off", model, backend="torch", loss_type=loss_type)
    with monkeypatch.context() as patch:
        for name in ("fused_grpo_loss", "token_logprobs", "fused_linear_grpo_loss", "linear_token_logprobs"):
            patch.setattr(scoring, name, None)
        compare(torch_curve, curve(tmp_path / "reference", model, backend="reference", loss_type=loss_type), off)


def test_triton_and_torch(tmp_path, model):
    """Interpreted, so a shorter run; both paths."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    short = {"steps": 2, "batch_size": 1, "num_generations": 4, "gradient_accumulation_steps": 1}
    torch_curve = curve(tmp_path / "torch", model, backend="torch", **short)
    off = nudged(torch_curve, tmp_path / "off", model, backend="torch", **short)
    compare(torch_curve, curve(tmp_path / "triton", model, backend="triton", loss_path="logits", **short), off)
    compare(torch_curve, curve(tmp_path / "linear", model, backend="triton", loss_path="linear", **short), off)


def test_linear_and_logits(tmp_path, model):
    logits = curve(tmp_path / "logits", model, loss_path="logits")
    off = nudged(logits, tmp_path / "off", model, loss_path="logits")
    compare(logits, curve(tmp_path / "linear", model, loss_path="linear"), off)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_checkpointed_activations_change_no_number(tmp_path, model):
    """The same operations, run again; and no name is used that transformers has renamed."""
    short = {"steps": 2, "num_minibatches": 1, "gradient_accumulation_steps": 1}
    (rows, weights), (others, other_weights) = (
        curve(tmp_path / str(again), model, gradient_checkpointing=again, **short) for again in (False, True))
    assert rows == others and all(torch.equal(other_weights[name], x) for name, x in weights.items())


def test_reference_is_refused_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reference", None)
    monkeypatch.setattr(scoring.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"--backend reference needs the package reference/.*--backend torch"):
        run(tmp_path / "run", backend="reference")
    assert not (tmp_path / "run").exists()


def test_auto_never_takes_hidden_states_to_the_reference():
    assert not Options(backend="reference", logits_budget_gib=1e-9).takes_hidden_states(4, 2**20)
    assert Options(logits_budget_gib=1e-9).takes_hidden_states(4, 2**20)


def test_what_is_taken_at_once_is_a_micro_batch():
    """8 x 8 completions of 4 + 1 positions, 2**20 words, twice, fp32: 2.5 GiB; a quarter of it 0.625."""
    options = {"batch_size": 8, "num_generations": 8, "logits_budget_gib": 1.0}
    assert Options(**options).takes_hidden_states(4, 2**20)
    assert not Options(**options, num_minibatches=2, gradient_accumulation_steps=2).takes_hidden_states(4, 2**20)
