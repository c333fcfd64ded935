"""The [B, T] kernel of an objective: each token's loss and derivatives, and the sums of its sequence.

It runs on log-probabilities, not on logits, and so costs next to nothing. Sums are taken in fp64, in a fixed order.
"""

from grpo_kernels.objective.advantages import is_known
from grpo_kernels.objective.corrections import mismatch, outside
from grpo_kernels.objective.language import jit, tl
from grpo_kernels.objective.token import (
    drift_of,
    keeps_sequence,
    limited_ratio,
    log_ratio,
    product,
    scaled,
    token_objective,
    weight,
)
from grpo_kernels.triton_backend.rewards import group_advantage
from grpo_kernels.triton_backend.row_kernels import kernel, load_or
from grpo_kernels.triton_backend.sequence_kernels import (
    BLOCK,
    add,
    bounds,
    load_row,
    no_sum,
    output_row,
    total_of,
    unmasked,
)
from grpo_kernels.triton_backend.totals import INF, SUMS


@jit
def advantages_at(adv, at, A_seq, inside):
    if adv is not None:
        return tl.load(adv + at, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.where(inside, A_seq, 0.0)


@jit
def share_of(first, end, part, parts):
    """The tokens from ``first`` to ``end`` in so many parts of whole blocks: where this part begins and ends."""
    size = tl.cdiv(tl.cdiv(end - first, parts), BLOCK) * BLOCK
    begin = first + part * size
    return begin, tl.minimum(begin + size, end)


@kernel
def sequence_kernel(
    logps, entropy, mask, old, ref, sampling, adv, rewards, wanted, is_weight, future,  # [B, T] ×7, [B], [B, T] ×3
    losses, local, spread, share, h, partial,  # out: [B, T] ×5, [B·parts, SUMS] fp64; None where nobody reads it
    count, loss_scale, tokens, entropy_coef, threshold, groups, batch_std, cu,
    mask_b, mask_t, old_b, old_t, ref_b, ref_t, samp_b, samp_t, adv_b, adv_t, wanted_b, wanted_t, is_b, is_t, count_b,
    parts, B, T, G, beta: tl.float32, w_factor: tl.float32, h_factor: tl.float32, adv_eps: tl.float32,
    drift_limit: tl.float32, correction_low: tl.float32, correction_high: tl.float32, limits, c,
    TERM: tl.constexpr, REGION: tl.constexpr, STATISTIC: tl.constexpr, CORRECTION: tl.constexpr, OWN: tl.constexpr,
    HOW: tl.constexpr, INFLUENCE: tl.constexpr, SPREAD: tl.constexpr, KL: tl.constexpr, BIAS: tl.constexpr,
    OFF_POLICY: tl.constexpr, LIMITED: tl.constexpr, CLAMPED: tl.constexpr, WEIGHT_ONCE: tl.constexpr,
    CLIP_ONCE: tl.constexpr, CORRECTED: tl.constexpr, SCALE: tl.constexpr, UNBIASED: tl.constexpr, SKIP: tl.constexpr,
    BONUS: tl.constexpr,
):  # fmt: skip
    """``parts`` programs per sequence: ℓ, its derivatives, and the sums of the metrics.

    ``local`` is ∂L/∂lp of the token itself, ``h`` is ∂L/∂H. With ``losses``, ℓ per token, the derivatives are ∂ℓ: the
    reduction's weight is not in them. With SPREAD ("level" or "term") the sequence also has ``spread``, ∂L/∂r of the
    ratio that all its tokens share, and ``share``, what each moves it by: `spread_kernel` puts them together.

    HOW ("", "mean", "sum") makes the level's log ratio of the tokens', OWN ("", "mean", "sum") the term's own
    statistic. Either of them, or an off-policy mask, needs all of a sequence before its first token, which is then
    read twice, by one program. INFLUENCE makes a factor of the ``future`` of `suffix_kernel`. CORRECTED: importance
    weights that were made of the sampler's log-probabilities have one value per "token" or "sequence", or are "gated"
    by the sequence's.
    """
    WHOLE: tl.constexpr = HOW != "" or OWN != "" or OFF_POLICY
    ALONE: tl.constexpr = WHOLE or CORRECTED == "sequence"
    MASKED: tl.constexpr = OFF_POLICY or threshold is not None
    TRUST: tl.constexpr = (is_weight is not None and OWN == "") or MASKED or future is not None
    program = tl.program_id(0).to(tl.int64)
    seq = program
    once = 1.0  # what belongs to the sequence is its first part's
    if not ALONE:
        seq = program // parts
        once = tl.where(program % parts == 0, 1.0, 0.0)
    first, last, end = bounds(cu, seq, B, T)
    row = output_row(cu, seq, T)
    factor = load_or(loss_scale, 0, 1.0)
    w = weight(load_or(count, seq * count_b, 1.0), w_factor * factor)
    w_slope = w
    if losses is not None:
        w_slope = 1.0
    bonus = 0.0
    if BONUS:
        bonus = weight(load_or(tokens, 0, 1.0), h_factor * load_or(entropy_coef, 0, 1.0) * factor)
    spread_of_rewards = 0.0
    A_seq = 0.0
    if rewards is not None:
        A_seq, spread_of_rewards = group_advantage(rewards, groups, batch_std, seq, B, G, adv_eps, SCALE, UNBIASED)

    r_seq = 0.0
    own = 0.0
    mean_drift = 0.0
    inverse = 1.0
    step = 1.0
    if WHOLE:
        sizes = no_sum()
        sums_r = no_sum()
        sums_own = no_sum()
        sums_drift = no_sum()
        for start in range(first, last, BLOCK):
            tok = start + tl.arange(0, BLOCK).to(tl.int64)
            live = unmasked(mask, seq * mask_b + tok * mask_t, tok < last)
            A = advantages_at(adv, seq * adv_b + tok * adv_t, A_seq, live)
            if SKIP:
                live = live & (load_row(wanted, seq * wanted_b + tok * wanted_t, live, A) != 0.0)
            lp = tl.load(logps + row + tok, mask=live, other=0.0)
            lp_old = load_row(old, seq * old_b + tok * old_t, live, lp)
            r = log_ratio(lp, lp_old)
            sizes = add(sizes, live, 1.0)
            if HOW != "":
                sums_r = add(sums_r, live, r)
            if OWN != "":
                x, _ = STATISTIC(r, A, c)
                if is_weight is not None:
                    if not WEIGHT_ONCE:
                        x = x + CORRECTION(load_row(is_weight, seq * is_b + tok * is_t, live, 1.0))
                sums_own = add(sums_own, live, x)
            if OFF_POLICY:
                drift = drift_of(lp, load_row(sampling, seq * samp_b + tok * samp_t, live, lp_old))
                sums_drift = add(sums_drift, live, drift)
        size = total_of(sizes)
        size = tl.where(size < 1.0, 1.0, size)
        inverse = (1.0 / size).to(tl.float32)
        if HOW == "mean":
            r_seq = (total_of(sums_r) / size).to(tl.float32)
            step = inverse
        elif HOW != "":
            r_seq = total_of(sums_r).to(tl.float32)
        if OWN == "mean":
            own = (total_of(sums_own) / size).to(tl.float32)
        elif OWN != "":
            own = total_of(sums_own).to(tl.float32)
        if OWN != "":
            if is_weight is not None:
                if WEIGHT_ONCE:
                    own += CORRECTION(tl.load(is_weight + seq * is_b).to(tl.float32))
        if OFF_POLICY:
            mean_drift = (total_of(sums_drift) / size).to(tl.float32)

    s_policy = no_sum()
    s_bonus = no_sum()
    s_tokens = no_sum()
    s_kl = no_sum()
    s_entropy = no_sum()
    s_low = no_sum()
    s_high = no_sum()
    s_cap = no_sum()
    s_ratio = no_sum()
    s_drift = no_sum()
    s_gap = no_sum()
    s_heard = no_sum()
    s_drawn = no_sum()
    s_corrected = no_sum()
    s_d = no_sum()
    s_future = no_sum()
    s_influence = no_sum()
    s_calm = no_sum()
    ratio_min = tl.full([BLOCK], INF, tl.float32)
    ratio_max = tl.full([BLOCK], -INF, tl.float32)
    gap_max = tl.zeros([BLOCK], tl.float32)
    drawn_min = tl.full([BLOCK], INF, tl.float32)
    drawn_max = tl.full([BLOCK], -INF, tl.float32)
    begin, stop = first, end
    if not ALONE:
        begin, stop = share_of(first, end, program % parts, parts)
    for start in range(begin, stop, BLOCK):
        tok = start + tl.arange(0, BLOCK).to(tl.int64)
        at = row + tok
        inside = tok < stop
        there = unmasked(mask, seq * mask_b + tok * mask_t, tok < tl.minimum(stop, last))
        A = advantages_at(adv, seq * adv_b + tok * adv_t, A_seq, there)
        live = there
        if SKIP:
            live = there & (load_row(wanted, seq * wanted_b + tok * wanted_t, there, A) != 0.0)
        lp = tl.load(logps + at, mask=live, other=0.0)
        lp_old = load_row(old, seq * old_b + tok * old_t, there, lp)
        w_token = load_row(is_weight, seq * is_b + tok * is_t, live, 1.0)
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
            trust = trust * w_token
        if future is not None:
            F = tl.load(future + at, mask=live, other=0.0)
            influence, calm = INFLUENCE(F, r, A, c)
            trust = product(influence, trust)
            s_future = add(s_future, live, F)
            s_influence = add(s_influence, live, influence)
            s_calm = add(s_calm, live, calm)
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
        if losses is not None:
            tl.store(losses + at, loss, mask=inside)
        if local is not None:
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
        if h is not None:
            tl.store(h + at, tl.where(chosen, -bonus, 0.0), mask=inside)

        s_policy = add(s_policy, live, w * loss)
        s_tokens = add(s_tokens, live, 1.0)
        if KL is not None:
            s_kl = add(s_kl, live, kl)
        if entropy is not None:
            s_entropy = add(s_entropy, live, H)
        if BONUS:
            s_bonus = add(s_bonus, chosen, bonus * H)
        if not CLIP_ONCE:
            low, high, cap = REGION(r, r_term, lp, lp_old, A, c)
            s_low = add(s_low, live, low)
            s_high = add(s_high, live, high)
            s_cap = add(s_cap, live, cap)
        ratio = tl.exp(r)
        s_ratio = add(s_ratio, live, ratio)
        s_drift = add(s_drift, live, ratio - 1.0 - r)
        ranked = live & (ratio == ratio)
        ratio_min = tl.minimum(ratio_min, tl.where(ranked, ratio, INF))
        ratio_max = tl.maximum(ratio_max, tl.where(ranked, ratio, -INF))

        if sampling is not None:
            sampled = load_row(sampling, seq * samp_b + tok * samp_t, there, 0.0)
            d = mismatch(lp_old, sampled)
            heard = live & (sampled == sampled)
            gap = tl.where(heard, tl.abs(d), 0.0)
            s_gap = add(s_gap, heard, gap)
            s_heard = add(s_heard, heard, 1.0)
            gap_max = tl.maximum(gap_max, tl.where(gap == gap, gap, 0.0))
            if CORRECTED == "sequence":
                s_d = add(s_d, there, d)
            else:
                drawn = tl.exp(d)
                if CORRECTED != "":
                    corrected = outside(drawn, correction_low, correction_high)
                    drawn = w_token
                    if CORRECTED == "gated":
                        corrected = drawn == 0.0
                    s_corrected = add(s_corrected, live & corrected, 1.0)
                s_drawn = add(s_drawn, live, drawn)
                ranked = live & (drawn == drawn)
                drawn_min = tl.minimum(drawn_min, tl.where(ranked, drawn, INF))
                drawn_max = tl.maximum(drawn_max, tl.where(ranked, drawn, -INF))

    n_policy = total_of(s_policy)
    n_tokens = total_of(s_tokens)
    n_clips = n_tokens
    if CLIP_ONCE:
        if adv is not None:
            A_seq = tl.load(adv + seq * adv_b).to(tl.float32)
        r, _ = limited_ratio(r_seq, limits, LIMITED)
        low, high, cap = REGION(r, own if OWN != "" else r, 0.0, 0.0, A_seq, c)
        n_clips = tl.where((A_seq == 0.0) & SKIP, 0.0, 1.0)
        n_low = n_clips * low
        n_high = n_clips * high
        n_cap = n_clips * cap
    else:
        n_low = total_of(s_low)
        n_high = total_of(s_high)
        n_cap = total_of(s_cap)
    reward = 0.0
    scored = 0.0
    flat = 0.0
    if rewards is not None:
        reward = tl.load(rewards + seq).to(tl.float64)
        scored = tl.where(is_known(reward), once, 0.0)
        reward = tl.where(scored != 0.0, reward, 0.0)
        flat = tl.where(spread_of_rewards == 0.0, once, 0.0)
    n_drawn = 0.0
    n_draws = 0.0
    n_corrected = 0.0
    n_trust = 0.0
    least = 0.0
    most = 0.0
    if sampling is not None:
        if CORRECTED == "sequence":  # sequences without tokens count too, but not those that were left unread
            drawn = tl.load(is_weight + seq * is_b).to(tl.float32)
            n_draws = tl.where((n_tokens == 0.0) & SKIP, 0.0, 1.0)
            distance = tl.exp(total_of(s_d).to(tl.float32))
            n_corrected = tl.where(outside(distance, correction_low, correction_high), n_draws, 0.0)
            n_drawn = tl.where(n_draws > 0.0, drawn, 0.0).to(tl.float64)
            n_trust = n_drawn * n_tokens
            known = (n_draws > 0.0) & (drawn == drawn)
            least = tl.where(known, drawn, INF)
            most = tl.where(known, drawn, -INF)
        else:
            n_draws = n_tokens
            n_corrected = total_of(s_corrected)
            n_drawn = total_of(s_drawn)
            n_trust = n_drawn
            least = tl.min(drawn_min, axis=0)
            most = tl.max(drawn_max, axis=0)
    row_of_sums = (
        n_policy - total_of(s_bonus), n_policy, n_tokens, total_of(s_kl), total_of(s_entropy), n_low, n_high, n_cap,
        n_clips, total_of(s_ratio), total_of(s_drift), once,
        tl.min(ratio_min, axis=0), 0.0, tl.max(ratio_max, axis=0), 0.0,  # `total_kernel` has the clipped shares
        reward, reward * reward, scored, flat, once - scored if rewards is not None else 0.0,
        total_of(s_gap), total_of(s_heard), n_drawn, n_draws, n_corrected, n_trust,
        tl.max(gap_max, axis=0), least, most, total_of(s_future), total_of(s_influence), total_of(s_calm),
    )  # fmt: skip
    if partial is not None:
        for k in tl.static_range(len(row_of_sums)):
            tl.store(partial + program * SUMS + k, row_of_sums[k])
