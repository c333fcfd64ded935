"""What an objective needs besides the logits, bundled: tensors and coefficients."""

from typing import NamedTuple

import torch


class Inputs(NamedTuple):
    """Tensors of a call; None where there is none. Those marked * broadcast to (B, T)."""

    ids: torch.Tensor  # (B, T)
    mask: torch.Tensor | None = None  # (B, T)
    old: torch.Tensor | None = None  # (B, T)
    ref: torch.Tensor | None = None  # (B, T)
    adv: torch.Tensor | None = None  # (B, T)*, or rewards
    rewards: torch.Tensor | None = None  # (B,)
    is_weight: torch.Tensor | None = None  # (B, T)*
    count: torch.Tensor | None = None  # (B,) or (): what the weight divides by
    loss_scale: torch.Tensor | None = None  # ()
    tokens: torch.Tensor | None = None  # (): unmasked tokens, which the entropy bonus divides by
    num_generations: int = 1


class Coefs(NamedTuple):
    """Numbers of a call. They travel to the ops as one fp32 CPU tensor: a new value recompiles nothing."""

    temperature: float
    beta: float = 0.0
    w_factor: float = 1.0
    h_factor: float = 0.0
    adv_eps: float = 0.0
    term: tuple[float, ...] = ()

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "Coefs":
        """From the CPU tensor; reads host memory, so no device is waited for."""
        values = packed.tolist()
        return cls(*values[:5], term=tuple(values[5:]))


def pack(*values: float) -> torch.Tensor:
    """Numbers as an fp32 CPU tensor. Under torch.compile each stays a tensor, or it would be a constant."""
    if torch.compiler.is_compiling():
        one = torch.ones(())
        return torch.stack([one * value for value in values])
    return torch.tensor(values, dtype=torch.float32)
