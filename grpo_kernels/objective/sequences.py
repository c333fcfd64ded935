"""Tokens and the sequences they belong to, on torch tensors.

Padded input is [B, T]; packed input is [1, N] with the bounds of its B sequences. What belongs to a
sequence is (B, 1) either way; `expand` and `per_sequence` are all that tells the two apart.
"""

import torch
from torch import Tensor

from grpo_kernels.objective.advantages import relative_advantages
from grpo_kernels.objective.inputs import Coefs, Inputs
from grpo_kernels.objective.plan import Plan


def expand(x: Tensor, inputs: Inputs) -> Tensor:
    """Something per token, per sequence (B, 1), or one number, as one per token."""
    shape = inputs.ids.shape
    if shape.numel() == 0:
        return x.new_empty(shape)
    if inputs.cu is not None and x.dim() and x.shape[0] > 1:  # packed: a row per sequence
        x = torch.cat([x, x.new_zeros(1, 1)])[inputs.segments.long(), 0]
    return x.expand(shape)


def per_sequence(x: Tensor, inputs: Inputs) -> Tensor:
    """Sums (..., B) in fp64 over the tokens of each sequence, of (..., B, T) or packed (..., 1, N)."""
    if inputs.cu is None:
        return x.sum(-1, dtype=torch.float64)
    if x.shape[-1] == 0:
        return x.new_zeros((*x.shape[:-2], inputs.sequences), dtype=torch.float64)
    flat = x.double().reshape(-1, x.shape[-1])  # [K, N]
    sums = torch.segment_reduce(flat.T.contiguous(), "sum", offsets=inputs.cu.long(), initial=0.0, unsafe=True)
    return sums.T.reshape(*x.shape[:-2], -1)


def segments(mask: Tensor | None, cu: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Of packed input: the sequence of each token [N] int32, and the unmasked tokens of each sequence [B]."""
    at = torch.arange(N, device=cu.device)
    numbers = torch.searchsorted(cu[1:].contiguous(), at, right=True, out_int32=True)
    if mask is None:
        return numbers, cu.diff().float()
    count = torch.nn.functional.pad((mask.reshape(-1) != 0).cumsum(0), (1, 0))
    return numbers, count[cu.long()].diff().float()


def join(local, spread, share, up, cu) -> Tensor:
    """g = up·local + share·Σ up·spread, the sum over each sequence."""
    inputs = Inputs(ids=local, cu=cu)
    if cu is not None:
        inputs = inputs._replace(segments=segments(None, cu, local.shape[1])[0])
    if up is not None:
        up = up.float()
        spread, local = (torch.where(x == 0.0, 0.0, x * up) for x in (spread, local))
    common = expand(per_sequence(spread, inputs)[:, None].float(), inputs)
    return local + torch.where(share == 0.0, 0.0, share * common)


def advantages(inputs: Inputs, coefs: Coefs, plan: Plan) -> Tensor:
    """As given, or (B, 1) from the rewards; fp32."""
    if inputs.rewards is None:
        return inputs.adv.float()
    return relative_advantages(
        inputs.rewards.float(), int(coefs.num_generations), inputs.groups, plan.scale_rewards, plan.unbiased,
        coefs.adv_eps, inputs.batch_std,
    )[:, None]  # fmt: skip


def counted_rows(inputs: Inputs, coefs: Coefs, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """(B, T) bool each: rows to read, None for all; unmasked rows that are left unread, None where none can be."""
    live = None if inputs.mask is None else inputs.mask != 0
    if inputs.cu is not None:
        inside = inputs.segments < inputs.sequences
        live = inside[None] if live is None else live & inside
    if not plan.skip:
        return live, None
    idle = expand(advantages(inputs, coefs, plan) if inputs.gate is None else inputs.gate, inputs) == 0.0
    return (~idle, idle) if live is None else (live & ~idle, live & idle)


def rows_to_read(inputs: Inputs, coefs: Coefs, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """`counted_rows`, with None wherever it says the same."""
    live, idle = counted_rows(inputs, coefs, plan)
    return (None, None) if live is not None and bool(live.all()) else (live, idle)
