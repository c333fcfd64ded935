"""Checks of hidden states and heads."""

import math

import torch

from grpo_kernels.call.checks import LOGITS_DTYPES, Layout, check_layout, check_tensor, is_dtensor, is_integer
from grpo_kernels.objective.scalars import is_number, is_whole, plain


def head_tensors(
    head: torch.Tensor | torch.nn.Module, bias: torch.Tensor | None, prefix: str = ""
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a head, as plain tensors; their names begin with ``prefix``."""
    if isinstance(head, torch.nn.Module):
        if bias is not None:
            raise ValueError("bias comes with the head: pass the module alone, or its weight and bias as tensors.")
        _check_module(head)
        head, bias = head.weight, head.bias
    check_tensor(f"{prefix}weight", head)
    if bias is not None:
        check_tensor(f"{prefix}bias", bias)
    if head.numel() == 0 and hasattr(head, "ds_id"):
        raise ValueError(
            "weight is partitioned by DeepSpeed ZeRO-3 and empty here. Keep the head out of the partitioning, or call "
            "the head and fused_grpo_loss on its logits, which ZeRO-3's hooks can follow."
        )
    return _gathered("weight", head), None if bias is None else _gathered("bias", bias)


def has_adapter(head: torch.nn.Module) -> bool:
    """Whether its weight alone is not what the head computes: LoRA and its kin, of PEFT or loralib."""
    return hasattr(head, "lora_A") or hasattr(head, "base_layer")


def _check_module(head: torch.nn.Module) -> None:
    kind = type(head).__name__
    if has_adapter(head):
        raise ValueError(
            f"the head is a {kind} with an adapter on it, which its weight alone does not have. Leave the head out of "
            "the adapter's target_modules, merge the adapter (merge_and_unload()), or use fused_grpo_loss on logits."
        )
    if not isinstance(head, torch.nn.Linear):
        raise TypeError(f"a head given as a module must be a torch.nn.Linear, got {kind}. Pass weight (V, H) and bias.")


def _gathered(name: str, x: torch.Tensor) -> torch.Tensor:
    """A DTensor as a plain tensor, whose gradient goes back as the mean over the ranks, as FSDP2 reduces it.

    Over ranks that see the same data (tensor parallelism) the mean of their equal gradients is each of them.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial, Replicate, Shard

    if not all(isinstance(p, (Shard, Replicate)) for p in x.placements):
        raise ValueError(f"{name} is a DTensor with placements {x.placements}, of which only Shard and Replicate can "
                         f"be gathered. Pass {name}.full_tensor().")  # fmt: skip
    return x.full_tensor(grad_placements=[Partial("avg")] * len(x.placements))


def check_hidden(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> Layout:  # fmt: skip
    """The layout of hidden states (B, T, H) or (B, T+1, H) and ids (B, T); or of packed (N, H) and (N,)."""
    check_tensor("hidden", hidden)
    check_tensor("completion_ids", ids)
    if is_dtensor(hidden):
        raise ValueError(
            "hidden is a DTensor, whose gradient the loss cannot place. Pass hidden.full_tensor(), or "
            "hidden.to_local() with the inputs of those rows."
        )
    if hidden.dtype not in LOGITS_DTYPES:
        raise TypeError(f"hidden must be float32, bfloat16 or float16, got {hidden.dtype}. Cast it.")
    if not is_integer(ids):
        raise TypeError(f"completion_ids must be integers, got {ids.dtype}. Cast them: .long().")
    if ids.dim() not in (1, 2):
        raise ValueError(f"completion_ids must be (B, T), or packed (N,), got {tuple(ids.shape)}.")
    shape = tuple(ids.shape)
    longer = () if ids.dim() == 1 else ((shape[0], shape[1] + 1),)
    if tuple(hidden.shape[:-1]) not in (shape, *longer):
        forms = "packed (N, H)" if ids.dim() == 1 else "(B, T, H) or (B, T+1, H)"
        raise ValueError(f"hidden must be {forms} for completion_ids {shape}, got {tuple(hidden.shape)}.")
    if hidden.shape[-1] == 0:
        raise ValueError(f"hidden {tuple(hidden.shape)} has states without an entry: its last dimension is H.")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must be (V, H) with H = {hidden.shape[-1]} from hidden, got {tuple(weight.shape)}. It is the "
            "head's weight as torch.nn.Linear has it."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}.")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name} is {x.dtype}, but hidden is {hidden.dtype}. Cast one: {name}.to(hidden.dtype).")
    for name, x in (("weight", weight), ("bias", bias), ("completion_ids", ids)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device} but hidden is on {hidden.device}. Move it there.")
    return check_layout(shape, cu_seqlens, hidden)


def check_logits_dtype(logits_dtype: torch.dtype | None, hidden: torch.Tensor, name: str = "hidden") -> bool:
    """Whether logits are fp32, whatever the dtype of the hidden states, which are called so."""
    if logits_dtype is not None and not isinstance(logits_dtype, torch.dtype):
        raise TypeError(f"logits_dtype must be None or a torch.dtype, got {type(logits_dtype).__name__}.")
    if logits_dtype not in (None, torch.float32, hidden.dtype):
        raise TypeError(
            f"logits_dtype must be torch.float32, or {hidden.dtype} as {name} is, got {logits_dtype}. Leave it out, or "
            f"cast {name} and its head."
        )
    return logits_dtype == torch.float32


def check_number(name: str, value: float) -> float:
    """A finite number above 0, as Python's."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")
    return float(value)


def check_count(value: int | None) -> int:
    """How many rows are read, -1 if nobody said."""
    if value is None:
        return -1
    if not is_whole(value):
        raise TypeError(f"num_rows must be None (the rows are counted) or an int, got {type(value).__name__}.")
    if value < 0:
        raise ValueError(f"num_rows must be 0 or more, got {value}. Leave it out to have the rows counted.")
    return plain(value)
