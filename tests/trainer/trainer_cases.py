"""What the trainer's tests share: a policy smaller than the demo's, rollouts by hand, short runs."""

import io
import json

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kernels.trainer import cli, loop
from grpo_kernels.trainer.options import Options
from grpo_kernels.trainer.task import addition
from grpo_kernels.trainer.tokenizer import character_tokenizer

TASK = addition()
TIMES = {"step_time", "sampling_time", "reward_time", "loss_time", "optimizer_time"}


def tiny_llama(tokenizer, **settings) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **sizes | settings,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def saved_model(path, alphabet=TASK.alphabet, tokenizer=None, **settings) -> str:
    """A model in a folder, as --model takes it."""
    tokenizer = tokenizer or character_tokenizer(alphabet)
    torch.manual_seed(0)
    tiny_llama(tokenizer, **settings).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def rollout_of(tokenizer, prompts, completion_ids, rewards) -> loop.Rollout:
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = torch.tensor(completion_ids)
    return loop.Rollout(
        prompt_ids=encoded["input_ids"],
        prompt_mask=encoded["attention_mask"],
        completion_ids=ids,
        completion_mask=loop.mask_after_eos(ids, tokenizer.eos_token_id),
        ended=(ids == tokenizer.eos_token_id).any(1),
        rewards=torch.tensor(rewards),
    )


def starts_even(prompts, completions, **columns):
    """A reward that an untrained policy earns now and then."""
    return [float(text[:1] in set("02468")) for text in completions]


def run(output_dir, **options):
    """A short run; (its result, the rows of metrics.jsonl without times, what it printed)."""
    console = Console(file=io.StringIO(), width=80)
    small = {"steps": 3, "batch_size": 4, "num_generations": 4, "eval_every": 2, "warmup_steps": 0}
    result = cli.run(Options(output_dir=str(output_dir), **{**small, **options}), console)
    return result, rows_of(output_dir), console.file.getvalue()


def rows_of(output_dir):
    lines = (output_dir / "grpo_metrics" / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in TIMES} for line in lines]
