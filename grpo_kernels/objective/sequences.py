"""Tokens and the sequences they belong to, on torch tensors.

Padded input is [B, T]; packed input is [1, N] with the bounds of its B sequences. What belongs to a
sequence is (B, 1) either way; `expand` and `per_sequence` are all that tells the two apart.
"""

import torch
from torch import Tensor

from grpo_kernels.objective.advantages import relative_advantages
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.token import joined


def expand(x: Tensor, batch: Batch) -> Tensor:
    """Something per token, per sequence (B, 1), or one number, as one per token."""
    shape = batch.ids.shape
    if shape.numel() == 0:
        return x.new_empty(shape)
    if batch.cu is not None and x.dim() and x.shape[0] > 1:  # packed: a row per sequence
        x = torch.cat([x, x.new_zeros(1, 1)])[batch.segments.long(), 0]
    return x.expand(shape)


def per_sequence(x: Tensor, batch: Batch) -> Tensor:
    """Sums (..., B) in fp64 over the tokens of each sequence, of (..., B, T) or packed (..., 1, N)."""
    if batch.cu is None:
        return x.sum(-1, dtype=torch.float64)
    if x.shape[-1] == 0:
        return x.new_zeros((*x.shape[:-2], batch.sequences), dtype=torch.float64)
    flat = x.double().reshape(-1, x.shape[-1])  # [K, N]
    sums = torch.segment_reduce(flat.T.contiguous(), "sum", offsets=batch.cu.long(), initial=0.0, unsafe=True)
    return sums.T.reshape(*x.shape[:-2], -1)


def suffix_sums(x: Tensor, log2_decay: float, batch: Batch) -> Tensor:
    """F_t = Σ_{k ≥ t} γ^(k−t)·x_k over the rest of each token's sequence, (B, T) or (1, N), fp64; log₂ γ is given.

    In O(T): pairs of neighbours are joined, then pairs of pairs, and each is taken apart again.
    """
    steps = torch.full_like(x, log2_decay, dtype=torch.float64)
    if batch.places is not None:
        steps[..., :-1] *= batch.places.diff()
    steps = steps.exp2()
    if batch.cu is not None:
        steps[0, :-1].masked_fill_(batch.segments[1:] != batch.segments[:-1], 0.0)
    return _suffix_sums(steps, x.double())


def _suffix_sums(step: Tensor, x: Tensor) -> Tensor:
    T, join = x.shape[-1], on_torch(joined)
    if T < 2:
        return x
    step, x = (torch.nn.functional.pad(y, (0, T % 2)) for y in (step, x))
    first, second = ((step[..., k::2], x[..., k::2]) for k in (0, 1))
    of_first = _suffix_sums(*join(*second, *first))
    following = torch.nn.functional.pad(of_first[..., 1:], (0, 1))
    _, of_second = join(1.0, following, *second)
    return torch.stack([of_first, of_second], dim=-1).flatten(-2)[..., :T]


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
    batch = Batch(ids=local, cu=cu)
    if cu is not None:
        batch = batch._replace(segments=segments(None, cu, local.shape[1])[0])
    if up is not None:
        up = up.float()
        spread, local = (torch.where(x == 0.0, 0.0, x * up) for x in (spread, local))
    common = expand(per_sequence(spread, batch)[:, None].float(), batch)
    return local + torch.where(share == 0.0, 0.0, share * common)


def advantages(batch: Batch, plan: Plan) -> Tensor:
    """As given, or (B, 1) from the rewards; fp32."""
    if batch.adv is not None:
        return batch.adv.float()
    return relative_advantages(
        batch.rewards.float(), int(batch.num_generations), batch.groups, plan.scale_rewards, plan.unbiased,
        batch.adv_eps, batch.batch_std,
    )[:, None]  # fmt: skip


def counted_rows(batch: Batch, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """(B, T) bool each: rows to read, None for all; unmasked rows that are left unread, None where none can be."""
    live = None if batch.mask is None else batch.mask != 0
    if batch.cu is not None:
        inside = batch.segments < batch.sequences
        live = inside[None] if live is None else live & inside
    if not plan.skip:
        return live, None
    idle = expand(advantages(batch, plan) if batch.wanted is None else batch.wanted, batch) == 0.0
    return (~idle, idle) if live is None else (live & ~idle, live & idle)


def rows_to_read(batch: Batch, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """`counted_rows`, with None wherever it says the same."""
    live, idle = counted_rows(batch, plan)
    return (None, None) if live is not None and bool(live.all()) else (live, idle)
