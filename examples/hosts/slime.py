"""slime: its policy loss, from the logits, with slime's reduction and metric names.

    --custom-megatron-init-path fused_loss.install
    --loss-type custom_loss --custom-loss-function-path fused_loss.fused_policy_loss    # another way, see docs/hosts.md

Name a copy of this file fused_loss.py, and put it on the PYTHONPATH. See docs/hosts.md.

Written against slime/backends/megatron_utils/loss.py at 00c2d6d, cp_utils.py at 04949ce, slime/utils/ppo_utils.py at
06787cf.
"""

from argparse import Namespace
from collections.abc import Callable
from itertools import accumulate

import torch
from megatron.core import mpu

from grpo_kernels import fused_grpo_loss, policy_loss, token_logprobs

Reducer = Callable[[torch.Tensor], torch.Tensor]
ESTIMATORS = ("grpo", "ppo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
KL = {"k1": {}, "k2": {}, "k3": {}, "low_var_kl": {"kl_clamp": 10.0}}


def install(args: Namespace) -> None:
    """Puts `fused_policy_loss` in the place of slime's own, which ``--loss-type policy_loss`` calls."""
    from slime.backends.megatron_utils import loss

    loss.policy_loss_function = fused_policy_loss


def fused_policy_loss(
    args: Namespace, batch: dict, logits: torch.Tensor, sum_of_sample_mean: Reducer
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """slime's `policy_loss_function` for the advantage estimators below.

    Args:
        args: slime's arguments.
        batch: ``unconcat_tokens``, ``total_lengths``, ``response_lengths``, ``advantages``, and ``log_probs``,
            ``ref_log_probs``, ``rollout_log_probs`` and ``opd_reverse_kl`` as far as the arguments need them: lists,
            one entry per sample.
        logits: (1, T, V), or (1, T, V/TP): samples one after the other; row i predicts token i+1.
        sum_of_sample_mean: slime's reduction of the tokens of all responses, (R,), to a number.

    Returns:
        The loss and what slime logs.
    """
    config = _config(args)
    lengths = batch["response_lengths"]
    ends = list(accumulate(batch["total_lengths"]))
    rows = torch.cat([torch.arange(end - n - 1, end - 1) for end, n in zip(ends, lengths)]).to(logits.device)  # (R,)
    T = logits.shape[1]

    def spread(x: torch.Tensor) -> torch.Tensor:  # (R,) -> (T,): the response's tokens at the rows that predict them
        return x.new_zeros(T).index_copy(0, rows, x)

    ids = torch.cat([tokens[-n:] for tokens, n in zip(batch["unconcat_tokens"], lengths)])
    weights = _weights(sum_of_sample_mean, torch.cat(batch["advantages"]))  # (R,), 0 where masked
    kept = weights != 0

    def joined(name: str) -> torch.Tensor | None:  # (R,); the reduction multiplies, and NaN times 0 would be NaN
        return torch.where(kept, torch.cat(batch[name]), 0.0) if batch.get(name) else None

    advantages, own, rollout = joined("advantages"), joined("log_probs"), joined("rollout_log_probs")
    old = rollout if args.use_rollout_logprobs else own
    kl_coef = args.kl_loss_coef if args.use_kl_loss else 0.0
    row_inputs = {"temperature": float(args.rollout_temperature), "return_entropy": True, **_vocab_group()}

    def tis() -> torch.Tensor | None:
        return (own - rollout).exp().clamp(args.tis_clip_low, args.tis_clip) if args.use_tis else None

    waits = args.use_tis and own is None  # for this pass's log-probabilities
    if kl_coef == 0.0 and args.entropy_coef == 0.0 and not waits:  # a linear reduction is a weight: one pass
        mismatch = tis()
        bounds = torch.tensor([0, *ends[:-1], T], device=logits.device)
        out = fused_grpo_loss(
            logits[0], spread(ids), spread(advantages), completion_mask=spread(kept), cu_seqlens=bounds,
            old_logps=None if old is None else spread(old), loss_agg_mode="token-sum",
            importance_weights=spread(weights if mismatch is None else weights * mismatch), **row_inputs, **config,
        )  # fmt: skip
        loss, logps, entropy = out.loss, out.logps[rows], out.entropy[rows]
        terms = {"pg_loss": loss}
    else:
        new = token_logprobs(logits[0], spread(ids), mask=spread(kept), **row_inputs)
        logps, entropy = new.logps[rows], new.entropy[rows]
        own = logps.detach() if own is None else own
        mismatch = tis()
        bounds = torch.tensor([0, *accumulate(lengths)], device=logits.device)
        out = policy_loss(logps, advantages, old_logps=old, completion_mask=kept, cu_seqlens=bounds,
                          importance_weights=mismatch, reduction="none", **config)  # fmt: skip
        terms = {"pg_loss": sum_of_sample_mean(out.loss)}
        loss = terms["pg_loss"] - args.entropy_coef * sum_of_sample_mean(entropy)
    if args.use_kl_loss:
        kl = _kl(args, logps if kl_coef else logps.detach(), joined("ref_log_probs"))
        terms["kl_loss"] = sum_of_sample_mean(kl)
        if kl_coef:
            loss = loss + kl_coef * terms["kl_loss"]

    logps, entropy = logps.detach(), entropy.detach()
    old = logps if old is None else old
    drift = old - logps
    if args.advantage_estimator == "gspo":
        drift = _sequence_means(drift, kept, lengths)
    ratio = (-drift).exp()
    clipped = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    is_clipped = clipped != ratio if args.advantage_estimator == "cispo" else clipped * advantages < ratio * advantages
    values = {"entropy_loss": entropy, "pg_clipfrac": is_clipped.float(), "ppo_kl": drift}
    if rollout is not None:
        values["train_rollout_logprob_abs_diff"] = ((logps if args.use_rollout_logprobs else old) - rollout).abs()
    if mismatch is not None:
        full = (own - rollout).exp()
        values |= {"ois": ratio, "tis": full, "tis_abs": (full - 1).abs(), "tis_clipfrac": (full != mismatch).float()}
    if batch.get("opd_reverse_kl"):  # its share of the advantages has been taken off by slime
        values["opd_reverse_kl"] = joined("opd_reverse_kl")
    log = {"loss": loss, **terms} | {name: sum_of_sample_mean(value) for name, value in values.items()}
    return loss, {name: value.detach() for name, value in log.items()}


def _config(args: Namespace) -> dict:
    """slime's arguments in this package's words; an error for those that it has none for."""
    refused = {
        "--context-parallel-size above 1": mpu.get_context_parallel_world_size() > 1,
        "--rollout-top-p below 1": getattr(args, "rollout_top_p", 1.0) != 1.0,
        "--pg-loss-type reinforce": getattr(args, "pg_loss_type", None) == "reinforce",
        "--use-opsm": getattr(args, "use_opsm", False),
        "--use-score-centering": getattr(args, "use_score_centering", False),
        "--use-unbiased-kl": getattr(args, "use_unbiased_kl", False),
        "--get-mismatch-metrics without --use-tis": getattr(args, "get_mismatch_metrics", False) and not args.use_tis,
        f"--advantage-estimator {args.advantage_estimator}": args.advantage_estimator not in ESTIMATORS,
        "--custom-tis-function-path": args.use_tis and getattr(args, "custom_tis_function_path", None),
        "--custom-pg-loss-reducer-function-path": getattr(args, "custom_pg_loss_reducer_function_path", None),
        f"--kl-loss-type {args.kl_loss_type}": args.use_kl_loss and args.kl_loss_type not in KL,
    }
    for setting, is_set in refused.items():
        if is_set:
            raise NotImplementedError(f"{setting}: not in fused_policy_loss. Use slime's own --loss-type policy_loss.")
    if args.advantage_estimator == "cispo":
        return {"policy_term": "cispo", "cispo_min": max(1 - args.eps_clip, 0.0), "cispo_max": 1 + args.eps_clip_high}
    level = "sequence" if args.advantage_estimator == "gspo" else "token"
    return {"importance_sampling_level": level, "epsilon": args.eps_clip, "epsilon_high": args.eps_clip_high,
            "dual_clip": args.eps_clip_c}  # fmt: skip


def _vocab_group() -> dict:
    """Megatron shards the vocabulary over the tensor-parallel ranks."""
    if mpu.get_tensor_model_parallel_world_size() == 1:
        return {}
    return {"vocab_group": mpu.get_tensor_model_parallel_group()}


def _weights(reduce: Reducer, like: torch.Tensor) -> torch.Tensor:
    """What a linear reduction multiplies each token with: its gradient."""
    with torch.enable_grad():
        probe = torch.zeros_like(like, requires_grad=True)
        return torch.autograd.grad(reduce(probe), probe)[0]


def _kl(args: Namespace, logps: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """The KL alone, (R,): a policy loss without advantages."""
    estimator = "k3" if args.kl_loss_type == "low_var_kl" else args.kl_loss_type
    out = policy_loss(logps[None], torch.zeros_like(ref)[None], ref_logps=ref[None], beta=1.0, kl_estimator=estimator,
                      reduction="none", **KL[args.kl_loss_type])  # fmt: skip
    return out.loss[0]


def _sequence_means(x: torch.Tensor, mask: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """(R,) with each sequence's mean over its unmasked tokens at each of its tokens."""
    parts = zip(torch.where(mask, x, 0.0).split(lengths), mask.split(lengths))
    return torch.cat([(a.sum() / m.sum().clamp_min(1)).expand_as(a) for a, m in parts])
