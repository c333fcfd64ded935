"""The [B, T] maths on torch tensors, with the kernels' own functions (`grpo_kernels.jit.on_torch`).

Padded input is [B, T]; packed input is [1, N] with the bounds of its B sequences. What belongs to a
sequence is (B, 1) either way; `expand` and `per_sequence` are all that tells the two apart.
"""

import torch

from grpo_kernels.advantages import moments, relative_advantages
from grpo_kernels.correction import Correction, mismatch, outside, within
from grpo_kernels.inputs import Coefs, Inputs
from grpo_kernels.jit import on_torch
from grpo_kernels.metrics import metrics_of
from grpo_kernels.objective import drift_of, keeps_sequence, limited_ratio, log_ratio, token_objective, weight
from grpo_kernels.plan import Plan
from grpo_kernels.variants import LEVELS, TERMS


def expand(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Something per token, per sequence (B, 1), or one number, as one per token."""
    shape = inputs.ids.shape
    if inputs.cu is not None and x.dim() and x.shape[0] > 1:  # packed: a row per sequence
        x = torch.cat([x, x.new_zeros(1, 1)])[inputs.segments.long(), 0]
    return x.expand(shape)


def per_sequence(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Sums over the tokens of each sequence, (B, 1) fp64."""
    if inputs.cu is None:
        return x.sum(1, keepdim=True, dtype=torch.float64)
    x, cu = x.double().reshape(-1), inputs.cu.long()
    return torch.segment_reduce(x, "sum", offsets=cu, initial=0.0, unsafe=True)[:, None]


def objective(
    logps: torch.Tensor, entropies: torch.Tensor | None, inputs: Inputs, coefs: Coefs, plan: Plan, weighted: bool
) -> tuple[torch.Tensor, ...]:
    """The [B, T] maths: (loss [], ℓ, local, spread, share, h, sums [S], metrics [M]).

    ``local`` is ∂L/∂lp of a token itself. Where a ratio belongs to the whole sequence, ``spread`` is
    ∂L/∂r and ``share`` what each token moves it by, for `join`; else both are empty.
    """
    read, _ = rows_to_read(inputs, coefs, plan)
    term, own, level = TERMS[plan.term], plan.own, LEVELS[plan.level]
    c = term.kind(*coefs.term)

    def known(x: torch.Tensor | None) -> torch.Tensor | None:
        """What stands at positions that do not count may be anything."""
        return None if x is None else torch.where(read, expand(x.float(), inputs), 0.0)

    adv = advantages(inputs, coefs, plan)
    A, lp, ref = known(adv), known(logps), known(inputs.ref)
    old = lp if inputs.old is None else known(inputs.old)
    r_token = on_torch(log_ratio)(lp, old)
    size = per_sequence(read, inputs)
    inverse = 1.0 / size.clamp(min=1.0)  # (B, 1)

    r_seq = step = None
    if level.how:
        step = inverse if level.how == "mean" else torch.ones_like(inverse)
        r_seq = (per_sequence(torch.where(read, r_token, 0.0), inputs) * step).float()
    r, passes = on_torch(limited_ratio)(r_token if r_seq is None else expand(r_seq, inputs), coefs.limits, plan.limited)

    r_term, own_slope, statistic = r, None, None
    if own is not None:
        x, own_slope = on_torch(own.function)(r_token, A, c)
        if inputs.is_weight is not None and not plan.weight_once:
            x = x + on_torch(own.correction)(torch.where(read, expand(inputs.is_weight.float(), inputs), 1.0))
        statistic = per_sequence(torch.where(read, x, 0.0), inputs) * (inverse if own.how == "mean" else 1.0)
        if inputs.is_weight is not None and plan.weight_once:
            statistic = statistic + on_torch(own.correction)(inputs.is_weight.float())
        statistic = statistic.float()
        r_term = expand(statistic, inputs)

    trust = torch.ones_like(lp)
    if inputs.is_weight is not None and own is None:
        trust = torch.where(read, expand(inputs.is_weight.float(), inputs), 1.0)
    if plan.off_policy:
        drift = on_torch(drift_of)(lp, old if inputs.sampling is None else known(inputs.sampling))
        drift = per_sequence(drift, inputs) * inverse
        keep = on_torch(keeps_sequence)(expand(drift.float(), inputs), A, coefs.drift)
        trust = torch.where(keep != 0.0, trust, 0.0)
    H = torch.zeros_like(lp) if entropies is None else known(entropies)
    chosen = read
    if inputs.threshold is not None:
        chosen = read & (inputs.threshold <= H)
        trust = torch.where(chosen, trust, 0.0)

    policy, kl, d_term, d_ratio, d_lp = on_torch(token_objective)(
        r, passes, r_term, lp, old, ref, A, trust, coefs.beta, coefs.limits, c, on_torch(term.function),
        on_torch(plan.kl_function) if plan.kl else None, plan.bias, own is not None,
        plan.trusts(inputs), plan.limited, plan.clamped,
    )  # fmt: skip
    losses = torch.where(read, policy + coefs.beta * kl if plan.kl else policy, 0.0)
    w, bonus = (expand(x, inputs) for x in weights(inputs, coefs, plan))

    def slope(x: torch.Tensor) -> torch.Tensor:
        return torch.where(read, (w if weighted else 1.0) * x, 0.0)

    spread, share = lp.new_empty(0), lp.new_empty(0)
    if plan.spread == "level":
        local, spread = slope(d_term + d_lp), slope(d_ratio)
        share = torch.where(read, expand(step.float(), inputs), 0.0)
    elif plan.spread == "term":
        local, spread = slope(d_ratio + d_lp), slope(d_term)
        share = torch.where(read, own_slope * expand(inverse.float(), inputs), 0.0)
    else:
        local = slope(d_term + d_ratio + d_lp)
    h = torch.where(chosen, -bonus, 0.0)

    def total(x: torch.Tensor, where: torch.Tensor = read) -> torch.Tensor:
        return torch.where(where, x, 0.0).sum(dtype=torch.float64)

    ratio = r.exp()
    ranked = read & (ratio == ratio)
    policy_loss = total(w * losses)
    reward_sums = _reward_sums(inputs, coefs, plan)
    low, high, dual, clips, low_min, high_max = _clip_sums(
        term, (r, r_term, lp, old, A, c), (r_seq, statistic, adv), read, size, inputs, coefs, plan
    )
    sums = torch.stack(
        [
            policy_loss - total(bonus * H, chosen), policy_loss, size.sum(), total(kl), total(H), low, high, dual,
            clips, total(ratio), total(ratio - 1.0 - r), *reward_sums,
            torch.where(ranked, ratio, torch.inf).amin().double(), low_min,
            torch.where(ranked, ratio, -torch.inf).amax().double(), high_max,
        ]
    )  # fmt: skip
    return sums[0].float(), losses, local, spread, share, h, sums, metrics_of(sums)


def _clip_sums(term, tokens, sequences, read, size, inputs: Inputs, coefs: Coefs, plan: Plan) -> list[torch.Tensor]:
    """(Σ low, Σ high, Σ dual, how many, smallest low and largest high of a sequence) of the term's region."""
    region = on_torch(term.region)
    if plan.clip_once:  # one value per sequence, those without tokens included
        r_seq, statistic, A = sequences
        r = torch.zeros_like(A) if r_seq is None else on_torch(limited_ratio)(r_seq, coefs.limits, plan.limited)[0]
        values = region(r, r if statistic is None else statistic, r, r, A, tokens[-1])
        low, high, dual = (torch.as_tensor(x, device=A.device).double().expand(A.shape) for x in values)
        count = (A != 0.0).double() if plan.skip else torch.ones_like(low)
        low, high, dual = low * count, high * count, dual * count
    else:
        values = (torch.as_tensor(x, device=read.device).expand(read.shape) for x in region(*tokens))
        low, high, dual = (per_sequence(torch.where(read, x, 0.0), inputs) for x in values)
        count = size
    low_share, high_share = low / count, high / count  # NaN where nothing counts
    return [low.sum(), high.sum(), dual.sum(), count.sum(), low_share.nan_to_num(torch.inf).amin(),
            high_share.nan_to_num(-torch.inf).amax()]  # fmt: skip


def join(local, spread, share, up, cu) -> torch.Tensor:
    """g = up·local + share·Σ up·spread, the sum over each sequence."""
    inputs = Inputs(ids=local, cu=cu)
    if cu is not None:
        inputs = inputs._replace(segments=segments(None, cu, local.shape[1])[0])
    if up is not None:
        up = up.float()
        spread, local = (torch.where(x == 0.0, 0.0, x * up) for x in (spread, local))
    common = expand(per_sequence(spread, inputs).float(), inputs)
    return local + torch.where(share == 0.0, 0.0, share * common)


def correct(old, inputs: Inputs, coefs: Coefs, correction: Correction) -> torch.Tensor:
    """Importance weights, (B, T) or (B, 1), from the sampler's log-probabilities."""
    live = _live(inputs)
    d = torch.where(live, on_torch(mismatch)(old.float(), inputs.sampling.float()), 0.0)
    low, high = coefs.correction_low, coefs.correction_high
    if correction.gated:
        mean = (per_sequence(d, inputs) / per_sequence(live, inputs).clamp(min=1.0)).float().exp()
        gone = on_torch(outside)(mean, low, high)
        return torch.where(expand(gone.float(), inputs) != 0.0, 0.0, d.exp())
    ratio = per_sequence(d, inputs).float().exp() if correction.per_sequence else d.exp()
    return on_torch(within)(ratio, low, high, correction.truncate)


def segments(mask: torch.Tensor | None, cu: torch.Tensor, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of packed input: the sequence of each token [N] int32, and the unmasked tokens of each sequence [B]."""
    at = torch.arange(N, device=cu.device)
    numbers = torch.searchsorted(cu[1:].contiguous(), at, right=True, out_int32=True)
    if mask is None:
        return numbers, cu.diff().float()
    count = torch.nn.functional.pad((mask.reshape(-1) != 0).cumsum(0), (1, 0))
    return numbers, count[cu.long()].diff().float()


def advantages(inputs: Inputs, coefs: Coefs, plan: Plan) -> torch.Tensor:
    """As given, or (B, 1) from the rewards; fp32."""
    if inputs.rewards is None:
        return inputs.adv.float()
    return relative_advantages(
        inputs.rewards.float(), int(coefs.num_generations), plan.scale_rewards, plan.unbiased, coefs.adv_eps,
        inputs.batch_std,
    )[:, None]  # fmt: skip


def _live(inputs: Inputs) -> torch.Tensor:
    """(B, T) bool, contiguous whatever the mask is: results take their strides from it."""
    if inputs.mask is None:
        return torch.ones(inputs.ids.shape, dtype=torch.bool, device=inputs.ids.device)
    return (inputs.mask != 0).contiguous()


def rows_to_read(inputs: Inputs, coefs: Coefs, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) bool each: rows to read, and unmasked rows that are left unread."""
    counted = _live(inputs)
    if inputs.cu is not None:
        counted = counted & (inputs.segments < inputs.sequences)
    if not plan.skip:
        return counted, torch.zeros_like(counted)
    idle = expand(advantages(inputs, coefs, plan) if inputs.gate is None else inputs.gate, inputs) == 0.0
    return counted & ~idle, counted & idle


def weights(inputs: Inputs, coefs: Coefs, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """(w, w_H), each a number or (B, 1)."""

    def of(count: torch.Tensor | None, factor: float) -> torch.Tensor:
        count = one if count is None else count.float()
        scale = one if inputs.loss_scale is None else inputs.loss_scale.float()
        return on_torch(weight)(count, factor, scale).reshape(-1, 1)

    one = torch.ones((), device=inputs.ids.device)
    return of(inputs.count, coefs.w_factor), of(inputs.tokens, coefs.h_factor if plan.bonus else 0.0)


def _reward_sums(inputs: Inputs, coefs: Coefs, plan: Plan) -> list[torch.Tensor]:
    """Σ R, Σ R², how many are not NaN, how many sequences lie in a group without spread, and B."""
    size = torch.tensor(float(inputs.sequences), dtype=torch.float64, device=inputs.ids.device)
    if inputs.rewards is None:
        return [torch.zeros_like(size)] * 4 + [size]
    rewards = inputs.rewards.float()
    valid = rewards == rewards
    if plan.scale_rewards != "batch":
        spread = moments(rewards.view(-1, int(coefs.num_generations)), plan.unbiased)[1]
    else:
        spread = moments(rewards.view(1, -1), plan.unbiased)[1] if inputs.batch_std is None else inputs.batch_std
    flat = (spread == 0.0).double().mean() * size
    known = torch.where(valid, rewards, 0.0).double()
    return [known.sum(), known.square().sum(), valid.sum(dtype=torch.float64), flat, size]
