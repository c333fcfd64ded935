"""How far the sampler's log-probabilities are from the trainer's, on torch tensors: the sums behind `sampling/*`."""

import torch

from grpo_kernels.cpu_backend.tokens import expand, per_sequence
from grpo_kernels.objective.corrections import CORRECTIONS, mismatch, outside
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.plan import Plan


def mismatch_sums(
    batch: Batch, plan: Plan, logps: torch.Tensor, live: torch.Tensor | None
) -> dict[str, float]:
    """Sums by name; none without the sampler's log-probabilities. ``live`` (B, T): the rows read; None: all."""
    if batch.sampling is None:
        return {}
    everywhere = torch.ones_like(logps, dtype=torch.bool)
    live = everywhere if live is None else live
    sampled = batch.sampling.float()
    d = on_torch(mismatch)(logps if batch.old is None else batch.old.float(), sampled)
    gap = d[live & (sampled == sampled)].abs()
    correction = CORRECTIONS[plan.correction] if plan.correction else None
    ratio, drawn, counts = d.exp(), d.exp(), live
    if correction is not None and correction.per_sequence:
        there = everywhere if batch.mask is None else batch.mask != 0
        ratio = per_sequence(torch.where(there, d, 0.0), batch).float().exp()
        drawn = batch.is_weight.float()[:, 0]
        sizes = per_sequence(live, batch)
        counts = sizes > 0.0 if plan.skip else torch.ones_like(sizes, dtype=torch.bool)
        trust = (drawn[counts].double() * sizes[counts]).sum().item()
    elif correction is not None:
        drawn = expand(batch.is_weight.float(), batch)
    corrected = 0.0
    if correction is not None:
        beyond = on_torch(outside)(ratio, batch.correction_low, batch.correction_high)
        corrected = float((drawn == 0.0 if correction.gated else beyond)[counts].sum())
    drawn = drawn[counts]
    total = drawn.sum(dtype=torch.float64).item()
    return {
        "sampling/sampling_logp_difference": gap.sum(dtype=torch.float64).item(),
        "sampling/sampling_logp_difference/count": float(gap.numel()),
        "sampling/importance_sampling_ratio": total,
        "sampling/importance_sampling_ratio/count": float(drawn.numel()),
        "sampling/corrected": corrected,
        "sampling/weight": trust if correction is not None and correction.per_sequence else total,
        "sampling/sampling_logp_difference/max": max(gap[gap == gap].tolist(), default=0.0),
        "sampling/importance_sampling_ratio/min": min(drawn[drawn == drawn].tolist(), default=torch.inf),
        "sampling/importance_sampling_ratio/max": max(drawn[drawn == drawn].tolist(), default=-torch.inf),
    }
