"""Your own objective: any PyTorch expression of what `token_logprobs` returns.

    python examples/own_objective.py

The objective here is REINFORCE with a penalty on the drift from the policy that sampled. The same in TRL's trainer:
"A loss of your own" in docs/integrations.md.
"""

import torch

from grpo_kernels import token_logprobs

logits = torch.randn(4, 16, 1000, requires_grad=True)
ids = torch.randint(0, 1000, (4, 16))
advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
with torch.no_grad():
    old = token_logprobs(logits + 0.1 * torch.randn_like(logits), ids).logps

new = token_logprobs(logits, ids, return_entropy=True)
loss = -(new.logps * advantages[:, None]).mean() + 0.1 * (new.logps - old).square().mean()
loss.backward()
print(f"loss {loss.item():.4f}, entropy {new.entropy.mean().item():.2f} nats, |gradient| {logits.grad.norm():.4f}")
