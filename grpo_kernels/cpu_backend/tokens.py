"""The [B, T] maths on torch tensors: the loss of tokens and its derivatives, by the kernels' own functions."""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.cpu_backend.sums import REGION, mismatch_sums, reward_sums, totals_of
from grpo_kernels.objective import token
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.catalogue import LEVELS, TERMS
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.metrics import SUFFIX
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.sequences import advantages, expand, per_sequence, rows_to_read, suffix_sums


class Tokens(NamedTuple):
    """What the loss of tokens needs besides their log-probabilities: it broadcasts to them, or is a number or None."""

    adv: Tensor
    old: Tensor | None
    ref: Tensor | None
    trust: Tensor | None
    w: Tensor | float
    bonus: Tensor | float  # w_H

    @classmethod
    def of(cls, batch: Batch, plan: Plan) -> "Tokens":
        """Of all tokens, for (B, T) log-probabilities."""
        given = (batch.count, batch.loss_scale, batch.tokens, batch.entropy_coef)
        count, scale, words, coef = (1.0 if x is None else x.float() for x in given)
        factor = batch.w_factor * scale
        if isinstance(count, Tensor) and not isinstance(factor, Tensor):
            factor = count.new_full((), factor)  # torch would multiply a number by the reciprocal
        w = on_torch(token.weight)(count, factor)
        w = w.unsqueeze(1) if isinstance(w, Tensor) and w.dim() else w
        bonus = on_torch(token.weight)(words, batch.h_factor * coef * scale) if plan.bonus else 0.0
        every = cls(advantages(batch, plan), batch.old, batch.ref, batch.is_weight, w, bonus)
        return every.each(lambda x: x.float() if batch.cu is None else expand(x.float(), batch))

    def each(self, change) -> "Tokens":
        return Tokens(*(change(x) if isinstance(x, Tensor) else x for x in self))


def token_loss(
    tokens: Tokens, lp: Tensor, batch: Batch, plan: Plan, level: Tensor | None = None, own: Tensor | None = None
) -> tuple[Tensor | float, ...]:
    """(ℓ, kl, ∂ℓ/∂r, ∂ℓ/∂r̂, ∂ℓ/∂lp, r̂), see `token_objective`; those that are numbers are 0.

    ``level``: the log ratio that the sequence shares, ``own``: the term's statistic of it; None: there is none.
    """
    term, old = TERMS[plan.term], lp if tokens.old is None else tokens.old
    level = on_torch(token.log_ratio)(lp, old) if level is None else level
    r, passes = on_torch(token.limited_ratio)(level, batch.limits, plan.limited)
    policy, kl, *slopes = on_torch(token.token_objective)(
        r, passes, r if own is None else own, lp, old, tokens.ref, tokens.adv, tokens.trust, batch.beta, batch.limits,
        term.kind(*batch.term), on_torch(term.function), on_torch(plan.kl_function) if plan.kl else None, plan.bias,
        own is not None, tokens.trust is not None, plan.limited, plan.clamped,
    )  # fmt: skip
    return policy + on_torch(token.scaled)(batch.beta, kl) if plan.kl else policy, kl, *slopes, r


def objective(
    logps: Tensor, entropies: Tensor | None, batch: Batch, plan: Plan, summed: bool = True
) -> tuple[Tensor | None, ...]:
    """The [B, T] maths: (loss [], sums [S], metrics [M], ℓ, local, spread, share, h).

    ``local`` is ∂L/∂lp of a token itself. Where a ratio belongs to the whole sequence, ``spread`` is
    ∂L/∂r and ``share`` what each token moves it by, for `join`. None is what has no reader: ℓ where the loss
    is weighted, ``spread`` and ``share`` where nothing is spread, ``h`` without a bonus; the first three
    unless ``summed``.
    """
    live, _ = rows_to_read(batch, plan)
    tokens, term, own, how = Tokens.of(batch, plan), TERMS[plan.term], plan.own, LEVELS[plan.level].how
    c, lp, old = term.kind(*batch.term), logps, logps if tokens.old is None else tokens.old

    def counted(x: Tensor) -> Tensor:
        """0 at the positions that do not count, where anything may stand."""
        return x if live is None else torch.where(live, x, 0.0)

    def of_sequences(x: Tensor) -> Tensor:
        return per_sequence(counted(x), batch)[:, None]

    r_seq = statistic = step = inverse = own_slope = None
    if plan.shares:
        r_token = on_torch(token.log_ratio)(lp, old)
        inverse = 1.0 / of_sequences(torch.ones_like(lp)).clamp(min=1.0)  # (B, 1)
    if how:
        step = inverse if how == "mean" else torch.ones_like(inverse)
        r_seq = (of_sequences(r_token) * step).float()
    if own is not None:
        x, own_slope = on_torch(own.function)(r_token, tokens.adv, c)
        if batch.is_weight is not None and not plan.weight_once:
            x = x + on_torch(own.correction)(tokens.trust)
        statistic = of_sequences(x) * (inverse if own.how == "mean" else 1.0)
        if batch.is_weight is not None and plan.weight_once:
            statistic = statistic + on_torch(own.correction)(batch.is_weight.float())
        statistic, tokens = statistic.float(), tokens._replace(trust=None)
    future, influence, calm = None, None, None
    if plan.suffix is not None:
        r_hat, _ = on_torch(token.limited_ratio)(on_torch(token.log_ratio)(lp, old), batch.limits, plan.limited)
        x, log2_decay = on_torch(plan.suffix.function)(r_hat, c)
        future = suffix_sums(counted(x), log2_decay, batch).float()
        influence, calm = on_torch(plan.suffix.influence)(future, r_hat, tokens.adv, c)
        trust = influence if tokens.trust is None else on_torch(token.product)(influence, tokens.trust)
        tokens = tokens._replace(trust=trust)
    chosen, keep = live, None
    if plan.off_policy:
        sampled = old if batch.sampling is None else batch.sampling.float()
        drift = expand((of_sequences(on_torch(token.drift_of)(lp, sampled)) * inverse).float(), batch)
        keep = on_torch(token.keeps_sequence)(drift, tokens.adv, batch.drift) != 0.0
    if batch.threshold is not None:
        chosen = (batch.threshold <= entropies) & (True if live is None else live)
        keep = chosen if keep is None else keep & chosen
    if keep is not None:
        trust = keep.float() if tokens.trust is None else torch.where(keep, tokens.trust, 0.0)
        tokens = tokens._replace(trust=trust)
    r_shared, own_shared = (None if x is None else expand(x, batch) for x in (r_seq, statistic))
    loss, kl, d_term, d_ratio, d_lp, r = token_loss(tokens, lp, batch, plan, r_shared, own_shared)

    def slope(d: Tensor | float) -> Tensor:
        d = tokens.w * d if plan.weighted else d
        return counted(d if isinstance(d, Tensor) and d.shape == lp.shape else d + torch.zeros_like(lp))

    spread = share = h = None
    if plan.spread == "level":
        local, spread, share = slope(d_term + d_lp), slope(d_ratio), counted(expand(step.float(), batch)).contiguous()
    elif plan.spread == "term":
        local, spread = slope(d_ratio + d_lp), slope(d_term)
        share = counted(own_slope * expand(inverse.float(), batch))
    else:
        local = slope(d_ratio + d_lp if own is None else d_term + d_ratio + d_lp)
    if plan.bonus:
        h = torch.zeros_like(lp) - tokens.bonus
        h = h if chosen is None else torch.where(chosen, h, 0.0)
    slopes = None if plan.weighted else counted(loss), local, spread, share, h
    slopes = tuple(x if x is None else x.contiguous() for x in slopes)  # a mask or advantages may be transposed
    if not summed:
        return None, None, None, *slopes
    mismatch, once = mismatch_sums(batch, plan, logps, live)
    once |= reward_sums(batch, plan)
    if plan.clip_once:
        A, region = advantages(batch, plan), ()
        counts = A != 0.0 if plan.skip else torch.ones_like(A, dtype=torch.bool)
        level = torch.zeros_like(A) if r_seq is None else r_seq
        level, _ = on_torch(token.limited_ratio)(level, batch.limits, plan.limited)
        marks = on_torch(term.region)(level, level if statistic is None else statistic, level, level, A, c)
        marks = zip((*REGION, "clip_ratio/count"), (*marks, 1.0))
        once |= {name: torch.where(counts, x, 0.0).double()[:, 0] for name, x in marks}
    else:
        region = on_torch(term.region)(r, r if own_shared is None else own_shared, lp, old, tokens.adv, c)
    ratio, policy = r.exp(), tokens.w * loss
    rows = {"loss": policy + torch.where(h == 0.0, 0.0, h * entropies) if plan.bonus else policy,
            "policy_loss": policy, "kl": kl, "entropy": entropies, "tokens": torch.ones_like(lp), "ratio": ratio,
            "approx_kl": torch.expm1(r) - r, **dict(zip(REGION, region)), **mismatch,
            **dict(zip(SUFFIX, (future, influence, calm)))}  # fmt: skip
    return *totals_of(rows, once, live, batch), *slopes
