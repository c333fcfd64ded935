"""GRPO inside `transformers.Trainer`: a subclass whose `compute_loss` is the fused loss.

    python examples/transformers_trainer.py

The example samples and rewards completions once. The Trainer then makes several epochs over them. From the second
update on they are an older policy's, for which the loss clips the ratio. The Trainer cuts batches into micro-batches.
Their gradients add up to the whole batch's, since the loss is divided by `num_items_in_batch`. Nothing is downloaded.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from grpo_kernels import fused_grpo_loss, group_advantages, token_logprobs
from grpo_kernels.metrics import combine

VOCABULARY, PROMPT, COMPLETION = 32, 4, 8  # tokens
PROMPTS, GENERATIONS = 8, 8


class FusedLossTrainer(Trainer):
    """Batches hold ``input_ids`` (B, S); ``labels`` (B, S), -100 where a token does not count; ``advantages`` (B,);
    ``old_logps`` (B, S-1)."""

    loss_is_scaled_for_ga = True  # by num_items_in_batch: the Trainer must not divide a second time
    sums: tuple = ()  # of the micro-batches since the last line of the log

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        ids = inputs["labels"][:, 1:]  # row t of the logits predicts token t+1
        # The count is over all ranks by default, and DDP takes the mean of their gradients.
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        out = fused_grpo_loss(
            outputs.logits, ids, inputs["advantages"], old_logps=inputs["old_logps"], completion_mask=ids != -100,
            loss_type="dapo", epsilon_high=0.28, num_items_in_batch=num_items_in_batch, loss_scale=ranks, inplace=True,
        )  # fmt: skip
        if model.training:
            self.sums = (*self.sums, out.sums)
        return (out.loss, outputs) if return_outputs else out.loss

    def log(self, logs, *args, **kwargs):
        if self.sums:
            metrics = combine(self.sums)
            logs |= {name: round(metrics[name].item(), 4) for name in ("clip_ratio/region_mean", "approx_kl")}
            self.sums = ()
        super().log(logs, *args, **kwargs)


def sampled(model: LlamaForCausalLM) -> list[dict]:
    """Completions rewarded for even tokens, with their advantages and the sampler's log-probabilities."""
    prompts = torch.randint(VOCABULARY, (PROMPTS, PROMPT)).repeat_interleave(GENERATIONS, 0)
    with torch.no_grad():
        sequences = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                                   max_new_tokens=COMPLETION, min_new_tokens=COMPLETION)  # fmt: skip
        old_logps = token_logprobs(model(sequences).logits, sequences[:, 1:]).logps
    lengths = torch.randint(2, COMPLETION + 1, (len(sequences), 1))  # as if some had ended early
    position = torch.arange(sequences.shape[1]) - PROMPT
    counts = (position >= 0) & (position < lengths)
    rewards = ((sequences % 2 == 0) & counts).sum(1) / counts.sum(1)
    labels = sequences.masked_fill(~counts, -100)
    rows = zip(sequences, labels, group_advantages(rewards, GENERATIONS).tolist(), old_logps)
    return [dict(zip(("input_ids", "labels", "advantages", "old_logps"), row)) for row in rows]


@torch.no_grad()
def preference(model: LlamaForCausalLM, data: list[dict]) -> float:
    """How much more likely a token of a good completion is than one of a bad one: the mean of A·log π."""
    ids, labels, old = (torch.stack([row[name] for row in data]) for name in ("input_ids", "labels", "old_logps"))
    mask = labels[:, 1:] != -100
    gain = token_logprobs(model(ids.to(model.device)).logits, ids[:, 1:].to(model.device)).logps.cpu() - old
    return ((gain * torch.tensor([row["advantages"] for row in data])[:, None])[mask]).mean().item()


def main(accumulation: int = 4, steps: int = 16, optimizer: str = "adamw_torch", learning_rate: float = 2e-3):
    """(the trained model, how much it prefers the good completions): 16 sequences a step, in micro-batches."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=PROMPT + COMPLETION, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    ))  # fmt: skip
    data = sampled(model)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation,
            max_steps=steps, optim=optimizer, learning_rate=learning_rate, lr_scheduler_type="constant",
            logging_steps=4, report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(), seed=0,
        )  # fmt: skip
        FusedLossTrainer(model, args, train_dataset=data).train()
    gained = preference(model, data)
    print(f"mean of advantage · log-probability gained: {gained:.4f}")
    return model, gained


if __name__ == "__main__":
    main()
