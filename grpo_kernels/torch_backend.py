"""The same contract on CPU tensors, in chunks of rows that stay in the cache.

Each chunk of logits is read once, turned into probabilities in a scratch buffer, and written once as
a gradient: no [N, V] tensor exists besides the gradient. The per-token maths are the kernels' own
functions (`grpo_kernels.jit.on_torch`).
"""

import threading
from collections.abc import Callable, Iterator

import torch

from grpo_kernels import checks
from grpo_kernels.inputs import Coefs, Inputs
from grpo_kernels.plan import Plan
from grpo_kernels.quantile import threshold
from grpo_kernels.torch_objective import correct, join, objective, rows_to_read, segments
from grpo_kernels.torch_tokens import Sums, Tokens, expand, judge, total_slope

__all__ = ["correct", "gradient", "join", "logprobs", "loss", "objective", "scale", "segments", "slope", "threshold"]

CHUNK_ELEMENTS = 1 << 21  # of fp32 scratch: 8 MiB
_LEAST = -69.0  # of log p: what fp32 can say of p with all its digits
_FLOOR = -1e30  # stands for −inf where p·x is formed: 0·(−1e30) is 0, 0·(−inf) is NaN


def run_rows(
    logits: torch.Tensor,
    ids: torch.Tensor,
    read: torch.Tensor | None,
    temperature: float | torch.Tensor,
    *,
    entropy: bool,
    cap: tuple[float, float] | None = None,
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
        cap: (bound, inner): the logits are bound·tanh(inner·logits).
        out: (B, rows, V), takes the gradient; may be ``logits``.
        slopes: from some n of the B·T tokens, their log-probabilities and entropies (n, 1) to
            (∂L/∂lp, ∂L/∂H), (n, 1) each; entropies and ∂L/∂H may be None.

    Returns:
        (B, T) log-probabilities and (B, T) entropies (empty if not asked for), fp32.
    """
    B, T = ids.shape
    rows, V = logits.shape[1:]
    logps, entropies = (torch.zeros(B * T if asked else 0, device=logits.device) for asked in (True, entropy))
    flat_ids = ids.reshape(-1, 1).long()
    if out is not None:
        _clear(out, read, T)
    height = max(1, min(B * rows, CHUNK_ELEMENTS // V))
    p_buffer = _scratch("p", height, V, logits.device)
    per_token = isinstance(temperature, torch.Tensor)
    heated = per_token or temperature != 1.0
    plain = logits.dtype == torch.float32 and not (heated or entropy or cap)  # softmax reads logits as they are
    slack = None if cap is None or out is None else _scratch("slack", height, V, logits.device)
    x_buffer = None if plain else _scratch("x", height, V, logits.device)
    checked = checks.validates(logits.device)  # then ids of rows that are read lie in the vocabulary
    h = H = mean = None
    for source, target, at, tokens in _chunks(logits, out, read, T, height):  # [n, V] and, per row, [n, 1]
        x = source[at] if isinstance(at, slice) else source.index_select(0, at)
        p = p_buffer[: x.shape[0]]
        if not plain:
            x = x_buffer[: x.shape[0]].copy_(x)
            if cap:
                bound, inner = cap
                x.mul_(inner).tanh_()
                if out is not None:  # (1 − tanh²)·inner·bound, the derivative
                    torch.mul(x, x, out=slack[: x.shape[0]]).neg_().add_(1.0).mul_(inner * bound)
                x.mul_(bound)
            if heated:
                heat = temperature[tokens][:, None] if per_token else temperature
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
        logps[tokens] = lp.view(-1)
        if entropy:
            depth = x.sub_(x.amax(-1, keepdim=True)).clamp_(min=_FLOOR)
            mean = torch.linalg.vecdot(p, depth)[:, None] / mass
            H = (mass / p.amax(-1, keepdim=True)).log() - mean  # the first is log Σ exp(x − top)
            entropies[tokens] = H.view(-1)
        if out is None:
            continue

        g, h = slopes(tokens, lp, H)
        direct = isinstance(at, slice) and target.dtype == p.dtype  # torch is slow at mixed-dtype arithmetic
        d = target[at] if direct else p
        d_token, share = g * (1.0 - p_token), g / mass
        if h is not None:
            d_token = d_token + h * p_token * (mean - depth.gather(1, token))
        if heated:
            d_token, share = d_token / heat, share / heat
        if h is None:
            torch.mul(p, share.neg_(), out=d)
        else:
            pull = h / mass / heat if heated else h / mass
            depth.sub_(mean).mul_(pull.neg_()).sub_(share)
            torch.mul(depth, p, out=d)
        d.scatter_(1, token, d_token)
        if cap:
            d.mul_(slack[: d.shape[0]])
        if not direct:
            target[at] = d.to(target.dtype)
    return logps.view(B, T), entropies.view(B, T) if entropy else entropies


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


def _chunks(
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
        block = read[first : first + per_block] if read is not None else torch.ones(per_block, T, dtype=torch.bool)
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


def _clear(out: torch.Tensor, read: torch.Tensor | None, T: int) -> None:
    """Gradient 0 for every row that is not read, the positions beyond T included."""
    if out.shape[1] > T:
        out[:, T:].zero_()
    if read is not None:
        seq, tok = (~read).nonzero(as_tuple=True)
        out[seq, tok] = 0.0


def logprobs(logits, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, stats); stats is empty, since `slope` makes the probabilities anew."""
    read, unread = rows_to_read(inputs, coefs, plan)
    logps, entropies = run_rows(logits, inputs.ids, read, _temperature(inputs, coefs), entropy=entropy, cap=_cap(coefs))
    return *_mark_unread(unread, logps, entropies), logps.new_empty(0)


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
    return *_mark_unread(unread, logps, entropies), *sums.finish(read)


def gradient(logits, out, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, entropies) of an objective of single tokens, whose gradient goes to ``out``."""
    return loss(logits, out, inputs, coefs, plan, entropy)[:2]


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
    """out = (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], both factors times ``up``."""
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

    run_rows(
        logits, inputs.ids, read, _temperature(inputs, coefs), entropy=h is not None, cap=_cap(coefs), out=out,
        slopes=slopes,
    )  # fmt: skip


def scale(grad: torch.Tensor, out: torch.Tensor, up: torch.Tensor) -> None:
    """out = grad · up, in place or not; nothing moves in place where up is 1."""
    if out.data_ptr() == grad.data_ptr() and up.item() == 1.0:
        return
    # a row without a gradient has none, whatever the factor
    dead = None if bool(up.isfinite()) else grad == 0.0
    torch.mul(grad, up.to(torch.float32), out=out)
    if dead is not None:
        out.masked_fill_(dead, 0.0)
