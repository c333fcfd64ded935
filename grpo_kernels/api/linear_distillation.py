"""`fused_linear_distillation_loss`: distillation from both models' hidden states, without [N, V] logits of either."""

import math

import torch

from grpo_kernels.call import ops
from grpo_kernels.call.checks import check_switches
from grpo_kernels.call.distillation_checks import TopK
from grpo_kernels.call.distillation_prepare import output, prepare
from grpo_kernels.call.output import LossOutput
from grpo_kernels.linear import distillation_autograd
from grpo_kernels.linear.distillation_checks import check_layout, student_head, teacher_head
from grpo_kernels.linear.head import chunk_rows, logit_bytes
from grpo_kernels.linear.head_autograd import ChunkOptions
from grpo_kernels.linear.head_checks import check_count, check_logits_dtype, check_number
from grpo_kernels.objective.distillation import Head


def fused_linear_distillation_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor | torch.nn.Module,
    teacher_hidden: torch.Tensor | TopK,
    teacher_weight: torch.Tensor | torch.nn.Module | None = None,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    beta: float = 1.0,
    temperature: torch.Tensor | float = 1.0,
    tail: bool | None = True,
    completion_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    loss_agg_mode: str = "global-tokens",
    num_items_in_batch: torch.Tensor | float | None = None,
    max_completion_length: torch.Tensor | float | None = None,
    global_batch_size: torch.Tensor | float | None = None,
    loss_scale: torch.Tensor | float = 1.0,
    chunk_bytes: int | None = None,
    num_rows: int | None = None,
    accumulate_in_fp32: bool = True,
    logits_dtype: torch.dtype | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> LossOutput:
    """`distillation_loss` of ``softcap·tanh(logit_scale·(hidden·weightᵀ + bias)/softcap)``, and of the teacher's.

    The logits of both are made a chunk of rows at a time. The kernel makes the gradient of the student's logits, and
    two products make the gradients of hidden states and weight from that: four matrix products in all, none of them
    twice. With ``reduction="none"`` and in fp16 the gradient has to wait, and the two products that make the logits
    are made again in the backward. Masked rows are left out of the products.

    Args:
        hidden: (B, T, H), or (B, T+1, H) whose last position is not read and gets gradient 0, or packed (N, H); fp32,
            bf16 or fp16: what the student's head is applied to, and the dtype of its products.
        weight: (V, H) in the dtype of ``hidden``, or the head itself (a ``torch.nn.Linear``), as in
            `fused_linear_grpo_loss`.
        teacher_hidden: the teacher's, (B, T, H'), (B, T+1, H') or (N, H'), of a size and dtype of its own; or a `TopK`,
            (B, T, K) or (N, K).
        teacher_weight: (V, H') or a head, over the student's vocabulary; None with a `TopK`.
        bias, teacher_bias: (V,), or None.
        logit_scale, teacher_logit_scale: factors of the logits (Cohere), or the inverse of their divisor (Granite).
        softcap, teacher_softcap: bounds of the logits (Gemma); None: none.
        chunk_bytes: bytes of logits at a time, of both models together. None: GRPO_KERNELS_CHUNK_BYTES, or else as in
            `fused_linear_grpo_loss`.
        num_rows: how many rows are read, if known; it must be right, which is checked on the CPU alone. With a mask or
            ``cu_seqlens`` the host otherwise waits for the device once, to count them.
        accumulate_in_fp32: add up the gradients of weight and bias in fp32; False: in the weight's own dtype.
        logits_dtype: of both models' logits. None: the dtype of their own hidden states; ``torch.float32``: as in
            `fused_linear_grpo_loss`.
        beta, temperature, tail, completion_mask, cu_seqlens, loss_agg_mode, num_items_in_batch, max_completion_length,
            global_batch_size, loss_scale, reduction, backend: as in `distillation_loss`.

    Returns:
        `LossOutput` as of `distillation_loss`; the loss is differentiable, once, in ``hidden``, ``weight`` and
        ``bias``, as far as they require grad.

    Raises:
        ValueError: wrong shape, device, value or combination; vocabularies of different size; a tensor of the teacher
            that requires grad; a head with an adapter on it.
        TypeError, IndexError, RuntimeError: as `distillation_loss`.
    """
    check_switches(accumulate_in_fp32=accumulate_in_fp32)
    student = student_head(hidden, weight, bias)
    told = teacher_head(teacher_hidden, teacher_weight, teacher_bias, student)
    layout = check_layout(hidden, teacher_hidden, completion_mask, cu_seqlens)
    fp32_logits = check_logits_dtype(logits_dtype, hidden)
    if told[0] is not None:
        check_logits_dtype(logits_dtype, told[0], "teacher_hidden")
    few = teacher_hidden if isinstance(teacher_hidden, TopK) else None
    backend = ops.choose_backend(backend, hidden)
    batch, plan = prepare(
        layout, hidden, few, backend, beta=beta, temperature=temperature, tail=tail, completion_mask=completion_mask,
        cu_seqlens=cu_seqlens, loss_agg_mode=loss_agg_mode, num_items_in_batch=num_items_in_batch,
        max_completion_length=max_completion_length, global_batch_size=global_batch_size, loss_scale=loss_scale,
        reduction=reduction, student=_scaled("", logit_scale, softcap),
        teacher=_scaled("teacher_", teacher_logit_scale, teacher_softcap),
    )  # fmt: skip
    itemsize = logit_bytes(student[1], fp32_logits)
    itemsize += 0 if told[1] is None else logit_bytes(told[1], fp32_logits, gradient=False)
    height = chunk_rows(chunk_bytes, student[1], itemsize)
    options = ChunkOptions(height, check_count(num_rows), accumulate_in_fp32, backend, fp32_logits=fp32_logits)
    student, told = ((layout.tokens(states), *rest) for states, *rest in (student, told))
    loss, values, sums, metrics = distillation_autograd.run(student, told, batch, plan, layout.T, options)
    return output(layout, loss, values, sums, metrics)


def _scaled(prefix: str, logit_scale: float, softcap: float | None) -> Head:
    scale = check_number(f"{prefix}logit_scale", logit_scale)
    return Head(scale, math.inf if softcap is None else check_number(f"{prefix}softcap", softcap))
