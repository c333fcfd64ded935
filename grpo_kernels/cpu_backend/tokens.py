"""The objective of tokens on torch tensors, with the kernels' own functions (`objective.language.on_torch`).

Padded input is [B, T]; packed input is [1, N] with the bounds of its B sequences. What belongs to a
sequence is (B, 1) either way; `expand` and `per_sequence` are all that tells the two apart. On the
host an operation costs more than what it does to a small tensor, so there are as few as can be: sums
are taken of one table, and single numbers are Python's.
"""

from typing import NamedTuple

import torch

from grpo_kernels.objective.advantages import group_moments, is_known, relative_advantages
from grpo_kernels.objective.catalogue import TERMS
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.language import on_numbers, on_torch
from grpo_kernels.objective.metrics import SUM_NAMES, summarise
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.token import limited_ratio, log_ratio, scaled, token_objective, weight


def expand(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Something per token, per sequence (B, 1), or one number, as one per token."""
    shape = batch.ids.shape
    if shape.numel() == 0:
        return x.new_empty(shape)
    if batch.cu is not None and x.dim() and x.shape[0] > 1:  # packed: a row per sequence
        x = torch.cat([x, x.new_zeros(1, 1)])[batch.segments.long(), 0]
    return x.expand(shape)


def per_sequence(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sums (..., B) in fp64 over the tokens of each sequence, of (..., B, T) or packed (..., 1, N)."""
    if batch.cu is None:
        return x.sum(-1, dtype=torch.float64)
    if x.shape[-1] == 0:
        return x.new_zeros((*x.shape[:-2], batch.sequences), dtype=torch.float64)
    flat = x.double().reshape(-1, x.shape[-1])  # [K, N]
    sums = torch.segment_reduce(flat.T.contiguous(), "sum", offsets=batch.cu.long(), initial=0.0, unsafe=True)
    return sums.T.reshape(*x.shape[:-2], -1)


class Tokens:
    """What tokens bring to their objective besides their log-probabilities."""

    def __init__(self, batch: Batch, plan: Plan):
        self.batch, self.batch, self.plan = batch, plan
        self.term = TERMS[plan.term]
        self.c = self.term.kind(*batch.term)
        w, bonus = weights(batch, plan)
        self._given = {"adv": advantages(batch, plan), "old": batch.old, "ref": batch.ref,
                       "trust": batch.is_weight, "w": w, "bonus": bonus}  # fmt: skip
        self._flat: dict[str, torch.Tensor] = {}

    def at(self, name: str, at: torch.Tensor | slice | None) -> torch.Tensor | float | None:
        """Of the tokens ``at``, counted through the batch, (n,); or (None) of all, to broadcast over (B, T)."""
        x = self._given[name]
        if x is None or isinstance(x, float):
            return x
        if at is None and self.batch.cu is None:
            return x.float()
        if name not in self._flat:
            self._flat[name] = expand(x.float(), self.batch).reshape(-1)
        return self._flat[name].view(self.batch.ids.shape) if at is None else self._flat[name][at]


class Verdict(NamedTuple):
    """What the objective makes of some tokens, each of their shape, or a number."""

    loss: torch.Tensor
    kl: torch.Tensor | float
    d_term: torch.Tensor | float
    d_ratio: torch.Tensor | float
    d_lp: torch.Tensor
    r: torch.Tensor
    marks: tuple[torch.Tensor | float, ...]  # of the term's region: low, high, dual


def judge(
    tokens: Tokens, at: torch.Tensor | slice | None, lp: torch.Tensor, trust: torch.Tensor | None,
    level: torch.Tensor | None = None, own: torch.Tensor | None = None,
) -> Verdict:  # fmt: skip
    """The objective of the tokens ``at``, whose ratio is ``level`` where it is not their own."""
    plan, coefs, term, c = tokens.plan, tokens.batch, tokens.term, tokens.c
    A, old, ref = tokens.at("adv", at), tokens.at("old", at), tokens.at("ref", at)
    old = lp if old is None else old
    r = on_torch(log_ratio)(lp, old) if level is None else level
    r, passes = on_torch(limited_ratio)(r, batch.limits, plan.limited)
    r_term = r if own is None else own
    policy, kl, *slopes = on_torch(token_objective)(
        r, passes, r_term, lp, old, ref, A, trust, batch.beta, batch.limits, c, on_torch(term.function),
        on_torch(plan.kl_function) if plan.kl else None, plan.bias, own is not None, trust is not None, plan.limited,
        plan.clamped,
    )  # fmt: skip
    loss = policy + on_torch(scaled)(batch.beta, kl) if plan.kl else policy
    marks = (0.0, 0.0, 0.0) if plan.clip_once else on_torch(term.region)(r, r_term, lp, old, A, c)
    return Verdict(loss, kl, *slopes, r, marks)


def total_slope(*parts: torch.Tensor | float) -> torch.Tensor | float:
    """The sum of derivatives; those that are numbers are 0."""
    tensors = [x for x in parts if isinstance(x, torch.Tensor)]
    return sum(tensors[1:], start=tensors[0]) if tensors else 0.0


class Sums:
    """The sums behind the metrics, from what was said of tokens."""

    def __init__(self, tokens: Tokens):
        self.tokens, self.table, self.names = tokens, None, ()
        self.low, self.high = torch.inf, -torch.inf  # of the ratio

    def add(self, at, live: torch.Tensor | None, said: Verdict, H: torch.Tensor | None, chosen=None) -> None:
        """Tokens ``at`` (None: all), of which those ``live`` count (None: all), ``chosen`` of them with their H."""
        plan = self.tokens.plan
        ratio = said.r.exp()
        rows = {"policy_loss": self.tokens.at("w", at) * said.loss, "ratio": ratio, "r": said.r}
        if plan.kl:
            rows["kl"] = said.kl
        if H is not None:
            rows["entropy"] = H
        if plan.bonus:
            bonus = self.tokens.at("bonus", at) * H
            rows["bonus"] = bonus if chosen is None else torch.where(chosen, bonus, 0.0)
        rows |= {name: x for name, x in zip(_MARKS, said.marks) if isinstance(x, torch.Tensor)}
        shape = said.loss.shape
        part = torch.stack([x if x.shape == shape else x.expand(shape) for x in rows.values()])
        if live is not None:
            part = torch.where(live, part, 0.0)
            ratio = ratio.expand(shape)[live]
        self._rank(ratio)
        if at is None:
            self.table = part
        else:
            if self.table is None:
                self.table = part.new_zeros(len(rows), self.tokens.batch.ids.numel())
            self.table[:, at] = part
        self.names = tuple(rows)

    def _rank(self, ratio: torch.Tensor) -> None:
        if ratio.numel() == 0:
            return
        low, high = (x.item() for x in ratio.aminmax())
        if low != low:  # NaN has no rank
            self._rank(ratio[ratio == ratio])
            return
        self.low, self.high = min(self.low, low), max(self.high, high)

    def finish(
        self, live: torch.Tensor | None, mismatch: dict[str, float], r_seq: torch.Tensor | None = None,
        statistic: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """(loss [], sums [S] fp64, metrics [M]).

        Args:
            live: as in `add`, (B, T).
            mismatch: of `mismatch_sums`.
            r_seq: (B, 1), the level's log ratio, for clip metrics with one value per sequence.
            statistic: (B, 1), the term's own, for the same.
        """
        batch, plan = self.tokens.batch, self.tokens.plan
        shape, device = batch.ids.shape, batch.ids.device
        table = torch.zeros(1, *shape, device=device)
        if self.table is not None:
            table = self.table.view(len(self.names), *shape)
        rows = dict(zip(self.names, per_sequence(table, batch).tolist()))  # name -> [B]
        values = dict.fromkeys(SUM_NAMES, 0.0) | {name: sum(row) for name, row in rows.items()}
        if live is None and batch.cu is None:
            sizes = [float(shape[1])] * batch.sequences
        else:
            sizes = per_sequence(torch.ones(shape, device=device) if live is None else live, batch).tolist()
        values["tokens"] = sum(sizes)
        if plan.clip_once:
            rows, sizes = self._marks_of_sequences(r_seq, statistic)
            values |= {name: sum(row) for name, row in rows.items()}
        values["clip_ratio/count"] = sum(sizes)
        for name, mark, best, nothing in (("low_min", "low", min, torch.inf), ("high_max", "high", max, -torch.inf)):
            row = rows.get(f"clip_ratio/{mark}", [0.0] * len(sizes))
            shares = [x / size for x, size in zip(row, sizes) if size]
            values[f"clip_ratio/{name}"] = best(shares, default=nothing)
        values["loss"] = values["policy_loss"] - values.pop("bonus", 0.0)
        values["approx_kl"] = values["ratio"] - values["tokens"] - values.pop("r", 0.0)
        values["ratio/min"], values["ratio/max"] = self.low, self.high
        values |= mismatch
        values |= _reward_sums(batch, self.tokens.batch, plan)
        row = [values[name] for name in SUM_NAMES]
        sums = torch.tensor(row, dtype=torch.float64, device=device)
        loss = torch.tensor(row[0], dtype=torch.float32, device=device)
        return loss, sums, torch.tensor(on_numbers(summarise)(*row[1:]), dtype=torch.float32, device=device)

    def _marks_of_sequences(self, r_seq, statistic) -> tuple[dict[str, list[float]], list[float]]:
        """The term's region with one value per sequence, those without tokens included: (marks, 1 where it counts)."""
        tokens, plan, coefs = self.tokens, self.tokens.plan, self.tokens.batch
        A = advantages(tokens.batch, plan)
        r = torch.zeros_like(A) if r_seq is None else on_torch(limited_ratio)(r_seq, batch.limits, plan.limited)[0]
        values = on_torch(tokens.term.region)(r, r if statistic is None else statistic, r, r, A, tokens.c)
        count = (A != 0.0).float() if plan.skip else torch.ones_like(A)
        return {name: (x * count)[:, 0].tolist() for name, x in zip(_MARKS, values)}, count[:, 0].tolist()


_MARKS = ("clip_ratio/low", "clip_ratio/high", "clip_ratio/dual")


def advantages(batch: Batch, plan: Plan) -> torch.Tensor:
    """As given, or (B, 1) from the rewards; fp32."""
    if batch.rewards is None:
        return batch.adv.float()
    return relative_advantages(
        batch.rewards.float(), int(batch.num_generations), batch.groups, plan.scale_rewards, plan.unbiased,
        batch.adv_eps, batch.batch_std,
    )[:, None]  # fmt: skip


def weights(batch: Batch, plan: Plan) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """(w, w_H), each a number or (B, 1)."""

    scale = 1.0 if batch.loss_scale is None else batch.loss_scale.item()

    def of(count: torch.Tensor | None, factor: float) -> torch.Tensor | float:
        if count is None or count.dim() == 0:
            return on_numbers(weight)(1.0 if count is None else count.item(), factor, scale)
        w = [on_numbers(weight)(n, factor, scale) for n in count.tolist()]
        return torch.tensor(w, dtype=torch.float32, device=count.device)[:, None]

    coef = 1.0 if batch.entropy_coef is None else batch.entropy_coef.item()
    return of(batch.count, batch.w_factor), of(batch.tokens, batch.h_factor * coef) if plan.bonus else 0.0


def _reward_sums(batch: Batch, plan: Plan) -> dict[str, float]:
    """Σ R, Σ R², how many are finite, and how many not, how many sequences lie in a group without spread, and B."""
    size = float(batch.sequences)
    if batch.rewards is None or not size:
        return {"sequences": size}
    rewards = batch.rewards.float()
    if plan.scale_rewards != "batch":
        spread = group_moments(rewards, int(batch.num_generations), batch.groups, plan.unbiased)[1]
    else:
        spread = batch.batch_std
    known = rewards[on_torch(is_known)(rewards)].double()
    return {
        "reward": known.sum().item(),
        "reward_squared": known.square().sum().item(),
        "rewards": float(known.numel()),
        "reward_not_finite": size - known.numel(),
        "zero_std": (spread == 0.0).double().mean().item() * size,
        "sequences": size,
    }
