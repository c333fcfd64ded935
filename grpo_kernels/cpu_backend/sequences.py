"""The [B, T] maths of a whole batch on torch tensors, where the log-probabilities are known already."""

import torch

from grpo_kernels.cpu_backend.mismatch import mismatch_sums
from grpo_kernels.cpu_backend.tokens import Sums, Tokens, advantages, expand, judge, per_sequence, total_slope
from grpo_kernels.objective.catalogue import LEVELS, TERMS
from grpo_kernels.objective.corrections import Correction, mismatch, outside, within
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.token import drift_of, keeps_sequence, log_ratio


def objective(
    logps: torch.Tensor, entropies: torch.Tensor | None, batch: Batch, plan: Plan, weighted: bool
) -> tuple[torch.Tensor, ...]:
    """The [B, T] maths: (loss [], sums [S], metrics [M], ℓ, local, spread, share, h).

    ``local`` is ∂L/∂lp of a token itself. Where a ratio belongs to the whole sequence, ``spread`` is
    ∂L/∂r and ``share`` what each token moves it by, for `join`; else both are empty. So is ℓ where the loss is
    weighted, and ``h`` without a bonus.
    """
    live, _ = rows_to_read(batch, plan)
    tokens = Tokens(batch, plan)
    own, how = TERMS[plan.term].statistic, LEVELS[plan.level].how

    def counted(x: torch.Tensor) -> torch.Tensor:
        """0 at the positions that do not count, where anything may stand."""
        return x if live is None else torch.where(live, x, 0.0)

    def of_sequences(x: torch.Tensor) -> torch.Tensor:
        return per_sequence(counted(x), batch)[:, None]

    r_seq = statistic = step = inverse = own_slope = None
    lp, A, old = logps, tokens.at("adv", None), tokens.at("old", None)
    if plan.of_sequence:
        r_token = on_torch(log_ratio)(lp, lp if old is None else old)
        inverse = 1.0 / of_sequences(torch.ones_like(lp)).clamp(min=1.0)  # (B, 1)
    if how:
        step = inverse if how == "mean" else torch.ones_like(inverse)
        r_seq = (of_sequences(r_token) * step).float()
    if own is not None:
        x, own_slope = on_torch(own.function)(r_token, A, tokens.c)
        if batch.is_weight is not None and not plan.weight_once:
            x = x + on_torch(own.correction)(tokens.at("trust", None))
        statistic = of_sequences(x) * (inverse if own.how == "mean" else 1.0)
        if batch.is_weight is not None and plan.weight_once:
            statistic = statistic + on_torch(own.correction)(batch.is_weight.float())
        statistic = statistic.float()

    trust, chosen = tokens.at("trust", None) if own is None else None, live
    if plan.off_policy:
        sampled = batch.sampling.float() if batch.sampling is not None else lp if old is None else old
        drift = (of_sequences(on_torch(drift_of)(lp, sampled)) * inverse).float()
        keep = on_torch(keeps_sequence)(expand(drift, batch), A, batch.drift)
        trust = torch.where(keep != 0.0, 1.0 if trust is None else trust, 0.0)
    if batch.threshold is not None:
        chosen = batch.threshold <= entropies
        chosen = chosen if live is None else chosen & live
        trust = torch.where(chosen, 1.0 if trust is None else trust, 0.0)

    level = None if r_seq is None else expand(r_seq, batch)
    said = judge(tokens, None, lp, trust, level, None if statistic is None else expand(statistic, batch))
    sums = Sums(tokens)
    sums.add(None, live, said, entropies, chosen)
    w = tokens.at("w", None) if weighted else 1.0

    def slope(*parts: torch.Tensor | float) -> torch.Tensor:
        d = total_slope(*parts)
        return counted((w * d).expand(lp.shape)).contiguous() if isinstance(d, torch.Tensor) else torch.zeros_like(lp)

    spread, share = lp.new_empty(0), lp.new_empty(0)
    if plan.spread == "level":
        local, spread = slope(said.d_term, said.d_lp), slope(said.d_ratio)
        share = counted(expand(step.float(), batch)).contiguous()
    elif plan.spread == "term":
        local, spread = slope(said.d_ratio, said.d_lp), slope(said.d_term)
        share = counted(own_slope * expand(inverse.float(), batch)).contiguous()
    else:
        local = slope(said.d_term, said.d_ratio, said.d_lp)
    h = lp.new_empty(0)
    if plan.bonus:
        h = torch.zeros_like(lp) - tokens.at("bonus", None)
        h = h if chosen is None else torch.where(chosen, h, 0.0)
    totals = sums.finish(live, mismatch_sums(batch, plan, logps, live), r_seq, statistic)
    losses = lp.new_empty(0) if weighted else counted(said.loss).contiguous()
    return *totals, losses, local, spread, share, h


def join(local, spread, share, up, cu) -> torch.Tensor:
    """g = up·local + share·Σ up·spread, the sum over each sequence."""
    batch = Batch(ids=local, cu=cu)
    if cu is not None:
        batch = batch._replace(segments=segments(None, cu, local.shape[1])[0])
    if up is not None:
        up = up.float()
        spread, local = (torch.where(x == 0.0, 0.0, x * up) for x in (spread, local))
    common = expand(per_sequence(spread, batch)[:, None].float(), batch)
    return local + torch.where(share == 0.0, 0.0, share * common)


def correct(old, batch: Batch, correction: Correction) -> torch.Tensor:
    """Importance weights, (B, T) or (B, 1), from the sampler's log-probabilities."""
    d = on_torch(mismatch)(old.float(), batch.sampling.float())
    live = torch.ones_like(d, dtype=torch.bool) if batch.mask is None else batch.mask != 0
    d = torch.where(live, d, 0.0)
    low, high = batch.correction_low, batch.correction_high
    if correction.gated:
        mean = (per_sequence(d, batch) / per_sequence(live, batch).clamp(min=1.0)).float().exp()[:, None]
        gone = on_torch(outside)(mean, low, high)
        return torch.where(expand(gone.float(), batch) != 0.0, 0.0, d.exp())
    ratio = per_sequence(d, batch)[:, None].float().exp() if correction.per_sequence else d.exp()
    return on_torch(within)(ratio, low, high, correction.truncate)


def segments(mask: torch.Tensor | None, cu: torch.Tensor, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of packed input: the sequence of each token [N] int32, and the unmasked tokens of each sequence [B]."""
    at = torch.arange(N, device=cu.device)
    numbers = torch.searchsorted(cu[1:].contiguous(), at, right=True, out_int32=True)
    if mask is None:
        return numbers, cu.diff().float()
    count = torch.nn.functional.pad((mask.reshape(-1) != 0).cumsum(0), (1, 0))
    return numbers, count[cu.long()].diff().float()


def counted_rows(batch: Batch, plan: Plan) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(B, T) bool each: rows to read, None for all; unmasked rows that are left unread, None where none can be."""
    live = None if batch.mask is None else batch.mask != 0
    if batch.cu is not None:
        inside = batch.segments < batch.sequences
        live = inside[None] if live is None else live & inside
    if not plan.skip:
        return live, None
    idle = expand(advantages(batch, plan) if batch.gate is None else batch.gate, batch) == 0.0
    return (~idle, idle) if live is None else (live & ~idle, live & idle)


def rows_to_read(batch: Batch, plan: Plan) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`counted_rows`, with None wherever it says the same."""
    live, idle = counted_rows(batch, plan)
    return (None, None) if live is not None and bool(live.all()) else (live, idle)
