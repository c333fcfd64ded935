"""Runs of TRL's trainer and of the fused one on tiny models, for test_trl_trainer*.py.

``python -m trl_runs MODEL FOLDER`` is one of two data-parallel ranks.
"""

import copy
import functools
import gc
import os
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3MoeConfig
from trl import GRPOConfig, GRPOTrainer

from grpo_kernels.integrations.trl import FusedGRPOTrainer
from grpo_kernels.trainer.tokenizer import character_tokenizer
from model_tolerance import assert_same_run, nudge, nudged_run
from tolerance import U

ALPHABET = "abcdefghijklmnopqrstuvwxyz 0123456789"
TIMES = ("step_time", "train_runtime", "_per_second", "total_flos", "eval_runtime", "profiling/")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
MODELS = {
    "llama": functools.partial(LlamaConfig, tie_word_embeddings=False),
    "tied": functools.partial(LlamaConfig, tie_word_embeddings=True),
    "gemma2": functools.partial(Gemma2Config, head_dim=8, final_logit_softcapping=3.0),
    "moe": functools.partial(Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                             decoder_sparse_step=1, mlp_only_layers=[], output_router_logits=True,
                             router_aux_loss_coef=0.1),
}  # fmt: skip


def save(name, path):
    tokenizer = character_tokenizer(ALPHABET)
    torch.manual_seed(1)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
           "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    AutoModelForCausalLM.from_config(MODELS[name](**SIZES, **ids)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def vowels(completions, **kwargs):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def length(completions, **kwargs):
    return [len(text) / 8 for text in completions]


class Mismatch:
    """Batches as if vLLM had sampled, and a tool had written; in front of a trainer class."""

    per_sequence = False

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        mask, noise = out["completion_mask"], torch.Generator().manual_seed(3)
        out["tool_mask"] = (torch.rand(mask.shape, generator=noise) < 0.8).long()
        drift = 0.3 * torch.randn(mask.shape, generator=noise)
        out["sampling_per_token_logps"] = out["old_per_token_logps"] + drift
        out["sampling_per_token_logps"][0, 0] = torch.nan  # vLLM could not score it
        ratio = torch.exp(-drift.masked_fill(mask * out["tool_mask"] == 0, 0.0))
        out["importance_sampling_ratio"] = ratio[:, :1] if self.per_sequence else ratio
        return out

    def _compute_loss(self, model, inputs):
        self.use_vllm = True
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.use_vllm = False


class MismatchPerSequence(Mismatch):
    per_sequence = True


class OneToken:
    """Batches of which a single token counts; in front of a trainer class."""

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        out["completion_mask"][1:] = out["completion_mask"][:, 1:] = 0
        out["num_items_in_batch"] = torch.ones_like(out["num_items_in_batch"])
        return out


class PerToken:
    """Advantages of each token; in front of a trainer class."""

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        out["advantages"] = out["advantages"][:, None].expand(out["completion_mask"].shape).clone()
        return out


def train(cls, path, tmp_path, *, front=None, evaluate=False, trainer=None, nudged=None, **args):
    """(rows of the log without times, weights after the run, the trainer); ``nudged``: arguments of `nudge`."""
    fresh = path if isinstance(path, str) else copy.deepcopy(path)
    again = functools.partial(train, cls, fresh, tmp_path, front=front, evaluate=evaluate, trainer=trainer, **args)
    args = {"learning_rate": 0.5, "max_steps": 3, "optim": "sgd", "lr_scheduler_type": "constant", "beta": 0.0,
            "gradient_checkpointing": False, "per_device_train_batch_size": 4, "num_generations": 4,
            "max_completion_length": 6, "logging_steps": 1, **args}  # fmt: skip
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=args.pop("bf16", False), report_to="none",
                        save_strategy="no", seed=5, disable_tqdm=True, **args)  # fmt: skip
    data = Dataset.from_dict({"prompt": ["ab", "hello 12", "7", "x y z"] * 4})
    if front:
        cls = type(cls.__name__, (front, cls), {})
    held_out = data.select(range(2)) if evaluate else None
    made = cls(path, [vowels, length], config, train_dataset=data, eval_dataset=held_out, **trainer or {})
    made.again = again
    if nudged:
        nudge(made.model, *nudged)
    made.train()
    if evaluate:
        made.evaluate()
    rows = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in made.state.log_history]
    return rows, {k: v.detach().clone() for k, v in made.model.state_dict().items()}, made


def same(ours, theirs, unit=U, only=""):
    """The same run, so far as a run from weights that are off by `unit` is the same: see model_tolerance."""
    trainer = theirs[2]
    if not hasattr(trainer, "nudged"):
        trainer.nudged = nudged_run(theirs, lambda seed: trainer.again(nudged=(seed, unit, only))[:2])
    assert_same_run(ours[:2], theirs[:2], trainer.nudged)


ITERATED = {"num_iterations": 2, "beta": 0.1, "max_steps": 3}
MICRO = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
RANKS = {
    "dapo": {**ITERATED, **MICRO},
    "sequence": {**ITERATED, "loss_type": "grpo", "importance_sampling_level": "sequence", "entropy_coef": 0.05},
    "entropy quantile": {**ITERATED, "loss_type": "bnpo", "top_entropy_quantile": 0.4, "entropy_coef": 0.05},
    "adaptive entropy": {**MICRO, "use_adaptive_entropy": True, "entropy_target": 2.9, "entropy_coef_delta": 0.02},
    "truncated": {"loss_type": "vespo", "mask_truncated_completions": True, "per_device_train_batch_size": 2,
                  "ddp_find_unused_parameters": True},
}  # fmt: skip


def main(path, folder):
    """One of the two ranks."""
    gc.freeze()
    for case, args in RANKS.items():
        theirs = train(GRPOTrainer, path, folder, ddp_backend="gloo", **args)
        assert theirs[2].accelerator.num_processes == 2
        for loss_path in ("linear", "logits"):
            same(train(FusedGRPOTrainer, path, folder, ddp_backend="gloo", trainer={"loss_path": loss_path}, **args),
                 theirs)  # fmt: skip
        print(f"passed: {case}", flush=True)
    os._exit(0)  # gloo's threads may abort an orderly exit, or hang in it, long after the last assertion


if __name__ == "__main__":
    main(*sys.argv[1:])
