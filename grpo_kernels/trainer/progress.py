"""How far a run has come, and who keeps that."""

from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass
class Progress:
    """Of a run: with weights, optimizer and random states it is all that a run goes on from."""

    step: int = 0
    num_tokens: int = 0
    rewards: list[float] = field(default_factory=list)  # of the last steps, newest last


class Saver(Protocol):
    """Keeps a run's state."""

    def restore(self, optimizer: torch.optim.Optimizer) -> Progress:
        """Puts optimizer and random states back, if a run is continued."""

    def save(self, optimizer: torch.optim.Optimizer, progress: Progress, last: bool) -> None:
        """Is called after each step."""
