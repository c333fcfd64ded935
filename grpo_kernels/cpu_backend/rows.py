"""Rows of logits on torch tensors, in chunks that stay in the cache: no [N, V] tensor exists besides the gradient.

`read_rows` reads each chunk once and makes probabilities of it; `write_gradient` turns those into the gradient.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from grpo_kernels.cpu_backend.tokens import expand
from grpo_kernels.objective.inputs import Coefs, Inputs
from grpo_kernels.objective.validation import validates

CHUNK_ELEMENTS = 1 << 20  # of an fp32 buffer: 4 MiB
_LEAST_LOGP = -69.0  # below it fp32 holds a probability with fewer digits, or as 0
_FLOOR = -1e30  # stands for −inf where p·x is formed: 0·(−1e30) is 0, 0·(−inf) is NaN
_LN2, _LOWEST = math.log(2.0), torch.finfo(torch.float32).min


class Rows(NamedTuple):
    """A chunk of n rows; what is one number per row is [n, 1]. The next chunk overwrites p, x and slack."""

    target: torch.Tensor | None  # rows of the gradient, of which these are `place`
    place: torch.Tensor | slice
    tokens: torch.Tensor | slice  # which of the B·T tokens they belong to
    alone: bool  # no other row is read
    ids: torch.Tensor  # token ids
    known: torch.Tensor | None  # False: the id is no entry of these logits, and ``ids`` has 0; None: all are
    temperature: torch.Tensor | float
    top: torch.Tensor | None  # the largest logit, where it has been subtracted
    p: torch.Tensor  # [n, V]: probabilities times ``mass``; of a part of the vocabulary exp x
    x: torch.Tensor  # [n, V]: logits over the temperature, relative to ``top``, if entropies are asked for
    slack: torch.Tensor | None  # [n, V]: derivative of the soft cap
    mass: torch.Tensor
    p_token: torch.Tensor
    x_token: torch.Tensor | None
    logps: torch.Tensor
    mean: torch.Tensor | None  # Σ p·x
    entropies: torch.Tensor | None


def read_rows(
    logits: torch.Tensor, inputs: Inputs, coefs: Coefs, read: torch.Tensor | None, *, entropy: bool,
    out: torch.Tensor | None = None, part: bool = False, stats: torch.Tensor | None = None,
) -> Iterator[Rows]:  # fmt: skip
    """The rows marked in ``read``, chunk by chunk.

    Args:
        logits: (B, rows, V), rows ≥ T.
        read: (B, T) bool; other rows are never read, and get gradient 0. None: all are read.
        out: (B, rows, V), where the caller will write a gradient; may be ``logits``.
        part: the logits are a part of the vocabulary.
        stats: (B·T, 3) of the whole rows, see `objective.softmax`, where the gradient of a part is asked for.
    """
    V, T = logits.shape[2], inputs.ids.shape[1]
    if out is not None:
        _clear(out, read, T)
    pieces = _chunks(logits, out, read, T, max(1, CHUNK_ELEMENTS // V))
    height = max((piece[-1] for piece in pieces), default=0)
    cap = (coefs.softcap, coefs.logit_scale / coefs.softcap) if coefs.softcap < torch.inf else None
    buffers = torch.empty(1 + entropy + (cap is not None), height, V, device=logits.device)
    every_id, heat = inputs.ids.reshape(-1, 1).long(), coefs.temperature
    if inputs.temperature is not None:
        heat = expand(inputs.temperature.float(), inputs).reshape(-1, 1)
    checked = not part and validates(logits.device)  # then the ids of rows that are read lie in the vocabulary
    shifted = part or entropy or isinstance(heat, torch.Tensor) or heat != 1.0
    known = top = x_token = mean = H = slack = None
    for source, target, place, tokens, n in pieces:
        x = source[place] if isinstance(place, slice) else source.index_select(0, place)
        into_target = out is not None and out is not logits and out.dtype == torch.float32 and isinstance(place, slice)
        p = target[place] if into_target and target.is_contiguous() else buffers[0, :n]
        temperature = heat[tokens] if isinstance(heat, torch.Tensor) else heat
        if cap and out is not None:
            slack = buffers[-1, :n]
        if shifted or cap or x.dtype != torch.float32:
            x = (buffers[1, :n] if entropy else p).copy_(x)
            if cap:
                _soft_cap(x, cap, slack)
            if shifted:  # before the division, which would round a large logit by more than logits differ
                top = x.amax(-1, keepdim=True).clamp_(min=_LOWEST) if stats is None else stats[tokens, :1]
                x.sub_(top).div_(temperature)
        torch.exp(x, out=p) if part else torch.softmax(x, -1, out=p)

        ids = every_id[tokens]
        if not checked:
            known = (ids >= 0) & (ids < V)
            ids = torch.where(known, ids, 0)
        # softmax's own sum of a long row is off by up to 3e-5: divide by p's
        mass = p.sum(-1, keepdim=True) if stats is None else stats[tokens, 1:2]
        p_token = p.gather(1, ids) / mass
        logps = p_token.log()
        if not part and not logps.amin().item() >= _LEAST_LOGP:
            small = (logps < _LEAST_LOGP)[:, 0]
            again = source[place][small].float()
            if cap:
                _soft_cap(again, cap, None)
            again -= again.amax(-1, keepdim=True)
            again /= temperature[small] if isinstance(temperature, torch.Tensor) else temperature
            logps[small] = again.gather(1, ids[small]) - again.logsumexp(-1, keepdim=True)
        if known is not None:
            logps = torch.where(known, logps, torch.nan)
        if entropy:
            x_token = x.gather(1, ids)
            x.clamp_(min=_FLOOR)
            if stats is None:
                mean = torch.linalg.vecdot(p, x, out=mass.new_empty(n))[:, None] / mass  # autocast leaves an out alone
                H = None if part else (mass / p.amax(-1, keepdim=True)).log() - mean  # the first is log Σ exp x
            else:
                mean = stats[tokens, 2:] * _LN2
        yield Rows(target, place, tokens, len(pieces) == 1, ids, known, temperature, top, p, x, slack, mass, p_token,
                   x_token, logps, mean, H)  # fmt: skip


def write_gradient(rows: Rows, g: torch.Tensor, h: torch.Tensor | None) -> None:
    """(1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)]·slack, from g = ∂L/∂lp and h = ∂L/∂H, [n, 1] each."""
    p, x, target = rows.p, rows.x, rows.target
    direct = isinstance(rows.place, slice) and target.dtype == p.dtype  # torch is slow at mixed-dtype arithmetic
    d = target[rows.place] if direct else p
    g = g if isinstance(rows.temperature, float) and rows.temperature == 1.0 else g / rows.temperature
    d_token, share = g * torch.rsub(rows.p_token, 1.0), g / rows.mass
    if h is None:
        torch.mul(p, share.neg_(), out=d)
    else:
        h = h / rows.temperature
        d_token = d_token + h * rows.p_token * (rows.mean - x.gather(1, rows.ids))
        x.sub_(rows.mean).mul_((h / rows.mass).neg_()).sub_(share)
        torch.mul(x, p, out=d)
    if rows.known is not None:
        d_token = torch.where(rows.known, d_token, d.gather(1, rows.ids))
    d.scatter_(1, rows.ids, d_token)
    if rows.slack is not None:
        d.mul_(rows.slack)
    if not direct:
        target[rows.place] = d.to(target.dtype)


def _soft_cap(x: torch.Tensor, cap: tuple[float, float], slack: torch.Tensor | None) -> None:
    """x = bound·tanh(inner·x), in place; slack: the derivative, (1 − tanh²)·inner·bound."""
    bound, inner = cap
    x.mul_(inner).tanh_()
    if slack is not None:
        torch.mul(x, x, out=slack).neg_().add_(1.0).mul_(inner * bound)
    x.mul_(bound)


def _chunks(
    logits: torch.Tensor, out: torch.Tensor | None, read: torch.Tensor | None, T: int, height: int
) -> list[tuple]:
    """(block of logits, block of out, rows of the block, their tokens, how many), ``height`` rows at most.

    A block is 2-D: all logits, if their rows are evenly spaced in memory, else a sequence.
    """
    B, rows = logits.shape[:2]
    even = all(x is None or B <= 1 or x.stride(0) == x.stride(1) * rows for x in (logits, out))
    step, pieces = max(B, 1) if even else 1, []
    for first in range(0, B, step):
        source, target = (None if x is None else x[first : first + step].flatten(0, 1) for x in (logits, out))
        if read is None and (rows == T or step == 1):
            for start in range(0, step * T, height):
                n, token = min(height, step * T - start), first * T + start
                pieces.append((source, target, slice(start, start + n), slice(token, token + n), n))
            continue
        block = torch.ones(step, T, device=logits.device) if read is None else read[first : first + step]
        seq, tok = block.nonzero(as_tuple=True)
        for place, tokens in zip((seq * rows + tok).split(height), ((seq + first) * T + tok).split(height)):
            if n := place.numel():
                start, last = int(place[0]), int(place[-1])
                pieces.append((source, target, slice(start, last + 1) if last - start + 1 == n else place, tokens, n))
    return pieces


def _clear(out: torch.Tensor, read: torch.Tensor | None, T: int) -> None:
    """Gradient 0 for every row that is not read, the positions beyond T included."""
    if out.shape[1] > T:
        out[:, T:].zero_()
    if read is not None:
        seq, tok = (~read).nonzero(as_tuple=True)
        out[seq, tok] = 0.0
