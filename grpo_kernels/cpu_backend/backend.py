"""The same functions as `grpo_kernels.triton_backend.launch`, on CPU tensors, in chunks of rows that stay in the cache.

`rows` reads and writes the logits, a chunk at a time. The per-token maths are the kernels' own
functions (`grpo_kernels.objective.language.on_torch`).
"""

import torch

from grpo_kernels.cpu_backend.rows import Rows, read_rows, write_gradient
from grpo_kernels.cpu_backend.sequences import correct, join, objective, rows_to_read, segments
from grpo_kernels.cpu_backend.sharded import shard, unite
from grpo_kernels.cpu_backend.sums import batch_std
from grpo_kernels.cpu_backend.tokens import Tokens, expand, token_loss
from grpo_kernels.objective.advantages import group_rows as groups
from grpo_kernels.objective.inputs import Coefs, Inputs
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.quantile import threshold

__all__ = [
    "batch_std", "correct", "gradient", "groups", "join", "logprobs", "loss", "objective", "scale", "segments", "shard",
    "slope", "threshold", "totals", "unite",
]  # fmt: skip


def logprobs(logits, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, stats); stats is empty: `slope` makes the probabilities anew, unless `unite` has made some."""
    read, unread = rows_to_read(inputs, coefs, plan)
    logps, entropies = _nothing_yet(inputs, entropy)
    for rows in read_rows(logits, inputs, coefs, read, entropy=entropy):
        logps, entropies = _with(rows, logps, entropies)
    return *_mark_unread(unread, logps, entropies), logps.new_empty(0)


def loss(logits, out, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, loss [], sums [S], metrics [M]) of an objective of single tokens.

    Its gradient goes to ``out`` in the same pass.
    """
    read, unread = rows_to_read(inputs, coefs, plan)
    if read is None:
        inputs = inputs._replace(mask=None)
    logps, entropies = _nothing_yet(inputs, entropy)
    tokens = sums = None
    for rows in read_rows(logits, inputs, coefs, read, entropy=entropy, out=out):
        logps, entropies = _with(rows, logps, entropies)
        if rows.alone:  # the objective of the whole batch has the slopes of its tokens
            *sums, _, g, _, _, h = objective(logps, entropies if entropy else None, inputs, coefs, plan, True)
            g, h = g.view(-1, 1)[rows.tokens], h.view(-1, 1)[rows.tokens] if plan.bonus else None
        else:
            tokens = tokens or Tokens.of(inputs, coefs, plan).each(lambda x: expand(x, inputs).reshape(-1, 1))
            some = tokens.each(lambda x: x[rows.tokens])  # noqa: B023, called at once
            terms = token_loss(some, rows.logps, coefs, plan)
            g = some.w * (terms.d_ratio + terms.d_lp)
            h = torch.zeros_like(g) - some.bonus if plan.bonus else None
        write_gradient(rows, g, h)
    sums = sums or totals(logps, entropies if entropy else None, inputs, coefs, plan)
    return *_mark_unread(unread, logps, entropies), *sums


def gradient(logits, out, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, entropies) of an objective of single tokens, whose gradient goes to ``out``."""
    return loss(logits, out, inputs, coefs, plan, entropy)[:2]


def totals(logps, entropies, inputs: Inputs, coefs: Coefs, plan: Plan) -> tuple[torch.Tensor, ...]:
    """(loss [], sums [S], metrics [M]) of an objective whose gradient has been written."""
    return objective(logps, entropies, inputs, coefs, plan, True)[:3]


def slope(logits, out, inputs: Inputs, stats, g, h, up, coefs: Coefs) -> None:
    """out = (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], both factors times ``up``; stats as `unite` has them."""
    read = (g if h is None else g.abs() + h.abs()) != 0.0
    if inputs.mask is not None:
        read &= inputs.mask != 0
    read = None if bool(read.all()) else read
    if up is not None:
        up = up.float()
        g, h = g * up, None if h is None else h * up
    g, h = g.reshape(-1, 1), None if h is None else h.reshape(-1, 1)
    stats = stats if stats.numel() else None
    part = stats is not None
    for rows in read_rows(logits, inputs, coefs, read, entropy=h is not None, out=out, part=part, stats=stats):
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


def _nothing_yet(inputs: Inputs, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies (B, T), those that were not asked for empty."""
    logps = torch.zeros(inputs.ids.shape, device=inputs.ids.device)
    return logps, torch.zeros_like(logps) if entropy else logps.new_empty(0)


def _with(rows: Rows, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Log-probabilities and entropies (B, T) with those of some rows in their places."""
    found = (rows.logps, rows.entropies)
    if rows.alone and isinstance(rows.tokens, slice):  # they are all there are
        return tuple(whole if x is None else x.view(whole.shape) for x, whole in zip(found, values))
    for x, whole in zip(found, values):
        if x is not None:
            whole.view(-1)[rows.tokens] = x[:, 0]
    return values


def _mark_unread(unread: torch.Tensor | None, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """NaN at unmasked rows that were not read."""
    if unread is None:
        return values
    return tuple(x.masked_fill_(unread, torch.nan) if x.numel() else x for x in values)
