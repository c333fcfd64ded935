"""verl: the forward KL to the tokens that a teacher's server lists, from the logits.

    VERL_USE_EXTERNAL_MODULES=fused_distillation

Name a copy of this file fused_distillation.py, and put it on the PYTHONPATH. ``distillation_loss.loss_mode`` stays
``forward_kl_topk``. See docs/distillation.md.
"""

from typing import Any

import torch
from verl.trainer.distillation import losses

from grpo_kernels import TopK, distillation_loss, token_logprobs

STRATEGIES = ("fsdp", "fsdp2", "veomni")


def fused_topk_loss(
    config: Any, distillation_config: Any, data: Any, student_logits: torch.Tensor, data_format: str
) -> dict[str, torch.Tensor]:
    """verl's ``compute_topk_loss``: what its logits processor keeps of each row; verl clamps and averages the losses.

    Args:
        config, distillation_config: verl's ``ActorConfig`` and ``DistillationConfig``.
        data: ``teacher_ids`` and ``teacher_logprobs``, nested (B, S, K); ``input_ids``, nested (B, S); ``responses``,
            nested, or padded beside ``prompts`` and ``attention_mask``.
        student_logits: (1, N, V): sequences one after the other; row i predicts token i+1; divided by the temperature.
        data_format: not read.

    Returns:
        ``distillation_losses``, ``student_mass`` and ``teacher_mass``, (1, N); 0 outside the responses.
    """
    ids, told = (data[name].values()[None] for name in ("teacher_ids", "teacher_logprobs"))  # (1, N, K)
    if config.strategy not in STRATEGIES or ids.shape[1] != student_logits.shape[1]:
        raise NotImplementedError(
            f"strategy {config.strategy!r}, {student_logits.shape[1]} rows of logits for {ids.shape[1]} tokens: "
            "fused_topk_loss takes whole rows of whole sequences. Use fsdp without sequence parallelism, or verl's own."
        )
    counts = _response_rows(data, ids.shape[1])[None]
    with torch.no_grad():
        ids = torch.where(counts[..., None], ids.long(), 0)
        told = torch.where(counts[..., None], told.float(), -torch.inf)
        x = student_logits.gather(-1, ids).float()
        best, at = x.max(-1, keepdim=True)
        known = token_logprobs(student_logits, ids.gather(-1, at)[..., 0], mask=counts).logps[..., None]
        logps = known + x - best  # the student's of the teacher's tokens
        masses = {"student_mass": torch.where(counts, logps.exp().sum(-1), 0.0), "teacher_mass": told.exp().sum(-1)}
        floor, constant = distillation_config.distillation_loss.log_prob_min_clamp, 0.0
        if floor is not None:  # what the student says less often than that counts, and has no gradient
            told, below = told.clamp_min(floor), logps < floor
            constant = torch.where(below & counts[..., None], told.exp() * (told - floor), 0.0).sum(-1)
            ids = ids.masked_fill(below, -1)
    out = distillation_loss(student_logits, TopK(ids, told), beta=0.0, tail=None, completion_mask=counts,
                            reduction="none")  # fmt: skip
    return {"distillation_losses": out.loss + constant, **masses}


def _response_rows(data: Any, N: int) -> torch.Tensor:
    """(N,) bool: the rows that predict a token of a response."""
    ends, responses = data["input_ids"].offsets()[1:], data["responses"]
    if responses.is_nested:
        lengths = responses.offsets().diff()
    else:
        lengths = data["attention_mask"][:, data["prompts"].shape[1] :].sum(1)
    edges = torch.zeros(N + 1, dtype=torch.long, device=ends.device)
    edges.index_add_(0, ends - lengths - 1, torch.ones_like(ends)).index_add_(0, ends - 1, -torch.ones_like(ends))
    return edges.cumsum(0)[:N] > 0


losses.compute_topk_loss = fused_topk_loss
