"""TRL's own `DistillationTrainer.train()` against `FusedDistillationTrainer.train()`: the same logs and weights."""

import functools
import gc

import pytest
import torch

pytest.importorskip("trl", reason="the drop-in needs TRL 1.16, which needs Python 3.11")

from datasets import Dataset
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig
from trl import DistillationConfig, DistillationTrainer

from grpo_kernels.integrations import trl_distillation
from grpo_kernels.integrations.trl_distillation import FusedDistillationTrainer, fused_divergence_loss
from grpo_kernels.trainer.tokenizer import character_tokenizer
from model_tolerance import assert_same_run, nudge, nudged_run
from trl_runs import ALPHABET, SIZES, TIMES


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


MODELS = {
    "llama": functools.partial(LlamaConfig, tie_word_embeddings=False, **SIZES),
    "wide": functools.partial(LlamaConfig, tie_word_embeddings=True, **{**SIZES, "hidden_size": 24}),
    "gemma2": functools.partial(Gemma2Config, head_dim=8, final_logit_softcapping=3.0, **SIZES),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> folder of a tiny model, saved."""

    def save(name):
        path, tokenizer = tmp_path_factory.mktemp(name), character_tokenizer(ALPHABET)
        torch.manual_seed(len(name))
        ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
               "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
        AutoModelForCausalLM.from_config(MODELS[name](**ids)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)

    return functools.cache(save)


def train(cls, student, teacher, folder, *, nudged=None, evaluate=False, **args):
    """(rows of the log without times, weights after the run, the trainer)"""
    args = {"learning_rate": 0.5, "max_steps": 3, "optim": "sgd", "lr_scheduler_type": "constant",
            "gradient_checkpointing": False, "per_device_train_batch_size": 4, "max_completion_length": 6,
            "logging_steps": 1, **args}  # fmt: skip
    config = DistillationConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
                                seed=5, disable_tqdm=True, **args)  # fmt: skip
    data = Dataset.from_dict({"prompt": ["ab", "hello 12", "7", "x y z"] * 4})
    made = cls(student, teacher, config, train_dataset=data, eval_dataset=data.select(range(2)) if evaluate else None)
    if nudged is not None:
        nudge(made.model, nudged)
    made.train()
    if evaluate:
        made.evaluate()
    rows = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in made.state.log_history]
    return rows, {k: v.detach().clone() for k, v in made.model.state_dict().items()}, made


CASES = {
    **{f"beta {b}, temperature {t}": {"beta": b, "temperature": t} for b in (0.0, 0.3, 0.5, 1.0) for t in (1.0, 2.0)},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "beta": 0.3},
    "evaluated": {"evaluate": True},
    "softcap": {"student": "gemma2", "beta": 0.5},
    "top_k of the sampler": {"top_k": 10},
}


@pytest.mark.parametrize("case", CASES)
def test_runs_are_the_same(case, saved, tmp_path):
    args = dict(CASES[case])
    student, teacher = saved(args.pop("student", "llama")), saved("wide")
    run = functools.partial(train, student=student, teacher=teacher, folder=tmp_path, **args)
    theirs, ours = run(DistillationTrainer), run(FusedDistillationTrainer)
    assert any("entropy" in row for row in theirs[0]) and any(row.get("loss") for row in theirs[0])
    nudged = nudged_run(theirs, lambda seed: run(DistillationTrainer, nudged=seed)[:2])
    assert_same_run(ours[:2], theirs[:2], nudged)


def test_less_than_one_token_and_none(saved):
    """TRL divides by N over the processes, which may be less than 1; a rank may have no token."""
    chunked = pytest.importorskip("trl.trainer.distillation_trainer")
    g = torch.Generator().manual_seed(0)
    h, u = torch.randn(2, 3, 8, generator=g), torch.randn(2, 3, 12, generator=g)
    w, v = torch.randn(30, 8, generator=g), torch.nn.Parameter(torch.randn(30, 12, generator=g))
    for mask, items in ((torch.tensor([[1, 0, 0], [0, 0, 0]]), torch.tensor(0.5)), (torch.zeros(2, 3).long(), None),
                        (torch.ones(2, 3).long(), 6)):  # fmt: skip
        got, want = [], []
        for function, out in ((fused_divergence_loss, got), (chunked._chunked_divergence_loss, want)):
            leaf = h.clone().requires_grad_()
            loss, entropy, count = function(leaf, u, w, v, mask, 1.0, num_items_in_batch=items)
            out += [loss.detach(), entropy.detach(), count, *torch.autograd.grad(loss, leaf)]
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_served_raises(monkeypatch, saved, tmp_path):
    monkeypatch.setattr(trl_distillation, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 partitions both heads"):
        train(FusedDistillationTrainer, saved("llama"), saved("wide"), tmp_path)
    monkeypatch.setattr(trl_distillation.trl, "__version__", "1.12.0")
    with pytest.raises(ValueError, match=r"needs TRL 1.16, and this is 1.12.0"):
        FusedDistillationTrainer(None)
