"""Logits whose vocabulary is spread over the ranks of a process group, as tensor parallelism leaves them.

Each rank reads its part of a row, the ranks exchange four numbers per row, and each reads its part
again and writes the gradient: two launches, and between them one all-gather of 16 bytes per row and
rank. A maximum and sums that refer to it cannot be reduced in one go, and gathered numbers are added
in the same order everywhere: every rank has the same loss, to the last bit. A small all-gather comes
first, of where each part begins.

A support of ids is whole on every rank, and costs no exchange: each counts its own ids from where its part begins and
passes the others over. A mask is in parts as the logits are. Whether any of them has an entry in a row, or else the
row is not restricted, takes one more all-gather, of a byte per row and rank, and a reading of the mask.
"""

import torch
from torch import Tensor

from grpo_kernels.call import checks, ops
from grpo_kernels.objective.batch import Batch, exchange
from grpo_kernels.objective.ranks import gathered


def logprobs(
    logits: Tensor, tensors: tuple, numbers: Tensor, plan: str, entropy: bool, backend: str, group
) -> tuple[Tensor, Tensor, Tensor, tuple]:
    """(logps, entropies, what `ops.slope_op` needs of each row, tensors for it), of logits whole or in parts.

    Args:
        logits: (B, rows, V), or this rank's (B, rows, V_rank), the parts lying in the order of the ranks.
        group: process group of the parts; None: the logits are whole.
    """
    batch = Batch(*tensors)
    if group is None:
        return *ops.logprobs_op(logits, tensors, numbers, plan, entropy, backend), tensors
    if checks.validates(logits.device):
        checks.check_parts(gathered(torch.tensor(batch.ids.numel(), device=logits.device), group).tolist())
    size = batch.ids.new_full((1,), logits.shape[-1], dtype=torch.int64)
    rank = torch.distributed.get_rank(group)
    sizes = gathered(size, group)[:, 0]
    tensors = exchange(tensors, ids=ops.local_ids_op(batch.ids, batch.mask, sizes, rank))
    if batch.support is not None:
        of_support = batch.support, batch.support_first, batch.support_last
        tensors = exchange(tensors, support=ops.local_support_op(*of_support, batch.mask, sizes, rank))
    if batch.support_mask is not None:
        tensors = exchange(tensors, support_last=_restricted(batch.support_mask, group))
    parts = gathered(ops.shard_op(logits, tensors, numbers, plan, entropy, backend), group)
    return *ops.unite_op(parts, tensors, numbers, entropy, backend), tensors


def _restricted(mask: Tensor, group) -> Tensor:
    """(B, T) int32, 1 for a row in which the mask of any rank has an entry."""
    return gathered(mask.any(-1).to(torch.uint8), group).amax(0).int()
