"""The same numbers through `fused_grpo_loss`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from grpo_kernels import fused_grpo_loss, group_advantages
from grpo_kernels.explain.by_hand import ANSWERS, BETA, EPSILON, LOGITS_NOW, STD_EPSILON, TOKENS, Step

TOLERANCE = 1e-5  # fp32, and every number is about 1 or smaller


class Compared(NamedTuple):
    """A quantity by hand and through `fused_grpo_loss`."""

    name: str
    call: str  # where the second comes from: a function, an output, or the name of a metric
    hand: list[float]
    fused: list[float]

    @property
    def difference(self) -> float:
        """The largest; NaN counts as infinite."""
        gaps = [abs(a - b) for a, b in zip(self.hand, self.fused, strict=True)]
        return max(math.inf if math.isnan(gap) else gap for gap in gaps)

    @property
    def equal(self) -> bool:
        return self.difference <= TOLERANCE


def through_the_kernel(step: Step, device: str = "cpu") -> list[Compared]:
    """What `fused_grpo_loss` makes of the same logits, answers and rewards."""
    count = len(ANSWERS)

    def column(values: Sequence[float]) -> torch.Tensor:  # (B, 1): every answer is one token long
        return torch.tensor(values, device=device)[:, None]

    logits = torch.tensor([[LOGITS_NOW]] * count, device=device, requires_grad=True)  # (B, T, V) = (8, 1, 5)
    ids = torch.tensor([[TOKENS.index(answer)] for answer in ANSWERS], device=device)  # (B, T)
    rewards = torch.tensor(step.rewards, device=device)  # (B,)
    arguments = {
        "rewards": rewards,
        "num_generations": count,
        "old_logps": column(step.old_logps),
        "ref_logps": column(step.ref_logps),
        "loss_type": "grpo",
        "epsilon": EPSILON,
        "beta": BETA,
        "advantage_eps": STD_EPSILON,
    }
    out = fused_grpo_loss(logits, ids, **arguments)
    out.loss.backward()
    with torch.no_grad():
        each = fused_grpo_loss(logits, ids, reduction="none", **arguments)

    def numbers(x: torch.Tensor) -> list[float]:
        return x.detach().flatten().tolist()

    advantages = group_advantages(rewards, count, eps=STD_EPSILON)
    metrics = out.metrics
    return [
        Compared("advantages", "group_advantages", step.advantages, numbers(advantages)),
        Compared("log-probabilities", "out.logps", step.logps, numbers(out.logps)),
        Compared("mean ratio", "ratio/mean", [sum(step.ratios) / count], numbers(metrics["ratio/mean"])),
        Compared("share clipped", "clip_ratio/region_mean",
                 [sum(step.is_clipped) / count], numbers(metrics["clip_ratio/region_mean"])),
        Compared("mean KL", "kl", [sum(step.kl) / count], numbers(metrics["kl"])),
        Compared("losses", 'reduction="none"', step.losses, numbers(each.loss)),
        Compared("loss", "out.loss", [step.loss], numbers(out.loss)),
        Compared("gradient", "logits.grad", [x for row in step.gradient for x in row], numbers(logits.grad)),
    ]  # fmt: skip
