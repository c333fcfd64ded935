"""The same contract on CPU tensors, in chunks of rows that stay in the cache.

`rows` reads and writes the logits, a chunk at a time. The per-token maths are the kernels' own
functions (`grpo_kernels.objective.language.on_torch`).
"""

import torch

from grpo_kernels.cpu_backend.mismatch import mismatch_sums
from grpo_kernels.cpu_backend.rows import run_rows
from grpo_kernels.cpu_backend.sequences import correct, join, objective, rows_to_read, segments
from grpo_kernels.cpu_backend.sharded import row_statistics, unite_parts, write_part
from grpo_kernels.cpu_backend.tokens import Sums, Tokens, expand, judge, total_slope
from grpo_kernels.objective.advantages import batch_spread
from grpo_kernels.objective.advantages import group_rows as groups
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.quantile import threshold

__all__ = [
    "batch_std", "correct", "gradient", "groups", "join", "logprobs", "loss", "objective", "scale", "segments", "shard",
    "slope", "threshold", "totals", "unite",
]  # fmt: skip


def logprobs(logits, batch: Batch, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, stats); stats is empty: `slope` makes the probabilities anew, unless `unite` has made some."""
    read, unread = rows_to_read(batch, plan)
    logps, entropies = run_rows(logits, batch.ids, read, _temperature(batch), entropy=entropy, cap=batch.cap)
    return *_mark_unread(unread, logps, entropies), logps.new_empty(0)


def shard(logits, batch: Batch, plan: Plan, entropy: bool) -> torch.Tensor:
    """[4·B·T] of logits that hold a part of the vocabulary, ids counted from its start, for `unite`."""
    read, unread = rows_to_read(batch, plan)
    stats, depths = row_statistics(logits, batch.ids, read, _temperature(batch))
    (depths,) = _mark_unread(unread, depths.view(batch.ids.shape))
    return torch.cat([stats.view(-1), depths.view(-1)])


def unite(parts, batch: Batch, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, stats), from what `shard` gave on every rank, [ranks, 4·B·T]; stats [B·T, 3] for `slope`."""
    logps, entropies, stats = unite_parts(parts, _temperature(batch))
    shape = batch.ids.shape
    return logps.view(shape), entropies.view(shape) if entropy else logps.new_empty(0), stats


def loss(logits, out, batch: Batch, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, loss [], sums [S], metrics [M]) of an objective of single tokens.

    Its gradient goes to ``out`` in the same pass.
    """
    read, unread = rows_to_read(batch, plan)
    tokens = Tokens(batch, plan)
    sums = Sums(tokens)
    shape = batch.ids.shape

    def slopes(
        at: torch.Tensor | slice, lp: torch.Tensor, H: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        size = shape if lp.numel() == shape.numel() else (-1,)  # all at once, or some
        at, lp, H = None if size is shape else at, lp.view(size), None if H is None else H.view(size)
        said = judge(tokens, at, lp, tokens.at("trust", at))
        sums.add(at, None, said, H)
        g = tokens.at("w", at) * total_slope(said.d_ratio, said.d_lp)
        h = torch.zeros_like(lp) - tokens.at("bonus", at) if plan.bonus else None
        return g.reshape(-1, 1), None if h is None else h.reshape(-1, 1)

    logps, entropies = run_rows(
        logits, batch.ids, read, _temperature(batch), entropy=entropy, cap=batch.cap, out=out, slopes=slopes
    )
    totals = sums.finish(read, mismatch_sums(batch, plan, logps, read))
    return *_mark_unread(unread, logps, entropies), *totals


def gradient(logits, out, batch: Batch, plan: Plan, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, entropies) of an objective of single tokens, whose gradient goes to ``out``."""
    return loss(logits, out, batch, plan, entropy)[:2]


def totals(logps, entropies, batch: Batch, plan: Plan) -> tuple[torch.Tensor, ...]:
    """(loss [], sums [S], metrics [M]) of an objective whose gradient is written already."""
    return objective(logps, entropies, batch, plan, True)[:3]


def batch_std(rewards: torch.Tensor, unbiased: bool) -> torch.Tensor:
    """`grpo_kernels.objective.advantages.batch_spread` in fp32."""
    return batch_spread(rewards.float(), unbiased)


def _temperature(batch: Batch) -> float | torch.Tensor:
    """A number, or one per token."""
    if batch.temperature is None:
        return batch.one_temperature
    return expand(batch.temperature.float(), batch).reshape(-1)


def _cap(batch: Batch) -> tuple[float, float] | None:
    return (batch.softcap, batch.logit_scale / batch.softcap) if batch.softcap < torch.inf else None


def _mark_unread(unread: torch.Tensor | None, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """NaN at unmasked rows that were not read; values that were not asked for are empty."""
    if unread is None:
        return values
    return tuple(x.masked_fill_(unread, torch.nan) if x.numel() else x for x in values)


def slope(logits, out, batch: Batch, stats, g, h, up) -> None:
    """out = (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], both factors times ``up``; stats as `unite` has them."""
    read = (g if h is None else g.abs() + h.abs()) != 0.0
    if batch.mask is not None:
        read &= batch.mask != 0
    read = None if bool(read.all()) else read
    if up is not None:
        up = up.float()
        g, h = g * up, None if h is None else h * up
    g, h = g.reshape(-1, 1), None if h is None else h.reshape(-1, 1)

    def slopes(at: torch.Tensor | slice, *_: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return g[at], None if h is None else h[at]

    heat = _temperature(batch)
    if stats.numel():
        write_part(logits, batch.ids, read, heat, stats, g, h, out)
    else:
        run_rows(logits, batch.ids, read, heat, entropy=h is not None, cap=batch.cap, out=out, slopes=slopes)


def scale(grad: torch.Tensor, out: torch.Tensor, up: torch.Tensor) -> None:
    """out = grad · up, in place or not; nothing moves in place where up is 1."""
    if out.data_ptr() == grad.data_ptr() and up.item() == 1.0:
        return
    # a row without a gradient has none, whatever the factor
    dead = None if bool(up.isfinite()) else grad == 0.0
    torch.mul(grad, up.to(torch.float32), out=out)
    if dead is not None:
        out.masked_fill_(dead, 0.0)
