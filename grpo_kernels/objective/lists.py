"""Checks of lists of token ids, one per row, that lie behind each other: those of `Support` and of `Targets`."""

from collections.abc import Iterable, Mapping, Sequence
from operator import index

import torch
from torch import Tensor

from grpo_kernels.objective.validation import validates


def check_lists(token_ids: Tensor, offsets: Tensor, kind: str) -> None:
    """Of row n's list ``token_ids[offsets[n]:offsets[n+1]]``; ``kind`` names the class that they are for.

    Raises:
        ValueError: wrong shape or device; on the CPU, offsets that fall, or do not go from 0 to the number of ids.
        TypeError: wrong dtype.
    """
    check_integers("token_ids", token_ids, "(M,)", kind)
    check_integers("offsets", offsets, "(N+1,)", kind)
    if offsets.shape[0] == 0:
        raise ValueError("offsets must be (N+1,), from 0 to the number of token_ids, got none: [0] for no row.")
    check_together("offsets", offsets, token_ids)
    M = token_ids.shape[0]
    if validates(offsets.device):
        falls = (offsets.diff() < 0).nonzero()
        if len(falls) or int(offsets[0]) != 0 or int(offsets[-1]) != M:
            where = f"falls after row {int(falls[0])}" if len(falls) else f"{int(offsets[0])} to {int(offsets[-1])}"
            raise ValueError(f"offsets must rise from 0 to {M}, the number of token_ids, got {where}.")


def check_integers(name: str, x: Tensor, shape: str | None, kind: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}. From lists: {kind}.from_lists.")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}. Cast them: .long().")
    if shape is not None and x.dim() != 1:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}.")


def check_together(name: str, x: Tensor, token_ids: Tensor) -> None:
    if x.device != token_ids.device:
        raise ValueError(f"{name} are on {x.device}, token_ids on {token_ids.device}. Move them together.")


def joined(rows: Iterable[Sequence[int]], name: str) -> tuple[Tensor, Tensor]:
    """(ids (M,), how many each row has (N,)) of a list of ids per row; ``name`` is what the rows are of.

    Raises:
        TypeError: a row is not a list of integers; TRL's and vLLM's lists per completion hold lists per token.
        ValueError: an id that int64 does not hold.
    """
    if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes)):
        raise TypeError(f"{name} is made from a list of token ids per token, got {type(rows).__name__}.")
    ids, counts = [], []
    for n, row in enumerate(rows):
        try:
            found = [index(j) for j in _entries(row)]
        except TypeError as error:
            raise TypeError(
                f"row {n} of {name} must be a list of token ids, integers, got {row!r:.60}. Lists per completion must "
                "be joined first: [row for completion in completions for row in completion]."
            ) from error
        ids += found
        counts.append(len(found))
    try:
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} has an id of more than 64 bits, from {min(ids)} to {max(ids)}.") from error


def _entries(row: Sequence[int]) -> Iterable[int]:
    if isinstance(row, Tensor) and (row.numel() == 0 or not row.is_floating_point()):
        return row.tolist()
    if not hasattr(row, "__getitem__") or isinstance(row, (str, bytes, Mapping, Tensor)):
        raise TypeError("not a list of integers")
    return row


def offsets_of(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))


def rows_of(offsets: Tensor, M: int) -> Tensor:
    """(M,) int64: the row of each of M entries; N, the number of rows, where they end before it."""
    places = torch.arange(M, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous().long(), places, right=True)
