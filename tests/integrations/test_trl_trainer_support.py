"""A sampler's mask that ``rollout_func`` returns, in every pass of `FusedGRPOTrainer`."""

import functools
import gc

import pytest
import torch

pytest.importorskip("trl", reason="the drop-in needs TRL 1.16, which needs Python 3.11")

from trl import GRPOTrainer

from grpo_kernels.integrations import trl as fused
from grpo_kernels.integrations.trl import FusedGRPOTrainer, patch
from grpo_kernels.integrations.trl_support import padded
from tolerance import U
from trl_runs import ITERATED, MICRO, same, save, train

# Logits of a few units, whose last bits depend on the cache that generate keeps and on padding.
ROUNDING = 64 * U
STALE = {**MICRO, "steps_per_generation": 4, "max_steps": 4}
CASES = {
    "one batch": {**ITERATED, "beta": 0.0},
    "reference": ITERATED,
    "accumulated, shuffled": {**ITERATED, **MICRO, "steps_per_generation": 2},
    "stale": {**STALE, "beta": 0.1},
    "sequence": {**ITERATED, "loss_type": "grpo", "importance_sampling_level": "sequence"},
    "multiples": {**ITERATED, "pad_to_multiple_of": 8, "temperature": 0.7},
    "truncated": {**ITERATED, **MICRO, "mask_truncated_completions": True},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return functools.cache(lambda name: save(name, tmp_path_factory.mktemp(name)))


def rollout(prompts, trainer, *, top_k, tells):
    """Samples top k from the model itself; ``tells`` is "kept", "all" the vocabulary, or "nothing"."""
    tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=6, do_sample=True,
            temperature=trainer.temperature, top_k=top_k, output_scores=True, return_dict_in_generate=True,
            eos_token_id=[tokenizer.eos_token_id, 5],  # ends early, now and then
        )  # fmt: skip
    model.train(was_training)
    completions = out.sequences[:, encoded["input_ids"].shape[1] :].tolist()
    told = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "sampling_mask": []}
    for n, ids in enumerate(completions):
        end = next((i + 1 for i, x in enumerate(ids) if x in (tokenizer.eos_token_id, 5)), len(ids))
        scores = [step[n] for step in out.scores[:end]]
        told["prompt_ids"].append(tokenizer(prompts[n])["input_ids"])
        told["completion_ids"].append(ids[:end])
        told["logprobs"].append([x.log_softmax(0)[i].item() for x, i in zip(scores, ids)])
        every = list(range(len(scores[0])))
        told["sampling_mask"].append([every if tells == "all" else (x > -torch.inf).nonzero()[:, 0].tolist()
                                      for x in scores])  # fmt: skip
    if tells == "nothing":
        del told["sampling_mask"]
    return told


def sampler(tells="kept", top_k=4):
    return {"rollout_func": functools.partial(rollout, top_k=top_k, tells=tells)}


class Watched:
    """In front of a trainer class: keeps each batch and what the loss made of it."""

    def _compute_loss(self, model, inputs):
        self.__dict__.setdefault("seen", []).append(inputs)
        return super()._compute_loss(model, inputs)


def watched(saved, tmp_path, monkeypatch, tells, loss_path="linear", **args):
    """[(the batch, the loss's output)] of a run in which nothing moves: each update is the first."""
    outs = []

    def call(own, *given, **named):
        outs.append(own(*given, **named))
        return outs[-1]

    for name in ("fused_grpo_loss", "fused_linear_grpo_loss"):
        monkeypatch.setattr(fused, name, functools.partial(call, getattr(fused, name)))
    trainer = {**sampler(tells), "loss_path": loss_path}
    made = train(FusedGRPOTrainer, saved("llama"), tmp_path, front=Watched, trainer=trainer,
                 **{**args, "learning_rate": 0.0})[2]  # fmt: skip
    assert len(outs) == len(made.seen) > 1
    return list(zip(made.seen, outs))


@pytest.mark.parametrize("loss_path", ["linear", "logits"])
@pytest.mark.parametrize("case", CASES)
def test_the_ratio_to_the_sampler_is_one(case, loss_path, saved, tmp_path, monkeypatch):
    """Of each token, so that a set that went astray in shuffling or splitting would show."""
    for batch, out in watched(saved, tmp_path, monkeypatch, "kept", loss_path, **CASES[case]):
        mask, drawn = batch["completion_mask"].bool(), batch["sampling_per_token_logps"]
        assert batch["sampling_mask"].shape[:2] == mask.shape and batch["sampling_mask"].dtype == torch.int32
        assert not mask.any() or batch["sampling_mask"].shape[2] == 4
        zeros = torch.zeros(int(mask.sum()))
        for logps in (out.logps, *(batch[name] for name in ("old_per_token_logps", "ref_per_token_logps")
                                   if name in batch)):  # fmt: skip
            torch.testing.assert_close((logps - drawn)[mask], zeros, rtol=0, atol=ROUNDING)


def test_without_the_mask_it_is_not(saved, tmp_path, monkeypatch):
    for batch, out in watched(saved, tmp_path, monkeypatch, "nothing", **ITERATED):
        mask = batch["completion_mask"].bool()
        assert "sampling_mask" not in batch
        assert (out.logps - batch["sampling_per_token_logps"])[mask].exp().mean() < 0.9
        assert (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[mask].exp().mean() < 0.9


@pytest.mark.parametrize("case", ["reference", "accumulated, shuffled", "stale"])
@pytest.mark.parametrize("tells", ["all", "nothing"])
def test_the_whole_vocabulary_is_no_restriction(case, tells, saved, tmp_path):
    """Logs and weights are the plain trainer's, which knows of no mask."""
    theirs = train(GRPOTrainer, saved("llama"), tmp_path, trainer=sampler(tells), **CASES[case])
    for loss_path in ("linear", "logits"):
        same(train(FusedGRPOTrainer, saved("llama"), tmp_path, trainer={**sampler(tells), "loss_path": loss_path},
                   **CASES[case]), theirs)  # fmt: skip


def test_entropy_is_over_the_kept_set(saved, tmp_path):
    rows, _, _ = train(FusedGRPOTrainer, saved("llama"), tmp_path, trainer=sampler("kept", top_k=2), **ITERATED)
    assert all(row["entropy"] <= torch.tensor(2.0).log() for row in rows if "entropy" in row)
    assert max(row["kl"] for row in rows if "kl" in row) > 0
    free, _, _ = train(FusedGRPOTrainer, saved("llama"), tmp_path, trainer=sampler("nothing", top_k=2), **ITERATED)
    assert free[0]["entropy"] > 1.5


def test_evaluation(saved, tmp_path):
    rows, _, _ = train(FusedGRPOTrainer, saved("llama"), tmp_path, trainer=sampler("kept", top_k=2), evaluate=True,
                       per_device_eval_batch_size=4, **ITERATED)  # fmt: skip
    assert all(row["eval_entropy"] <= torch.tensor(2.0).log() for row in rows if "eval_entropy" in row)
    assert any("eval_entropy" in row for row in rows)


def test_a_patched_trainer_replays_and_a_loss_of_its_own_does_not(saved, tmp_path):
    class Own(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            assert "sampling_mask" not in inputs
            return super()._compute_loss(model, inputs)

    stock = GRPOTrainer._generate
    ours = train(FusedGRPOTrainer, saved("llama"), tmp_path, trainer=sampler(), **ITERATED)
    undo = patch()
    try:
        patched = train(GRPOTrainer, saved("llama"), tmp_path, trainer=sampler(), **ITERATED)
        with pytest.warns(UserWarning, match="Own has a _compute_loss of its own"):
            train(Own, saved("llama"), tmp_path, trainer=sampler(), **{**ITERATED, "max_steps": 1})
    finally:
        undo()
    assert GRPOTrainer._generate is stock
    assert patched[0] == ours[0]


def test_padded():
    made = padded([[[7, 3], None, []], None, [[1]]], [3, 2, 1], 4)
    assert made.tolist() == [[[7, 3], [-1, -1], [-1, -1], [-1, -1]], [[-1, -1]] * 4, [[1, -1], *[[-1, -1]] * 3]]
    assert padded([[[2]], [[]]], [1, 1]).tolist() == [[[2]], [[-1]]] and made.dtype == torch.int32
    assert padded([None], [2]).tolist() == [[[-1], [-1]]]
    with pytest.raises(ValueError, match="has 1 completions, and completion_ids has 2"):
        padded([[[1]]], [1, 1])
    with pytest.raises(ValueError, match=r"sampling_mask\[1\] of rollout_func has 1 tokens, and the completion has 2"):
        padded([[[1]], [[1]]], [1, 2])
    with pytest.raises(TypeError, match="must be a list of token ids"):
        padded([[["a"]]], [1])
