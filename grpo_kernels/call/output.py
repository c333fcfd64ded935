"""What a loss function returns."""

from typing import NamedTuple

import torch

from grpo_kernels.call.checks import Layout
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.catalogue import TERMS
from grpo_kernels.objective.metrics import named, names_of
from grpo_kernels.objective.plan import Plan


class LossOutput(NamedTuple):
    """What a loss function returns; everything but the loss is detached and stays on the device."""

    loss: torch.Tensor  # () fp32, or (B, T), packed (N,), with reduction="none"
    logps: torch.Tensor | None  # (B, T) or (N,) fp32, 0 where masked; None of a distillation
    entropy: torch.Tensor | None  # likewise
    metrics: dict[str, torch.Tensor]  # 0-d fp32
    sums: dict[str, torch.Tensor]  # 0-d fp64, see grpo_kernels.objective.metrics.combine


def output(
    batch: Batch, plan: Plan, layout: Layout, *, loss: torch.Tensor, logps: torch.Tensor,
    entropy: torch.Tensor | None, has_entropy: bool, sums: torch.Tensor, metrics: torch.Tensor,
) -> LossOutput:  # fmt: skip
    """Puts names to metrics and sums; ``has_entropy``: entropies exist, whether or not they are returned."""
    metric_names, sum_names = names_of(
        beta=bool(plan.kl), entropy=has_entropy or plan.needs_entropy, rewards=batch.rewards is not None,
        reports=TERMS[plan.term].reports, dual=plan.capped, sampling=batch.sampling is not None,
        corrected=bool(plan.correction), suffix=plan.suffix is not None,
    )  # fmt: skip
    return LossOutput(layout.restore(loss), logps, entropy, named(metrics, metric_names), named(sums, sum_names))
