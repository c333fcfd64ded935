"""Several targets per row: `Targets`, and the maths of their log-probabilities and of the gradient.

A row is read with one token, its anchor: the target of the largest logit, id 0 where there is none. From it follow
the others, and the gradient is that of the anchor alone but for the targets' own entries::

    lp_k   = lp_anchor + (x_k − x_anchor)/temperature
    dx_j   = (1/temperature)·(Σ_{k: id_k = j} g_k − p_j·(Σ_k g_k + h·(lp_j + H)))        x̄ − x_j = −(lp_j + H)

Sums are those of sorted runs, in fp64 and in a fixed order: no atomics, and the host does not wait.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.objective.batch import Batch, Cap
from grpo_kernels.objective.lists import check_lists, joined, offsets_of, rows_of
from grpo_kernels.objective.sequences import expand

_FLOOR = -1e30  # stands for −inf where p·lp is formed: 0·(−1e30) is 0, 0·(−inf) is NaN
_NO_ID = 2**63 - 1


class Targets:
    """Token ids whose log-probabilities are asked for, any number per row, as lists behind each other.

    Rows are tokens in row-major order, N = B·T, or those of packed input. A negative id is absent: log-probability 0,
    no gradient. An id may come several times in a row. What stands in masked rows is not used.

    Args:
        token_ids: (M,) int32 or int64.
        offsets: (N+1,) int32 or int64, from 0 to M, never falling: row n has ``token_ids[offsets[n]:offsets[n+1]]``.

    Raises:
        ValueError: wrong shape or device; on the CPU, offsets that fall, or do not go from 0 to M.
        TypeError: wrong dtype.

    On a GPU no value is looked at (GRPO_KERNELS_VALIDATE=1 changes that) and the host does not wait. Ids are checked
    where the vocabulary is known, in the call.
    """

    __slots__ = ("offsets", "token_ids")

    def __init__(self, token_ids: Tensor, offsets: Tensor):
        check_lists(token_ids, offsets, "Targets")
        self.token_ids: Tensor = token_ids  # (M,)
        self.offsets: Tensor = offsets  # (N+1,)

    def __len__(self) -> int:
        """N, the number of rows."""
        return self.offsets.shape[0] - 1

    def __repr__(self) -> str:
        return f"Targets({len(self)} rows, {self.token_ids.shape[0]} ids, {self.token_ids.device})"

    def to(self, device: torch.device | str) -> "Targets":
        device = torch.device(device)
        it = Targets.__new__(Targets)
        it.token_ids, it.offsets = (x.to(device, non_blocking=True) for x in (self.token_ids, self.offsets))
        return it

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "Targets":
        """From a list of ids per token, N of them.

        Raises:
            TypeError: a row is not a list of integers.
        """
        ids, counts = joined(rows, "Targets")
        return cls(ids, offsets_of(counts)).to(device)


class Entries(NamedTuple):
    """The M targets of n rows, in the order of the rows."""

    ids: Tensor  # (M,) int64, 0 where absent
    rows: Tensor  # (M,) int64, in [0, n)
    there: Tensor  # (M,) bool: not absent, and its row is read

    @classmethod
    def of(cls, ids: Tensor, offsets: Tensor | None, mask: Tensor | None, n: int) -> "Entries":
        """Of ids (M,): lists with these offsets (n+1,), or without any M/n in each row; n > 0."""
        ids = ids.long()
        M = ids.shape[0]
        there = ids >= 0
        if offsets is None:
            rows = torch.arange(M, device=ids.device) // max(M // n, 1)
        else:
            rows = rows_of(offsets, M)
            there = there & (rows < n)
            rows = rows.clamp(max=n - 1)
        if mask is not None:
            there = there & (mask.reshape(-1) != 0)[rows]
        return cls(torch.where(there, ids, 0), rows, there)

    def cut(self, start: int, end: int, first: int) -> "Entries":
        """Some of them, whose rows count from ``first``."""
        return Entries(self.ids[start:end], self.rows[start:end] - first, self.there[start:end])


def gathered(logits: Tensor, T: int, entries: Entries, cap: Cap | None) -> Tensor:
    """(M,) fp32: the targets' logits, of (B, rows, V) with rows ≥ T; of those that are absent anything."""
    rows = torch.where(entries.there, entries.rows, 0)
    x = logits[rows // T, rows % T, entries.ids.clamp(max=logits.shape[2] - 1)].float()
    return x if cap is None else torch.tanh(x * cap.inner) * cap.bound


def anchors(x: Tensor, entries: Entries, n: int, V: int) -> tuple[Tensor, Tensor]:
    """(n,) each: the token with which a row is read, and its logit.

    An id outside of the vocabulary comes first: the row's log-probabilities become NaN, as with a NaN in the row.
    """
    key = torch.where(entries.ids >= V, torch.inf, x)
    key = torch.where(entries.there, key, -torch.inf)
    top = x.new_full((n,), -torch.inf).scatter_reduce_(0, entries.rows, key, "amax")
    ids = torch.where(entries.there & (key == top[entries.rows]), entries.ids, _NO_ID)
    first = ids.new_full((n,), _NO_ID).scatter_reduce_(0, entries.rows, ids, "amin")
    return torch.where(first == _NO_ID, 0, first), top


def logprobs_from(x: Tensor, top: Tensor, logps: Tensor, temperature: Tensor | float, entries: Entries) -> Tensor:
    """(M,): the targets' log-probabilities, from those of the rows' anchors (n,)."""
    d = (x - top[entries.rows]) / _at(temperature, entries)
    d = torch.where(x == -torch.inf, x, d)
    return torch.where(entries.there, logps[entries.rows] + d, 0.0)


class Written(NamedTuple):
    """The targets' entries in a gradient, (M,) each. Targets of one token have equal values."""

    ids: Tensor  # an absent target's: its row's anchor
    values: Tensor
    known: Tensor  # bool; False in a row without a target, whose entries are right already

    def over(self, out: Tensor, rows: tuple[Tensor, ...], start: int = 0, end: int | None = None) -> None:
        """Writes those of [start, end) over the gradient; ``rows`` are their rows, as indices of ``out``."""
        ids, values, known = (x[start:end] for x in self)
        places = (*rows, ids)
        out[places] = torch.where(known, values.to(out.dtype), out[places])

    def cap(self, logits: Tensor, rows: Tensor, cap: Cap, start: int, end: int) -> None:
        """Multiplies those of [start, end) by a soft cap's derivative at the logits (n, V), which are not capped."""
        ids, values, _ = (x[start:end] for x in self)
        t = torch.tanh(logits[rows, ids].float() * cap.inner)
        slope = (1.0 - t * t) * (cap.inner * cap.bound)
        values.copy_(torch.where(values == 0.0, 0.0, values * slope))


def gradient(
    entries: Entries, g: Tensor, logps: Tensor, anchor_ids: Tensor, anchor_logps: Tensor, h: Tensor | None,
    entropies: Tensor | None, temperature: Tensor | float, V: int,
) -> tuple[Tensor, Written]:  # fmt: skip
    """(n,) Σ_k g_k of the rows, and the targets' entries.

    Args:
        g: (M,) ∂L/∂lp.
        h, entropies: (n,) ∂L/∂H and H, or None.
    """
    ids, rows, there = entries
    M, n = ids.shape[0], anchor_ids.shape[0]
    ids = torch.where(there, ids, anchor_ids[rows]).clamp(max=V - 1)
    lp = torch.where(there, logps, anchor_logps[rows])
    key, order = (rows * V + ids).sort(stable=True)
    ordered = torch.where(there, g, 0.0).double()[order]
    of_rows = _sums(ordered, torch.searchsorted(key, torch.arange(n + 1, device=key.device) * V)).float()
    # a column: one thread per sum, which suits the short runs of equal ids
    run = torch.nn.functional.pad(key[1:] != key[:-1], (1, 0))[:M].cumsum(0)
    bounds = torch.searchsorted(run, torch.arange(M + 1, device=key.device))
    of_ids = _sums(ordered[:, None], bounds)[:, 0].float()[run]
    own = torch.empty_like(of_ids).scatter_(0, order, of_ids)
    pull = of_rows[rows]
    quiet = (own == 0.0) & (pull == 0.0)
    if h is not None:
        slope = h[rows]
        pull = pull + slope * (lp.clamp(min=_FLOOR) + entropies[rows])
        quiet = quiet & (slope == 0.0)
    values = (own - lp.exp() * pull) / _at(temperature, entries)
    known = there.new_zeros(n, dtype=torch.int64).scatter_add_(0, rows, there.long()) > 0
    # where no slope is, the row is not read: NaN of its log-probabilities stays out
    return of_rows, Written(ids, torch.where(quiet, 0.0, values), known[rows])


def temperatures(batch: Batch) -> Tensor | float:
    """One per token, (B·T,), or a number."""
    if batch.temperature is None:
        return batch.one_temperature
    return expand(batch.temperature.float(), batch).reshape(-1)


def _at(temperature: Tensor | float, entries: Entries) -> Tensor | float:
    return temperature[entries.rows] if isinstance(temperature, Tensor) else temperature


def _sums(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(x, "sum", offsets=offsets, initial=0.0, unsafe=True)
