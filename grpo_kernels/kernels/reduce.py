"""The [B, T] kernels: token objective, its sums per sequence, and the sums over sequences.

They run on log-probabilities, not on logits, and so cost next to nothing. Sums are taken in a fixed
order, in fp32 within a sequence's tile and in fp64 across tiles and sequences: two runs give the
same bits, and counts stay exact.
"""

from grpo_kernels.jit import jit, tl
from grpo_kernels.kernels.rewards import group_advantage
from grpo_kernels.kernels.rows import kernel, load_or
from grpo_kernels.metrics import SUM_NAMES, summarise
from grpo_kernels.objective import log_ratio, token_objective, weight

BLOCK = tl.constexpr(256)
SUMS = tl.constexpr(len(SUM_NAMES))
_INF = tl.constexpr(float("inf"))


@jit
def load_row(pointer, at, where, default):
    if pointer is not None:
        return tl.load(pointer + at, mask=where, other=0.0).to(tl.float32)
    else:
        return default


@jit
def add(total, value):
    return total + tl.sum(value, axis=0).to(tl.float64)


@kernel
def sequence_kernel(
    logps, entropy, mask, old, ref, adv, rewards, is_weight,  # [B, T] ×6, [B], [B, T]
    losses, g, h, partial,  # out: [B, T] ×3, [B, SUMS] fp64
    count, loss_scale, tokens,
    mask_b, mask_t, old_b, old_t, ref_b, ref_t, adv_b, adv_t, is_b, is_t, count_b,
    B, T, G, beta: tl.float32, w_factor: tl.float32, h_factor: tl.float32, adv_eps: tl.float32, c,
    TERM: tl.constexpr, REGION: tl.constexpr, KL: tl.constexpr, SCALE: tl.constexpr, UNBIASED: tl.constexpr,
    SKIP: tl.constexpr, BONUS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One program per sequence: ℓ, its derivatives by lp (g) and entropy (h), and the sums of the metrics."""
    seq = tl.program_id(0).to(tl.int64)
    factor = load_or(loss_scale, 0, 1.0)
    w = weight(load_or(count, seq * count_b, 1.0), w_factor, factor)
    w_slope = w if WEIGHTED else 1.0
    bonus = 0.0
    if BONUS:
        bonus = weight(load_or(tokens, 0, 1.0), h_factor, factor)
    spread = 0.0
    A_seq = 0.0
    if rewards is not None:
        A_seq, spread = group_advantage(rewards, seq, B, G, adv_eps, SCALE, UNBIASED)

    zero = tl.sum(tl.zeros([BLOCK], tl.float32), axis=0).to(tl.float64)
    s_loss = zero
    s_policy = zero
    s_tokens = zero
    s_kl = zero
    s_entropy = zero
    s_low = zero
    s_high = zero
    s_ratio = zero
    s_drift = zero
    ratio_min = tl.full([BLOCK], _INF, tl.float32)
    ratio_max = tl.full([BLOCK], -_INF, tl.float32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        tok = t.to(tl.int64)
        at = seq * T + tok
        inside = t < T
        live = inside
        if mask is not None:
            live = inside & (tl.load(mask + seq * mask_b + tok * mask_t, mask=inside, other=0) != 0)
        if rewards is not None:
            A = tl.where(inside, A_seq, 0.0)
        else:
            A = load_row(adv, seq * adv_b + tok * adv_t, live, 0.0)
        if SKIP:
            live = live & (A != 0.0)
        lp = tl.load(logps + at, mask=live, other=0.0)
        r = log_ratio(lp, load_row(old, seq * old_b + tok * old_t, live, lp))
        policy, kl, d_ratio, d_lp = token_objective(
            r, lp, load_row(ref, seq * ref_b + tok * ref_t, live, 0.0), A,
            load_row(is_weight, seq * is_b + tok * is_t, live, 1.0), beta, c, TERM, KL,
        )  # fmt: skip
        loss = policy
        if KL is not None:
            loss = policy + beta * kl
        loss = tl.where(live, loss, 0.0)
        if losses is not None:
            tl.store(losses + at, loss, mask=inside)
        if g is not None:
            tl.store(g + at, tl.where(live, w_slope * (d_ratio + d_lp), 0.0), mask=inside)
        if h is not None:
            tl.store(h + at, tl.where(live, -bonus, 0.0), mask=inside)

        s_policy = add(s_policy, w * loss)
        s_loss = add(s_loss, w * loss)
        s_tokens = add(s_tokens, tl.where(live, 1.0, 0.0))
        s_kl = add(s_kl, tl.where(live, kl, 0.0))
        if entropy is not None:
            H = tl.load(entropy + at, mask=live, other=0.0)
            s_entropy = add(s_entropy, H)
            if BONUS:
                s_loss = add(s_loss, -bonus * H)
        low, high = REGION(r, A, c)
        s_low = add(s_low, tl.where(live, low, 0.0))
        s_high = add(s_high, tl.where(live, high, 0.0))
        ratio = tl.exp(r)
        s_ratio = add(s_ratio, tl.where(live, ratio, 0.0))
        s_drift = add(s_drift, tl.where(live, ratio - 1.0 - r, 0.0))
        ratio_min = tl.minimum(ratio_min, tl.where(live, ratio, _INF))
        ratio_max = tl.maximum(ratio_max, tl.where(live, ratio, -_INF))

    row = partial + seq * SUMS
    empty = s_tokens == 0.0
    tl.store(row + 0, s_loss)
    tl.store(row + 1, s_policy)
    tl.store(row + 2, s_tokens)
    tl.store(row + 3, s_kl)
    tl.store(row + 4, s_entropy)
    tl.store(row + 5, s_low)
    tl.store(row + 6, s_high)
    tl.store(row + 7, s_ratio)
    tl.store(row + 8, s_drift)
    reward = zero
    scored = zero
    flat = zero
    if rewards is not None:
        reward = tl.load(rewards + seq).to(tl.float64)
        scored = tl.where(reward == reward, 1.0, 0.0).to(tl.float64)
        reward = tl.where(reward == reward, reward, 0.0)
        flat = tl.where(spread == 0.0, 1.0, 0.0).to(tl.float64)
    tl.store(row + 9, reward)
    tl.store(row + 10, reward * reward)
    tl.store(row + 11, scored)
    tl.store(row + 12, flat)
    tl.store(row + 13, zero + 1.0)
    tl.store(row + 14, tl.min(ratio_min, axis=0).to(tl.float64))
    tl.store(row + 15, tl.where(empty, _INF, s_low / s_tokens))
    tl.store(row + 16, tl.max(ratio_max, axis=0).to(tl.float64))
    tl.store(row + 17, tl.where(empty, -_INF, s_high / s_tokens))


@jit
def column(partial, B, at: tl.constexpr, HOW: tl.constexpr):
    """Sum, minimum or maximum of one column of the partial sums [B, SUMS], in fp64."""
    i = tl.arange(0, 128)
    start_value = 0.0 if HOW == "sum" else (_INF if HOW == "min" else -_INF)
    acc = tl.full([128], start_value, tl.float64)
    for start in range(0, B, 128):
        x = tl.load(partial + (start + i).to(tl.int64) * SUMS + at, mask=start + i < B, other=start_value)
        if HOW == "sum":
            acc += x
        elif HOW == "min":
            acc = tl.minimum(acc, x)
        else:
            acc = tl.maximum(acc, x)
    if HOW == "sum":
        return tl.sum(acc, axis=0)
    elif HOW == "min":
        return tl.min(acc, axis=0)
    else:
        return tl.max(acc, axis=0)


@kernel
def total_kernel(partial, sums, loss, metrics, B):
    """One program: the sums over sequences [SUMS] fp64, the loss [] and the metrics, fp32."""
    total = column(partial, B, 0, "sum")
    policy = column(partial, B, 1, "sum")
    tokens = column(partial, B, 2, "sum")
    kl = column(partial, B, 3, "sum")
    entropy = column(partial, B, 4, "sum")
    low = column(partial, B, 5, "sum")
    high = column(partial, B, 6, "sum")
    ratio = column(partial, B, 7, "sum")
    drift = column(partial, B, 8, "sum")
    reward = column(partial, B, 9, "sum")
    reward_square = column(partial, B, 10, "sum")
    scored = column(partial, B, 11, "sum")
    flat = column(partial, B, 12, "sum")
    sequences = column(partial, B, 13, "sum")
    ratio_min = column(partial, B, 14, "min")
    low_min = column(partial, B, 15, "min")
    ratio_max = column(partial, B, 16, "max")
    high_max = column(partial, B, 17, "max")
    every = (total, policy, tokens, kl, entropy, low, high, ratio, drift, reward, reward_square, scored, flat,
             sequences, ratio_min, low_min, ratio_max, high_max)  # fmt: skip
    for k in tl.static_range(SUMS):
        tl.store(sums + k, every[k])
    tl.store(loss, total.to(tl.float32))
    values = summarise(policy, tokens, kl, entropy, low, high, ratio, drift, reward, reward_square, scored, flat,
                       sequences, ratio_min, low_min, ratio_max, high_max)  # fmt: skip
    for k in tl.static_range(len(values)):
        tl.store(metrics + k, values[k].to(tl.float32))
