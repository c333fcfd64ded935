"""The losses from hidden states, chunk by chunk; backend-independent. `head_autograd` says which runs when.

* `row_chunks`: objectives of single tokens: a chunk's logits become their gradient in one launch.
* `sequence_chunks`: objectives of sequences: chunks of whole sequences, whose ratios are known before the
  gradient is written over the logits. A sequence longer than a chunk is projected twice.
* `score`, `pull_back`: log-probabilities alone, and later the gradient from given ∂L/∂lp, projecting again.

Rows that do not count are left out before the products.
"""

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from grpo_kernels.call import checks
from grpo_kernels.linear.head import ChunkedHead, Gradients
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.corrections import CORRECTIONS
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.sequences import advantages, counted_rows, expand


class Rows:
    """The tokens that are read.

    Attributes:
        index: (n,) their places among the B·T tokens; None: all of them.
        idle: (B, T) bool: unmasked tokens that are left unread, or None.
    """

    def __init__(self, batch: Batch, plan: Plan, count: int):
        """``count``: how many they are, where the caller knows; else -1, and the host waits for the device."""
        self.batch = batch
        live, self.idle = counted_rows(batch, plan)
        self.index = None
        if live is not None and count >= 0:
            if checks.validates(live.device) and count != (read := int(live.sum())):
                raise ValueError(f"num_rows={count}, but {read} rows are read. Leave it out to have them counted.")
            self.index = torch.nonzero_static(live.reshape(-1), size=count)[:, 0]
        elif live is not None:
            self.index = live.reshape(-1).nonzero()[:, 0]

    def per_token(self, x: Tensor | None) -> Tensor | None:
        """(n,), of something (B, T), or broadcasting to it."""
        if x is None:
            return None
        flat = expand(x, self.batch).reshape(-1)
        return flat if self.index is None else flat.index_select(0, self.index)

    @functools.cached_property
    def _ranges(self) -> tuple[Tensor, Tensor]:
        return self.per_token(self.batch.support_first), self.per_token(self.batch.support_last)

    def restricted(self, start: int, end: int, each: bool = False) -> dict[str, Tensor]:
        """What so many of them are restricted to, as fields of a batch (1, n), or of one sequence ``each`` (n, 1)."""
        batch, place = self.batch, (slice(None), None) if each else (None,)
        if batch.support is not None:
            first, last = (x[start:end][place] for x in self._ranges)
            return {"support": batch.support, "support_first": first, "support_last": last}
        if batch.support_mask is None:
            return {}
        places = torch.arange(start, end, device=batch.ids.device) if self.index is None else self.index[start:end]
        T = batch.ids.shape[1]
        return {"support_mask": batch.support_mask[places // T, places % T][place]}

    def spread_out(self, x: Tensor) -> Tensor:
        """(B, T) of (n,): 0 where a token was not read, NaN where it was left unread."""
        shape = self.batch.ids.shape
        if self.index is None:
            return x.view(shape)
        full = x.new_zeros(shape.numel()).index_copy_(0, self.index, x).view(shape)
        return full if self.idle is None else full.masked_fill_(self.idle, torch.nan)

    def bounds(self) -> tuple[Tensor, list[int]]:
        """(B+1,) where among the tokens read each sequence begins, and the last ends; for the host too, which waits."""
        batch = self.batch
        B, T = batch.sequences, batch.ids.shape[1]
        cu = batch.cu if batch.cu is not None else torch.arange(B + 1, device=batch.ids.device) * T
        if self.index is None and batch.cu is None:
            return cu.int(), [k * T for k in range(B + 1)]
        if self.index is not None:
            cu = torch.searchsorted(self.index, cu.to(self.index.dtype))
        return cu.int(), cu.tolist()


def row_chunks(
    run: ModuleType, head: ChunkedHead, rows: Rows, batch: Batch, plan: Plan, entropy: bool, into: Gradients
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) (B, T) of an objective of single tokens, whose gradient goes ``into``."""
    plan = plan._replace(skip=False)
    names = ("ids", "old", "ref", "is_weight", "temperature")
    of_tokens = {name: rows.per_token(getattr(batch, name)) for name in names}
    of_tokens["adv"] = rows.per_token(advantages(batch, plan))
    count = batch.count
    of_rows = count is not None and count.dim() > 0
    if of_rows:
        count = rows.per_token(count[:, None])
    logps, entropies = _empty(head, entropy)
    for start, end in _pieces(0, head.count, head.buffer.shape[0]):
        h, z = head.product(start, end)
        dz = head.gradient_of(z)
        part = batch.with_only(
            **{name: None if x is None else x[start:end, None] for name, x in of_tokens.items()},
            count=count[start:end] if of_rows else count, loss_scale=batch.loss_scale, tokens=batch.tokens,
            entropy_coef=batch.entropy_coef, **rows.restricted(start, end, each=True),
        )  # fmt: skip
        lp, H = run.gradient(z[:, None], dz[:, None], part, plan, entropy)  # (n, 1, V): n sequences of a token each
        logps[start:end] = lp[:, 0]
        if entropy:
            entropies[start:end] = H[:, 0]
        head.add(into, start, end, h, dz, start == 0)
    finish(head, into)
    return rows.spread_out(logps), rows.spread_out(entropies) if entropy else entropies


def sequence_chunks(
    run: ModuleType, head: ChunkedHead, rows: Rows, batch: Batch, plan: Plan, entropy: bool, into: Gradients
) -> tuple[Tensor, Tensor]:
    """`row_chunks` of an objective whose tokens depend on the rest of their sequence, and on nothing else."""
    plan = plan._replace(skip=False)
    adv = advantages(batch, plan)
    on_device, bounds = rows.bounds()
    height = head.buffer.shape[0]
    logps, entropies = _empty(head, entropy)
    of_tokens = {name: rows.per_token(getattr(batch, name)) for name in ("ids", "old", "ref", "sampling")}
    of_either = {name: x if _per_sequence(x, batch) else rows.per_token(x) for name, x in
                 (("adv", adv), ("is_weight", batch.is_weight), ("temperature", batch.temperature))}  # fmt: skip
    for first, last in _groups(bounds[1:], height):  # sequences
        start, end = bounds[first], bounds[last]
        if start == end:
            continue
        part = batch.with_only(
            **{name: None if x is None else x[None, start:end] for name, x in of_tokens.items()},
            **{name: x if x is None else x[first:last] if x.dim() == 2 else x[None, start:end]
               for name, x in of_either.items()},
            count=batch.count if batch.count is None or batch.count.dim() == 0 else batch.count[first:last],
            loss_scale=batch.loss_scale, tokens=batch.tokens, entropy_coef=batch.entropy_coef,
            cu=on_device[first : last + 1] - start,
            places=None if rows.index is None else rows.index[None, start:end],
        )  # fmt: skip
        part = part._replace(segments=run.segments(None, part.cu, end - start)[0])
        pieces = list(_pieces(start, end, height))
        stats = []
        for a, b in pieces:
            h, z = head.product(a, b)
            tokens = _tokens_of(part, a - start, b - start)._replace(**rows.restricted(a, b))
            lp, H, stat = run.logprobs(z[None], tokens, plan, entropy)
            stats.append(stat)
            logps[a:b] = lp[0]
            if entropy:
                entropies[a:b] = H[0]
        lp, H = logps[None, start:end], entropies[None, start:end] if entropy else None
        if plan.late_correction:
            part = part._replace(is_weight=run.correct(lp, part, CORRECTIONS[plan.correction]))
        *_, local, spread, share, slope_H = run.objective(lp, H, part, plan, summed=False)
        g = run.join(local, spread, share, None, part.cu) if plan.spread else local
        for (a, b), stat in zip(pieces, stats):
            if len(pieces) > 1:
                h, z = head.product(a, b)
            dz, here = head.gradient_of(z), slice(a - start, b - start)
            slope_h = slope_H[:, here].contiguous() if plan.bonus else None
            tokens = _tokens_of(part, a - start, b - start)._replace(**rows.restricted(a, b))
            run.slope(z[None], dz[None], tokens, stat, g[:, here].contiguous(), slope_h, None)
            head.add(into, a, b, h, dz, a == 0)
    finish(head, into)
    return rows.spread_out(logps), rows.spread_out(entropies) if entropy else entropies


def score(
    run: ModuleType, head: ChunkedHead, rows: Rows, batch: Batch, plan: Plan, entropy: bool, stats: Tensor
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) (B, T), without a gradient; ``stats`` takes what `pull_back` needs of each row."""
    plan = plan._replace(skip=False)
    ids, temperature = rows.per_token(batch.ids), rows.per_token(batch.temperature)
    logps, entropies = _empty(head, entropy)
    for start, end in _pieces(0, head.count, head.buffer.shape[0]):
        z = head.product(start, end)[1][None]
        part = batch.with_only(ids=ids[None, start:end], temperature=_cut(temperature, start, end),
                               **rows.restricted(start, end))  # fmt: skip
        lp, H, stat = run.logprobs(z, part, plan, entropy)
        stats[start:end] = stat
        logps[start:end] = lp[0]
        if entropy:
            entropies[start:end] = H[0]
    return rows.spread_out(logps), rows.spread_out(entropies) if entropy else entropies


def pull_back(
    run: ModuleType, head: ChunkedHead, rows: Rows, batch: Batch, stats: Tensor, g: Tensor, h: Tensor | None,
    up: Tensor | None, into: Gradients,
) -> None:  # fmt: skip
    """Gradients from ∂L/∂lp and ∂L/∂H (B, T), both times ``up``, through logits made anew.

    ``stats`` are `score`'s: the product must give the same logits again, by the same settings (TF32, say).
    """
    ids, temperature = rows.per_token(batch.ids), rows.per_token(batch.temperature)
    g, h, up = rows.per_token(g), rows.per_token(h), rows.per_token(up)
    for start, end in _pieces(0, head.count, head.buffer.shape[0]):
        x, z = head.product(start, end)
        dz = head.gradient_of(z)
        part = batch.with_only(ids=ids[None, start:end], temperature=_cut(temperature, start, end),
                               **rows.restricted(start, end))  # fmt: skip
        run.slope(z[None], dz[None], part, stats[start:end], *(_cut(y, start, end) for y in (g, h, up)))
        head.add(into, start, end, x, dz, start == 0)
    finish(head, into)


def _pieces(start: int, end: int, height: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + height, end)) for at in range(start, end, height))


def _groups(ends: list[int], height: int) -> Iterator[tuple[int, int]]:
    """Runs of whole sequences of at most ``height`` rows together, or one sequence."""
    first, start = 0, 0
    for k, end in enumerate(ends):
        if end - start > height and k > first:
            yield first, k
            first, start = k, ends[k - 1]
    yield first, len(ends)


def _per_sequence(x: Tensor | None, batch: Batch) -> bool:
    """Whether something is (B, 1); where T = 1 that is per token, as good."""
    return x is None or (x.shape[1] == 1 and x.shape[0] == batch.sequences and batch.ids.shape != x.shape)


def _cut(x: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if x is None else x[None, start:end]


def _tokens_of(part: Batch, start: int, end: int) -> Batch:
    """What the row kernels need of some of the tokens of packed input."""
    temperature = None if part.temperature is None else expand(part.temperature, part)[:, start:end]
    return part.with_only(ids=part.ids[:, start:end], temperature=temperature)


def _empty(head: ChunkedHead, entropy: bool) -> tuple[Tensor, Tensor]:
    logps = torch.empty(head.count, dtype=torch.float32, device=head.weight.device)
    return logps, torch.empty_like(logps) if entropy else logps.new_empty(0)


def finish(head: ChunkedHead, into: Gradients) -> None:
    """Without a row no chunk has written the weight's gradient."""
    if head.count == 0:
        into.weight.zero_()
