"""The functions of `grpo_kernels.triton_backend.launch` on CPU tensors: chunks of rows, by the kernels' own maths."""

import torch

from grpo_kernels.cpu_backend.rows import read_rows, write_gradient
from grpo_kernels.cpu_backend.tokens import Tokens, objective, token_loss
from grpo_kernels.objective.advantages import batch_spread as batch_std
from grpo_kernels.objective.advantages import group_rows as groups
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.corrections import correct
from grpo_kernels.objective.parts import LN2, absent_part, unite
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.quantile import threshold
from grpo_kernels.objective.sequences import counted_rows, expand, join, rows_to_read, segments

__all__ = [
    "batch_std", "correct", "gradient", "groups", "join", "logprobs", "loss", "objective", "scale", "segments", "shard",
    "slope", "threshold", "totals", "unite",
]  # fmt: skip


def logprobs(logits, batch: Batch, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, stats); stats is empty: `slope` makes the probabilities anew, unless `unite` has made some."""
    read, unread = rows_to_read(batch, plan)
    logps, entropies = _zeros(batch, entropy, unread)
    for _ in read_rows(logits, batch, read, entropy=entropy, into=(logps, entropies)):
        pass
    return logps, entropies, logps.new_empty(0)


def shard(logits, batch: Batch, plan: Plan, entropy: bool) -> torch.Tensor:
    """[4·B·T] of logits that hold a part of the vocabulary, ids counted from its start, for `unite`.

    (top, total, mean) of each row, see `objective.softmax`, total −1 if it is not read. Then the token's depth, NaN
    outside [0, V); of a row that is not read 0, or NaN if it is unmasked.
    """
    part, n = absent_part(batch, plan), batch.ids.numel()
    stats, depths = part[: 3 * n].view(n, 3), part[3 * n :]
    read, _ = counted_rows(batch, plan)
    for rows in read_rows(logits, batch, read, entropy=True, stats=stats):
        depths[rows.tokens] = rows.logps[:, 0] / LN2
    return part


def loss(logits, out, batch: Batch, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, loss [], sums [S], metrics [M]) of an objective of single tokens.

    Its gradient goes to ``out`` in the same pass.
    """
    read, unread = rows_to_read(batch, plan)
    batch = batch if read is not None else batch._replace(mask=None)
    logps, entropies = found = _zeros(batch, entropy, unread)
    H, tokens, sums = entropies if entropy else None, None, None
    for rows in read_rows(logits, batch, read, entropy=entropy, into=found, out=out):
        if rows.alone:  # the objective of the whole batch has the slopes of its tokens
            *sums, _, g, _, _, h = objective(logps, H, batch, plan)
            g, h = g.view(-1, 1)[rows.tokens], h.view(-1, 1)[rows.tokens] if plan.bonus else None
        else:
            tokens = tokens or Tokens.of(batch, plan).each(lambda x: expand(x, batch).reshape(-1, 1))
            some = tokens.each(lambda x: x[rows.tokens])  # noqa: B023 (called at once)
            _, _, _, d_ratio, d_lp, _ = token_loss(some, rows.logps, batch, plan)
            g, h = some.w * (d_ratio + d_lp), torch.zeros_like(rows.logps) - some.bonus if plan.bonus else None
        write_gradient(rows, g, h)
    return *found, *(sums or totals(logps, H, batch, plan))


def gradient(logits, out, batch: Batch, plan: Plan, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, entropies) of an objective of single tokens, whose gradient goes to ``out``."""
    return loss(logits, out, batch, plan, entropy)[:2]


def totals(logps, entropies, batch: Batch, plan: Plan) -> tuple[torch.Tensor, ...]:
    """(loss [], sums [S], metrics [M]) of an objective whose gradient has been written."""
    return objective(logps, entropies, batch, plan)[:3]


def slope(logits, out, batch: Batch, stats, g, h, up) -> None:
    """out = (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], both factors times ``up``; stats as `unite` has them."""
    read = (g if h is None else g.abs() + h.abs()) != 0.0
    if batch.mask is not None:
        read &= batch.mask != 0
    read = None if bool(read.all()) else read
    g, h = (x if x is None else (x if up is None else x * up.float()).reshape(-1, 1) for x in (g, h))
    stats = stats if stats.numel() else None
    for rows in read_rows(logits, batch, read, entropy=h is not None, out=out, stats=stats):
        write_gradient(rows, g[rows.tokens], None if h is None else h[rows.tokens])


def scale(grad: torch.Tensor, out: torch.Tensor, up: torch.Tensor) -> None:
    """out = grad · up, in place or not; nothing moves in place where up is 1."""
    if out.data_ptr() == grad.data_ptr() and up.item() == 1.0:
        return
    # a row without a gradient has none, whatever the factor
    dead = None if bool(up.isfinite()) else grad == 0.0
    torch.mul(grad, up.to(torch.float32), out=out)
    if dead is not None:
        out.masked_fill_(dead, 0.0)


def _zeros(batch: Batch, entropy: bool, unread: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """For log-probabilities and entropies (B, T), NaN where an unmasked row is not read; empty if not asked for."""
    logps = torch.zeros(batch.ids.shape, dtype=torch.float32, device=batch.ids.device)
    logps = logps if unread is None else logps.masked_fill_(unread, torch.nan)
    return logps, logps.clone() if entropy else logps.new_empty(0)
