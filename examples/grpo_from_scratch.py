"""GRPO from scratch: one file, torch alone.

    python examples/grpo_from_scratch.py       # about a minute of one CPU core

A small transformer learns to add two-digit numbers. First it sees sums with their answers, until it is right four
times in ten. From then on nobody shows it an answer: it guesses, and is told which guesses were right. That is GRPO,
Group Relative Policy Optimization (DeepSeekMath, arXiv:2402.03300). Read from top to bottom. Shapes stand beside
tensors: B completions, T tokens of a completion, P tokens of a prompt, V tokens in the vocabulary.

What is left out, and why:

- Padding, and prompts of several lengths: every prompt here has six characters.
- A learned reward, and a network that predicts it (PPO): a program checks the answer, and the group is the baseline.
- Corrections for a sampler with log-probabilities of its own: the same weights sample and learn here.
- A key-value cache, micro-batches, several devices, half precision: they change the code, not the algorithm.
- The rest of the family (DAPO, Dr. GRPO, GSPO, CISPO, ...): the package `grpo_kernels` has it.
"""

# %%
import copy
import importlib.util
import random
import time
from pathlib import Path

import torch
from torch import Tensor, nn

# %% [markdown]
# ## The task
#
# A prompt is `37+48=`, its answer `58.`: the sum 85 with its last digit first, and a full stop as the end. Last digit
# first is the order in which one adds on paper; so written, the sum is learned several times as fast
# (arXiv:2307.03381). The first 500 problems, which are 250 pairs in both orders, are held out: the model is measured on
# them, and never learns from them.

# %%
ALPHABET = "0123456789+=."
END, V = ALPHABET.index("."), len(ALPHABET)
P, T = 6, 4  # tokens of "37+48=", and of the longest answer, "891."
HELD_OUT = 500
G, EPSILON, BETA = 8, 0.2, 0.04  # completions of a prompt; how far the ratio may move; the weight of the KL


def encode(texts: list[str], length: int) -> Tensor:
    """Texts → token ids (B, length), filled with the end."""
    return torch.tensor([[ALPHABET.index(c) for c in text.ljust(length, ".")] for text in texts])


PAIRS = [(a, b) for a in range(10, 100) for b in range(a, 100)]
random.Random(0).shuffle(PAIRS)
PROMPTS = encode([f"{a}+{b}=" for c, d in PAIRS for a, b in ((c, d), (d, c))], P)  # (8190, P)
ANSWERS = encode([str(c + d)[::-1] for c, d in PAIRS for _ in range(2)], T)  # (8190, T)


def mask_of(ids: Tensor) -> Tensor:
    """(B, T): 1 for the tokens up to the first end, that one included, and 0 behind it."""
    is_end = (ids == END).float()
    return (is_end.cumsum(1) - is_end == 0).float()


def reward(ids: Tensor, answers: Tensor) -> Tensor:
    """(B,): 1 for a completion that is the answer, up to its end, and 0 for any other."""
    return (((ids == answers) | (mask_of(ids) == 0)).all(1) & (ids == END).any(1)).float()

# %% [markdown]
# ## The model, and how it samples
#
# A transformer of two layers with 69,000 weights. At each position it gives every token that may come next a score, the
# logit; softmax makes probabilities of them. A sample draws one token after the other by its probability. For a
# measurement the likeliest is taken.

# %%
class Policy(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2, heads: int = 8):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True,
                                           norm_first=True)  # fmt: skip
        self.token, self.position = nn.Embedding(V, width), nn.Embedding(P + T, width)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, V)

    def forward(self, ids: Tensor) -> Tensor:  # (B, L) → logits (B, L, V)
        L = ids.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(L)  # (L, L): a token sees those before it
        return self.head(self.blocks(self.token(ids) + self.position.weight[:L], causal, is_causal=True))


def completion_logits(policy: Policy, prompts: Tensor, ids: Tensor) -> Tensor:
    """(B, T, V): row t scores token t of the completion, from all that stands before it."""
    return policy(torch.cat([prompts, ids[:, :-1]], 1))[:, P - 1 :]


@torch.no_grad()
def sample(policy: Policy, prompts: Tensor, greedy: bool = False) -> Tensor:
    """Completions (B, T) of prompts (B, P)."""
    ids = prompts
    for _ in range(T):
        p = policy(ids)[:, -1].softmax(-1)  # (B, V)
        ids = torch.cat([ids, p.argmax(-1, keepdim=True) if greedy else p.multinomial(1)], 1)
    return ids[:, P:]


def accuracy(policy: Policy) -> float:
    """The share of the held-out problems that the model solves."""
    return reward(sample(policy, PROMPTS[:HELD_OUT], greedy=True), ANSWERS[:HELD_OUT]).mean().item()

# %% [markdown]
# ## The group's advantage
#
# How good is a reward? GRPO samples G completions of the same prompt, and compares them (arXiv:2402.03300, §4.1.2):
#
#     A = (R − mean) / (std + 10⁻⁴)        mean and standard deviation of the group
#
# Where all G rewards are the same, every A is 0, and the group teaches nothing.

# %%
def group_advantages(rewards: Tensor) -> Tensor:
    """(B,) → (B,); rows [k·G, (k+1)·G) are the completions of one prompt."""
    R = rewards.view(-1, G)  # (prompts, G)
    return ((R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4)).flatten()

# %% [markdown]
# ## The loss
#
#     ρ    = exp(lp − old)                          how much likelier the token is than when it was sampled
#     ℓ    = −min(ρ·A, clip(ρ, 1−ε, 1+ε)·A)         nothing is gained beyond ε (PPO, arXiv:1707.06347)
#     kl   = eᵘ − u − 1,  u = ref − lp              k3, never negative (arXiv:2402.03300, eq. 4)
#     loss = 1/B · Σᵢ 1/|yᵢ| · Σₜ (ℓ + β·kl)        over the tokens of a completion, then over completions
#
# lp is the log-probability of the sampled token under the model that learns, old under the model that sampled, ref
# under the model that GRPO started from, which it should not forget. The value of the loss says little: the
# advantages of a group add up to 0. Its gradient is what teaches.

# %%
def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """lp = x[id] − log Σ eˣ: logits (B, T, V), ids (B, T) → (B, T)."""
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def grpo_loss(logits: Tensor, ids: Tensor, A: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """logits (B, T, V); ids, old, ref, mask (B, T); A (B,) → loss, share of clipped tokens, mean KL: a number each."""
    lp, A = token_logps(logits, ids), A[:, None]  # (B, T), (B, 1): every token has its completion's advantage
    ρ = (lp - old).exp()
    free, bounded = ρ * A, ρ.clamp(1 - EPSILON, 1 + EPSILON) * A  # (B, T)
    u = ref - lp
    kl = u.exp() - u - 1  # (B, T)
    each = -torch.min(free, bounded) + BETA * kl
    loss = ((each * mask).sum(1) / mask.sum(1)).mean()
    return loss, *(((x * mask).sum() / mask.sum()).detach() for x in (bounded < free, kl))

# %% [markdown]
# ## Training: a warm-up with answers, then GRPO without
#
# GRPO makes likelier what was sampled and right. A model that is never right learns nothing from it. So some steps of
# ordinary training come first, on problems with their answers. A step of GRPO draws prompts, samples G completions of
# each, rewards them and compares them in their groups. Then it makes two updates on them. In the first every ρ is 1. In
# the second it is not, and the clip matters.

# %%
def warm_up(policy: Policy, aim: float = 0.4, most: int = 1000) -> None:
    optimizer = torch.optim.AdamW(policy.parameters(), 2e-3, weight_decay=0.0)
    for step in range(1, most + 1):
        rows = torch.randint(HELD_OUT, len(PROMPTS), (256,))
        ids = ANSWERS[rows]  # (256, T)
        loss = -(token_logps(completion_logits(policy, PROMPTS[rows], ids), ids) * mask_of(ids)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0 and accuracy(policy) >= aim:
            break
    print(f"warm-up: {step} steps with answers, held-out accuracy {accuracy(policy):.3f}")


def train(policy: Policy, steps: int = 150, prompts: int = 64, lr: float = 1.5e-3) -> tuple[list, tuple]:
    """Trains in place; returns [(step, held-out accuracy)], and what the loss was given last."""
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr, weight_decay=0.0)
    curve = [(0, accuracy(policy))]
    print("step  reward     loss  |gradient|  clipped      KL  held-out accuracy")
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)  # falls to 0 in a straight line
        rows = torch.randint(HELD_OUT, len(PROMPTS), (prompts,)).repeat_interleave(G)  # (B,), B = prompts·G
        x = PROMPTS[rows]  # (B, P)
        ids = sample(policy, x)  # (B, T)
        mask, R = mask_of(ids), reward(ids, ANSWERS[rows])  # (B, T), (B,)
        with torch.no_grad():
            old, ref = (token_logps(completion_logits(m, x, ids), ids) for m in (policy, reference))  # (B, T) each
        for _ in range(2):
            logits = completion_logits(policy, x, ids)  # (B, T, V)
            loss, clipped, kl = grpo_loss(logits, ids, group_advantages(R), old, ref, mask)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        if step % 10 == 0 or step == steps:
            curve.append((step, accuracy(policy)))
            numbers = f"{R.mean():6.3f} {loss:8.4f}  {norm:10.3f}  {clipped:7.3f}  {kl:6.4f}  {curve[-1][1]:17.3f}"
            print(f"{step:4d}  {numbers}", flush=True)
    return curve, (logits.detach(), ids, R, old, ref, mask)

# %% [markdown]
# ## The curve, and the same loss from the package
#
# `fused_grpo_loss` is given what the loss above was given last. It has to come to the same loss, and to the same
# gradient for every logit.

# %%
def plot(curve: list[tuple[int, float]], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        return print("matplotlib is not installed: the plot is skipped.")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(*zip(*curve), marker="o")
    axes.set(xlabel="GRPO step", ylabel="held-out accuracy", ylim=(0, 1), title="Two-digit addition")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def compare(logits: Tensor, ids: Tensor, R: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> tuple | None:
    if importlib.util.find_spec("grpo_kernels") is None:
        return print("grpo_kernels is not installed: the comparison with fused_grpo_loss is skipped.")
    from grpo_kernels import fused_grpo_loss

    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()  # (B, T, V)
    loss = grpo_loss(ours, ids, group_advantages(R), old, ref, mask)[0]
    out = fused_grpo_loss(theirs, ids, rewards=R, num_generations=G, old_logps=old, ref_logps=ref,
                          completion_mask=mask, loss_type="grpo", epsilon=EPSILON, beta=BETA)  # fmt: skip
    (loss + out.loss).backward()
    print("                 above  fused_grpo_loss  largest gap")
    for name, a, b in (("loss", loss, out.loss), ("|gradient|", ours.grad, theirs.grad)):
        print(f"{name:<10}  {a.norm():10.8f}  {b.norm():15.8f}  {(a - b).abs().max():11.0e}")
    return loss, ours.grad, out.loss, theirs.grad


def main(out: str = "output") -> list[tuple[int, float]]:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a model is no faster on more
    start, policy = time.process_time(), Policy()
    warm_up(policy)
    curve, last = train(policy)
    print(f"GRPO: from {curve[0][1]:.3f} to {curve[-1][1]:.3f}; {time.process_time() - start:.0f} CPU seconds in all")
    plot(curve, Path(out) / "grpo_from_scratch.png")
    compare(*last)
    return curve


if __name__ == "__main__":
    main()
