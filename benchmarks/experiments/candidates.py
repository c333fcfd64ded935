"""Everything that is compiled and measured: candidates, and the launch parameters each is tried with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from benchmarks.experiments import cluster, counter, hints, interleaved, present
from benchmarks.experiments.common import Job


class Candidate(NamedTuple):
    """One way to do the job with one set of launch parameters."""

    name: str
    module: ModuleType  # has launch(job, out, **setting) → logps
    setting: dict

    @property
    def label(self) -> str:
        words = (f"{key} {value}" if not isinstance(value, str) else f"{key} {value[6:]}" for key, value in self.setting.items() if value != "")
        return ", ".join([self.name, *words])

    def launch(self, job: Job, out: torch.Tensor, **more: object) -> torch.Tensor:
        return self.module.launch(job, out, **self.setting, **more)

    def unavailable(self, device: torch.device, V: int) -> str | None:
        why: Callable = getattr(self.module, "unavailable", lambda *_, **__: None)
        return why(device, V, **self.setting)
