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
    logps, entropies = run_rows(logits, inputs.ids, read, _temperature(inputs, coefs), entropy=entropy, cap=_cap(coefs))
    return *_mark_unread(unread, logps, entropies), logps.new_empty(0)


def shard(logits, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> torch.Tensor:
    """[4·B·T] of logits that hold a part of the vocabulary, ids counted from its start, for `unite`."""
    read, unread = rows_to_read(inputs, coefs, plan)
    stats, depths = row_statistics(logits, inputs.ids, read, _temperature(inputs, coefs))
    (depths,) = _mark_unread(unread, depths.view(inputs.ids.shape))
    return torch.cat([stats.view(-1), depths.view(-1)])


def unite(parts, inputs: Inputs, coefs: Coefs, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, stats), from what `shard` gave on every rank, [ranks, 4·B·T]; stats [B·T, 3] for `slope`."""
    logps, entropies, stats = unite_parts(parts, _temperature(inputs, coefs))
    shape = inputs.ids.shape
    return logps.view(shape), entropies.view(shape) if entropy else logps.new_empty(0), stats


def loss(logits, out, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, loss [], sums [S], metrics [M]) of an objective of single tokens.

    Its gradient goes to ``out`` in the same pass.
    """
    read, unread = rows_to_read(inputs, coefs, plan)
    tokens = Tokens(inputs, coefs, plan)
    sums = Sums(tokens)
    shape = inputs.ids.shape

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
        logits, inputs.ids, read, _temperature(inputs, coefs), entropy=entropy, cap=_cap(coefs), out=out, slopes=slopes
    )
    totals = sums.finish(read, mismatch_sums(inputs, coefs, plan, logps, read))
    return *_mark_unread(unread, logps, entropies), *totals


def gradient(logits, out, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, entropies) of an objective of single tokens, whose gradient goes to ``out``."""
    return loss(logits, out, inputs, coefs, plan, entropy)[:2]


def totals(logps, entropies, inputs: Inputs, coefs: Coefs, plan: Plan) -> tuple[torch.Tensor, ...]:
    """(loss [], sums [S], metrics [M]) of an objective whose gradient is written already."""
    return objective(logps, entropies, inputs, coefs, plan, True)[:3]


def batch_std(rewards: torch.Tensor, unbiased: bool) -> torch.Tensor:
    """`grpo_kernels.objective.advantages.batch_spread` in fp32."""
    return batch_spread(rewards.float(), unbiased)


def _temperature(inputs: Inputs, coefs: Coefs) -> float | torch.Tensor:
    """A number, or one per token."""
    if inputs.temperature is None:
        return coefs.temperature
    return expand(inputs.temperature.float(), inputs).reshape(-1)


def _cap(coefs: Coefs) -> tuple[float, float] | None:
    return (coefs.softcap, coefs.logit_scale / coefs.softcap) if coefs.softcap < torch.inf else None


def _mark_unread(unread: torch.Tensor | None, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """NaN at unmasked rows that were not read; values that were not asked for are empty."""
    if unread is None:
        return values
    return tuple(x.masked_fill_(unread, torch.nan) if x.numel() else x for x in values)


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

    def slopes(at: torch.Tensor | slice, *_: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return g[at], None if h is None else h[at]

    heat = _temperature(inputs, coefs)
    if stats.numel():
        write_part(logits, inputs.ids, read, heat, stats, g, h, out)
    else:
        run_rows(logits, inputs.ids, read, heat, entropy=h is not None, cap=_cap(coefs), out=out, slopes=slopes)


def scale(grad: torch.Tensor, out: torch.Tensor, up: torch.Tensor) -> None:
    """out = grad · up, in place or not; nothing moves in place where up is 1."""
    if out.data_ptr() == grad.data_ptr() and up.item() == 1.0:
        return
    # a row without a gradient has none, whatever the factor
    dead = None if bool(up.isfinite()) else grad == 0.0
    torch.mul(grad, up.to(torch.float32), out=out)
    if dead is not None:
        out.masked_fill_(dead, 0.0)
