"""Checks of what a distillation is given."""

import math
from typing import NamedTuple

import torch

from grpo_kernels.call import checks
from grpo_kernels.call.checks import LOGITS_DTYPES, Layout, check_device, check_tensor
from grpo_kernels.objective.aggregations import AGGREGATIONS
from grpo_kernels.objective.scalars import is_number


class TopK(NamedTuple):
    """A teacher's likeliest tokens, for `distillation_loss` and `fused_linear_distillation_loss`.

    Attributes:
        token_ids: (B, T, K), packed (N, K), integers; one below 0 is no token. A token may stand only once in a row.
        logps: likewise, float: the teacher's log-probabilities of these tokens, at the temperature of the loss
            already; −∞ is no token.
    """

    token_ids: torch.Tensor
    logps: torch.Tensor


def check_beta(beta: float) -> float:
    if not is_number(beta):
        raise TypeError(f"beta must be a number, got {type(beta).__name__}. It is part of the loss's structure.")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie between 0 (forward KL) and 1 (reverse KL), got {beta!r}.")
    return float(beta)


def check_choices(tail: object, loss_agg_mode: str) -> None:
    if not (tail is None or isinstance(tail, bool)):
        raise ValueError(f"tail must be True, False or None, got {tail!r}.")
    if not isinstance(loss_agg_mode, str) or loss_agg_mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(map(repr, AGGREGATIONS))}, got {loss_agg_mode!r}.")


def check_pair(
    logits: torch.Tensor, teacher: torch.Tensor | TopK, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> Layout:
    """The layout of logits (B, T, V) or (B, T+1, V) and a teacher of them; or of packed (N, V).

    T is what mask and teacher say, else the logits.
    """
    _check_logits("logits", logits)
    check_teacher(teacher, logits)
    if not isinstance(teacher, TopK):
        _check_logits("teacher", teacher)
        if teacher.shape[-1] != logits.shape[-1]:
            raise ValueError(
                f"teacher has a vocabulary of {teacher.shape[-1]}, but logits one of {logits.shape[-1]}. Both models "
                "must share their tokens: cut what only pads the larger one."
            )
    told = teacher.token_ids if isinstance(teacher, TopK) else teacher
    return check_rows("logits", logits, told, isinstance(teacher, TopK), mask, cu_seqlens)


def check_rows(
    name: str, student: torch.Tensor, told: torch.Tensor, few: bool, mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Layout:  # fmt: skip
    """The layout of a student's (B, T, ·) or (B, T+1, ·), or packed (N, ·), and what a teacher has of each token."""
    if student.dim() not in (2, 3):
        raise ValueError(f"{name} must be (B, T, ·), or packed (N, ·), got {tuple(student.shape)}.")
    if told.dim() != student.dim():
        raise ValueError(f"the teacher is {tuple(told.shape)} for {name} {tuple(student.shape)}: both must be packed, "
                         "or neither.")  # fmt: skip
    if student.dim() == 2:
        if told.shape[0] != student.shape[0]:
            raise ValueError(f"the teacher has {told.shape[0]} packed tokens, but {name} {student.shape[0]}.")
        if cu_seqlens is None:
            raise ValueError("packed input needs cu_seqlens, (S+1,): the bounds of its sequences, from 0 to N.")
        return checks.check_layout((student.shape[0],), cu_seqlens, student)
    if mask is not None and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        T = mask.shape[1]
    else:
        T = told.shape[1] if few else min(student.shape[1], told.shape[1])
    rows = (T,) if few else (T, T + 1)
    if student.shape[1] not in (T, T + 1) or told.shape[0] != student.shape[0] or told.shape[1] not in rows:
        raise ValueError(
            f"the teacher must have a row for each of the {student.shape[0]}×{T} tokens, and {name} too, or one "
            f"position more per sequence; got {tuple(told.shape)} and {tuple(student.shape)}."
        )
    return checks.check_layout((student.shape[0], T), cu_seqlens, student)


def _check_logits(name: str, x: torch.Tensor) -> None:
    check_tensor(name, x)
    if checks.is_dtensor(x):
        raise ValueError(f"{name} is a DTensor. Pass {name}.full_tensor(), or to_local() and what belongs to its rows.")
    if x.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}. Cast them: {name}.float(); for a "
                        "float64 result use the plain PyTorch code in reference/.")  # fmt: skip
    if x.dim() not in (2, 3):
        raise ValueError(f"{name} must be (B, T, V), or packed (N, V), got {tuple(x.shape)}.")
    if x.shape[-1] == 0:
        raise ValueError(f"{name} {tuple(x.shape)} are without a vocabulary: their last dimension is V.")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous in the vocabulary, got strides {x.stride()}. Make them so with "
                         f"{name}.contiguous(), which copies, or do not transpose them.")  # fmt: skip


def check_teacher(teacher: torch.Tensor | TopK, student: torch.Tensor) -> None:
    """What is common to whole teachers and `TopK`: types, device, and that no gradient is asked for."""
    if not isinstance(teacher, (torch.Tensor, TopK)):
        raise TypeError(f"teacher must be a torch.Tensor or a TopK, got {type(teacher).__name__}.")
    if isinstance(teacher, TopK):
        ids, logps = teacher
        check_tensor("teacher.token_ids", ids)
        check_tensor("teacher.logps", logps)
        if not checks.is_integer(ids):
            raise TypeError(f"teacher.token_ids must be integers, got {ids.dtype}. Cast them: .long().")
        if not logps.dtype.is_floating_point:
            raise TypeError(f"teacher.logps must be floating point, got {logps.dtype}. Cast them: .float().")
        if ids.dim() not in (2, 3) or ids.shape != logps.shape:
            raise ValueError(
                f"teacher.token_ids and teacher.logps must be (B, T, K), or packed (N, K), alike; got "
                f"{tuple(ids.shape)} and {tuple(logps.shape)}."
            )
    few = isinstance(teacher, TopK)
    tensors = {"teacher.token_ids": teacher[0], "teacher.logps": teacher[1]} if few else {"teacher": teacher}
    for name, x in tensors.items():
        check_device(name, x, student)
        if x.requires_grad:
            raise ValueError(f"{name} requires grad, but the gradient flows to the student only. Pass {name}.detach(), "
                             "or run the teacher under torch.no_grad().")  # fmt: skip


def check_told(ids: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor | None, V: int) -> None:
    """Values of a `TopK`: ids inside the vocabulary, none twice in a row, log-probabilities of at most 0."""
    here = (ids >= 0) & (logps != -math.inf)
    if mask is not None:
        here = here & (mask != 0)[..., None]
    outside = here & (ids >= V)
    if bool(outside.any()):
        where = outside.nonzero()[0].tolist()
        raise IndexError(
            f"teacher.token_ids[{', '.join(map(str, where))}] = {ids[tuple(where)].item()} is outside the student's "
            f"vocabulary of {V}. Check that both models share their tokens."
        )
    ordered = torch.where(here, ids.long(), torch.arange(-ids.shape[-1], 0, device=ids.device)).sort(-1)[0]
    twice = (ordered.diff(dim=-1) == 0).any(-1)
    if bool(twice.any()):
        where = twice.nonzero()[0].tolist()
        raise ValueError(f"teacher.token_ids[{', '.join(map(str, where))}] has a token twice. Give each once, and fill "
                         "up with ids below 0.")  # fmt: skip
    if bool((here & (logps > 0)).any()):
        raise ValueError("teacher.logps must be log-probabilities, at most 0: log_softmax of the teacher's logits.")
