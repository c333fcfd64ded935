"""Supports: for each token, the ids that a truncating sampler (top-k, top-p, min-p) kept and drew from."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from grpo_kernels.objective.lists import check_integers, check_lists, check_together, joined, offsets_of, rows_of
from grpo_kernels.objective.scalars import is_whole
from grpo_kernels.objective.validation import validates

REPEATED = -(2**31)  # in place of an id that its row has already
_MOST = 2**31 - 1
_ROW_NUMBERS = (torch.int64, torch.int32, torch.bool)


class Support:
    """The ids that each of N tokens was drawn from, as lists behind each other: row n keeps ``ids[first[n]:last[n]]``.

    The sampler's probabilities are normalised over these, and so are the log-probabilities of a call that is given
    them (DeepSeek-V3.2, arXiv:2512.02556 §3.1). Rows are tokens in row-major order, N = B·T, or those of packed input.
    A row without ids is not restricted. The order of the ids in a row does not matter, and one that comes twice counts
    once. What stands in masked rows is not used.

    Args:
        token_ids: (M,) int32 or int64.
        offsets: (N+1,) int32 or int64, from 0 to M, never falling: row n has ``token_ids[offsets[n]:offsets[n+1]]``.

    Raises:
        ValueError: wrong shape or device; on the CPU, offsets that fall, or do not go from 0 to M.
        TypeError: wrong dtype.

    On a GPU no value is looked at (GRPO_KERNELS_VALIDATE=1 changes that) and the host does not wait. Ids are checked
    where the vocabulary is known, in the call.
    """

    __slots__ = ("first", "ids", "last")

    def __init__(self, token_ids: Tensor, offsets: Tensor):
        check_lists(token_ids, offsets, "Support")
        self._set(token_ids, offsets)

    def _set(self, token_ids: Tensor, offsets: Tensor, repeats: bool = True) -> None:
        ids = token_ids.clamp(1 - 2**31, _MOST).int()
        self.ids: Tensor = _mark_repeated(ids, offsets) if repeats else ids  # (M,) int32
        self.first: Tensor = offsets[:-1]  # (N,) of its ids, the place of a row's first
        self.last: Tensor = offsets[1:]  # (N,) and the place behind its last

    @classmethod
    def _made(cls, token_ids: Tensor, offsets: Tensor, repeats: bool = True) -> "Support":
        """Without a look at the offsets, which end at M or before it."""
        it = cls.__new__(cls)
        it._set(token_ids, offsets, repeats)
        return it

    def __len__(self) -> int:
        """N, the number of rows."""
        return self.first.shape[0]

    def __repr__(self) -> str:
        return f"Support({len(self)} rows, {self.ids.shape[0]} ids, {self.ids.device})"

    def __getitem__(self, rows: slice | Tensor) -> "Support":
        """Some rows: a slice, or their numbers (n,). Of a micro-batch of sequences: ``[first · T : last · T]``.

        Raises:
            TypeError: something else. ValueError: numbers that are not (n,), or a slice that goes backwards.
            IndexError: a number that no row has.
        """
        if not isinstance(rows, slice) and not (isinstance(rows, Tensor) and rows.dtype in _ROW_NUMBERS):
            got = rows.dtype if isinstance(rows, Tensor) else repr(rows)
            raise TypeError(f"a Support takes a slice of rows, or an integer tensor of their numbers, got {got}.")
        if isinstance(rows, Tensor) and rows.dim() != 1:
            raise ValueError(f"the numbers of a Support's rows must be (n,), got {tuple(rows.shape)}.")
        if isinstance(rows, slice) and rows.step is not None and rows.step < 1:
            raise ValueError(f"a slice of a Support's rows must go forwards, got {rows}. Pass their numbers.")
        return self._with(self.ids, self.first[rows], self.last[rows])

    def to(self, device: torch.device | str) -> "Support":
        device = torch.device(device)
        return self._with(*(x.to(device, non_blocking=True) for x in (self.ids, self.first, self.last)))

    @classmethod
    def _with(cls, ids: Tensor, first: Tensor, last: Tensor) -> "Support":
        it = cls.__new__(cls)
        it.ids, it.first, it.last = ids, first, last
        return it

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "Support":
        """From a list of ids per token, N of them.

        Raises:
            TypeError: a row is not a list of integers; TRL's and vLLM's lists per completion hold lists per token.
            ValueError: an id of more than 64 bits.
        """
        ids, counts = joined(rows, "a support")
        return cls.from_counts(ids, counts).to(device)

    @classmethod
    def from_counts(cls, token_ids: Tensor, counts: Tensor) -> "Support":
        """From ids (M,), and how many of them each token has, (N,) or (B, T).

        Raises:
            ValueError: wrong device; on the CPU, negative counts, or counts that do not add up to M. TypeError: wrong
                dtype.
        """
        check_integers("token_ids", token_ids, "(M,)", "Support")
        check_integers("counts", counts, None, "Support")
        check_together("counts", counts, token_ids)
        counts = counts.reshape(-1)
        if validates(counts.device) and (bool((counts < 0).any()) or int(counts.sum()) != token_ids.shape[0]):
            raise ValueError(
                f"counts must be at least 0 and add up to the {token_ids.shape[0]} token_ids, got "
                f"{int(counts.min())} at least and {int(counts.sum())} together."
            )
        return cls._made(token_ids, offsets_of(counts))

    @classmethod
    def from_padded(cls, token_ids: Tensor, sizes: Tensor | None = None) -> "Support":
        """From ids (B, T, K) or (N, K), of which negative ones are absent.

        Args:
            sizes: (B, T) or (N,): how many of a row's ids count, from its start; None: all that are there.

        Raises:
            ValueError: wrong shape or device; on the CPU, sizes below 0 or above K. TypeError: wrong dtype.
        """
        check_integers("token_ids", token_ids, None, "Support")
        if token_ids.dim() not in (2, 3):
            raise ValueError(f"token_ids must be (B, T, K) or (N, K), got {tuple(token_ids.shape)}.")
        there = token_ids >= 0
        if sizes is not None:
            check_integers("sizes", sizes, None, "Support")
            if sizes.shape != token_ids.shape[:-1]:
                raise ValueError(f"sizes must be {tuple(token_ids.shape[:-1])}, got {tuple(sizes.shape)}.")
            check_together("sizes", sizes, token_ids)
            K = token_ids.shape[-1]
            if validates(sizes.device) and bool(((sizes < 0) | (sizes > K)).any()):
                raise ValueError(f"sizes must be from 0 to K = {K}, got {int(sizes.min())} to {int(sizes.max())}.")
            there = there & (torch.arange(K, device=token_ids.device) < sizes[..., None])
        if token_ids.device.type == "cpu":
            return cls._made(token_ids[there], offsets_of(there.sum(-1).reshape(-1)))
        return cls._made(_at_front(token_ids, there), offsets_of(there.sum(-1).reshape(-1)))

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Support":
        """From a bool mask (B, T, V) or (N, V). The host waits for the device, which counts; a call takes masks, too.

        Raises:
            ValueError: wrong shape. TypeError: not bool.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}.")
        if mask.dim() not in (2, 3):
            raise ValueError(f"mask must be (B, T, V) or (N, V), got {tuple(mask.shape)}.")
        ids = mask.flatten(0, -2).nonzero()[:, 1]
        return cls._made(ids, offsets_of(mask.sum(-1).reshape(-1)), repeats=False)

    @classmethod
    def from_vllm(
        cls, outputs: Sequence[object], num_tokens: int | None = None, padding: str = "right",
        device: torch.device | str = "cpu",
    ) -> "Support":  # fmt: skip
        """From vLLM's completions, whose ``sampling_mask.token_ids`` has a list of ids per generated token.

        Args:
            outputs: B of them, ``[completion for request in requests for completion in request.outputs]``.
            num_tokens: T, to which completions are padded; None: packed, one behind the other.
            padding: the side of it, ``"right"`` or ``"left"``.

        Raises:
            ValueError: an output without a mask, or longer than T. TypeError: it is not a `CompletionOutput`, T is no
                integer, or a mask holds something else than lists of ids.
        """
        if padding not in ("right", "left"):
            raise ValueError(f"padding must be 'right' or 'left', got {padding!r}.")
        if num_tokens is not None and not is_whole(num_tokens):
            raise TypeError(f"num_tokens must be None or an int, got {type(num_tokens).__name__}.")
        if not isinstance(outputs, Iterable):
            raise TypeError(f"outputs must be a list of completions, got {type(outputs).__name__}.")
        rows: list[Sequence[int]] = []
        for n, output in enumerate(outputs):
            if hasattr(output, "outputs"):
                raise TypeError(
                    f"outputs[{n}] is a {type(output).__name__}. Pass its completions: [completion for request in "
                    "requests for completion in request.outputs]."
                )
            mask = getattr(output, "sampling_mask", None)
            if getattr(mask, "token_ids", None) is None:
                raise ValueError(
                    f"outputs[{n}] has no sampling_mask. Ask vLLM (0.28 or newer) for it; where nothing was truncated "
                    "no support is needed."
                )
            lists = list(mask.token_ids)
            missing = 0 if num_tokens is None else num_tokens - len(lists)
            if missing < 0:
                raise ValueError(f"outputs[{n}] has {len(lists)} tokens, more than num_tokens={num_tokens}.")
            pad: list[Sequence[int]] = [()] * missing
            rows += [*lists, *pad] if padding == "right" else [*pad, *lists]
        return cls.from_lists(rows, device)


def _at_front(token_ids: Tensor, there: Tensor) -> Tensor:
    """The ids that are there, then −1: as many places as ids, since only the device knows how many are there."""
    flat = there.reshape(-1)
    place = torch.where(flat, flat.cumsum(0) - 1, flat.shape[0])
    return token_ids.new_full((flat.shape[0] + 1,), -1).scatter_(0, place, token_ids.reshape(-1))[:-1]


def _mark_repeated(ids: Tensor, offsets: Tensor) -> Tensor:
    """`REPEATED` in place of every id that its row has already."""
    key, order = ((rows_of(offsets, ids.shape[0]) << 32) + ids).sort(stable=True)
    again = torch.nn.functional.pad(key[1:] == key[:-1], (1, 0))[: ids.shape[0]]
    return ids.masked_fill(torch.zeros_like(again).scatter_(0, order, again), REPEATED)
