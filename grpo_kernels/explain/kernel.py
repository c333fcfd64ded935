"""The same numbers through the package's functions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from grpo_kernels import Support, distillation_loss, fused_grpo_loss, group_advantages, token_logprobs
from grpo_kernels.explain import distill_by_hand, support_by_hand
from grpo_kernels.explain.by_hand import ANSWERS, BETA, EPSILON, LOGITS_NOW, STD_EPSILON, TOKENS, Step

TOLERANCE = 1e-5  # fp32, and every number is about 1 or smaller


class Compared(NamedTuple):
    """A quantity by hand and through the package."""

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


def numbers(x: torch.Tensor) -> list[float]:
    return x.detach().flatten().tolist()


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


def support_through_the_kernel(row: support_by_hand.Kept, device: str = "cpu") -> list[Compared]:
    """What `token_logprobs` and `fused_grpo_loss` make of the same logits, answers and kept set."""
    answers = support_by_hand.ANSWERS
    logits = torch.tensor([[support_by_hand.LOGITS_NOW]] * len(answers), device=device, requires_grad=True)  # (B, 1, V)
    before = torch.tensor([[support_by_hand.LOGITS_OLD]] * len(answers), device=device)  # (B, 1, V)
    ids = torch.tensor([[TOKENS.index(answer)] for answer in answers], device=device)  # (B, 1)
    advantages = torch.tensor(support_by_hand.ADVANTAGES, device=device)  # (B,)
    kept = [TOKENS.index(token) for token in row.kept]
    support = Support.from_lists([kept] * len(answers), device=device)
    now = token_logprobs(logits.detach(), ids, support=support, return_entropy=True)
    old = token_logprobs(before, ids, support=support).logps
    arguments = {"old_logps": old, "support": support, "epsilon": EPSILON, "loss_type": "grpo"}
    out = fused_grpo_loss(logits, ids, advantages, **arguments)
    out.loss.backward()
    with torch.no_grad():
        each = fused_grpo_loss(logits, ids, advantages, reduction="none", **arguments)
    mean_ratio = sum(row.ratios) / len(answers)
    return [
        Compared("old log-probabilities", "token_logprobs", row.old_logps, numbers(old)),
        Compared("log-probabilities", "out.logps", row.logps, numbers(out.logps)),
        Compared("entropies", "token_logprobs", [row.entropy] * len(answers), numbers(now.entropy)),
        Compared("mean ratio", "ratio/mean", [mean_ratio], numbers(out.metrics["ratio/mean"])),
        Compared("losses", 'reduction="none"', row.losses, numbers(each.loss)),
        Compared("loss", "out.loss", [row.loss], numbers(out.loss)),
        Compared("gradient", "logits.grad", [x for each in row.gradient for x in each], numbers(logits.grad)),
    ]


def distillation_through_the_kernel(row: distill_by_hand.Pair, device: str = "cpu") -> list[Compared]:
    """What `distillation_loss` makes of the same student and teacher."""
    teacher = torch.tensor([[distill_by_hand.TEACHER]], device=device)  # (B, T, V) = (1, 1, 5)
    compared = []
    for beta, divergence in row.divergences.items():
        logits = torch.tensor([[distill_by_hand.STUDENT]], device=device, requires_grad=True)  # (1, 1, 5)
        out = distillation_loss(logits, teacher, beta=beta)
        out.loss.backward()
        compared += [
            Compared(f"D, β = {beta:g}", "out.loss", [divergence.value], numbers(out.loss)),
            Compared(f"gradient, β = {beta:g}", "logits.grad", divergence.gradient, numbers(logits.grad)),
        ]
    return [
        *compared,
        Compared("entropy, student", "out.entropy", [row.entropy], numbers(out.entropy)),
        Compared("entropy, teacher", "teacher_entropy", [row.teacher_entropy], numbers(out.metrics["teacher_entropy"])),
    ]
