"""From the argument ``support`` to fields of a batch."""

import torch

from grpo_kernels.call import checks
from grpo_kernels.call.checks import Layout
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.supports import REPEATED, Support


def check_support(
    support: Support | torch.Tensor | None, layout: Layout, V: int, like: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The fields of `Batch` that a support comes to; none without one. ``like`` lies on the device that it must.

    ``V``: entries that a row of a mask has, those of this rank where the vocabulary is in parts.

    Raises:
        ValueError: wrong number of rows, shape, stride or device. TypeError: it is neither a `Support` nor a bool
            tensor.
    """
    if support is None:
        return {}
    if isinstance(support, torch.Tensor):
        return {"support_mask": layout.tokens(_checked_mask(support, layout, V, like))}
    if not isinstance(support, Support):
        raise TypeError(
            f"support must be a Support or a bool tensor, got {type(support).__name__}. From a list of token ids per "
            "token: Support.from_lists(rows)."
        )
    shape = (layout.T,) if layout.packed else (layout.B, layout.T)
    rows = shape[0] if layout.packed else layout.B * layout.T
    if len(support) != rows:
        raise ValueError(
            f"support must have a row per token, {'N' if layout.packed else 'B·T'} = {rows}, got {len(support)}. "
            "Tokens that were not restricted, padding too, have rows without ids."
        )
    checks.check_device("support", support.ids, like)
    first, last = (layout.tokens(x.reshape(shape)) for x in (support.first, support.last))
    return {"support": support.ids, "support_first": first, "support_last": last}


def _checked_mask(mask: torch.Tensor, layout: Layout, V: int, like: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"support as a tensor must be bool, got {mask.dtype}. Ids go into a Support.from_padded(ids).")
    shapes = {"(N, V)": (layout.T, V)} if layout.packed else {"(B, T, V)": (layout.B, layout.T, V)}
    checks.check_shape("support", mask, shapes)
    checks.check_device("support", mask, like)
    if mask.stride(-1) != 1 and V > 1:
        raise ValueError(
            f"support must be contiguous in the vocabulary, got strides {mask.stride()}. Make it so: "
            "support.contiguous()."
        )
    return mask


def check_support_values(batch: Batch, V: int) -> None:
    """Ids of a support inside the vocabulary, in all rows that the mask counts."""
    ids = batch.support
    if ids is None:
        return
    wrong = ((ids < 0) | (ids >= V)) & (ids != REPEATED)
    if not bool(wrong.any()):
        return
    until = torch.nn.functional.pad(wrong.cumsum(0), (1, 0))
    bad = until[batch.support_last.long()] > until[batch.support_first.long()]
    if batch.mask is not None:
        bad &= batch.mask != 0
    if bool(bad.any()):
        row = int(bad.reshape(-1).nonzero()[0])
        first, last = (int(x.reshape(-1)[row]) for x in (batch.support_first, batch.support_last))
        strange = int(ids[first:last][wrong[first:last]][0])
        raise IndexError(
            f"row {row} of support has the id {strange}, which is outside the vocabulary of {V}. Check that the "
            "sampler has the same tokenizer, or mask the token."
        )


def local_support(ids: torch.Tensor, sizes: torch.Tensor, rank: int) -> torch.Tensor:
    """Ids of the whole vocabulary as this rank's kernels take them, counted from where its part starts.

    Those of other ranks become `REPEATED`, which is passed over: their row stays restricted. Those of no rank become
    -1, an id that no rank has.

    Args:
        ids: (M,) int32, as `Support` has them.
        sizes: [ranks], entries of each rank's part.
    """
    start, size, V = sizes[:rank].sum(), sizes[rank], sizes.sum()
    here = (ids >= start) & (ids < start + size)
    local = torch.where(here, ids - start, REPEATED)
    return local.masked_fill_((ids >= V) | ((ids < 0) & (ids != REPEATED)), -1)
