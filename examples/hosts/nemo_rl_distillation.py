"""NeMo-RL: its distillation loss from a teacher's top k logits.

    loss_fn = FusedDistillationLoss(config.loss_fn, megatron=config.policy["megatron_cfg"]["enabled"])

Write this line between ``setup(...)`` and ``distillation_train(...)``, in a copy of NeMo-RL's
examples/run_distillation.py. See docs/distillation.md.
"""

from typing import Any

import torch
from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType
from torch.distributed.tensor import DTensor

from grpo_kernels import TopK, distillation_loss

OUTSIDE = -100.0  # NeMo-RL's log-probability of what the teacher does not list, where zero_outside_topk is set


class FusedDistillationLoss:
    """NeMo-RL's ``DistillationLossFn``, with ``input_type`` LOGIT.

    Args:
        cfg: NeMo-RL's ``DistillationLossConfig``.
        megatron: whether the policy worker is Megatron's, which shards the vocabulary over its tensor-parallel ranks.
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGIT

    def __init__(self, cfg: Any, megatron: bool = False) -> None:
        mixed = {"forward": 1.0, "reverse": 0.0, "mixed": cfg.mixed_kl_weight}
        self.forward_weight, self.zero_outside, self.megatron = mixed[cfg.kl_type], cfg.zero_outside_topk, megatron

    def __call__(
        self, logits: torch.Tensor, data: dict, global_valid_seqs: torch.Tensor, global_valid_toks: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of a micro-batch, and NeMo-RL's metrics.

        Args:
            logits: (B, S, V); row i predicts token i+1; divided by the temperature already, as the teacher's.
            data: ``teacher_topk_logits`` and ``teacher_topk_indices``, (B, S, K), of which the last position is not
                read; ``input_ids`` and ``token_mask`` (B, S), ``sample_mask`` (B,).
            global_valid_seqs: not read.
            global_valid_toks: 0-d count over all ranks and micro-batches.
        """
        B, T = data["input_ids"].shape[0], data["input_ids"].shape[1] - 1
        logits = self._whole(logits)
        if logits.shape[1] < T:
            raise NotImplementedError(
                f"logits hold {logits.shape[1]} of {T + 1} positions, and FusedDistillationLoss has no context "
                "parallelism: set context_parallel_size to 1, or use NeMo-RL's own loss."
            )
        logits = logits[:, :T]  # a view: what follows is padding, and the row after the last token
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        kept = (mask != 0)[..., None]
        ids = torch.where(kept, data["teacher_topk_indices"][:, :T].to(logits.device), 0)
        told = torch.where(kept, data["teacher_topk_logits"][:, :T].to(logits.device).float(), 0.0).log_softmax(-1)
        common = {"completion_mask": mask, "loss_agg_mode": "token-mean", "num_items_in_batch": global_valid_toks}

        loss, w = 0.0, self.forward_weight
        if w:
            tail = None if self.zero_outside else False
            loss = loss + w * distillation_loss(logits, TopK(ids, told), beta=0.0, tail=tail, **common).loss
        if w < 1 and self.zero_outside:  # a whole teacher, who gives each other token the same
            whole = told.new_full(logits.shape, OUTSIDE).scatter_(-1, ids, told)
            loss = loss + (1 - w) * distillation_loss(logits, whole, beta=1.0, **common).loss
        elif w < 1:
            loss = loss + (1 - w) * distillation_loss(logits, TopK(ids, told), beta=1.0, tail=False, **common).loss
        return loss, {"loss": loss.item(), "num_valid_samples": B}

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits as one tensor; an error where the vocabulary is sharded."""
        group = None
        if isinstance(logits, DTensor):
            mesh = logits.device_mesh
            logits, group = logits.to_local(), mesh.get_group("tp" if mesh.ndim > 1 else 0)
        elif self.megatron:
            from megatron.core.parallel_state import get_tensor_model_parallel_group

            group = get_tensor_model_parallel_group()
        if group is not None and torch.distributed.get_world_size(group) > 1:
            raise NotImplementedError(
                "the vocabulary is sharded over tensor-parallel ranks, and distillation_loss takes whole rows: set "
                "tensor_parallel_size (Megatron: tensor_model_parallel_size) to 1, or use NeMo-RL's own loss."
            )
        return logits
