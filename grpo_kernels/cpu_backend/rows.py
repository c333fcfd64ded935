"""Rows of logits on torch tensors: one pass, in chunks that stay in the cache.

Each chunk of logits is read once, turned into probabilities in a scratch buffer, and written once as
a gradient: no [N, V] tensor exists besides the gradient.
"""

import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from grpo_kernels.objective.batch import Cap
from grpo_kernels.objective.validation import validates

CHUNK_ELEMENTS = 1 << 21  # of fp32 scratch: 8 MiB
_LEAST = -69.0  # of log p: what fp32 can say of p with all its digits
FLOOR = -1e30  # stands for −inf where p·x is formed: 0·(−1e30) is 0, 0·(−inf) is NaN


def run_rows(
    logits: torch.Tensor,
    ids: torch.Tensor,
    read: torch.Tensor | None,
    temperature: float | torch.Tensor,
    *,
    entropy: bool,
    cap: Cap | None = None,
    out: torch.Tensor | None = None,
    slopes: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over the rows marked in ``read``: log-probabilities, entropies, and the gradient if asked.

    Args:
        logits: (B, rows, V), rows ≥ T.
        ids: (B, T).
        read: (B, T) bool; other rows are never read, and have log-probability, entropy and gradient 0.
            None: all are read.
        temperature: divides the logits; a number, or one per token, (B·T,).
        entropy: compute entropies too.
        cap: the logits are bound·tanh(inner·logits).
        out: (B, rows, V), takes the gradient; may be ``logits``.
        slopes: from some n of the B·T tokens, their log-probabilities and entropies (n, 1) to
            (∂L/∂lp, ∂L/∂H), (n, 1) each; entropies and ∂L/∂H may be None.

    Returns:
        (B, T) log-probabilities and (B, T) entropies (empty if not asked for), fp32.
    """
    B, T = ids.shape
    rows, V = logits.shape[1:]
    logps = entropies = None
    if ids.numel() == 0:
        if out is not None:
            out.zero_()
        logps = torch.zeros(B, T, device=logits.device)
        return logps, torch.zeros_like(logps) if entropy else logps.new_empty(0)
    flat_ids = ids.reshape(-1, 1).long()
    if out is not None:
        clear(out, read, T)
    height = max(1, min(B * rows, CHUNK_ELEMENTS // V))
    p_buffer = scratch("p", height, V, logits.device)
    heated = isinstance(temperature, torch.Tensor) or temperature != 1.0
    plain = logits.dtype == torch.float32 and not (heated or entropy or cap)  # softmax reads logits as they are
    slack = None if cap is None or out is None else scratch("slack", height, V, logits.device)
    x_buffer = None if plain else scratch("x", height, V, logits.device)
    checked = validates(logits.device)  # then ids of rows that are read lie in the vocabulary
    depth = mean = H = heat = None
    for source, target, at, tokens in chunks(logits, out, read, T, height):  # [n, V] and, per row, [n, 1]
        x = source[at] if isinstance(at, slice) else source.index_select(0, at)
        p = p_buffer[: x.shape[0]]
        if not plain:
            x = x_buffer[: x.shape[0]].copy_(x)
            if cap:
                bound, inner, _ = cap
                x.mul_(inner).tanh_()
                if out is not None:  # (1 − tanh²)·inner·bound, the derivative
                    torch.mul(x, x, out=slack[: x.shape[0]]).neg_().add_(1.0).mul_(inner * bound)
                x.mul_(bound)
            if heated:
                heat = heat_of(temperature, tokens)
                x.div_(heat)
        torch.softmax(x, -1, out=p)
        mass = p.sum(-1, keepdim=True)  # softmax's own sum of a long row is off by up to 3e-5: divide by p's
        token = flat_ids[tokens]
        if not checked:
            known = (token >= 0) & (token < V)
            token = torch.where(known, token, 0)
        p_token = p.gather(1, token) / mass
        lp = _log_probability(x, p_token, token)
        if not checked:
            lp = torch.where(known, lp, torch.nan)
        logps = placed(logps, tokens, lp, B * T)
        if entropy:
            depth = x.sub_(x.amax(-1, keepdim=True)).clamp_(min=FLOOR)
            mean = dot(p, depth) / mass
            H = (mass / p.amax(-1, keepdim=True)).log() - mean  # the first is log Σ exp(x − top)
            entropies = placed(entropies, tokens, H, B * T)
        if out is None:
            continue

        row = Row(p, p_token, mass, depth, mean, token)
        write_slope(target, at, row, *slopes(tokens, lp, H), heat, None if slack is None else slack[: p.shape[0]])
    if logps is None:  # not a row was read
        logps, entropies = (torch.zeros(B * T, device=logits.device) for _ in range(2))
    return logps.view(B, T), entropies.view(B, T) if entropy else logps.new_empty(0)


def heat_of(temperature: float | torch.Tensor, tokens: torch.Tensor | slice) -> float | torch.Tensor:
    """The temperature of some tokens: a number, or [n, 1]."""
    return temperature[tokens][:, None] if isinstance(temperature, torch.Tensor) else temperature


def dot(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Σ p·x of each row, [n, 1]; autocast leaves alone what has an ``out``."""
    return torch.linalg.vecdot(p, x, out=p.new_empty(p.shape[0]))[:, None]


def placed(whole: torch.Tensor | None, tokens: torch.Tensor | slice, x: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) with x (n, 1) at its tokens, and 0 where nothing has been placed; x itself where it is all there is."""
    if x.numel() == count and isinstance(tokens, slice):
        return x.view(-1)
    if whole is None:
        whole = x.new_zeros(count)
    whole[tokens] = x.view(-1)
    return whole


class Row(NamedTuple):
    """Of n rows what their gradient needs."""

    p: torch.Tensor  # [n, V], probabilities times ``mass``; overwritten
    p_token: torch.Tensor  # [n, 1], of the token, divided by mass
    mass: torch.Tensor  # [n, 1]
    depth: torch.Tensor | None  # [n, V], logits below the largest, finite; for ∂L/∂H; overwritten
    mean: torch.Tensor | None  # [n, 1], Σ p·depth
    token: torch.Tensor  # [n, 1], ids
    known: torch.Tensor | None = None  # [n, 1], False: the token's entry is not here; None: it always is


def write_slope(
    target: torch.Tensor,
    at: torch.Tensor | slice,
    row: Row,
    g: torch.Tensor,
    h: torch.Tensor | None,
    heat: float | torch.Tensor | None,
    slack: torch.Tensor | None = None,
) -> None:
    """target[at] = (1/heat)·[g·(onehot − p) + h·p·(x̄ − x)]·slack; g and h are [n, 1]."""
    p, p_token, mass, depth, mean, token, known = row
    direct = isinstance(at, slice) and target.dtype == p.dtype  # torch is slow at mixed-dtype arithmetic
    d = target[at] if direct else p
    d_token, share = g * torch.rsub(p_token, 1.0), g / mass
    if h is not None:
        d_token = d_token + h * p_token * (mean - depth.gather(1, token))
    if heat is not None:
        d_token, share = d_token / heat, share / heat
    if h is None:
        torch.mul(p, share.neg_(), out=d)
    else:
        pull = h / mass if heat is None else h / mass / heat
        depth.sub_(mean).mul_(pull.neg_()).sub_(share)
        torch.mul(depth, p, out=d)
    if known is not None:
        d_token = torch.where(known, d_token, d.gather(1, token))
    d.scatter_(1, token, d_token)
    if slack is not None:
        d.mul_(slack)
    if not direct:
        target[at] = d.to(target.dtype)


_kept = threading.local()


def scratch(name: str, height: int, V: int, device: torch.device) -> torch.Tensor:
    """An uninitialised buffer (height, V), fp32.

    On the CPU each thread keeps its own, of 8 MiB or one row: memory that is given back comes again page
    by page, which takes longer than the softmax over it.
    """
    if device.type != "cpu":
        return torch.empty(height, V, device=device)
    flat = getattr(_kept, name, None)
    if flat is None or flat.numel() < height * V:
        with torch.inference_mode(False):  # or it could not be written to outside of it
            flat = torch.empty(max(CHUNK_ELEMENTS, height * V), device=device)
        setattr(_kept, name, flat)
    return flat[: height * V].view(height, V)


def _log_probability(x: torch.Tensor, p_token: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """log p of each row's token; from the logits where p is too small to carry all its digits."""
    lp = p_token.log()
    if not lp.amin().item() >= _LEAST:
        small = lp < _LEAST
        rows = x[small[:, 0]]
        lp[small] = rows.gather(1, token[small][:, None])[:, 0] - rows.logsumexp(-1)
    return lp


def _blocks(x: torch.Tensor) -> list[torch.Tensor]:
    """(B, rows, V) as 2-D views: one, if the rows are evenly spaced in memory, else one per sequence."""
    if x.shape[0] == 1 or x.stride(0) == x.stride(1) * x.shape[1]:
        return [x.flatten(0, 1)]
    return list(x.unbind(0))


def chunks(
    logits: torch.Tensor, out: torch.Tensor | None, read: torch.Tensor | None, T: int, height: int
) -> Iterator[tuple]:
    """(block of logits, block of out, rows of the block, their tokens), ``height`` rows at most."""
    B, rows = logits.shape[:2]
    sources = _blocks(logits)
    targets = _blocks(out) if out is not None else [None] * len(sources)
    if len(sources) != len(targets):
        sources = list(logits.unbind(0))
        targets = list(out.unbind(0))
    per_block = B // len(sources)
    for k, (source, target) in enumerate(zip(sources, targets)):
        first = k * per_block  # sequence
        if read is None and (rows == T or per_block == 1):
            count = per_block * T
            for start in range(0, count, height):
                end = min(start + height, count)
                yield source, target, slice(start, end), slice(first * T + start, first * T + end)
            continue
        if read is None:
            block = torch.ones(per_block, T, dtype=torch.bool, device=logits.device)
        else:
            block = read[first : first + per_block]
        seq, tok = block.nonzero(as_tuple=True)
        place = seq * rows + tok  # row within the block
        tokens = (seq + first) * T + tok
        for at, token in zip(place.split(height), tokens.split(height)):
            if at.numel() == 0:
                continue
            start, last = int(at[0]), int(at[-1])
            if last - start + 1 == at.numel():
                at = slice(start, last + 1)
            yield source, target, at, token


def clear(out: torch.Tensor, read: torch.Tensor | None, T: int) -> None:
    """Gradient 0 for every row that is not read, the positions beyond T included."""
    if out.shape[1] > T:
        out[:, T:].zero_()
    if read is not None:
        seq, tok = (~read).nonzero(as_tuple=True)
        out[seq, tok] = 0.0
