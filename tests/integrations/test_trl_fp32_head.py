"""TRL's cast_lm_head_to_fp32, of a model in bf16: an fp32 parameter, and not `logits_dtype` of a bf16 one."""

import gc

import pytest
import torch

pytest.importorskip("trl", reason="the drop-in needs TRL 1.16, which needs Python 3.11")

from trl import GRPOTrainer

from grpo_kernels.integrations.head import ModelHead
from grpo_kernels.integrations.trl import FusedGRPOTrainer
from tolerance import EPS, U, assert_within, steps
from trl_runs import save, train


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def test_an_fp32_head_of_a_bf16_model(tmp_path, monkeypatch):
    """TRL makes the parameter fp32, which is read where it lies: no copy, and fp32 hidden states."""
    read, arguments, model = [], ModelHead.arguments, save("llama", tmp_path / "model")

    def noted(self, model, hidden):
        found = arguments(self, model, hidden)
        weight = model.get_output_embeddings().weight
        read.append((hidden.dtype, weight.dtype, found["weight"].data_ptr() == weight.data_ptr()))
        return found

    monkeypatch.setattr(ModelHead, "arguments", noted)
    args = {"max_steps": 1, "cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    before = train(GRPOTrainer, model, tmp_path, learning_rate=0.0, **args)[1]
    theirs = train(GRPOTrainer, model, tmp_path, **args)[1]
    ours = train(FusedGRPOTrainer, model, tmp_path, trainer={"loss_path": "linear"}, **args)[1]
    assert set(read) == {(torch.float32, torch.float32, True)}
    for name, x in theirs.items():
        head = name == "lm_head.weight"
        assert ours[name].dtype == x.dtype == (torch.float32 if head else torch.bfloat16)
        # Of a sum of 24 tokens in fp32; a gradient that goes back into bf16 may round to a neighbour.
        size = max(x.abs().max().item(), (x.float() - before[name].float()).abs().max().item())
        assert_within(ours[name], x, (steps(24) * U if head else 2 * EPS[torch.bfloat16]) * size, name)
    assert not torch.equal(theirs["lm_head.weight"], before["lm_head.weight"])
