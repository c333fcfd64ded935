"""The same contract on CPU tensors, in chunks of rows that stay in the cache.

Each chunk of logits is read once, turned into probabilities in a scratch buffer, and written once as
a gradient: no [N, V] tensor exists besides the gradient. The per-token maths are the kernels' own
functions (`grpo_kernels.jit.on_torch`).
"""

from collections.abc import Callable, Iterator

import torch

from grpo_kernels.advantages import group_advantages, moments
from grpo_kernels.inputs import Coefs, Inputs
from grpo_kernels.jit import on_torch
from grpo_kernels.metrics import metrics_of
from grpo_kernels.objective import log_ratio, token_objective, weight
from grpo_kernels.variants import TERMS, Plan

CHUNK_ELEMENTS = 1 << 21  # of fp32 scratch: 8 MiB, measured fastest from 512×32000 to 256×151936
_TINY = 1e-30
_FLOOR = -1e30  # stands for −inf where p·x is formed: 0·(−1e30) is 0, 0·(−inf) is NaN


def run_rows(
    logits: torch.Tensor,
    ids: torch.Tensor,
    read: torch.Tensor,
    temperature: float,
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
        temperature: divides the logits.
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
    p_buffer = torch.empty(height, V, device=logits.device)
    plain = logits.dtype == torch.float32 and temperature == 1.0 and not entropy  # softmax reads logits as they are
    x_buffer = None if plain else torch.empty(height, V, device=logits.device)
    for source, target, at, tokens in _chunks(logits, out, read, height):
        x = source[at] if isinstance(at, slice) else source.index_select(0, at)
        p = p_buffer[: x.shape[0]]
        if not plain:
            x = x_buffer[: x.shape[0]].copy_(x)
            if temperature != 1.0:
                x.div_(temperature)
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
        direct = isinstance(at, slice) and target.dtype == p.dtype  # torch is slow at mixed-dtype arithmetic
        d = target[at] if direct else p
        d_token = g * (1.0 - p_token)
        if h is None:
            torch.mul(p, (-g / (mass * temperature))[:, None], out=d)
        else:
            d_token += h * p_token * (mean - depth.gather(1, token)[:, 0])
            depth.sub_(mean[:, None]).mul_(-h[:, None]).sub_(g[:, None]).div_((mass * temperature)[:, None])
            torch.mul(depth, p, out=d)
        d.scatter_(1, token, (d_token / temperature)[:, None])
        if not direct:
            target[at] = d.to(target.dtype)
    return logps.view(B, T), entropies.view(B, T) if entropy else logps.new_empty(0)


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
    read, unread = _rows_to_read(inputs, coefs, plan)
    logps, entropies = run_rows(logits, inputs.ids, read, coefs.temperature, entropy=entropy)
    return *_mark_unread(unread, logps, entropies), logps.new_empty(0)


def loss(logits, out, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, entropies) of a token-level objective, whose gradient goes to ``out`` in the same pass."""
    B, T = inputs.ids.shape
    read, unread = _rows_to_read(inputs, coefs, plan)
    flat = {name: _flat(value) for name, value in _token_tensors(inputs, coefs, plan).items()}
    w, bonus = (x.expand(B, T).reshape(-1) for x in _weights(inputs, coefs, plan))

    def slopes(tokens: torch.Tensor, lp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        here = {name: None if value is None else value[tokens] for name, value in flat.items()}
        _, _, d_ratio, d_lp, _ = _objective(lp, here, coefs, plan)
        return w[tokens] * (d_ratio + d_lp), -bonus[tokens] if plan.bonus else None

    logps, entropies = run_rows(logits, inputs.ids, read, coefs.temperature, entropy=entropy, out=out, slopes=slopes)
    return _mark_unread(unread, logps, entropies)


def _mark_unread(unread: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """NaN at unmasked rows that were not read; values that were not asked for are empty."""
    return tuple(x.masked_fill_(unread, torch.nan) if x.numel() else x for x in values)


def slope(logits, out, ids, mask, stats, g, h, up, coefs: Coefs) -> None:
    """out = (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], both factors times ``up``."""
    up = 1.0 if up is None else up.float()
    g = (g * up).reshape(-1)
    h = None if h is None else (h * up).reshape(-1)
    live = (g if h is None else g.abs() + h.abs()).view(ids.shape) != 0.0
    read = live if mask is None else live & (mask != 0)

    def slopes(tokens: torch.Tensor, lp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return g[tokens], None if h is None else h[tokens]

    run_rows(logits, ids, read, coefs.temperature, entropy=h is not None, out=out, slopes=slopes)


def scale(grad: torch.Tensor, out: torch.Tensor, up: torch.Tensor) -> None:
    """out = grad · up, in place or not; nothing moves in place where up is 1."""
    if out.data_ptr() != grad.data_ptr() or up.item() != 1.0:
        torch.mul(grad, up.to(torch.float32), out=out)


def objective(
    logps: torch.Tensor, entropies: torch.Tensor | None, inputs: Inputs, coefs: Coefs, plan: Plan, weighted: bool
) -> tuple[torch.Tensor, ...]:
    """The [B, T] maths: (loss [], ℓ [B, T], ∂/∂lp [B, T], ∂/∂H [B, T], sums [S], metrics [M])."""
    B, T = inputs.ids.shape
    read, _ = _rows_to_read(inputs, coefs, plan)
    tensors = _token_tensors(inputs, coefs, plan)
    # what stands at positions that do not count may be anything
    here = {name: None if value is None else torch.where(read, value, 0.0) for name, value in tensors.items()}
    lp = torch.where(read, logps, 0.0)
    policy, kl, d_ratio, d_lp, r = _objective(lp, here, coefs, plan)
    losses = torch.where(read, policy + coefs.beta * kl if plan.kl else policy, 0.0)

    w, bonus = (x.expand(B, T) for x in _weights(inputs, coefs, plan))
    g = torch.where(read, (d_ratio + d_lp) * (w if weighted else 1.0), 0.0)
    h = torch.where(read, -bonus, 0.0)

    def total(x: torch.Tensor) -> torch.Tensor:
        return torch.where(read, x, 0.0).sum(dtype=torch.float64)

    term = TERMS[plan.term]
    low, high = on_torch(term.region)(r, here["adv"], term.kind(*coefs.term))
    ratio = r.exp()
    count = read.sum(1, dtype=torch.float64)
    low_share = torch.where(read, low, 0.0).sum(1, dtype=torch.float64) / count  # NaN in an empty sequence
    high_share = torch.where(read, high, 0.0).sum(1, dtype=torch.float64) / count
    H = torch.zeros_like(lp) if entropies is None else torch.where(read, entropies, 0.0)
    policy_loss = total(w * losses)
    sums = torch.stack(
        [
            policy_loss - total(bonus * H), policy_loss, count.sum(), total(kl), total(H), total(low), total(high),
            total(ratio), total(ratio - 1.0 - r), *_reward_sums(inputs, coefs, plan),
            torch.where(read, ratio, torch.inf).amin().double(), low_share.nan_to_num(torch.inf).amin(),
            torch.where(read, ratio, -torch.inf).amax().double(), high_share.nan_to_num(-torch.inf).amax(),
        ]
    )  # fmt: skip
    return sums[0].float(), losses, g, h, sums, metrics_of(sums)


def _objective(lp, here: dict, coefs: Coefs, plan: Plan) -> tuple[torch.Tensor, ...]:
    """(ℓ_policy, kl, ∂/∂r, ∂/∂lp, r) of tokens, all tensors of the shape of ``lp``."""
    term = TERMS[plan.term]
    r = on_torch(log_ratio)(lp, lp if here["old"] is None else here["old"])
    values = on_torch(token_objective)(
        r, lp, here["ref"], here["adv"], here["is_weight"], coefs.beta, term.kind(*coefs.term),
        on_torch(term.function), on_torch(plan.kl_function) if plan.kl else None,
    )  # fmt: skip
    return *values, r


def _token_tensors(inputs: Inputs, coefs: Coefs, plan: Plan) -> dict[str, torch.Tensor | None]:
    """The per-token inputs as (B, T) fp32."""
    shape = inputs.ids.shape
    one = torch.ones((), device=inputs.ids.device)
    given = {"old": inputs.old, "ref": inputs.ref, "is_weight": one if inputs.is_weight is None else inputs.is_weight}
    tensors = {name: None if x is None else x.float().expand(shape) for name, x in given.items()}
    return {**tensors, "adv": _advantages(inputs, coefs, plan)}


def _advantages(inputs: Inputs, coefs: Coefs, plan: Plan) -> torch.Tensor:
    adv = inputs.adv
    if inputs.rewards is not None:
        adv = group_advantages(
            inputs.rewards.float(), inputs.num_generations, scale_rewards=plan.scale_rewards,
            unbiased=plan.unbiased, eps=coefs.adv_eps,
        )[:, None]  # fmt: skip
    return adv.float().expand(inputs.ids.shape)


def _rows_to_read(inputs: Inputs, coefs: Coefs, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) bool each: rows to read, and unmasked rows that are left unread."""
    shape, device = inputs.ids.shape, inputs.ids.device
    counted = torch.ones(shape, dtype=torch.bool, device=device) if inputs.mask is None else inputs.mask != 0
    if not plan.skip:
        return counted, torch.zeros_like(counted)
    idle = _advantages(inputs, coefs, plan) == 0.0
    return counted & ~idle, counted & idle


def _weights(inputs: Inputs, coefs: Coefs, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """(w, w_H), each broadcastable to (B, T)."""

    def of(count: torch.Tensor | None, factor: float) -> torch.Tensor:
        count = one if count is None else count.float()
        scale = one if inputs.loss_scale is None else inputs.loss_scale.float()
        return on_torch(weight)(count, factor, scale).reshape(-1, 1)

    one = torch.ones((), device=inputs.ids.device)

    return of(inputs.count, coefs.w_factor), of(inputs.tokens, coefs.h_factor if plan.bonus else 0.0)


def _reward_sums(inputs: Inputs, coefs: Coefs, plan: Plan) -> list[torch.Tensor]:
    """Σ R, Σ R², how many are not NaN, how many sequences lie in a group without spread, and B."""
    B = inputs.ids.shape[0]
    size = torch.tensor(float(B), dtype=torch.float64, device=inputs.ids.device)
    if inputs.rewards is None:
        return [torch.zeros_like(size)] * 4 + [size]
    rewards = inputs.rewards.float()
    valid = rewards == rewards
    rows = rewards.view(1, -1) if plan.scale_rewards == "batch" else rewards.view(-1, inputs.num_generations)
    flat = (moments(rows, plan.unbiased)[1] == 0.0).double().mean() * B
    known = torch.where(valid, rewards, 0.0).double()
    return [known.sum(), known.square().sum(), valid.sum(dtype=torch.float64), flat, size]


def _flat(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.reshape(-1)
