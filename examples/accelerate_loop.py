"""A GRPO loop with Accelerate: gradient accumulation, and any number of ranks.

    python examples/accelerate_loop.py            # or: accelerate launch examples/accelerate_loop.py

`accelerator.backward` divides the loss by the number of micro-batches, and DDP takes the mean over the ranks.
`num_items_in_batch` and `loss_scale` make the gradients of the micro-batches add up to that of the whole batch,
however many tokens each micro-batch has. Nothing is downloaded.
"""

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kernels import fused_grpo_loss, group_advantages
from grpo_kernels.metrics import combine

VOCABULARY, PROMPT, COMPLETION, END = 32, 4, 8, 1  # tokens; the one that ends a completion
PROMPTS, GENERATIONS = 4, 8  # per step and rank
PER_SEQUENCE = ("grpo", "gspo", "sapo", "dr_grpo", "luspo")  # these average over sequences, not over tokens


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=PROMPT + COMPLETION, bos_token_id=None,
                         eos_token_id=END, pad_token_id=0)  # fmt: skip
    return LlamaForCausalLM(config)


def main(accumulation: int = 4, steps: int = 20, loss_type: str = "dapo", optimizer=torch.optim.Adam,
         learning_rate: float = 5e-3):  # fmt: skip
    """(the trained model, the mean reward of each step)."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulation)
    torch.manual_seed(0)  # the same weights on every rank
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, optimizer(model.parameters(), learning_rate))
    torch.manual_seed(accelerator.process_index)
    seen = []
    for step in range(steps):
        prompts = torch.randint(VOCABULARY, (PROMPTS, PROMPT)).repeat_interleave(GENERATIONS, 0).to(accelerator.device)
        with torch.no_grad():
            sequences = accelerator.unwrap_model(model).generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=COMPLETION
            )
        ids = sequences[:, PROMPT:]  # (B, T)
        ended = (ids == END).cumsum(1)
        mask = (ended == 0) | ((ended == 1) & (ids == END))  # up to the end, and with it
        rewards = ((ids % 2 == 0) & mask).sum(1) / mask.sum(1)  # the share of even tokens
        advantages = group_advantages(rewards, GENERATIONS)  # of whole groups: a micro-batch may cut one

        # What spans the batch is counted before it is cut.
        tokens = accelerator.gather(mask.sum()).sum()
        sums = []
        for part in torch.arange(len(ids), device=ids.device).tensor_split(accumulation):
            share = len(part) / len(ids) / accelerator.num_processes if loss_type in PER_SEQUENCE else 1.0
            with accelerator.accumulate(model):
                logits = model(sequences[part]).logits[:, PROMPT - 1 :]  # (b, T+1, V), a view
                out = fused_grpo_loss(
                    logits, ids[part], advantages[part], completion_mask=mask[part], loss_type=loss_type,
                    max_completion_length=COMPLETION, num_items_in_batch=tokens,
                    loss_scale=share * accumulation * accelerator.num_processes, return_entropy=True, inplace=True,
                )  # fmt: skip
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
            sums.append(out.sums)
        seen.append(accelerator.gather(rewards).mean().item())
        if step % 5 == 0 or step == steps - 1:
            entropy = combine(sums)["entropy"]  # of all micro-batches, each token counted once
            accelerator.print(f"step {step:3d}  reward {seen[-1]:.2f}  entropy {entropy:.2f}  tokens {tokens}")
    return accelerator.unwrap_model(model), seen


if __name__ == "__main__":
    main()
