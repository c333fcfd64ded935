"""Logits whose vocabulary is spread over the ranks of a process group, as tensor parallelism leaves them.

Each rank reads its part of a row, the ranks exchange four numbers per row, and each reads its part
again and writes the gradient: two launches, and between them one all-gather of 16 bytes per row and
rank. A maximum and sums that refer to it cannot be reduced in one go, and gathered numbers are added
in the same order everywhere: every rank has the same loss, to the last bit. A small all-gather comes
first, of where each part begins.
"""

import torch
from torch import Tensor

from grpo_kernels.call import checks, ops
from grpo_kernels.objective.batch import Batch, exchange
from grpo_kernels.objective.ranks import gathered


def logprobs(
    logits: Tensor, tensors: tuple, numbers: Tensor, plan: str, entropy: bool, backend: str, group
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropies, what `ops.slope_op` needs of each row, ids for it), of logits whole or in parts.

    Args:
        logits: (B, rows, V), or this rank's (B, rows, V_rank), the parts lying in the order of the ranks.
        group: process group of the parts; None: the logits are whole.
    """
    batch = Batch(*tensors)
    if group is None:
        return *ops.logprobs_op(logits, tensors, numbers, plan, entropy, backend), batch.ids
    if checks.validates(logits.device) and not torch.compiler.is_compiling():
        checks.check_parts(gathered(torch.tensor(batch.ids.numel(), device=logits.device), group).tolist())
    size = batch.ids.new_full((1,), logits.shape[-1], dtype=torch.int64)
    rank = torch.distributed.get_rank(group)
    ids = ops.local_ids_op(batch.ids, batch.mask, gathered(size, group)[:, 0], rank)
    tensors = exchange(tensors, ids=ids)
    parts = gathered(ops.shard_op(logits, tensors, numbers, plan, entropy, backend), group)
    return *ops.unite_op(parts, tensors, numbers, entropy, backend), ids
