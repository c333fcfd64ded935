"""The same contract on CPU tensors, in chunks of rows that stay in the cache.

Each chunk of logits is read once, turned into probabilities in a scratch buffer, and written once as
a gradient: no [N, V] tensor exists besides the gradient. The per-token maths are the kernels' own
functions (`grpo_kernels.jit.on_torch`).
"""

import threading
from collections.abc import Callable, Iterator

import torch

from grpo_kernels.inputs import Coefs, Inputs
from grpo_kernels.jit import on_torch
from grpo_kernels.objective import limited_ratio, log_ratio, token_objective
from grpo_kernels.plan import Plan
from grpo_kernels.quantile import threshold
from grpo_kernels.torch_objective import (
    advantages,
    correct,
    expand,
    join,
    objective,
    rows_to_read,
    segments,
    weights,
)
from grpo_kernels.variants import TERMS

__all__ = ["correct", "join", "logprobs", "loss", "objective", "scale", "segments", "slope", "threshold"]

CHUNK_ELEMENTS = 1 << 21  # of fp32 scratch: 8 MiB
_TINY = 1e-30
_FLOOR = -1e30  # stands for −inf where p·x is formed: 0·(−1e30) is 0, 0·(−inf) is NaN


def run_rows(
    logits: torch.Tensor,
    ids: torch.Tensor,
    read: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    entropy: bool,
    out: torch.Tensor | None = None,
    slopes: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over the rows marked in ``read``: log-probabilities, entropies, and the gradient if asked.

    Args:
        logits: (B, rows, V), rows ≥ T.
        ids: (B, T).
        read: (B, T) bool; other rows are never read, and have log-probability, entropy and gradient 0.
        temperature: divides the logits; a number, or one per token, (B·T,).
        entropy: compute entropies too.
        out: (B, rows, V), takes the gradient; may be ``logits``.
        slopes: from indices into the B·T tokens and their log-probabilities to (∂L/∂lp, ∂L/∂H or None).

    Returns:
        (B, T) log-probabilities and (B, T) entropies (empty if not asked for), fp32.
    """
    B, T = ids.shape
    rows, V = logits.shape[1:]
    logps = torch.zeros(B * T, device=logits.device)
    entropies = torch.zeros(B * T, device=logits.device)
    flat_ids = ids.reshape(-1).long()
    if out is not None:
        _clear(out, read)
    height = max(1, min(B * rows, CHUNK_ELEMENTS // V))
    p_buffer = _scratch("p", height, V, logits.device)
    per_token = isinstance(temperature, torch.Tensor)
    heated = per_token or temperature != 1.0
    plain = logits.dtype == torch.float32 and not heated and not entropy  # softmax reads logits as they are
    x_buffer = None if plain else _scratch("x", height, V, logits.device)
    for source, target, at, tokens in _chunks(logits, out, read, height):
        x = source[at] if isinstance(at, slice) else source.index_select(0, at)
        p = p_buffer[: x.shape[0]]
        if not plain:
            x = x_buffer[: x.shape[0]].copy_(x)
            if heated:
                x.div_(temperature[tokens][:, None] if per_token else temperature)
        torch.softmax(x, -1, out=p)
        mass = p.sum(-1)  # softmax's own sum of a long row is off by up to 3e-5: divide by what p adds up to
        token = flat_ids[tokens]
        known = (token >= 0) & (token < V)
        token = torch.where(known, token, 0)[:, None]
        p_token = p.gather(1, token)[:, 0] / mass
        lp = torch.where(known, _log_probability(x, p_token, token), torch.nan)
        logps[tokens] = lp
        if entropy:
            depth = x.sub_(x.amax(-1, keepdim=True)).clamp_(min=_FLOOR)
            mean = torch.linalg.vecdot(p, depth) / mass
            entropies[tokens] = (mass / p.amax(-1)).log() - mean  # the first is log Σ exp(x − top)
        if out is None:
            continue

        g, h = slopes(tokens, lp)
        cold = 1.0 / (temperature[tokens] if per_token else temperature)
        direct = isinstance(at, slice) and target.dtype == p.dtype  # torch is slow at mixed-dtype arithmetic
        d = target[at] if direct else p
        d_token = g * (1.0 - p_token)
        if h is None:
            torch.mul(p, (-g * cold / mass)[:, None], out=d)
        else:
            d_token += h * p_token * (mean - depth.gather(1, token)[:, 0])
            depth.sub_(mean[:, None]).mul_(-h[:, None]).sub_(g[:, None]).mul_((cold / mass)[:, None])
            torch.mul(depth, p, out=d)
        d.scatter_(1, token, (d_token * cold)[:, None])
        if not direct:
            target[at] = d.to(target.dtype)
    return logps.view(B, T), entropies.view(B, T) if entropy else logps.new_empty(0)


_kept = threading.local()


def _scratch(name: str, height: int, V: int, device: torch.device) -> torch.Tensor:
    """An uninitialised buffer (height, V), fp32.

    On the CPU each thread keeps its own, of 8 MiB or one row: memory that is given back comes again page
    by page, which takes longer than the softmax over it.
    """
    if device.type != "cpu":
        return torch.empty(height, V, device=device)
    flat = getattr(_kept, name, None)
    if flat is None or flat.numel() < height * V:
        with torch.inference_mode(False):  # or it could not be written to outside of it
            flat = torch.empty(max(CHUNK_ELEMENTS, height * V))
        setattr(_kept, name, flat)
    return flat[: height * V].view(height, V)


def _log_probability(x: torch.Tensor, p_token: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """log p of each row's token; from the logits where p is too small to carry all its digits."""
    lp = p_token.log()
    small = p_token < _TINY
    if bool(small.any()):
        rows = x[small]
        lp[small] = rows.gather(1, token[small])[:, 0] - rows.logsumexp(-1)
    return lp


def _blocks(x: torch.Tensor) -> list[torch.Tensor]:
    """(B, rows, V) as 2-D views: one, if the rows are evenly spaced in memory, else one per sequence."""
    if x.shape[0] == 1 or x.stride(0) == x.stride(1) * x.shape[1]:
        return [x.flatten(0, 1)]
    return list(x.unbind(0))


def _chunks(logits: torch.Tensor, out: torch.Tensor | None, read: torch.Tensor, height: int) -> Iterator[tuple]:
    """(block of logits, block of out, rows of the block, their token indices), ``height`` rows at most."""
    B, rows = logits.shape[:2]
    T = read.shape[1]
    sources = _blocks(logits)
    targets = _blocks(out) if out is not None else [None] * len(sources)
    if len(sources) != len(targets):
        sources = list(logits.unbind(0))
        targets = list(out.unbind(0))
    per_block = B // len(sources)
    for k, (source, target) in enumerate(zip(sources, targets)):
        seq, tok = read[k * per_block : (k + 1) * per_block].nonzero(as_tuple=True)
        place = seq * rows + tok  # row within the block
        tokens = (seq + k * per_block) * T + tok
        for at, token in zip(place.split(height), tokens.split(height)):
            if at.numel() == 0:
                continue
            first, last = int(at[0]), int(at[-1])
            if last - first + 1 == at.numel():
                at = slice(first, last + 1)
            yield source, target, at, token


def _clear(out: torch.Tensor, read: torch.Tensor) -> None:
    """Gradient 0 for every row that is not read, the positions beyond T included."""
    T = read.shape[1]
    out[:, T:].zero_()
    if not bool(read.all()):
        seq, tok = (~read).nonzero(as_tuple=True)
        out[seq, tok] = 0.0


def logprobs(logits, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, stats); stats is empty, since `slope` makes the probabilities anew."""
    read, unread = rows_to_read(inputs, coefs, plan)
    logps, entropies = run_rows(logits, inputs.ids, read, _temperature(inputs, coefs), entropy=entropy)
    return *_mark_unread(unread, logps, entropies), logps.new_empty(0)


def loss(logits, out, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, entropies) of a token-level objective, whose gradient goes to ``out`` in the same pass."""
    read, unread = rows_to_read(inputs, coefs, plan)
    term = TERMS[plan.term]
    w, bonus = (expand(x, inputs).reshape(-1) for x in weights(inputs, coefs, plan))
    adv = expand(advantages(inputs, coefs, plan), inputs).reshape(-1)
    old, ref, is_weight = (
        None if x is None else expand(x.float(), inputs).reshape(-1) for x in (inputs.old, inputs.ref, inputs.is_weight)
    )
    function, kl = on_torch(term.function), on_torch(plan.kl_function) if plan.kl else None
    c = term.kind(*coefs.term)

    def slopes(at: torch.Tensor, lp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        lp_old = lp if old is None else old[at]
        r, passes = on_torch(limited_ratio)(on_torch(log_ratio)(lp, lp_old), coefs.limits, plan.limited)
        trust = None if is_weight is None else is_weight[at]
        _, _, _, d_ratio, d_lp = on_torch(token_objective)(
            r, passes, r, lp, lp_old, None if ref is None else ref[at], adv[at], trust, coefs.beta, coefs.limits, c,
            function, kl, plan.bias, False, trust is not None, plan.limited, plan.clamped,
        )  # fmt: skip
        return w[at] * (d_ratio + d_lp), -bonus[at] if plan.bonus else None

    logps, entropies = run_rows(
        logits, inputs.ids, read, _temperature(inputs, coefs), entropy=entropy, out=out, slopes=slopes
    )
    return _mark_unread(unread, logps, entropies)


def _temperature(inputs: Inputs, coefs: Coefs) -> float | torch.Tensor:
    """A number, or one per token."""
    if inputs.temperature is None:
        return coefs.temperature
    return expand(inputs.temperature.float(), inputs).reshape(-1)


def _mark_unread(unread: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """NaN at unmasked rows that were not read; values that were not asked for are empty."""
    return tuple(x.masked_fill_(unread, torch.nan) if x.numel() else x for x in values)


def slope(logits, out, inputs: Inputs, stats, g, h, up, coefs: Coefs) -> None:
    """out = (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], both factors times ``up``."""
    up = 1.0 if up is None else up.float()
    read = (g if h is None else g.abs() + h.abs()) != 0.0
    if inputs.mask is not None:
        read &= inputs.mask != 0
    g = (g * up).reshape(-1)
    h = None if h is None else (h * up).reshape(-1)

    def slopes(at: torch.Tensor, lp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return g[at], None if h is None else h[at]

    run_rows(logits, inputs.ids, read, _temperature(inputs, coefs), entropy=h is not None, out=out, slopes=slopes)


def scale(grad: torch.Tensor, out: torch.Tensor, up: torch.Tensor) -> None:
    """out = grad · up, in place or not; nothing moves in place where up is 1."""
    if out.data_ptr() == grad.data_ptr() and up.item() == 1.0:
        return
    # a row without a gradient has none, whatever the factor
    dead = None if bool(up.isfinite()) else grad == 0.0
    torch.mul(grad, up.to(torch.float32), out=out)
    if dead is not None:
        out.masked_fill_(dead, 0.0)
