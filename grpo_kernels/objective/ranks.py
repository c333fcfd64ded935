"""Tensors of all ranks of a process group, gathered on each of them."""

import torch
from torch import Tensor


def gathered(x: Tensor, group) -> Tensor:
    """[ranks, ...] of a tensor that has the same shape on every rank."""
    every = x.new_empty((torch.distributed.get_world_size(group), *x.shape))
    # Into one tensor: NCCL would fill a list by copying from a tensor of its own.
    _gather(every.view(-1), x.contiguous().view(-1), group=group)
    return every


# torch 2.13 has renamed it
_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
