"""NeMo-RL: its clipped policy-gradient loss, from the logits.

    loss_fn = FusedClippedPGLoss(config.loss_fn, megatron=config.policy["megatron_cfg"]["enabled"])

Write this line between ``setup(...)`` and ``grpo_train(...)``, in a copy of NeMo-RL's examples/run_grpo.py. See
docs/hosts.md.

Written against nemo_rl/algorithms/loss/loss_functions.py at 006907a, loss_input.py at 0054c4e, wrapper.py at 002bc7f,
interfaces.py and nemo_rl/models/megatron/train.py at 002cdc2, examples/run_grpo.py at 0505ac7; calculate_kl in the
form with importance_sampling_weights.
"""

from typing import Any

import torch
from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer
from torch.distributed.tensor import DTensor

from grpo_kernels import fused_grpo_loss, policy_loss, token_logprobs

REFUSED = ("use_on_policy_kl_approximation", "positive_example_nll_weight")
PER_TOKEN = ("probs_ratio", "probs_ratio_clamped", "token_mult_prob_error", "gen_kl_error", "policy_kl_error",
             "js_divergence_error", "approx_entropy")  # fmt: skip
AS_IT_IS = ("num_valid_samples", "probs_ratio_min", "probs_ratio_max", "probs_ratio_clamped_min",
            "probs_ratio_clamped_max")  # fmt: skip


class FusedClippedPGLoss:
    """NeMo-RL's ``ClippedPGLossFn``, with ``input_type`` LOGIT.

    Args:
        cfg: NeMo-RL's ``ClippedPGLossConfig``.
        megatron: whether the policy worker is Megatron's, which shards the vocabulary over its tensor-parallel ranks.
    """

    input_type = LossInputType.LOGIT

    def __init__(self, cfg: Any, megatron: bool = False) -> None:
        for name in REFUSED:
            if getattr(cfg, name, 0):
                raise NotImplementedError(f"loss_fn.{name}: not in FusedClippedPGLoss. Use NeMo-RL's own loss.")
        if cfg.disable_ppo_ratio and cfg.ratio_clip_c is not None:
            raise NotImplementedError("loss_fn.ratio_clip_c has no meaning with disable_ppo_ratio: set it to null.")
        self.cfg, self.megatron = cfg, megatron
        self.beta = 0.0 if cfg.use_kl_in_reward else cfg.reference_policy_kl_penalty
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL
        tokens, sequences = MetricNormalizer.TOKENS, MetricNormalizer.SEQUENCES
        by_loss = tokens if cfg.token_level_loss else sequences
        self.metric_normalizations = {
            "loss": by_loss, "kl_penalty": by_loss,
            "sampling_importance_ratio": sequences if cfg.sequence_level_importance_ratios else tokens,
            "is_oob_ratio": sequences if cfg.truncated_importance_sampling_type == "seq-mask-tis" else tokens,
            **dict.fromkeys(PER_TOKEN, tokens), **dict.fromkeys(AS_IT_IS, MetricNormalizer.NONE),
        }  # fmt: skip

    def __call__(
        self, logits: torch.Tensor, data: dict, global_valid_seqs: torch.Tensor, global_valid_toks: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a micro-batch, and NeMo-RL's metrics.

        Args:
            logits: (B, S, V), or (B, S, V/TP); row i predicts token i+1; divided by the temperature already.
            data: ``input_ids``, ``token_mask``, ``advantages``, ``prev_logprobs``, ``generation_logprobs`` and
                ``reference_policy_logprobs``, (B, S), of which the first position is not read; ``sample_mask`` (B,).
            global_valid_seqs, global_valid_toks: 0-d counts over all ranks and micro-batches.
        """
        ids = data["input_ids"][:, 1:]
        (B, T), token_level = ids.shape, self.cfg.token_level_loss
        logits, sharded = self._local(logits)
        if logits.shape[1] < T:
            raise NotImplementedError(
                f"logits hold {logits.shape[1]} of {T + 1} positions, and FusedClippedPGLoss has no context "
                "parallelism: set context_parallel_size to 1, or use NeMo-RL's own loss."
            )
        logits = logits[:, :T]  # a view: what follows is padding, and the row after the last token
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        seqs, toks = global_valid_seqs.clamp_min(1), global_valid_toks.clamp_min(1)  # 0: a batch without a token
        prev = None if self.cfg.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        common = {
            "advantages": data["advantages"][:, 1:], "old_logps": prev, "completion_mask": mask,
            "sampling_logps": data["generation_logprobs"][:, 1:], "num_items_in_batch": toks,
            "loss_scale": 1.0 if token_level else B / seqs,
            "loss_agg_mode": "token-mean" if token_level else "sequence-mean", **self._objective(),
        }  # fmt: skip
        if self.beta == 0.0:  # one pass over the logits
            out = fused_grpo_loss(logits, ids, **common, **sharded)
            loss, logps, kl = out.loss, out.logps, None
        else:
            logps = token_logprobs(logits, ids, mask=mask, **sharded).logps
            kl = _kl(self.cfg, logps, data["reference_policy_logprobs"][:, 1:], mask)
            kl = kl.sum() / toks if token_level else _mean(kl, mask).sum() / seqs
            loss = policy_loss(logps, **common).loss + self.beta * kl
        with torch.no_grad():
            log = self._metrics(logps.detach(), data, mask, seqs, toks)
            log |= {"loss": loss, "kl_penalty": torch.zeros_like(loss) if kl is None else kl}
            values = torch.stack([value.detach().float() for value in log.values()])
        return loss, dict(zip(log, values.tolist()))  # NeMo-RL wants numbers: one wait for the device

    def _local(self, logits: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """This rank's logits, and the group that the vocabulary is sharded over, if it is."""
        group = None
        if isinstance(logits, DTensor):
            mesh = logits.device_mesh
            logits, group = logits.to_local(), mesh.get_group("tp" if mesh.ndim > 1 else 0)
        elif self.megatron:
            from megatron.core.parallel_state import get_tensor_model_parallel_group

            group = get_tensor_model_parallel_group()
        if group is None or torch.distributed.get_world_size(group) == 1:
            return logits, {}
        return logits, {"vocab_group": group}

    def _objective(self) -> dict:
        """The config in this package's words."""
        cfg, correction = self.cfg, {}
        if cfg.use_importance_sampling_correction:
            kind = cfg.truncated_importance_sampling_type
            unit = "sequence" if cfg.sequence_level_importance_ratios else "token"
            low = cfg.truncated_importance_sampling_ratio_min
            correction = {
                "sampling_correction": {"icepop": f"{unit}_mask", "seq-mask-tis": "seq_mask_tis"}.get(
                    kind, f"{unit}_truncate"
                ),
                "sampling_correction_min": 0.0 if kind == "tis" and low is None else low,
                "sampling_correction_max": cfg.truncated_importance_sampling_ratio,
            }
        if cfg.disable_ppo_ratio:
            return {"policy_term": "reinforce", **correction}
        if cfg.use_cispo:
            bounds = {"cispo_min": 1 - cfg.ratio_clip_min, "cispo_max": 1 + cfg.ratio_clip_max}
            return {"policy_term": "cispo", **bounds, **correction}
        level = "sequence" if cfg.sequence_level_importance_ratios and not cfg.force_on_policy_ratio else "token"
        return {"epsilon": cfg.ratio_clip_min, "epsilon_high": cfg.ratio_clip_max, "dual_clip": cfg.ratio_clip_c,
                "importance_sampling_level": level, **correction}  # fmt: skip

    def _metrics(self, logps, data, mask, seqs, toks) -> dict[str, torch.Tensor]:
        cfg, generated = self.cfg, data["generation_logprobs"][:, 1:]
        prev = logps if cfg.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        ratio = logps if cfg.disable_ppo_ratio else logps - prev
        if cfg.sequence_level_importance_ratios and not cfg.disable_ppo_ratio:
            ratio = _mean(ratio, mask)[:, None].expand_as(logps)
        ratio = clamped = ratio if cfg.disable_ppo_ratio else ratio.exp()
        if not (cfg.disable_ppo_ratio or cfg.force_on_policy_ratio):
            clamped = ratio.clamp(1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max)
        mixture = (0.5 * (prev.exp() + generated.exp())).log()
        kind = cfg.reference_policy_kl_type
        values = {
            "probs_ratio": ratio,
            "probs_ratio_clamped": clamped,
            "token_mult_prob_error": _selected((generated - prev).abs(), mask).exp(),
            "gen_kl_error": _estimate(prev - generated, kind),
            "policy_kl_error": _estimate(generated - prev, kind),
            "js_divergence_error": 0.5 * (_estimate(prev - mixture, "k3") + _estimate(generated - mixture, "k3")),
            "approx_entropy": -(logps - generated).exp() * logps,
        }
        log = {name: _selected(value, mask).sum() / toks for name, value in values.items()}
        for name, value in (("probs_ratio", ratio), ("probs_ratio_clamped", clamped)):
            log[f"{name}_min"] = value.masked_fill(mask == 0, torch.inf).min()
            log[f"{name}_max"] = value.masked_fill(mask == 0, -torch.inf).max()
        log |= _mismatch(cfg, prev - generated, data["sample_mask"], mask, seqs, toks)
        return log | {"num_valid_samples": data["sample_mask"].sum()}


def _selected(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x, and 0 where masked, whatever stands there: NaN times 0 would be NaN."""
    return torch.where(mask != 0, x, 0.0)


def _mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,): each sequence's mean over its unmasked tokens."""
    return _selected(x, mask).sum(1) / mask.sum(1).clamp_min(1)


def _estimate(u: torch.Tensor, kind: str) -> torch.Tensor:
    """KL estimators of u = log q − log p, for samples of p."""
    return {"k1": lambda: -u, "k2": lambda: 0.5 * u.square(), "k3": lambda: u.exp() - 1 - u}[kind]()


def _kl(cfg: Any, logps: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """NeMo-RL's penalty per token, 0 where masked: its factor is 1, and has the gradient of the sampling."""
    u = held = _selected(ref - logps, mask)
    if cfg.kl_input_clamp_value is not None:
        held = u.clamp(-cfg.kl_input_clamp_value, cfg.kl_input_clamp_value)
    sampled = (logps - logps.detach()).exp()
    kl = torch.where(u == held, sampled, 1.0) * _estimate(held, cfg.reference_policy_kl_type)
    bound = cfg.kl_output_clamp_value
    return kl if bound is None else kl.clamp(-bound, bound)


def _mismatch(cfg: Any, drift, sample_mask, mask, seqs, toks) -> dict[str, torch.Tensor]:
    """The sampler's importance weights as NeMo-RL logs them; the loss has made its own."""
    kind, high = cfg.truncated_importance_sampling_type, cfg.truncated_importance_sampling_ratio
    low = cfg.truncated_importance_sampling_ratio_min or 0.0
    per_sequence = cfg.sequence_level_importance_ratios
    weights = _selected(drift, mask).sum(1, keepdim=True).exp() if per_sequence else drift.exp()
    log = {}
    if high is not None:
        unit = _mean(drift, mask).exp()[:, None] if kind == "seq-mask-tis" else weights
        out = (unit < low) | (unit > high)
        whole = kind == "seq-mask-tis"
        counted, total = (_selected(out[:, 0], sample_mask), seqs) if whole else (_selected(out, mask), toks)
        log["is_oob_ratio"] = counted.sum() / total
        weights = weights.clamp(low, high) if kind == "tis" else weights.masked_fill(out, 0.0)
    if per_sequence:
        log["sampling_importance_ratio"] = _selected(weights[:, 0], sample_mask).sum() / seqs
    else:
        log["sampling_importance_ratio"] = _selected(weights, mask).sum() / toks
    return log
