"""Rows of logits on torch tensors, in chunks that stay in the cache: no [N, V] tensor exists besides the gradient."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.cpu_backend.supports import left_out
from grpo_kernels.objective.batch import Batch, Cap
from grpo_kernels.objective.parts import LN2, LOWEST
from grpo_kernels.objective.sequences import expand
from grpo_kernels.objective.validation import validates

CHUNK_ELEMENTS = 1 << 21  # of an fp32 buffer: 8 MiB
_LEAST_LOGP = -69.0  # below it fp32 holds a probability with fewer digits, or as 0
_FLOOR = -1e30  # stands for −inf where p·x is formed: 0·(−1e30) is 0, 0·(−inf) is NaN


class Rows(NamedTuple):
    """A chunk of n rows; what has one number per row is [n, 1]. The next chunk overwrites what is [n, V]."""

    tokens: Tensor | slice  # which of the B·T tokens they belong to
    alone: bool  # no other row is read
    logps: Tensor
    gradient: Tensor  # [n, V], takes it; without the derivative of a soft cap, which follows
    ids: Tensor  # token ids
    known: Tensor | None  # False: these logits have no such entry, and ``ids`` is 0; None: they have all
    temperature: Tensor | None  # None: 1
    x: Tensor  # [n, V]: (logits − the largest)/temperature, where there are entropies
    p: Tensor  # [n, V]: probabilities times mass; of a part of the vocabulary exp x
    p_token: Tensor  # over mass
    mass: Tensor
    mean: Tensor | None  # Σ p·x / mass


def read_rows(
    logits: Tensor, batch: Batch, read: Tensor | None, *, entropy: bool,
    into: tuple[Tensor, Tensor] | None = None, out: Tensor | None = None, stats: Tensor | None = None,
) -> Iterator[Rows]:  # fmt: skip
    """The rows marked in ``read``, chunk by chunk.

    Args:
        logits: (B, rows, V), rows ≥ T.
        read: (B, T) bool; other rows are never read, and get gradient 0. None: all are read.
        entropy: make entropies, or prepare a gradient by them.
        into: takes log-probabilities and entropies (B, T).
        out: (B, rows, V), where the caller will write a gradient; may be ``logits``.
        stats: (B·T, 3), see `objective.softmax`, if the logits are a part of the vocabulary. With ``out`` they are
            given, of the whole rows; else taken, of the part, and the tokens' depths instead of log-probabilities.
    """
    V, T, part, whole = logits.shape[2], batch.ids.shape[1], stats is not None, stats if out is not None else None
    pieces = row_pieces(logits, out, read, T, height := max(1, min(CHUNK_ELEMENTS // V, batch.ids.numel())))
    cap = batch.cap
    buffers = torch.empty(1 + entropy + (cap is not None), height, V, dtype=torch.float32, device=logits.device)
    every_id = batch.ids.reshape(-1, 1).long()
    temperatures, number = None, batch.one_temperature
    if number != 1.0:
        temperatures = torch.full(every_id.shape, number, dtype=torch.float32, device=logits.device)
    if batch.temperature is not None:
        temperatures = expand(batch.temperature.float(), batch).reshape(-1, 1)
    shifted = part or entropy or temperatures is not None
    direct = out is not None and out.dtype == torch.float32  # torch is slow at arithmetic of mixed dtypes
    inplace = out is not None and out.data_ptr() == logits.data_ptr()
    checked = not part and validates(logits.device)  # then the ids of rows that are read lie in the vocabulary
    known = temperature = mean = slack = None
    for source, target, place, tokens in pieces:
        x, ids = source[place], every_id[tokens]
        n = len(ids)
        if not checked:
            known = (ids >= 0) & (ids < V)
            ids = torch.where(known, ids, 0)
        out_of, wrong = left_out(batch, tokens, ids, known, V)
        if wrong is not None and not checked:
            known = known & ~wrong
        there = direct and isinstance(place, slice)
        gradient = target[place] if there else buffers[0, :n]
        p = buffers[0, :n] if inplace else gradient
        if shifted or cap or out_of is not None or x.dtype != torch.float32:
            x = (buffers[1, :n] if entropy else p).copy_(x)
        if cap:
            slack = soft_cap(x, cap, None if out is None else buffers[-1, :n])
        if out_of is not None:
            x.masked_fill_(out_of, -torch.inf)
        if shifted:
            top = x.amax(-1, keepdim=True).clamp_(min=LOWEST) if whole is None else whole[tokens, :1]
            x.sub_(top)
        if temperatures is not None:  # only now: the quotient of a large logit is rounded by more
            temperature = temperatures[tokens]
            x.div_(temperature)
        depth = x.gather(1, ids) if part else None
        torch.exp(x, out=p) if part else torch.softmax(x, -1, out=p)
        # softmax's own sum of a long row is off by up to 3e-5: divide by p's
        mass = p.sum(-1, keepdim=True) if whole is None else whole[tokens, 1:2]
        p_token = p.gather(1, ids) / mass
        logps = depth if part else p_token.log()
        if not part and not logps.amin().item() >= _LEAST_LOGP:
            small = (logps < _LEAST_LOGP)[:, 0]
            x_small = source[place][small].float()
            if cap:
                soft_cap(x_small, cap, None)
            if out_of is not None:
                x_small.masked_fill_(out_of[small], -torch.inf)
            x_small -= x_small.amax(-1, keepdim=True)
            x_small /= 1.0 if temperature is None else temperature[small]
            logps[small] = x_small.log_softmax(-1).gather(1, ids[small])
        logps = logps if known is None else torch.where(known, logps, torch.nan)
        if entropy:
            x.clamp_(min=_FLOOR)
            dot = mass.new_empty(n)  # autocast leaves alone what has an ``out``
            mean = torch.linalg.vecdot(p, x, out=dot)[:, None] / mass if whole is None else whole[tokens, 2:] * LN2
        if into is not None:
            into[0].view(-1, 1)[tokens] = logps
        if into is not None and entropy:
            into[1].view(-1, 1)[tokens] = (mass / p.amax(-1, keepdim=True)).log() - mean  # the first is log Σ exp x
        if part and whole is None:
            total = mass if wrong is None else mass.masked_fill(wrong, torch.nan)
            stats[tokens] = torch.cat([top, total, mean / LN2], dim=1)
        yield Rows(tokens, len(pieces) == 1, logps, gradient, ids, known, temperature, x, p, p_token, mass, mean)
        if slack is not None:
            gradient.mul_(slack if out_of is None else slack.masked_fill_(out_of, 0.0))
        if out is not None and not there:
            target[place] = gradient if isinstance(place, slice) else gradient.to(target.dtype)


def write_gradient(rows: Rows, g: Tensor, h: Tensor | None) -> None:
    """(1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], from g = ∂L/∂lp and h = ∂L/∂H, [n, 1] each."""
    p, x, d, ids = rows.p, rows.x, rows.gradient, rows.ids
    if rows.temperature is not None:
        g, h = g / rows.temperature, None if h is None else h / rows.temperature
    d_token, share = g * torch.rsub(rows.p_token, 1.0), g / rows.mass
    if h is None:
        torch.mul(p, share.neg_(), out=d)
    else:
        d_token = d_token + h * rows.p_token * (rows.mean - x.gather(1, ids))
        torch.mul(x.sub_(rows.mean).mul_((h / rows.mass).neg_()).sub_(share), p, out=d)
    if rows.known is not None:
        d_token = torch.where(rows.known, d_token, d.gather(1, ids))
    d.scatter_(1, ids, d_token)


def soft_cap(x: Tensor, cap: Cap, slack: Tensor | None) -> Tensor | None:
    """x = bound·tanh(inner·x), in place; ``slack`` takes its derivative, (1 − tanh²)·inner·bound."""
    x.mul_(cap.inner).tanh_()
    if slack is not None:
        torch.mul(x, x, out=slack).neg_().add_(1.0).mul_(cap.inner * cap.bound)
    x.mul_(cap.bound)
    return slack


def row_pieces(logits: Tensor, out: Tensor | None, read: Tensor | None, T: int, height: int) -> list[tuple]:
    """(block of logits, of out, rows of the block, their tokens), ``height`` at most; other rows get gradient 0.

    A block is 2-D: all logits, if their rows are evenly spaced in memory, else a sequence.
    """
    B, rows = logits.shape[:2]
    if out is not None and rows > T:
        out[:, T:].zero_()
    if out is not None and read is not None:
        out[(~read).nonzero(as_tuple=True)] = 0.0
    even = B > 0 and all(x is None or B == 1 or x.stride(0) == x.stride(1) * rows for x in (logits, out))
    step, pieces = B if even else 1, []
    for first in range(0, B, step):
        blocks = [x if x is None else x.flatten(0, 1) if even else x[first] for x in (logits, out)]
        if read is None and (rows == T or step == 1):
            for start in range(0, step * T, height):
                end = min(start + height, step * T)
                pieces.append((*blocks, slice(start, end), slice(first * T + start, first * T + end)))
            continue
        block = logits.new_ones(step, T, dtype=torch.bool) if read is None else read[first : first + step]
        seq, tok = block.nonzero(as_tuple=True)
        for place, tokens in zip((seq * rows + tok).split(height), ((seq + first) * T + tok).split(height)):
            if len(place):
                start, end = int(place[0]), int(place[-1]) + 1
                pieces.append((*blocks, slice(start, end) if end - start == len(place) else place, tokens))
    return pieces
