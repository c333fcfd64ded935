"""The entropy that a share of the tokens exceeds, without a host synchronisation and at any size.

`torch.quantile` stops at 2^24 elements and wants the masked ones removed, which a GPU can only do by
telling the host how many there are. Here they are sorted to the end instead, as infinite.
"""

import torch
from torch import Tensor

from grpo_kernels.objective.language import constant, jit, on_torch, tl
from grpo_kernels.objective.ranks import gathered

# Up to torch 2.13 torch.quantile ranks in fp32, which skips whole numbers from here on; since 2.14 in fp64.
FP32_COUNT = 1 << 24 if torch.__version__ < (2, 14) else 0
_FP32_COUNT = constant(FP32_COUNT)


@jit
def rank_of(last, single, double):
    """The rank q·last, of the last one's number and of the product in fp32 and in fp64; 0 where there is none.

    A rank that is off by rounding lies above or below an entry, which then falls on the other side of the threshold.
    """
    rank = tl.where(last < _FP32_COUNT, single, double)
    return tl.where(rank < 0.0, 0.0, rank)


@jit
def interpolated(start, end, part):
    """Between two entries, as torch.lerp: from the nearer one, so that a whole rank gives an entry exactly."""
    found = tl.where(part < 0.5, start + part * (end - start), end - (end - start) * (1.0 - part))
    return tl.where(start == end, start, found)  # both may be infinite


def sorted_entropies(entropies: Tensor, mask: Tensor | None, data_group=None) -> tuple[Tensor, Tensor]:
    """Ascending entropies of this batch, and of the batches of all ranks of ``data_group``; the masked infinite.

    Batches of different sizes are padded to the largest, which takes one host synchronisation.
    """
    H = entropies.reshape(-1)
    if mask is not None:
        H = H.masked_fill(mask.reshape(-1) == 0, torch.inf)
    ordered = H.sort().values
    return ordered, ordered if data_group is None else _gather(H, data_group).sort().values


def threshold(ordered: Tensor, everywhere: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """(`torch.quantile` (linear) of the finite entries of ``everywhere``, those of ``ordered`` not below it)."""
    last = (everywhere < torch.inf).sum() - 1
    rank = on_torch(rank_of)(last, (last.float() * q).double(), last.double() * q)
    below = rank.floor()
    ends = everywhere[torch.stack((below, rank.ceil())).long()]
    value = on_torch(interpolated)(ends[0], ends[1], (rank - below).float())
    return value, ((ordered < torch.inf) & (ordered >= value)).sum(dtype=torch.float32)


def _gather(H: Tensor, group) -> Tensor:
    """The entries of all ranks, those that pad to a common size infinite."""
    size = torch.tensor([H.numel()], device=H.device)
    torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX, group)
    padded = torch.nn.functional.pad(H, (0, int(size) - H.numel()), value=torch.inf)
    return gathered(padded, group).flatten()
