"""Which way the rows of a loss take through the chip: the Triton kernel's, or the on-chip kernel's.

``GRPO_KERNELS_ROWS`` in the environment says: ``triton``; ``onchip``, which raises where that kernel cannot run; or
``auto``, the default, which takes the on-chip kernel where `onchip_record` has it as measured right and faster.
"""

import os

import torch

from grpo_kernels.objective.batch import Batch
from grpo_kernels.triton_backend.onchip_record import FASTER
from grpo_kernels.triton_backend.shapes import crowded

VARIABLE, WAYS = "GRPO_KERNELS_ROWS", ("auto", "triton", "onchip")
LEAST_BYTES = 64_000  # of a row: shorter ones fit into L2 many times, and were not measured


def setting() -> str:
    """The value of GRPO_KERNELS_ROWS.

    Raises:
        ValueError: it is none of auto, triton and onchip.
    """
    found = os.environ.get(VARIABLE) or "auto"
    if found not in WAYS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(WAYS)}, got {found!r}.")
    return found


def on_chip(logits: torch.Tensor, out: torch.Tensor, batch: Batch, entropy: bool):
    """The module that launches the on-chip kernel, or None where the Triton kernel is to run.

    Raises:
        ValueError: GRPO_KERNELS_ROWS=onchip, and the on-chip kernel cannot run this call.
    """
    way = setting()
    if way == "triton" or (way == "auto" and not _recorded(logits, crowded(batch, entropy))):
        return None
    reason = obstacle(logits, out, batch) or device_obstacle(logits)
    if reason is None:
        from grpo_kernels.triton_backend import onchip_launch  # needs Gluon, which few calls do

        return onchip_launch
    if way == "onchip":
        raise ValueError(f"{VARIABLE}=onchip: {reason}. With {VARIABLE}=auto such calls run the Triton kernel.")
    return None


def _recorded(logits: torch.Tensor, crowded: int) -> bool:
    if not FASTER or not logits.is_cuda:
        return False
    dtype = str(logits.dtype).removeprefix("torch.")
    return (logits.shape[2], dtype, torch.cuda.get_device_capability(logits.device), crowded) in FASTER


def obstacle(logits: torch.Tensor, out: torch.Tensor, batch: Batch) -> str | None:
    """Why the kernel cannot run a call, wherever it is, or None."""
    V = logits.shape[2]
    if logits.dtype not in (torch.bfloat16, torch.float32):
        return f"logits must be bfloat16 or float32, got {logits.dtype}"
    if out.dtype != logits.dtype:
        return f"the gradient must have the logits' dtype, {logits.dtype}, got {out.dtype}"
    unit = 16 // logits.element_size()
    if V * logits.element_size() < LEAST_BYTES:
        return f"rows must have {LEAST_BYTES} bytes or more, got {V * logits.element_size()}"
    if V % unit:
        return f"the vocabulary must be a multiple of {unit}, got {V}"
    for x in (logits, out):
        if x.data_ptr() % 16 or any(size > 1 and stride % unit for size, stride in zip(x.shape[:2], x.stride()[:2])):
            return f"rows must start at multiples of 16 bytes, got strides {tuple(x.stride())}"
    if batch.softcap < torch.inf:
        return "a logit softcap is not supported"
    if batch.support is not None or batch.support_mask is not None:
        return "a support is not supported"
    if batch.ids.numel() == 0 or batch.sequences == 0:
        return "there are no tokens"
    return None


def device_obstacle(logits: torch.Tensor) -> str | None:
    """Why the kernel cannot run on the logits' device, or None."""
    if not logits.is_cuda or torch.version.hip:
        return f"needs an NVIDIA GPU, got tensors on {logits.device}"
    properties = torch.cuda.get_device_properties(logits.device)
    if properties.major < 9:
        return f"needs compute capability 9.0 or newer, got {properties.major}.{properties.minor}"
    # Not every torch tells how much a program may have; of the GPUs from 9.0 on, those of 12.x have less.
    shared = getattr(properties, "shared_memory_per_block_optin", (99 if properties.major == 12 else 227) * 1024)
    if shared < 227 * 1024:
        return f"needs 227 KB of shared memory per program, got {shared // 1024}"
    return None
