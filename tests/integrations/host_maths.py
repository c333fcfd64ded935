"""What each host computes, written out in plain torch from its source, for test_hosts.py and its neighbours.

Float64 in, float64 out: (loss, metrics). The versions that were read are in docs/hosts.md.
"""

import torch


def logps_and_entropy(logits, ids, temperature=1.0):
    """(..., V) and (...) -> log-probabilities and entropies, (...)."""
    all_logps = torch.log_softmax(logits / temperature, -1)
    return all_logps.gather(-1, ids[..., None])[..., 0], -(all_logps.exp() * all_logps).sum(-1)


def clipped(ratio, advantages, low, high, dual=None):
    """(PPO's loss per token, where it is clipped)."""
    free, held = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    loss = torch.maximum(free, held)
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)
    return loss, (held > free).double()


def k3(u):
    return u.exp() - 1 - u


def mean(x, mask, dim=None):
    return (x * mask).sum(dim) / mask.sum(dim).clamp_min(1)


def slime(args, batch, logits, reduce):
    """`policy_loss_function` of slime, in the order in which it goes."""
    pieces, start = [], 0
    for tokens, total, n in zip(batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"]):
        rows = logits[0, start + total - n - 1 : start + total - 1]
        pieces.append(logps_and_entropy(rows, tokens[-n:], args.rollout_temperature))
        start += total
    logps = [logps for logps, _ in pieces]
    entropy = torch.cat([entropy for _, entropy in pieces])
    advantages = torch.cat(batch["advantages"]).double()
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old = [x.double() for x in old] if old else [x.detach() for x in logps]
    drift = [o - x for o, x in zip(old, logps)]
    if args.advantage_estimator == "gspo":
        drift = [mean(d, m).expand_as(d) for d, m in zip(drift, batch["loss_masks"])]
    logps, old, drift = torch.cat(logps), torch.cat(old), torch.cat(drift)
    ratio = (-drift).exp()
    if args.advantage_estimator == "cispo":
        held = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
        pg, clip = -held.detach() * advantages * logps, (held != ratio).double()
    else:
        pg, clip = clipped(ratio, advantages, args.eps_clip, args.eps_clip_high, args.eps_clip_c)
    log = {}
    if args.use_tis:
        rollout = torch.cat(batch["rollout_log_probs"]).double()
        own = torch.cat(batch["log_probs"]).double() if batch.get("log_probs") else logps.detach()
        tis = (own - rollout).exp()
        weight = tis.clamp(args.tis_clip_low, args.tis_clip)
        pg = pg * weight
        log = {"ois": ratio, "tis": tis, "tis_abs": (tis - 1).abs(), "tis_clipfrac": (tis != weight).double()}
    if batch.get("rollout_log_probs"):
        compared = logps if args.use_rollout_logprobs else old
        log["train_rollout_logprob_abs_diff"] = (compared - torch.cat(batch["rollout_log_probs"])).abs()
    log = {name: reduce(value) for name, value in log.items()}
    log |= {"pg_loss": reduce(pg), "pg_clipfrac": reduce(clip), "ppo_kl": reduce(drift)}
    log["entropy_loss"] = reduce(entropy)
    loss = log["pg_loss"] - args.entropy_coef * log["entropy_loss"]
    if args.use_kl_loss:
        u = torch.cat(batch["ref_log_probs"]).double() - logps
        kl = {"k1": -u, "k2": u.square() / 2, "k3": k3(u), "low_var_kl": k3(u).clamp(-10, 10)}[args.kl_loss_type]
        log["kl_loss"] = reduce(kl)
        loss = loss + args.kl_loss_coef * log["kl_loss"]
    return loss, log | {"loss": loss}


def nemo_rl(cfg, logits, data, seqs, toks):
    """`ClippedPGLossFn` of NeMo-RL, behind its log-probabilities of the next tokens."""
    ids = data["input_ids"][:, 1:]
    token_mask, sample_mask = data["token_mask"][:, 1:].double(), data["sample_mask"].double()
    mask = token_mask * sample_mask[:, None]
    cut = {name: data[name][:, 1:].double() for name in
           ("advantages", "prev_logprobs", "generation_logprobs", "reference_policy_logprobs")}  # fmt: skip
    A, prev, generated, ref = cut.values()
    logps, _ = logps_and_entropy(logits[:, : ids.shape[1]], ids)
    if cfg.force_on_policy_ratio:
        prev = logps.detach()

    def per_sequence(x):
        return (x * token_mask).sum(1) / (token_mask.sum(1) + 1e-8)

    def whole(x):
        if cfg.token_level_loss:
            return (x * mask).sum() / toks
        return (per_sequence(x) * sample_mask).sum() / seqs

    def tokens(x):
        return ((x * mask).sum() / toks).detach()

    u = ref - logps
    held = u.clamp(-cfg.kl_input_clamp_value, cfg.kl_input_clamp_value)
    factor = torch.where(u == held, (logps - logps.detach()).exp(), torch.ones_like(u))
    kind = {"k1": lambda u: -u, "k2": lambda u: u.square() / 2, "k3": k3}[cfg.reference_policy_kl_type]
    kl = (factor * kind(held)).clamp(-cfg.kl_output_clamp_value, cfg.kl_output_clamp_value)
    kl = cfg.reference_policy_kl_penalty * whole(kl)

    r = logps - prev
    if cfg.sequence_level_importance_ratios:
        r = per_sequence(r)[:, None].expand_as(r)
    ratio = (logps - logps.detach()).exp() if cfg.force_on_policy_ratio else r.exp()
    bound = ratio if cfg.force_on_policy_ratio else ratio.clamp(1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max)
    if cfg.disable_ppo_ratio:
        ratio = bound = logps
    if cfg.use_cispo:
        pg = -A * bound.detach() * logps
    else:
        pg = torch.maximum(-A * ratio, -A * bound)
    if cfg.ratio_clip_c is not None:
        pg = torch.where(A < 0, torch.minimum(pg, -A * cfg.ratio_clip_c), pg)

    drift, oob = prev - generated, {}
    weight = ((drift * mask).sum(1, keepdim=True) if cfg.sequence_level_importance_ratios else drift).exp().detach()
    low, high = cfg.truncated_importance_sampling_ratio_min or 0.0, cfg.truncated_importance_sampling_ratio
    kind_of_tis = cfg.truncated_importance_sampling_type
    if kind_of_tis == "tis":
        oob = {"is_oob_ratio": tokens(((weight > high) | (weight < low)).double())}
        weight = weight.clamp(low, high)
    elif kind_of_tis == "icepop":
        kept = (weight >= low) & (weight <= high)
        oob = {"is_oob_ratio": tokens((~kept).double())}
        weight = torch.where(kept, weight, 0.0)
    elif kind_of_tis == "seq-mask-tis":
        geometric = per_sequence(drift).exp().detach()
        kept = ((geometric >= low) & (geometric <= high)).double()
        oob = {"is_oob_ratio": ((1 - kept) * sample_mask).sum() / seqs}
        weight = weight * kept[:, None]
    if cfg.use_importance_sampling_correction:
        pg = weight * pg
    loss = whole(pg) + kl
    mixture = (0.5 * prev.exp() + 0.5 * generated.exp()).log()
    log = {
        "loss": loss,
        "probs_ratio": tokens(ratio), "probs_ratio_clamped": tokens(bound),
        "probs_ratio_min": ratio[mask > 0].min(), "probs_ratio_max": ratio[mask > 0].max(),
        "probs_ratio_clamped_min": bound[mask > 0].min(), "probs_ratio_clamped_max": bound[mask > 0].max(),
        "kl_penalty": kl / cfg.reference_policy_kl_penalty if cfg.reference_policy_kl_penalty else kl,
        "token_mult_prob_error": tokens(((generated - prev).abs() * mask).exp()),
        "gen_kl_error": tokens(kind(prev - generated)), "policy_kl_error": tokens(kind(generated - prev)),
        "js_divergence_error": tokens(0.5 * k3(prev - mixture) + 0.5 * k3(generated - mixture)),
        "sampling_importance_ratio": (weight.squeeze(-1) * sample_mask).sum() / seqs
        if cfg.sequence_level_importance_ratios else tokens(weight),
        "num_valid_samples": sample_mask.sum(), "approx_entropy": -tokens((logps - generated).exp() * logps), **oob,
    }  # fmt: skip
    return loss, log


def torchforge(
    loss_fn, logits, target_ids, advantages, generator_logprobs, loss_mask, ref_logprobs=None, loss_scale=None
):
    """`GRPOLoss` of torchforge."""
    mask = loss_mask.double()
    logps, entropy = logps_and_entropy(logits, target_ids.clamp_min(0))
    logps = torch.where(target_ids == -100, 0.0, logps)
    r = (logps - generator_logprobs).clamp(-20, 20)
    ratio = r.exp()
    pg, _ = clipped(ratio, advantages.double(), loss_fn.clip_low, loss_fn.clip_high)
    log = {}
    if loss_fn.beta > 0:
        kl = k3((ref_logprobs - logps).clamp(-20, 20)).clamp(0, 10)
        pg = pg + loss_fn.beta * kl
        log["loss/kl_ref/mean"] = mean(kl, mask)
    tokens = mask.sum() if loss_scale is None else loss_scale
    loss = {
        "fixed_horizon": (pg * mask).sum() / mask.numel(),
        "token_mean": (pg * mask).sum() / tokens,
        "sequence_mean": mean(pg, mask, 1).mean(),
    }[loss_fn.agg_type]
    held = ratio.clamp(1 - loss_fn.clip_low, 1 + loss_fn.clip_high)
    return loss, log | {
        "loss/entropy/mean": mean(entropy, mask), "loss/ratio/mean": mean(ratio, mask),
        "loss/kl_policy/mean": mean(-r, mask), "loss/clip/clipped_ratio/mean": mean(held, mask),
        "loss/clip/high_fraction": mean(((ratio > 1 + loss_fn.clip_high) & (advantages > 0)).double(), mask),
        "loss/clip/low_fraction": mean(((ratio < 1 - loss_fn.clip_low) & (advantages < 0)).double(), mask),
        "loss/aggregate/active_fraction": mask.mean(),
    }  # fmt: skip


def roll(cfg, batch, meta, logits):
    """`ActorWorker.loss_func` of ROLL."""
    mask = batch["response_mask"][:, 1:].double()
    logps, _ = logps_and_entropy(logits[:, :-1], batch["input_ids"][:, 1:])
    logps, A = logps * mask, batch["advantages"].double()
    tokens = meta["batch_num_tokens"]["response_mask"]
    samples = meta["global_valid_samples"]["response_mask"]
    sequences = (mask.sum(1) > 0).double()

    def reduce(x):
        return {
            "token-mean": (x * mask).sum() / tokens,
            "seq-mean-token-sum": ((x * mask).sum(1) * sequences).sum() / (samples + 1e-8),
            "seq-mean-token-mean": (mean(x, mask, 1) * sequences).sum() / (samples + 1e-8),
            "seq-mean-token-sum-norm": ((x * mask).sum(1) * sequences).sum() / mask.shape[-1],
        }[cfg.loss_agg_mode]

    r = logps - batch["old_log_probs"] * mask
    ratio = r.exp()
    low, high = (cfg.pg_clip_low, cfg.pg_clip_high) if cfg.use_pg_clip_range else (cfg.pg_clip, cfg.pg_clip)
    pg, worse = clipped(ratio, A, low, high, 1 + 2 * cfg.pg_clip if cfg.dual_clip_loss else None)
    kl = reduce(k3(batch["ref_log_probs"] * mask - logps).clamp(-10, 10))
    pg = reduce(pg)
    loss = pg + cfg.kl_loss_coef * kl if cfg.use_kl_loss else pg
    below, above = (ratio < 1 - low).double(), (ratio > 1 + high).double()
    return loss, {
        "actor/ppo_ratio_high_clipfrac": above.mean(), "actor/ppo_ratio_low_clipfrac": below.mean(),
        "actor/ppo_ratio_clipfrac": (below + above).mean(), "actor/ratio_mean": mean(ratio, mask, 1).mean(),
        "actor/ratio_max": (ratio * mask).max(), "actor/ratio_min": (ratio * mask + (1 - mask) * 1e10).min(),
        "actor/clipfrac": reduce(worse), "actor/pg_loss": pg, "actor/kl_loss": kl, "actor/total_loss": loss,
        "actor/approxkl": reduce(r.square() / 2), "actor/policykl": reduce(r),
    }  # fmt: skip


def openrlhf(options, logps, old, A, mask, rollout, dp_size=1, batch_num_tokens=None, global_batch_size=None):
    """`PolicyLoss` of OpenRLHF: its five results, None where it has none."""
    gspo, level = options.get("policy_loss_type") == "gspo", options.get("is_correction_level", "off")
    low, high = options.get("clip_eps_low", 0.2), options.get("clip_eps_high", 0.2)
    ratio = (logps - old).clamp(-20, 20).exp()
    if gspo:
        r = logps - (old if level == "off" else rollout)
        ratio = mean(r, mask, 1).exp()[:, None] * mask
    loss, worse = clipped(ratio, A, low, high, options.get("dual_clip"))
    vllm_kl = filtered = None
    if level != "off" and not gspo:
        least, most = options.get("is_correction_threshold", (0.5, 5.0))
        mismatch = old - rollout
        unit = mean(mismatch, mask, 1)[:, None].exp() if level == "seq" else mismatch.exp()
        outside = (unit < least) | (unit > most)
        clip = options.get("is_correction_mode", "mask") == "clip"
        loss = loss * (unit.clamp(least, most) if clip else torch.where(outside, 0.0, mismatch.exp()))
        filtered = outside.double().mean() if level == "seq" else mean(outside.double(), mask)
        vllm_kl = mean(-mismatch, mask)
    if options.get("token_level_loss", True) and not gspo:
        total = mask.sum() if batch_num_tokens is None else batch_num_tokens / dp_size
        loss = (loss * mask).sum() / total
    else:
        sequences = (mask.sum(1) > 0).double()
        total = sequences.sum() if global_batch_size is None else global_batch_size / dp_size
        loss = (mean(loss, mask, 1) * sequences).sum() / total
    return loss, mean(worse, mask), mean(old - logps, mask), vllm_kl, filtered


def verl_topk(settings, data, logits):
    """`compute_forward_kl_topk` of verl under FSDP; rows outside the responses are 0, where verl reads them and drops
    what it finds."""
    ids = data["teacher_ids"].values().long()
    counted = ids[:, 0] >= 0
    told = torch.where(counted[:, None], data["teacher_logprobs"].values().double(), 0.0)
    own = torch.log_softmax(logits[0], -1).gather(-1, ids.clamp_min(0))
    masses = own.exp().sum(-1), told.exp().sum(-1)
    if settings.log_prob_min_clamp is not None:
        own, told = own.clamp_min(settings.log_prob_min_clamp), told.clamp_min(settings.log_prob_min_clamp)
    losses = (told.exp() * (told - own)).sum(-1)
    names = ("distillation_losses", "student_mass", "teacher_mass")
    return {name: torch.where(counted, x, 0.0)[None] for name, x in zip(names, (losses, *masses))}


def nemo_rl_distillation(cfg, logits, data, toks):
    """`DistillationLossFn` of NeMo-RL, behind `get_distillation_topk_logprobs_from_logits`."""
    T = data["input_ids"].shape[1] - 1
    mask = data["token_mask"][:, 1:].double() * data["sample_mask"].double()[:, None]
    kept = (mask > 0)[..., None]
    ids = torch.where(kept, data["teacher_topk_indices"][:, :T], 0)
    told = torch.where(kept, data["teacher_topk_logits"][:, :T].double(), 0.0).log_softmax(-1)
    everything = logits[:, :T].log_softmax(-1)
    own = everything.gather(-1, ids) if cfg.zero_outside_topk else logits[:, :T].gather(-1, ids).log_softmax(-1)
    forward = (told.exp() * (told - own)).sum(-1)
    reverse = (own.exp() * (own - told)).sum(-1)
    if cfg.zero_outside_topk:
        all_of_it, listed = (everything.exp() * everything).sum(-1), (own.exp() * own).sum(-1)
        reverse = reverse + all_of_it - listed + 100.0 * (1 - own.exp().sum(-1))
    w = {"forward": 1.0, "reverse": 0.0, "mixed": cfg.mixed_kl_weight}[cfg.kl_type]
    loss = ((w * forward + (1 - w) * reverse) * mask).sum() / toks
    return loss, {"loss": loss, "num_valid_samples": len(ids)}


def slime_distillation(args, batch, logits, reduce):
    """`apply_opd_kl_to_advantages` of slime, and its loss."""
    drift = [own.double() - told.double() for own, told in zip(batch["log_probs"], batch["teacher_log_probs"])]
    advantages = [A.double() - args.opd_kl_coef * d for A, d in zip(batch["advantages"], drift)]
    loss, log = slime(args, {**batch, "advantages": advantages}, logits, reduce)
    return loss, log | {"opd_reverse_kl": reduce(torch.cat(drift))}
