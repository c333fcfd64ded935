"""The loss, the sums and the metrics of a batch, from what is known of its tokens; on torch tensors, sums in fp64."""

import torch
from torch import Tensor

from grpo_kernels.cpu_backend.tokens import expand, per_sequence
from grpo_kernels.objective.advantages import group_moments, is_known, moments
from grpo_kernels.objective.corrections import CORRECTIONS, mismatch, outside
from grpo_kernels.objective.inputs import Coefs, Inputs
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.metrics import SUM_NAMES, metrics_of
from grpo_kernels.objective.plan import Plan

_GAP, _DRAWN = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"


def totals_of(
    rows: dict[str, Tensor], once: dict[str, Tensor], live: Tensor | None, inputs: Inputs, coefs: Coefs, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], sums [S], metrics [M]).

    Args:
        rows: what is summed over the tokens, by its name in SUM_NAMES; broadcasts to (B, T).
        once: what is summed over the sequences, (B,) each.
        live: (B, T) bool, the tokens that count; None: all.
    """
    shape = inputs.ids.shape
    table = torch.stack([x if x.shape == shape else x.expand(shape) for x in rows.values()])
    if live is not None:
        table = torch.where(live, table, 0.0)
    sums = dict(zip(rows, per_sequence(table, inputs).unbind()))  # (B,) each
    sums = {"clip_ratio/count": sums["tokens"], **sums, **once, **_reward_sums(inputs, coefs, plan)}
    values = dict.fromkeys(SUM_NAMES, 0.0) | dict(zip(sums, torch.stack([*sums.values()]).sum(-1).tolist()))
    values["sequences"] = float(inputs.sequences)

    nothing = torch.zeros_like(sums["tokens"])
    low, high = (sums.get(f"clip_ratio/{name}", nothing) / sums["clip_ratio/count"] for name in ("low", "high"))
    values["clip_ratio/low_min"], values["clip_ratio/high_max"] = _ends(low)[0], _ends(high)[1]
    values["ratio/min"], values["ratio/max"] = _ends(rows["ratio"], live)
    if inputs.sampling is not None:
        values[f"{_GAP}/max"] = max(0.0, _ends(rows[_GAP], live)[1])
        drawn = (once[_DRAWN], once[f"{_DRAWN}/count"]) if _DRAWN in once else (rows[_DRAWN], live)
        values[f"{_DRAWN}/min"], values[f"{_DRAWN}/max"] = _ends(*drawn)
    row = torch.tensor([values[name] for name in SUM_NAMES], dtype=torch.float64, device=table.device)
    return row[0].float(), row, metrics_of(row)


def _ends(x: Tensor, counts: Tensor | None = None) -> tuple[float, float]:
    """The least and the largest entry of those that count (None: all) and are not NaN; (inf, −inf) without any."""
    x = x[x == x if counts is None else (x == x) & counts]
    return tuple(end.item() for end in x.aminmax()) if x.numel() else (torch.inf, -torch.inf)


def mismatch_rows(inputs: Inputs, coefs: Coefs, plan: Plan, logps: Tensor) -> dict[str, Tensor]:
    """Of tokens: how far the sampler's log-probabilities are from the trainer's, and the weights that follow."""
    if inputs.sampling is None:
        return {}
    d, sampled = _mismatch(inputs, logps), inputs.sampling == inputs.sampling
    rows = {_GAP: torch.where(sampled, d.abs(), 0.0), f"{_GAP}/count": sampled}
    correction, ratio = CORRECTIONS[plan.correction] if plan.correction else None, d.exp()
    if correction is None:
        return rows | _weights(ratio, torch.ones_like(d), torch.zeros_like(d), ratio)
    if correction.per_sequence:
        return rows
    weight = expand(inputs.is_weight.float(), inputs)
    beyond = on_torch(outside)(ratio, coefs.correction_low, coefs.correction_high)
    return rows | _weights(weight, torch.ones_like(d), weight == 0.0 if correction.gated else beyond, weight)


def mismatch_of_sequences(
    inputs: Inputs, coefs: Coefs, plan: Plan, logps: Tensor, live: Tensor | None
) -> dict[str, Tensor]:
    """Of sequences: their weights, where a correction gives them one each. Those without tokens count, too."""
    if inputs.sampling is None or not (plan.correction and CORRECTIONS[plan.correction].per_sequence):
        return {}
    d = _mismatch(inputs, logps)
    ratio = per_sequence(d if inputs.mask is None else torch.where(inputs.mask != 0, d, 0.0), inputs).float().exp()
    size = per_sequence(torch.ones_like(d) if live is None else live, inputs)
    counts = size > 0.0 if plan.skip else torch.ones_like(size, dtype=torch.bool)  # not those that were left unread
    weight = torch.where(counts, inputs.is_weight.double()[:, 0], 0.0)
    beyond = on_torch(outside)(ratio, coefs.correction_low, coefs.correction_high)
    return _weights(weight, counts, counts & beyond, weight * size)


def _mismatch(inputs: Inputs, logps: Tensor) -> Tensor:
    return on_torch(mismatch)(logps if inputs.old is None else inputs.old.float(), inputs.sampling.float())


def _weights(weight: Tensor, counts: Tensor, corrected: Tensor, of_tokens: Tensor) -> dict[str, Tensor]:
    return {_DRAWN: weight, f"{_DRAWN}/count": counts, "sampling/corrected": corrected, "sampling/weight": of_tokens}


def _reward_sums(inputs: Inputs, coefs: Coefs, plan: Plan) -> dict[str, Tensor]:
    """Of sequences: R and R², whether R is finite, and whether its group has no spread."""
    if inputs.rewards is None or not inputs.sequences:
        return {}
    rewards = inputs.rewards.float()
    spread = inputs.batch_std
    if plan.scale_rewards != "batch":
        spread = group_moments(rewards, int(coefs.num_generations), inputs.groups, plan.unbiased)[1]
    elif spread is None:
        spread = batch_std(rewards, plan.unbiased)
    known = on_torch(is_known)(rewards)
    R = torch.where(known, rewards, 0.0).double()
    return {"reward": R, "reward_squared": R.square(), "rewards": known, "reward_not_finite": ~known,
            "zero_std": (spread == 0.0).expand_as(known)}  # fmt: skip


def batch_std(rewards: Tensor, unbiased: bool) -> Tensor:
    """The spread of all rewards of a batch [], see `objective.advantages.moments`."""
    return moments(rewards.float().view(1, -1), unbiased)[1].view(())
