"""Checks of the heads of two models."""

import torch

from grpo_kernels.call.checks import LOGITS_DTYPES, Layout, check_tensor, is_dtensor
from grpo_kernels.call.distillation_checks import TopK, check_rows, check_teacher
from grpo_kernels.linear.head_checks import head_tensors

Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # hidden states, weight, bias


def student_head(hidden: torch.Tensor, weight: torch.Tensor | torch.nn.Module, bias: torch.Tensor | None) -> Head:
    head = (hidden, *head_tensors(weight, bias))
    _check_head("", head, hidden)
    return head


def teacher_head(
    hidden: torch.Tensor | TopK, weight: torch.Tensor | torch.nn.Module | None, bias: torch.Tensor | None, student: Head
) -> Head | tuple[None, None, None]:
    """The teacher's, over the same vocabulary; nothing where it has told some tokens."""
    if isinstance(hidden, TopK):
        if weight is not None or bias is not None:
            raise ValueError("a TopK needs no head: leave out teacher_weight and teacher_bias.")
        check_teacher(hidden, student[0])
        return None, None, None
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"teacher_hidden must be a torch.Tensor or a TopK, got {type(hidden).__name__}.")
    if weight is None:
        raise ValueError("teacher_hidden needs teacher_weight, the teacher's head (V, H), unless it is a TopK.")
    head = (hidden, *head_tensors(weight, bias, "teacher_"))
    _check_head("teacher_", head, student[0])
    for name, x in zip(("teacher_hidden", "teacher_weight", "teacher_bias"), head):
        if x is not None and x.requires_grad:
            raise ValueError(f"{name} requires grad, but the gradient flows to the student only. Pass {name}.detach(), "
                             "or freeze the teacher: teacher.requires_grad_(False).")  # fmt: skip
    if head[1].shape[0] != student[1].shape[0]:
        raise ValueError(
            f"teacher_weight has a vocabulary of {head[1].shape[0]}, but weight one of {student[1].shape[0]}. Both "
            "models must share their tokens: cut what only pads the larger one."
        )
    return head


def check_layout(
    hidden: torch.Tensor, told: torch.Tensor | TopK, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> Layout:
    few = isinstance(told, TopK)
    return check_rows("hidden", hidden, told.token_ids if few else told, few, mask, cu_seqlens)


def _check_head(prefix: str, head: Head, student: torch.Tensor) -> None:
    hidden, weight, bias = head
    check_tensor(f"{prefix}hidden", hidden)
    if is_dtensor(hidden):
        raise ValueError(f"{prefix}hidden is a DTensor. Pass {prefix}hidden.full_tensor(), or to_local() and what "
                         "belongs to its rows.")  # fmt: skip
    if hidden.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{prefix}hidden must be float32, bfloat16 or float16, got {hidden.dtype}. Cast it.")
    if hidden.dim() not in (2, 3) or hidden.shape[-1] == 0:
        raise ValueError(f"{prefix}hidden must be (B, T, H), or packed (N, H), got {tuple(hidden.shape)}.")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{prefix}weight must be (V, H) with H = {hidden.shape[-1]} from {prefix}hidden, got "
            f"{tuple(weight.shape)}. It is the head's weight as torch.nn.Linear has it."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{prefix}bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}.")
    for name, x in ((f"{prefix}weight", weight), (f"{prefix}bias", bias), (f"{prefix}hidden", hidden)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name} is {x.dtype}, but {prefix}hidden is {hidden.dtype}. Cast one of them.")
        if x is not None and x.device != student.device:
            raise ValueError(f"{name} is on {x.device} but hidden is on {student.device}. Move it there.")
