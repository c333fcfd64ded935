"""A GRPO loop written by hand: sample, reward, old log-probabilities, a few updates with the fused loss.

    python examples/plain_loop.py

The model is a tiny Llama with random weights, so that nothing is downloaded. It is rewarded for even tokens, and
learns to sample nothing else. For a model of yours, change `tiny_llama`, the prompts and `reward`.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kernels import fused_grpo_loss, token_logprobs

VOCABULARY, PROMPT, COMPLETION = 32, 4, 8  # tokens
PROMPTS, GENERATIONS = 4, 8  # per step


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=PROMPT + COMPLETION, bos_token_id=None,
                         eos_token_id=None, pad_token_id=0)  # fmt: skip
    return LlamaForCausalLM(config)


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: torch.Tensor) -> torch.Tensor:
    """Prompts (B, P) with completions (B, P + T) at temperature 1."""
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                          max_new_tokens=COMPLETION, min_new_tokens=COMPLETION)  # fmt: skip


def reward(completions: torch.Tensor) -> torch.Tensor:
    """(B,): the share of even tokens."""
    return (completions % 2 == 0).float().mean(1)


def main(steps: int = 20, updates: int = 2, learning_rate: float = 5e-3) -> list[float]:
    """Mean reward of each step."""
    torch.manual_seed(0)
    model, rewards_seen = tiny_llama(), []
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    for step in range(steps):
        # Completions of a prompt stand together: rows [k·G, (k+1)·G) are its group.
        prompts = torch.randint(VOCABULARY, (PROMPTS, PROMPT)).repeat_interleave(GENERATIONS, 0)
        sequences = sample(model, prompts)
        ids = sequences[:, PROMPT:]  # (B, T)
        rewards = reward(ids)
        with torch.no_grad():
            old_logps = token_logprobs(model(sequences).logits[:, PROMPT - 1 :], ids).logps
        for _ in range(updates):  # the first one is on-policy; from the second on, the ratio and its clipping matter
            logits = model(sequences).logits[:, PROMPT - 1 :]  # (B, T+1, V), a view: row t predicts ids[:, t]
            out = fused_grpo_loss(logits, ids, rewards=rewards, num_generations=GENERATIONS, old_logps=old_logps,
                                  loss_type="dapo", epsilon_high=0.28, inplace=True)  # fmt: skip
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        rewards_seen.append(rewards.mean().item())
        if step % 5 == 0 or step == steps - 1:
            clipped, drift = out.metrics["clip_ratio/region_mean"], out.metrics["approx_kl"]
            print(f"step {step:3d}  reward {rewards_seen[-1]:.2f}  clipped {clipped:.2f}  KL to old {drift:.4f}")
    return rewards_seen


if __name__ == "__main__":
    main()
