"""TRL's GRPOTrainer with its loss replaced: one import and one name change. It trains a tiny model in a few seconds.

    python examples/trl_trainer.py        # needs TRL: pip install trl

The policy learns to write vowels.
"""

import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback
from trl import GRPOConfig

from grpo_kernels.integrations.trl import FusedGRPOTrainer  # in the place of trl.GRPOTrainer
from grpo_kernels.trainer.tokenizer import character_tokenizer


def vowels(completions: list[str], **kwargs) -> list[float]:
    """The share of vowels in each completion."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def main(steps: int = 20) -> list[float]:
    """Trains; returns the mean reward of each step."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyz ")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # TRL wants a model that has a name
        tokenizer.save_pretrained(folder)
        args = GRPOConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=32, num_generations=8,
            max_completion_length=8, learning_rate=0.01, beta=0.02, logging_steps=1, report_to="none",
            save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
            dataloader_pin_memory=torch.cuda.is_available(), seed=0,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": ["once upon", "a day in", "the end of", "my dear"]})
        trainer = FusedGRPOTrainer(folder, vowels, args=args, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    for row in rows[:: max(1, len(rows) // 5)]:
        print(f"step {row['step']:3d}  reward {row['reward']:.3f}  kl {row['kl']:.4f}  clipped "
              f"{row['clip_ratio/region_mean']:.3f}")  # fmt: skip
    return [row["reward"] for row in rows]


if __name__ == "__main__":
    main()
