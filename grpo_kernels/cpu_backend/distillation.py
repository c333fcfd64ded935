"""Distillation on torch tensors: in chunks of rows that stay in the cache, and without an [N, V] tensor of its own.

What is made of probabilities are the kernels' own functions (`grpo_kernels.objective.divergence`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.cpu_backend.rows import CHUNK_ELEMENTS, row_pieces, soft_cap
from grpo_kernels.objective import divergence
from grpo_kernels.objective.batch import Batch, Cap
from grpo_kernels.objective.distillation import DistillationBatch, DistillationPlan
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.metrics import distillation_metrics
from grpo_kernels.objective.parts import LN2, LOWEST
from grpo_kernels.objective.sequences import expand, per_sequence
from grpo_kernels.objective.softmax import entropy_of
from grpo_kernels.objective.token import product, weight

_DEEP = -160.0  # 2^d is 0 from here on: in products d stops here, since 0·(−inf) would be NaN
_CHUNK = CHUNK_ELEMENTS // 4  # both models' logits, probabilities and logarithms are in the cache at once


def gradient(logits, teacher, out, batch: DistillationBatch, plan: DistillationPlan, T: int) -> Tensor:
    """Values [3, B, T]: divergence, entropy, the teacher's; the rows' gradient goes to ``out`` in the same pass."""
    return _rows(logits, teacher, out, batch, plan, T, None)


def compare(logits, teacher, batch: DistillationBatch, plan: DistillationPlan, T: int) -> tuple[Tensor, Tensor]:
    """(values [3, B, T], nothing: `slope` computes the rows again)"""
    values = _rows(logits, teacher, None, batch, plan, T, None)
    return values, values.new_empty(0)


def slope(logits, teacher, out, batch: DistillationBatch, plan: DistillationPlan, T: int, stats, up) -> None:
    """The gradient times ``up``."""
    _rows(logits, teacher, out, batch, plan, T, up.expand(logits.shape[0], T).float())


def totals(values: Tensor, batch: DistillationBatch, plan: DistillationPlan) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], sums [S], metrics [M]) of the values [3, B, T] of all rows."""
    like = _like(values[0], batch)
    live = torch.ones_like(values[0]) if batch.mask is None else (batch.mask != 0).float()
    if batch.cu is not None:
        live = torch.where(batch.segments < batch.sequences(1), live, 0.0)
    weighted = torch.where(live != 0.0, on_torch(product)(values[0], _weights(like, batch)), 0.0)
    sums = per_sequence(torch.stack([weighted, live, *values]), like).sum(-1)
    _, tokens, divergence, entropy, teacher_entropy = sums.unbind()
    named = dict(tokens=tokens, divergence=divergence, entropy=entropy, teacher_entropy=teacher_entropy)
    return sums[0].float(), sums, torch.stack(list(distillation_metrics(named).values()))


def _like(x: Tensor, batch: DistillationBatch) -> Batch:
    """What `expand` and `per_sequence` take; x is of the tokens' shape."""
    return Batch(x, cu=batch.cu, segments=batch.segments)


def _weights(like: Batch, batch: DistillationBatch) -> Tensor:
    """(B, T): what each token's divergence counts in the loss."""
    count = 1.0 if batch.count is None else batch.count.float()
    w = on_torch(weight)(count, batch.w_factor * (1.0 if batch.loss_scale is None else batch.loss_scale.float()))
    w = torch.as_tensor(w, dtype=torch.float32, device=like.ids.device)
    return expand(w[:, None] if w.dim() else w, like)


def _rows(logits, teacher, out, batch: DistillationBatch, plan: DistillationPlan, T: int, up: Tensor | None) -> Tensor:
    B, _, V = logits.shape
    values = torch.zeros(3, B, T, dtype=torch.float32, device=logits.device)
    like, flat = _like(values[0], batch), values.view(3, B * T)
    read = None if batch.mask is None else batch.mask != 0
    if batch.cu is not None:
        used = batch.segments[None] < batch.sequences(B)
        read = used if read is None else read & used
    g = None
    if out is not None:
        g = _weights(like, batch) if plan.weighted else torch.ones_like(values[0])
        if up is not None:
            g = g * up
            read = g != 0.0 if read is None else read & (g != 0.0)
        g = g.reshape(-1, 1)
    read = None if read is None or bool(read.all()) else read
    if B * T == 0:
        if out is not None:
            out.zero_()  # without a token there is the last position still
        return values
    heat = batch.temperature
    heat = batch.one_temperature if heat is None else expand(heat.float(), like).reshape(-1, 1)
    for source, target, at, tokens in row_pieces(logits, out, read, T, max(1, min(B * T, _CHUNK // V))):
        inverse = 1.0 / LN2 / (heat[tokens] if isinstance(heat, Tensor) else heat)
        factor = None if g is None else g[tokens]
        goal = None if target is None else (target, at, factor)
        if teacher is not None:
            said = _whole(source[at], _of_tokens(teacher, tokens, T), inverse, batch, plan, goal)
        else:
            told = (x.reshape(B * T, -1)[tokens] for x in (batch.token_ids, batch.teacher_logps))
            said = _few(source, at, *told, inverse, batch, plan, goal)
        flat[:, tokens] = torch.stack([x.view(-1) for x in said])
    return values


class _Row(NamedTuple):
    """Of n rows of logits: log2 p and p [n, V], and per row [n, 1]; ``log_p`` is the depths less ``log_total``."""

    x: Tensor  # [n, V] capped
    log_p: Tensor
    p: Tensor
    top: Tensor
    log_total: Tensor
    entropy: Tensor  # in nats


def _row(x: Tensor, scale: Tensor | float, cap: Cap | None) -> _Row:
    x = _capped(x.float(), cap)
    top = x.amax(-1, keepdim=True).clamp(min=LOWEST)
    depth = (x - top).mul_(scale)
    p = depth.exp2()
    total = p.sum(-1, keepdim=True)
    dot = total.new_empty(len(x))  # autocast leaves alone what has an ``out``
    mean = torch.linalg.vecdot(p, depth.clamp(min=_DEEP), out=dot)[:, None] / total
    log_total = total.log2()
    return _Row(x, depth.sub_(log_total), p.div_(total), top, log_total, on_torch(entropy_of)(total, mean))


def _capped(x: Tensor, cap: Cap | None) -> Tensor:
    """bound·tanh(inner·x); −inf stays."""
    if cap is None:
        return x
    banned, x = x == -torch.inf, x.clone()
    soft_cap(x, cap, None)
    return x.masked_fill_(banned, -torch.inf)


def _slack(x: Tensor, cap: Cap) -> Tensor:
    """∂/∂x of `_capped`, from its value."""
    return torch.where(x == -torch.inf, 0.0, (1.0 - (x * cap.per_bound).square()) * (cap.inner * cap.bound))


def _whole(x, z, inverse, batch: DistillationBatch, plan: DistillationPlan, goal) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence, entropy, the teacher's) of n rows; their gradient goes to ``goal``."""
    scale, cap = inverse * batch.student.factor, batch.student.cap
    student = _row(x, scale, cap)
    teacher = _row(z, inverse * batch.teacher.factor, batch.teacher.cap)
    value, pull = on_torch(divergence.outcome)(
        student.p, student.log_p, teacher.p, teacher.log_p, batch.beta, plan.mixed, plan.by_teacher
    )
    value = value.sum(-1, keepdim=True)
    if goal is not None:
        pulls = torch.full_like(value, -1.0) if plan.by_teacher else pull.sum(-1, keepdim=True)
        d = on_torch(divergence.slope)(pull, student.p, on_torch(divergence.centre)(pulls, value))
        target, at, factor = goal
        d = d.mul_(factor * scale * LN2)
        if cap is not None:
            d = d.mul_(_slack(student.x, cap))
        target[at] = _unless_zero(d, factor).to(target.dtype)
    return value, student.entropy, teacher.entropy


def _few(source, at, ids, logps, inverse, batch: DistillationBatch, plan: DistillationPlan, goal):
    """`_whole` of a teacher that has told K tokens (n, K); without the rest only their logits are read."""
    V = source.shape[1]
    scale, cap = inverse * batch.student.factor, batch.student.cap
    ids, log_q = ids.long(), logps.float() / LN2
    here = (ids >= 0) & (log_q != -torch.inf)
    known = here & (ids < V)
    rows = torch.arange(at.start, at.stop, device=ids.device) if isinstance(at, slice) else at
    rows, ids = rows[:, None].expand(ids.shape), torch.where(known, ids, 0)
    x = _capped(source[rows, ids].float().masked_fill_(here & ~known, torch.nan), cap)
    if plan.whole_student:
        student = _row(source[at], scale, cap)
        log_p = (x - student.top) * scale - student.log_total
    else:
        student, log_p = None, (x - on_torch(divergence.highest)(x.T, here.T)[:, None]) * scale
    log_p, log_q = (torch.where(here, y, -torch.inf).T for y in (log_p, log_q))
    value, d, others, entropy, teacher_entropy = on_torch(divergence.compare)(
        log_p, log_q, here.T, batch.beta, plan.mixed, plan.by_teacher, plan.outcomes == "rest", plan.outcomes == "few"
    )
    if goal is not None:
        target, _, factor = goal
        factors, others = factor * scale * LN2, others[:, None]
        rest = others * factors if student is None else student.p.mul_(others * factors)
        d = d.T * factors
        if cap is not None:
            d = d * _slack(x, cap)
            rest = rest if student is None else rest * _slack(student.x, cap)
        target[at] = _unless_zero(rest, factor).to(target.dtype)
        target[rows[known], ids[known]] = _unless_zero(d, factor)[known].to(target.dtype)
    return value, entropy if student is None else student.entropy, teacher_entropy


def _unless_zero(d: Tensor, factor: Tensor) -> Tensor:
    """0 in rows whose factor is 0, whatever stands there."""
    return torch.where(factor == 0.0, 0.0, d)


def _of_tokens(x: Tensor, tokens: Tensor | slice, T: int) -> Tensor:
    """[n, V] of (B, rows, V), rows ≥ T: the rows of some of the B·T tokens."""
    B, rows, _ = x.shape
    if isinstance(tokens, slice):
        if B == 1 or (rows == T and x.stride(0) == x.stride(1) * rows):
            return x.flatten(0, 1)[tokens]
        tokens = torch.arange(tokens.start, tokens.stop, device=x.device)
    return x[tokens // T, tokens % T]
