"""TRL: `FusedDistillationTrainer` in the place of `trl.DistillationTrainer`.

Replaced is the divergence of both models' hidden states and heads, a function of TRL's module that its trainer calls
inside of the student's forward. Sampling, the teacher's forward, and what is logged stay TRL's.
"""

import types
import warnings

import torch
import trl
from packaging.version import Version
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DistillationTrainer

from grpo_kernels.api.linear_distillation import fused_linear_distillation_loss
from grpo_kernels.linear.head_checks import head_tensors

TESTED = "1.16"
_REPLACED = "_chunked_divergence_loss"
_STOCK = DistillationTrainer._compute_loss


def fused_divergence_loss(
    student_hidden_states: torch.Tensor,
    teacher_hidden_states: torch.Tensor,
    student_lm_head_weight: torch.Tensor,
    teacher_lm_head_weight: torch.Tensor,
    completion_mask: torch.Tensor,
    beta: float,
    num_items_in_batch: torch.Tensor | int | None = None,
    student_lm_head_bias: torch.Tensor | None = None,
    teacher_lm_head_bias: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, Σ of the student's entropies, tokens), of the arguments of TRL's own function."""
    student = _head(student_hidden_states, student_lm_head_weight, student_lm_head_bias)
    with torch.no_grad():
        teacher = _head(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias)
    scale, num_items = 1.0, num_items_in_batch
    if num_items is not None:  # TRL divides by less than one token, should it come to it
        num_items = torch.as_tensor(num_items, dtype=torch.float32, device=student_hidden_states.device)
        scale = num_items.clamp(min=1.0) / num_items
    out = fused_linear_distillation_loss(
        student[0], student[1], teacher[0].detach(), teacher[1].detach(), bias=student[2],
        teacher_bias=None if teacher[2] is None else teacher[2].detach(), logit_scale=student_logit_scale,
        softcap=student_final_logit_softcapping, teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_final_logit_softcapping, beta=beta, temperature=temperature,
        completion_mask=completion_mask, num_items_in_batch=num_items, loss_scale=scale,
    )  # fmt: skip
    return out.loss, out.sums["entropy"].float(), (completion_mask != 0).sum()


def _head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    """Hidden states, weight and bias in the dtype in which TRL multiplies them."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    weight, bias = head_tensors(weight, bias)
    return tuple(None if x is None else x.to(dtype) for x in (hidden, weight, bias))


_fused_compute_loss = types.FunctionType(
    _STOCK.__code__, {**_STOCK.__globals__, _REPLACED: fused_divergence_loss}, _STOCK.__name__, _STOCK.__defaults__,
    _STOCK.__closure__,
)  # fmt: skip


class FusedDistillationTrainer(DistillationTrainer):
    """`trl.DistillationTrainer` with the fused divergence; same arguments, same logs.

    Four products with the heads make a step, where TRL's function takes six, and eight for β between 0 and 1. Under
    mixed precision the logits are in the dtype of the hidden states; TRL's are in fp32.

    Raises:
        ValueError: what cannot be served: an older TRL, one whose loss is made otherwise, DeepSpeed ZeRO-3.
    """

    def __init__(self, *args, **kwargs) -> None:
        if Version(trl.__version__) < Version(TESTED):
            raise ValueError(f"grpo_kernels needs TRL {TESTED}, and this is {trl.__version__}. Upgrade it.")
        if _REPLACED not in _STOCK.__code__.co_names:
            raise ValueError(f"The DistillationTrainer of TRL {trl.__version__} makes its loss otherwise than that of "
                             f"{TESTED}. Use trl.DistillationTrainer.")  # fmt: skip
        if Version(trl.__version__).release[:2] != Version(TESTED).release:
            warnings.warn(f"grpo_kernels is tested with TRL {TESTED}, and this is {trl.__version__}. Compare a run "
                          "with trl.DistillationTrainer's before you rely on it.", stacklevel=2)  # fmt: skip
        super().__init__(*args, **kwargs)
        if is_deepspeed_zero3_enabled():
            raise ValueError("DeepSpeed ZeRO-3 partitions both heads, which the fused divergence needs whole. Use "
                             "another stage, FSDP, or trl.DistillationTrainer.")  # fmt: skip

    _compute_loss = _fused_compute_loss
