"""What a call costs the host: loss and gradient of a batch so small that nothing else takes time.

    python -m benchmarks.host_report [--calls N]

Processor time per call, the least of several rounds in which everyone takes a turn, and operations of
torch's own per call. Three ways to write the loss by hand stand for eager PyTorch: the loss alone,
the loss with the clip metrics that trainers log, and `reference/`, which returns what
`fused_grpo_loss` returns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from benchmarks.counting import bare_ops
from benchmarks.environment import describe
from grpo_kernels import fused_grpo_loss

B, T, V = 2, 4, 16
ROUNDS = 25
EPSILON = 0.2


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "completion_ids": torch.randint(V, (B, T), generator=g),
        "advantages": torch.randn(B, generator=g),
        "old_logps": torch.randn(B, T, generator=g) * 0.1 - 2.0,
        "completion_mask": torch.ones(B, T),
    }


def by_hand(x, completion_ids, advantages, old_logps, completion_mask, metrics: bool = False) -> torch.Tensor:
    lp = torch.log_softmax(x.float(), -1).gather(-1, completion_ids[..., None])[..., 0]
    ratio, A, mask = torch.exp(lp - old_logps), advantages[:, None], completion_mask != 0
    per_token = -torch.minimum(ratio * A, ratio.clamp(1 - EPSILON, 1 + EPSILON) * A)
    if metrics:
        with torch.no_grad():
            tokens = mask.sum().clamp(min=1)
            low, high = (ratio < 1 - EPSILON) & (A < 0), (ratio > 1 + EPSILON) & (A > 0)
            {name: torch.where(mask, part.float(), 0.0).sum() / tokens for name, part in
             {"low": low, "high": high, "region": low | high, "ratio": ratio}.items()}  # fmt: skip
    return (torch.where(mask, per_token, 0.0).sum(1) / mask.sum(1).clamp(min=1)).mean()


def ways() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name -> the loss of logits."""
    inputs = batch()
    return {
        "eager, the loss alone": lambda x: by_hand(x, **inputs),
        "eager, with clip metrics": lambda x: by_hand(x, **inputs, metrics=True),
        "reference/, all outputs": lambda x: reference.grpo_loss(x, **inputs).loss,
        "grpo_kernels, all outputs": lambda x: fused_grpo_loss(x, **inputs, backend="torch").loss,
    }


def step(loss: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> None:
    loss(logits.detach().requires_grad_()).backward()


class Operations(TorchDispatchMode):
    """Counts operations, those inside the custom ops included where they run as plain functions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(loss: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> int:
    with bare_ops(), Operations() as seen:
        step(loss, logits)
    return seen.count


def microseconds(losses: dict[str, Callable], logits: torch.Tensor, calls: int) -> dict[str, float]:
    best = dict.fromkeys(losses, float("inf"))
    for _ in range(ROUNDS):
        for name, loss in losses.items():
            start = time.process_time()
            for _ in range(calls):
                step(loss, logits)
            best[name] = min(best[name], (time.process_time() - start) / calls * 1e6)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100, help="calls per round (default: 100)")
    calls = parser.parse_args().calls
    torch.set_num_threads(1)
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(1))
    losses = ways()
    for loss in losses.values():
        step(loss, logits)  # what is imported or cached at the first call
    about = describe(torch.device("cpu"))
    print(f"{about['cpu']}, torch {about['torch']}, one thread, {about['date'][:10]}, logits {B}x{T}x{V}")
    times = microseconds(losses, logits, calls)
    for name, loss in losses.items():
        print(f"{name:26} {times[name]:6.0f} us {operations(loss, logits):5d} operations")


if __name__ == "__main__":
    main()
