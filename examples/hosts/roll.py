"""ROLL: the loss of its actor worker, from the logits.

    actor_train:
      worker_cls: fused_loss.FusedActorWorker

Name a copy of this file fused_loss.py, and put it on the PYTHONPATH. See docs/hosts.md.

Written against roll/pipeline/base_worker.py at 015a111, roll/utils/functionals.py at 090ac94,
roll/distributed/strategy/strategy.py at 005acba, and read again at 8eb27cc: 0.3.0.
"""

import torch
from roll.pipeline.base_worker import ActorWorker

from grpo_kernels import fused_grpo_loss

REFUSED = ("entropy_loss_coef", "postive_loss_coef", "use_topr_neg_loss_coef", "train_infer_ratio_mask",
           "train_infer_diff_mask", "difficulty_loss_weight", "length_loss_weight",
           "use_rollout_importance_sampling_ratio", "use_sequence_packing", "max_len_mask", "difficulty_mask",
           "error_max_len_clip")  # fmt: skip
SERVED = {"importance_sampling": "token", "ratio_type": "token", "pg_variant": "ppo", "rl_loss_coef": 1}


class FusedActorWorker(ActorWorker):
    """ROLL's ``ActorWorker`` with a loss that reads the logits once."""

    def loss_func(self, data, output_tensor: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a micro-batch, and ROLL's metrics.

        Args:
            data: ``input_ids`` and ``response_mask`` (B, S); ``old_log_probs``, ``ref_log_probs`` and ``advantages``
                (B, S-1); the token and sample counts over the ranks in ``meta_info``.
            output_tensor: logits (B, S, V), or (B, S, V/TP) from Megatron; row i predicts token i+1.
        """
        cfg, batch = self.pipeline_config, data.batch
        self._check(data, output_tensor)
        mask = batch["response_mask"][:, 1:].long()
        kept = mask != 0  # selects: what stands at a masked token is never read, NaN included
        B, T = mask.shape
        low, high = (cfg.pg_clip_low, cfg.pg_clip_high) if cfg.use_pg_clip_range else (cfg.pg_clip, cfg.pg_clip)
        tokens = _at_least_1(data.meta_info["batch_num_tokens"]["response_mask"])
        samples = _at_least_1(data.meta_info["global_valid_samples"]["response_mask"])
        mode, scale = {
            "token-mean": ("token-sum", 1 / tokens),
            "seq-mean-token-sum": ("token-sum", 1 / samples),
            "seq-mean-token-mean": ("sequence-mean", B / samples),
            "seq-mean-token-sum-norm": ("token-sum", 1 / T),
        }[cfg.loss_agg_mode]
        old, ref, advantages = batch["old_log_probs"], batch["ref_log_probs"], batch["advantages"]
        out = fused_grpo_loss(
            output_tensor, batch["input_ids"][:, 1:], advantages, old_logps=old, ref_logps=ref, completion_mask=mask,
            loss_agg_mode=mode, loss_scale=scale, epsilon=low, epsilon_high=high,
            dual_clip=1 + 2 * cfg.pg_clip if cfg.dual_clip_loss else None,
            beta=cfg.kl_loss_coef if cfg.use_kl_loss else 0.0, kl_clamp=10.0, **self._vocab_group(),
        )  # fmt: skip

        def reduce(x: torch.Tensor) -> torch.Tensor:  # ROLL's agg_loss
            x = torch.where(kept, x, 0.0).sum(1)
            return scale * ((x / mask.sum(1).clamp_min(1)).mean() if mode == "sequence-mean" else x.sum())

        r, u = (torch.where(kept, x, 0.0) for x in (out.logps - old, ref - out.logps))
        ratio = r.exp()
        below, above = (ratio < 1 - low).float(), (ratio > 1 + high).float()
        kl_loss = reduce((u.exp() - u - 1).clamp(max=10.0))
        worse = ratio.clamp(1 - low, 1 + high) * advantages < ratio * advantages
        log = {
            "actor/ppo_ratio_high_clipfrac": above.mean(),
            "actor/ppo_ratio_low_clipfrac": below.mean(),
            "actor/ppo_ratio_clipfrac": (below + above).mean(),
            "actor/ratio_mean": (torch.where(kept, ratio, 0.0).sum(1) / mask.sum(1).clamp_min(1)).mean(),
            "actor/ratio_max": torch.where(kept, ratio, 0.0).max(),
            "actor/ratio_min": ratio.masked_fill(~kept, 1e10).min(),
            "actor/clipfrac": reduce(worse.float()),
            "actor/pg_loss": out.loss - (cfg.kl_loss_coef * kl_loss if cfg.use_kl_loss else 0.0),
            "actor/kl_loss": kl_loss,
            "actor/total_loss": out.loss,
            "actor/approxkl": reduce(0.5 * r.square()),
            "actor/policykl": reduce(r),
        }
        values = torch.stack([value.detach().float() for value in log.values()]).tolist()  # one wait for the device
        return out.loss, dict(zip(log, values))

    def _vocab_group(self) -> dict:
        """Megatron shards the vocabulary over the tensor-parallel ranks; ROLL's other strategies do not."""
        if not self.worker_config.strategy_args.strategy_name.startswith("megatron"):
            return {}
        from megatron.core import mpu

        if mpu.get_tensor_model_parallel_world_size() == 1:
            return {}
        return {"vocab_group": mpu.get_tensor_model_parallel_group()}

    def _check(self, data, logits: torch.Tensor) -> None:
        cfg = self.pipeline_config
        refused = [name for name in REFUSED if getattr(cfg, name, 0) or getattr(self.worker_config, name, 0)]
        given = {name: getattr(cfg, name, served) for name, served in SERVED.items()}
        refused += [f"{name}: {value}" for name, value in given.items() if value != SERVED[name]]
        correction = getattr(cfg, "train_infer_correction", None)
        if correction is not None and correction.is_weight.enabled:
            refused.append("train_infer_correction.is_weight")
        if refused:
            raise NotImplementedError(f"{', '.join(refused)}: not in FusedActorWorker. Use ROLL's own ActorWorker.")
        if "old_log_probs" not in data.batch or not getattr(cfg, "enable_old_logprobs_recompute", True):
            raise NotImplementedError("FusedActorWorker needs old_log_probs: set enable_old_logprobs_recompute: true.")
        if logits.shape[1] != data.batch["input_ids"].shape[1]:
            raise NotImplementedError(
                f"logits hold {logits.shape[1]} of {data.batch['input_ids'].shape[1]} positions: FusedActorWorker has "
                "no context parallelism. Set context_parallel_size (ulysses_size) to 1."
            )


def _at_least_1(count: torch.Tensor | float) -> torch.Tensor | float:
    """A divisor; a batch without a token has a count of 0."""
    return count.clamp_min(1) if isinstance(count, torch.Tensor) else max(count, 1)
