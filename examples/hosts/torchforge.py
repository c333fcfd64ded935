"""torchforge: its GRPO loss, from the logits.

    TitanTrainer.options(...).as_actor(**cfg.trainer, loss=FusedGRPOLoss())

Write this in apps/grpo/main.py, in place of ``loss=GRPOLoss()``. See docs/hosts.md.

Written against src/forge/rl/loss/grpo.py, types.py and src/forge/actors/trainer/titan.py at bd76a9b, primitives.py at
89f8536, src/forge/rl/collate.py at 4f49597. The recipe is not for older versions, which call
loss(logits, response=..., padding_mask=...) and take a scalar.
"""

from dataclasses import dataclass

import torch
from forge.observability.metrics import Metric, Reduce
from forge.rl.loss.types import LossOutput
from torch.distributed.tensor import DTensor

from grpo_kernels import fused_grpo_loss

AGGREGATIONS = {"fixed_horizon": "constant", "token_mean": "token-mean", "sequence_mean": "sequence-mean"}


@dataclass
class FusedGRPOLoss:
    """torchforge's ``GRPOLoss``, with its arguments and defaults."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    beta: float = 0.1
    agg_type: str = "fixed_horizon"

    def __call__(
        self,
        logits: torch.Tensor,  # (B, S, V): row i predicts target_ids[:, i]
        target_ids: torch.Tensor,  # (B, S), -100 where masked
        advantages: torch.Tensor,  # (B, S)
        generator_logprobs: torch.Tensor,  # (B, S)
        loss_mask: torch.Tensor,  # (B, S)
        ref_logprobs: torch.Tensor | None = None,  # (B, S)
        loss_scale: torch.Tensor | None = None,  # what token_mean divides by
    ) -> LossOutput:
        if isinstance(logits, DTensor):
            raise NotImplementedError(
                "logits sharded over the vocabulary: set parallelism.disable_loss_parallel to true, "
                "parallelism.tensor_parallel_degree to 1, or use torchforge's own GRPOLoss."
            )
        loss_mask = loss_mask * (target_ids != -100)  # the last position has no target
        out = fused_grpo_loss(
            logits, target_ids, advantages, old_logps=generator_logprobs, ref_logps=ref_logprobs,
            completion_mask=loss_mask, num_items_in_batch=loss_scale, return_entropy=True,
            loss_agg_mode=AGGREGATIONS[self.agg_type], epsilon=self.clip_low, epsilon_high=self.clip_high,
            log_ratio_clamp=20.0, beta=self.beta, kl_clamp=10.0,
        )  # fmt: skip
        log_ratio = (out.logps - generator_logprobs).clamp(-20.0, 20.0)
        held = log_ratio.exp().clamp(1 - self.clip_low, 1 + self.clip_high)
        kept, tokens = loss_mask != 0, loss_mask.sum().clamp_min(1.0)
        values = {
            "loss/entropy/mean": out.metrics["entropy"],
            "loss/ratio/mean": out.metrics["ratio/mean"],
            "loss/kl_policy/mean": -torch.where(kept, log_ratio, 0.0).sum() / tokens,
            "loss/clip/clipped_ratio/mean": torch.where(kept, held, 0.0).sum() / tokens,
            "loss/clip/high_fraction": out.metrics["clip_ratio/high_mean"],
            "loss/clip/low_fraction": out.metrics["clip_ratio/low_mean"],
            "loss/aggregate/active_fraction": loss_mask.float().mean(),
        }
        if self.beta > 0:
            values["loss/kl_ref/mean"] = out.metrics["kl"]
        return LossOutput(out.loss, [Metric(key, value, Reduce.MEAN) for key, value in values.items()])
