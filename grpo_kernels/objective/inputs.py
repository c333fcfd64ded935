"""What an objective needs besides the logits, bundled: tensors and coefficients."""

import functools
from typing import NamedTuple

import torch

from grpo_kernels.objective.token import Limits
from grpo_kernels.objective.tracing import is_eager


class Inputs(NamedTuple):
    """Tensors of a call; None where there is none.

    Padded input has B sequences of T tokens. Packed input comes as one row of N tokens, (1, N), with
    ``cu``; what belongs to a sequence is then (B, 1). Those marked * broadcast: (B, T), (B, 1) or (1, N).
    """

    ids: torch.Tensor  # (B, T) or (1, N)
    mask: torch.Tensor | None = None  # as ids
    old: torch.Tensor | None = None  # as ids
    ref: torch.Tensor | None = None  # as ids
    sampling: torch.Tensor | None = None  # as ids
    adv: torch.Tensor | None = None  # *, or rewards
    rewards: torch.Tensor | None = None  # (B,)
    gate: torch.Tensor | None = None  # *, 0 where `Plan.skip` leaves a row unread; None: it leaves those of A = 0
    is_weight: torch.Tensor | None = None  # *
    temperature: torch.Tensor | None = None  # *, in place of the number
    count: torch.Tensor | None = None  # (B,) or (): what the weight divides by
    loss_scale: torch.Tensor | None = None  # ()
    tokens: torch.Tensor | None = None  # (): unmasked tokens, which the entropy bonus divides by
    entropy_coef: torch.Tensor | None = None  # (): factor of the entropy bonus
    threshold: torch.Tensor | None = None  # (): tokens of lower entropy are masked out
    batch_std: torch.Tensor | None = None  # (): spread of all rewards, those of other ranks too; for that scale alone
    cu: torch.Tensor | None = None  # (B+1,) bounds of the sequences in packed input
    segments: torch.Tensor | None = None  # (N,) int32: the sequence of each packed token
    groups: torch.Tensor | None = None  # (2, B) int32: first row and size of each sequence's group; None: all the same

    @property
    def sequences(self) -> int:
        return self.ids.shape[0] if self.cu is None else self.cu.shape[0] - 1


class Coefs(NamedTuple):
    """Numbers of a call. They travel to the ops as one fp32 CPU tensor: a new value recompiles nothing."""

    temperature: float = 1.0
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
    def limits(self) -> Limits:
        return Limits(self.r_low, self.r_high, self.kl_u, self.kl_value)

    def pack(self) -> torch.Tensor:
        """As an fp32 CPU tensor. Under torch.compile values stay tensors: numbers would be constants of it."""
        values = (*self[:-1], *self.term)
        if torch.compiler.is_compiling():
            one = torch.ones((), device="cpu")
            return torch.stack([one * value for value in values])
        return _packed(values) if is_eager() else torch.tensor(values, dtype=torch.float32, device="cpu")

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "Coefs":
        """From the CPU tensor; reads host memory, so no device is waited for."""
        values = packed.tolist()
        fixed = len(cls._fields) - 1
        return cls(*values[:fixed], term=tuple(values[fixed:]))


@functools.lru_cache(maxsize=64)
def _packed(values: tuple[float, ...]) -> torch.Tensor:
    """The tensor of these values, kept: most calls have the values of the call before. It is never written to."""
    with torch.inference_mode(False):  # or autograd could not save it
        return torch.tensor(values, dtype=torch.float32, device="cpu")
