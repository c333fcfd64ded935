"""The loss, the sums and the metrics of a batch, from what is known of its tokens; on torch tensors, sums in fp64."""

import torch
from torch import Tensor

from grpo_kernels.objective.advantages import group_moments, is_known
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.corrections import CORRECTIONS, mismatch, outside
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.metrics import SUM_NAMES, metrics_of
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.sequences import expand, per_sequence

Named = dict[str, Tensor]  # by names in SUM_NAMES
REGION = ("clip_ratio/low", "clip_ratio/high", "clip_ratio/dual")
_CLIPS = (*REGION[:2], "clip_ratio/count")
_GAP, _DRAWN = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"


def totals_of(rows: Named, once: Named, live: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], sums [S], metrics [M]).

    Args:
        rows: what is summed over the tokens, broadcasting to (B, T); what is no tensor is nothing.
        once: what is summed over the sequences, (B,) each.
        live: (B, T) bool, the tokens that count; None: all.
    """
    shape, rows = batch.ids.shape, {name: x for name, x in rows.items() if isinstance(x, Tensor)}
    table = torch.stack([x.float() if x.shape == shape else x.float().expand(shape) for x in rows.values()])
    of_sequences = per_sequence(table if live is None else torch.where(live, table, 0.0), batch)  # [rows, B] fp64
    values = dict.fromkeys(SUM_NAMES, 0.0) | dict(zip(rows, of_sequences.sum(-1).tolist()))
    values |= {"clip_ratio/count": values["tokens"], "sequences": float(batch.sequences)}
    if once:
        values |= dict(zip(once, torch.stack([*once.values()]).sum(-1, dtype=torch.float64).tolist()))
    sums = dict(zip(rows, of_sequences.tolist())) | {name: once[name].tolist() for name in _CLIPS if name in once}
    sizes = sums.get("clip_ratio/count", sums["tokens"])
    low, high = ([x / n for x, n in zip(sums.get(name, [0.0] * len(sizes)), sizes) if n] for name in REGION[:2])
    values["clip_ratio/low_min"] = min(low, default=torch.inf)
    values["clip_ratio/high_max"] = max(high, default=-torch.inf)
    values["ratio/min"], values["ratio/max"] = _ends(rows["ratio"], live)
    if batch.sampling is not None:
        values[f"{_GAP}/max"] = max(0.0, _ends(rows[_GAP], live)[1])
        drawn = (once[_DRAWN], once[f"{_DRAWN}/count"]) if _DRAWN in once else (rows[_DRAWN], live)
        values[f"{_DRAWN}/min"], values[f"{_DRAWN}/max"] = _ends(*drawn)
    row = torch.tensor([values[name] for name in SUM_NAMES], dtype=torch.float64, device=table.device)
    return torch.tensor(values["loss"], dtype=torch.float32, device=row.device), row, metrics_of(row)


def _ends(x: Tensor, counts: Tensor | None = None) -> tuple[float, float]:
    """The least and the largest entry of those that count (None: all) and are not NaN; (inf, −inf) without any."""
    x = x if counts is None else x[counts]
    least, most = (end.tolist() for end in x.aminmax()) if x.numel() else (torch.inf, -torch.inf)
    return (least, most) if least == least else _ends(x, x == x)


def mismatch_sums(batch: Batch, plan: Plan, logps: Tensor, live: Tensor | None) -> tuple[Named, Named]:
    """What the sampler's log-probabilities are for, as ``rows`` and ``once`` of `totals_of`.

    A correction may give each sequence a weight; those without tokens count, too, but not those left unread.
    """
    if batch.sampling is None:
        return {}, {}
    d = on_torch(mismatch)(logps if batch.old is None else batch.old.float(), batch.sampling.float())
    heard = batch.sampling == batch.sampling
    rows = {_GAP: torch.where(heard, d.abs(), 0.0), f"{_GAP}/count": heard}
    correction = CORRECTIONS[plan.correction] if plan.correction else None
    once, size = correction is not None and correction.per_sequence, torch.ones_like(d)
    if once:
        size = per_sequence(size if live is None else live, batch)
        d = per_sequence(d if batch.mask is None else torch.where(batch.mask != 0, d, 0.0), batch).float()
    ratio, counts = d.exp(), size > 0.0 if plan.skip and once else torch.ones_like(d, dtype=torch.bool)
    weight, corrected = ratio, torch.zeros_like(counts)
    if correction is not None:
        weight = batch.is_weight.float()[:, 0] if once else expand(batch.is_weight.float(), batch)
        beyond = on_torch(outside)(ratio, batch.correction_low, batch.correction_high)
        corrected = (weight == 0.0 if correction.gated else beyond) & counts
    weight = torch.where(counts, weight, 0.0)
    weights = {_DRAWN: weight, f"{_DRAWN}/count": counts, "sampling/corrected": corrected,
               "sampling/weight": weight * size}  # fmt: skip
    return (rows, weights) if once else (rows | weights, {})


def reward_sums(batch: Batch, plan: Plan) -> Named:
    """Of sequences: R and R², whether R is finite, and whether its group has no spread."""
    if batch.rewards is None or not batch.sequences:
        return {}
    rewards, spread = batch.rewards.float(), batch.batch_std
    if plan.scale_rewards != "batch":
        spread = group_moments(rewards, int(batch.num_generations), batch.groups, plan.unbiased)[1]
    known = on_torch(is_known)(rewards)
    R = torch.where(known, rewards, 0.0).double()
    return {"reward": R, "reward_squared": R.square(), "rewards": known, "reward_not_finite": ~known,
            "zero_std": (spread == 0.0).expand_as(known)}  # fmt: skip
