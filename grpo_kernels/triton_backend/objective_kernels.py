"""The [B, T] kernels: token objective, its sums per sequence, and the sums over sequences.

They run on log-probabilities, not on logits, and so cost next to nothing. Sums over sequences are
taken in fp64, in a fixed order.
"""

from grpo_kernels.objective.advantages import is_known
from grpo_kernels.objective.language import jit, tl
from grpo_kernels.objective.metrics import summarise
from grpo_kernels.objective.token import (
    drift_of,
    keeps_sequence,
    limited_ratio,
    log_ratio,
    scaled,
    token_objective,
    weight,
)
from grpo_kernels.triton_backend.rewards import group_advantage
from grpo_kernels.triton_backend.row_kernels import kernel, load_or
from grpo_kernels.triton_backend.sequence_kernels import BLOCK, SUMS, add, bounds, load_row, nothing, unmasked

_INF = tl.constexpr(float("inf"))


@jit
def advantages_at(adv, at, A_seq, inside):
    if adv is not None:
        return tl.load(adv + at, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.where(inside, A_seq, 0.0)


@kernel
def sequence_kernel(
    logps, entropy, mask, old, ref, sampling, adv, rewards, gate, is_weight,  # [B, T] ×7, [B], [B, T] ×2
    losses, local, spread, share, h, partial,  # out: [B, T] ×5, [B, SUMS] fp64
    count, loss_scale, tokens, entropy_coef, threshold, groups, batch_std, cu,
    mask_b, mask_t, old_b, old_t, ref_b, ref_t, samp_b, samp_t, adv_b, adv_t, gate_b, gate_t, is_b, is_t, count_b,
    at_b, B, T, G, beta: tl.float32, w_factor: tl.float32, h_factor: tl.float32, adv_eps: tl.float32,
    drift_limit: tl.float32, limits, c,
    TERM: tl.constexpr, REGION: tl.constexpr, STATISTIC: tl.constexpr, CORRECTION: tl.constexpr, OWN: tl.constexpr,
    HOW: tl.constexpr, SPREAD: tl.constexpr, KL: tl.constexpr, BIAS: tl.constexpr, OFF_POLICY: tl.constexpr,
    LIMITED: tl.constexpr, CLAMPED: tl.constexpr, TRUST: tl.constexpr, SUMMARY: tl.constexpr,
    WEIGHT_ONCE: tl.constexpr, CLIP_ONCE: tl.constexpr, SCALE: tl.constexpr, UNBIASED: tl.constexpr,
    SKIP: tl.constexpr, BONUS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One program per sequence: ℓ, its derivatives, and the sums of the metrics.

    ``local`` is ∂L/∂lp of the token itself, ``h`` is ∂L/∂H. With SPREAD ("level" or "term") the
    sequence also has ``spread``, ∂L/∂r of the ratio that all its tokens share, and ``share``, what each
    moves it by: `spread_kernel` puts them together. HOW ("", "mean", "sum") makes the level's log
    ratio of the tokens', OWN ("", "mean", "sum") the term's own statistic; SUMMARY: either exists, or
    an off-policy mask, so that the sequence is read twice.
    """
    seq = tl.program_id(0).to(tl.int64)
    first, last, end = bounds(cu, seq, B, T)
    factor = load_or(loss_scale, 0, 1.0)
    w = weight(load_or(count, seq * count_b, 1.0), w_factor, factor)
    w_slope = w if WEIGHTED else 1.0
    bonus = 0.0
    if BONUS:
        bonus = weight(load_or(tokens, 0, 1.0), h_factor * load_or(entropy_coef, 0, 1.0), factor)
    spread_of_rewards = 0.0
    A_seq = 0.0
    if rewards is not None:
        A_seq, spread_of_rewards = group_advantage(rewards, groups, batch_std, seq, B, G, adv_eps, SCALE, UNBIASED)

    size = nothing()
    total_r = nothing()
    total_own = nothing()
    total_drift = nothing()
    if SUMMARY:
        for start in range(first, last, BLOCK):
            tok = start + tl.arange(0, BLOCK).to(tl.int64)
            live = unmasked(mask, seq * mask_b + tok * mask_t, tok < last)
            A = advantages_at(adv, seq * adv_b + tok * adv_t, A_seq, live)
            if SKIP:
                live = live & (load_row(gate, seq * gate_b + tok * gate_t, live, A) != 0.0)
            lp = tl.load(logps + seq * at_b + tok, mask=live, other=0.0)
            lp_old = load_row(old, seq * old_b + tok * old_t, live, lp)
            r = log_ratio(lp, lp_old)
            size = add(size, tl.where(live, 1.0, 0.0))
            total_r = add(total_r, tl.where(live, r, 0.0))
            if OWN != "":
                x, _ = STATISTIC(r, A, c)
                if is_weight is not None:
                    if not WEIGHT_ONCE:
                        x = x + CORRECTION(load_row(is_weight, seq * is_b + tok * is_t, live, 1.0))
                total_own = add(total_own, tl.where(live, x, 0.0))
            if OFF_POLICY:
                drift = drift_of(lp, load_row(sampling, seq * samp_b + tok * samp_t, live, lp_old))
                total_drift = add(total_drift, tl.where(live, drift, 0.0))
    size = tl.where(size < 1.0, 1.0, size)
    inverse = (1.0 / size).to(tl.float32)
    mean_drift = (total_drift / size).to(tl.float32)
    r_seq = total_r.to(tl.float32)
    step = 1.0
    if HOW == "mean":
        r_seq = (total_r / size).to(tl.float32)
        step = inverse
    own = total_own.to(tl.float32)
    if OWN == "mean":
        own = (total_own / size).to(tl.float32)
    if OWN != "":
        if is_weight is not None:
            if WEIGHT_ONCE:
                own += CORRECTION(tl.load(is_weight + seq * is_b).to(tl.float32))

    s_loss = nothing()
    s_policy = nothing()
    s_tokens = nothing()
    s_kl = nothing()
    s_entropy = nothing()
    s_low = nothing()
    s_high = nothing()
    s_cap = nothing()
    s_ratio = nothing()
    s_drift = nothing()
    ratio_min = tl.full([BLOCK], _INF, tl.float32)
    ratio_max = tl.full([BLOCK], -_INF, tl.float32)
    for start in range(first, end, BLOCK):
        tok = start + tl.arange(0, BLOCK).to(tl.int64)
        at = seq * at_b + tok
        inside = tok < end
        live = unmasked(mask, seq * mask_b + tok * mask_t, tok < last)
        A = advantages_at(adv, seq * adv_b + tok * adv_t, A_seq, live)
        if SKIP:
            live = live & (load_row(gate, seq * gate_b + tok * gate_t, live, A) != 0.0)
        lp = tl.load(logps + at, mask=live, other=0.0)
        lp_old = load_row(old, seq * old_b + tok * old_t, live, lp)
        r_token = log_ratio(lp, lp_old)
        r = r_token
        if HOW != "":
            r = r_seq + tl.zeros([BLOCK], tl.float32)
        r, passes = limited_ratio(r, limits, LIMITED)
        r_term = r
        if OWN != "":
            r_term = own + tl.zeros([BLOCK], tl.float32)

        trust = tl.full([BLOCK], 1.0, tl.float32)
        if OWN == "":
            trust = trust * load_row(is_weight, seq * is_b + tok * is_t, live, 1.0)
        if OFF_POLICY:
            trust = tl.where(keeps_sequence(mean_drift, A, drift_limit) != 0.0, trust, 0.0)
        H = load_row(entropy, at, live, 0.0)
        chosen = live
        if threshold is not None:
            chosen = live & (H >= tl.load(threshold))
            trust = tl.where(chosen, trust, 0.0)
        policy, kl, d_term, d_ratio, d_lp = token_objective(
            r, passes, r_term, lp, lp_old, load_row(ref, seq * ref_b + tok * ref_t, live, 0.0), A, trust, beta,
            limits, c, TERM, KL, BIAS, OWN != "", TRUST, LIMITED, CLAMPED,
        )  # fmt: skip
        loss = policy
        if KL is not None:
            loss = policy + scaled(beta, kl)
        loss = tl.where(live, loss, 0.0)
        tl.store(losses + at, loss, mask=inside)
        if SPREAD == "level":
            g = d_term + d_lp
            tl.store(spread + at, tl.where(live, w_slope * d_ratio, 0.0), mask=inside)
            tl.store(share + at, tl.where(live, step, 0.0), mask=inside)
        elif SPREAD == "term":
            g = d_ratio + d_lp
            _, slope = STATISTIC(r_token, A, c)
            tl.store(spread + at, tl.where(live, w_slope * d_term, 0.0), mask=inside)
            tl.store(share + at, tl.where(live, slope * inverse, 0.0), mask=inside)
        else:
            g = d_term + d_ratio + d_lp
        tl.store(local + at, tl.where(live, w_slope * g, 0.0), mask=inside)
        tl.store(h + at, tl.where(chosen, -bonus, 0.0), mask=inside)

        s_policy = add(s_policy, w * loss)
        s_loss = add(s_loss, w * loss)
        s_tokens = add(s_tokens, tl.where(live, 1.0, 0.0))
        s_kl = add(s_kl, tl.where(live, kl, 0.0))
        s_entropy = add(s_entropy, tl.where(live, H, 0.0))
        if BONUS:
            s_loss = add(s_loss, tl.where(chosen, -bonus * H, 0.0))
        if not CLIP_ONCE:
            low, high, cap = REGION(r, r_term, lp, lp_old, A, c)
            s_low = add(s_low, tl.where(live, low, 0.0))
            s_high = add(s_high, tl.where(live, high, 0.0))
            s_cap = add(s_cap, tl.where(live, cap, 0.0))
        ratio = tl.exp(r)
        s_ratio = add(s_ratio, tl.where(live, ratio, 0.0))
        s_drift = add(s_drift, tl.where(live, ratio - 1.0 - r, 0.0))
        ranked = live & (ratio == ratio)
        ratio_min = tl.minimum(ratio_min, tl.where(ranked, ratio, _INF))
        ratio_max = tl.maximum(ratio_max, tl.where(ranked, ratio, -_INF))

    s_clips = s_tokens
    if CLIP_ONCE:
        if adv is not None:
            A_seq = tl.load(adv + seq * adv_b).to(tl.float32)
        r, _ = limited_ratio(r_seq, limits, LIMITED)
        low, high, cap = REGION(r, own if OWN != "" else r, 0.0, 0.0, A_seq, c)
        s_clips = nothing() + (tl.where(A_seq == 0.0, 0.0, 1.0) if SKIP else 1.0)
        s_low = s_clips * low
        s_high = s_clips * high
        s_cap = s_clips * cap
    empty = s_clips == 0.0
    reward = nothing()
    scored = nothing()
    flat = nothing()
    if rewards is not None:
        reward = tl.load(rewards + seq).to(tl.float64)
        scored = tl.where(is_known(reward), 1.0, 0.0).to(tl.float64)
        reward = tl.where(is_known(reward), reward, 0.0)
        flat = tl.where(spread_of_rewards == 0.0, 1.0, 0.0).to(tl.float64)
    row = (
        s_loss, s_policy, s_tokens, s_kl, s_entropy, s_low, s_high, s_cap, s_clips, s_ratio, s_drift,
        reward, reward * reward, scored, flat, nothing() + 1.0,
        tl.min(ratio_min, axis=0).to(tl.float64), tl.where(empty, _INF, s_low / s_clips),
        tl.max(ratio_max, axis=0).to(tl.float64), tl.where(empty, -_INF, s_high / s_clips),
        1.0 - scored,
    )  # fmt: skip
    for k in tl.static_range(len(row)):
        tl.store(partial + seq * SUMS + k, row[k])


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
def total_kernel(partial, sums, loss, metrics, B, SAMPLED: tl.constexpr):
    """One program: the sums over sequences [SUMS] fp64, the loss [] and the metrics, fp32.

    SAMPLED: `mismatch_kernel` has run, which has the last columns.
    """
    total = column(partial, B, 0, "sum")
    policy = column(partial, B, 1, "sum")
    tokens = column(partial, B, 2, "sum")
    kl = column(partial, B, 3, "sum")
    entropy = column(partial, B, 4, "sum")
    low = column(partial, B, 5, "sum")
    high = column(partial, B, 6, "sum")
    dual = column(partial, B, 7, "sum")
    clips = column(partial, B, 8, "sum")
    ratio = column(partial, B, 9, "sum")
    drift = column(partial, B, 10, "sum")
    reward = column(partial, B, 11, "sum")
    reward_square = column(partial, B, 12, "sum")
    scored = column(partial, B, 13, "sum")
    flat = column(partial, B, 14, "sum")
    sequences = column(partial, B, 15, "sum")
    ratio_min = column(partial, B, 16, "min")
    low_min = column(partial, B, 17, "min")
    ratio_max = column(partial, B, 18, "max")
    high_max = column(partial, B, 19, "max")
    not_finite = column(partial, B, 20, "sum")
    gap = nothing()
    heard = nothing()
    drawn = nothing()
    draws = nothing()
    corrected = nothing()
    trust = nothing()
    gap_max = nothing()
    drawn_min = nothing()
    drawn_max = nothing()
    if SAMPLED:
        gap = column(partial, B, 21, "sum")
        heard = column(partial, B, 22, "sum")
        drawn = column(partial, B, 23, "sum")
        draws = column(partial, B, 24, "sum")
        corrected = column(partial, B, 25, "sum")
        trust = column(partial, B, 26, "sum")
        gap_max = column(partial, B, 27, "max")
        drawn_min = column(partial, B, 28, "min")
        drawn_max = column(partial, B, 29, "max")
    every = (total, policy, tokens, kl, entropy, low, high, dual, clips, ratio, drift, reward, reward_square, scored,
             flat, sequences, ratio_min, low_min, ratio_max, high_max, not_finite, gap, heard, drawn, draws, corrected,
             trust, gap_max, drawn_min, drawn_max)  # fmt: skip
    for k in tl.static_range(SUMS):
        tl.store(sums + k, every[k])
    tl.store(loss, total.to(tl.float32))
    values = summarise(policy, tokens, kl, entropy, low, high, dual, clips, ratio, drift, reward, reward_square, scored,
                       flat, sequences, ratio_min, low_min, ratio_max, high_max, not_finite, gap, heard, drawn, draws,
                       corrected, trust, gap_max, drawn_min, drawn_max)  # fmt: skip
    for k in tl.static_range(len(values)):
        tl.store(metrics + k, values[k].to(tl.float32))
