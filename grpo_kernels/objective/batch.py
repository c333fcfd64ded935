"""Batch: what an objective needs besides the logits, tensors and numbers, in the form that the backends take."""

from typing import NamedTuple

import torch

from grpo_kernels.objective.token import Limits


class Cap(NamedTuple):
    """Of a soft cap, x = bound·tanh(inner·z): inner is the logits' scale divided by bound."""

    bound: float
    inner: float
    per_bound: float  # 1 / bound: a division costs eight instructions

    @classmethod
    def of(cls, bound: float, scale: float) -> "Cap | None":
        """None without a bound, where the scale is part of the temperature."""
        return None if bound == torch.inf else cls(bound, scale / bound, 1.0 / bound)


class Batch(NamedTuple):
    """Tensors of a call, None where there is none; and its numbers.

    Padded input has B sequences of T tokens. Packed input comes as one row of N tokens, (1, N), with
    ``cu``; what belongs to a sequence is then (B, 1). Those marked * broadcast: (B, T), (B, 1) or (1, N).
    """

    ids: torch.Tensor  # (B, T) or (1, N)
    mask: torch.Tensor | None = None  # as ids
    old: torch.Tensor | None = None  # as ids
    ref: torch.Tensor | None = None  # as ids
    sampling: torch.Tensor | None = None  # as ids
    adv: torch.Tensor | None = None  # *; without them the advantages are those of the rewards
    rewards: torch.Tensor | None = None  # (B,); beside advantages for their metrics alone
    wanted: torch.Tensor | None = None  # *, 0 where `Plan.skip` leaves a row unread; None: it leaves those of A = 0
    is_weight: torch.Tensor | None = None  # *
    temperature: torch.Tensor | None = None  # *, in place of `one_temperature`
    count: torch.Tensor | None = None  # (B,) or (): what the weight divides by
    loss_scale: torch.Tensor | None = None  # ()
    tokens: torch.Tensor | None = None  # (): unmasked tokens, which the entropy bonus divides by
    entropy_coef: torch.Tensor | None = None  # (): factor of the entropy bonus
    threshold: torch.Tensor | None = None  # (): tokens of lower entropy are masked out
    batch_std: torch.Tensor | None = None  # (): spread of all rewards, those of other ranks too; for that scale alone
    cu: torch.Tensor | None = None  # (B+1,) bounds of the sequences in packed input
    segments: torch.Tensor | None = None  # (N,) int32: the sequence of each packed token
    places: torch.Tensor | None = None  # as ids, of packed input whose sequences lack tokens: where they stood, rising
    support: torch.Tensor | None = None  # (M,) int32: ids that rows are restricted to, see `Support`
    support_first: torch.Tensor | None = None  # as ids: of those the place of a row's first, and
    support_last: torch.Tensor | None = None  # as ids: that behind its last; the same: not restricted
    support_mask: torch.Tensor | None = None  # (*ids, V) bool, in place of these; False throughout: not restricted.
    # In parts, one per rank, it comes with ``support_last``, 0 for a row that is False throughout on all ranks.
    groups: torch.Tensor | None = None  # (2, B) int32: first row and size of each sequence's group; None: all the same
    # From here on numbers.
    one_temperature: float = 1.0
    beta: float = 0.0
    w_factor: float = 1.0
    h_factor: float = 0.0
    adv_eps: float = 0.0
    r_low: float = -torch.inf
    r_high: float = torch.inf
    kl_u: float = torch.inf
    kl_value: float = torch.inf
    drift: float = torch.inf  # threshold of the off-policy mask
    correction_low: float = -torch.inf
    correction_high: float = torch.inf
    quantile: float = 0.0  # share of the tokens below the entropy threshold
    num_generations: float = 1.0  # a whole number
    softcap: float = torch.inf  # logits x become softcap · tanh(logit_scale · x / softcap)
    logit_scale: float = 1.0  # without a softcap it is part of the temperature
    term: tuple[float, ...] = ()

    @property
    def sequences(self) -> int:
        return self.ids.shape[0] if self.cu is None else self.cu.shape[0] - 1

    @property
    def limits(self) -> Limits:
        return Limits(self.r_low, self.r_high, self.kl_u, self.kl_value)

    @property
    def cap(self) -> Cap | None:
        return Cap.of(self.softcap, self.logit_scale)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(self[:_TENSORS])

    def with_only(self, **tensors: torch.Tensor | None) -> "Batch":
        """The same numbers, and these tensors alone."""
        return self._replace(**{**_NO_TENSORS, **tensors})

    def pack(self) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
        """What an op takes: the tensors, and the numbers as `one_tensor`."""
        return self.tensors, one_tensor((*self[_TENSORS:-1], *self.term))

    @classmethod
    def unpack(cls, tensors: tuple | list, numbers: torch.Tensor) -> "Batch":
        """From what `pack` gave; reads host memory, so no device is waited for."""
        values = numbers.tolist()
        fixed = len(cls._fields) - 1 - _TENSORS
        return cls(*tensors, *values[:fixed], tuple(values[fixed:]))


_TENSORS = Batch._fields.index("one_temperature")
SUPPORT = ("support", "support_first", "support_last", "support_mask")
_NO_TENSORS = dict.fromkeys(Batch._fields[:_TENSORS])


def one_tensor(values: tuple[float, ...]) -> torch.Tensor:
    """Numbers as one fp32 CPU tensor, whose values recompile nothing.

    Under torch.compile the values stay tensors: numbers would be constants of it.
    """
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float32, device="cpu")
        return torch.stack([one * value for value in values])
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def exchange(tensors: tuple, **fields: torch.Tensor | None) -> tuple:
    """The tensors of a batch with others in these fields."""
    return Batch(*tensors)._replace(**fields).tensors
