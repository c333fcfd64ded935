"""Everything that is compiled and measured: the candidates, each with the launch parameters it is tried with."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from benchmarks.experiments import cluster, counter, hints, interleaved, present
from benchmarks.experiments.common import Job


class Candidate(NamedTuple):
    name: str
    module: ModuleType  # has launch(job, out, **setting) → logps, and may say where it is unavailable
    setting: dict

    @property
    def label(self) -> str:
        """Short, e.g. "counter K4 w16 r64": K lines of 16 bytes a thread, warps of 32, registers at most."""
        short = {"warps": "w", "registers": "r", "per_processor": "p", "stages": "s", "ctas": "c",
                 "first": "", "second": ""}  # fmt: skip
        words = (short.get(key, key) + str(value).removeprefix("evict_") for key, value in self.setting.items())
        return " ".join([self.name, *words])

    def launch(self, job: Job, out: torch.Tensor, **more: object) -> torch.Tensor:
        return self.module.launch(job, out, **self.setting, **more)

    def unavailable(self, job: Job) -> str | None:
        why = getattr(self.module, "unavailable", None)
        return why and why(job.logits.device, job.V, job.logits.dtype, **self.setting)


def candidates(dtype: torch.dtype) -> list[Candidate]:
    """The most promising first. Two fp32 take as many registers as four bf16 that are computed with as fp32."""
    fp32 = dtype == torch.float32
    found = [Candidate("present", present, {})]

    def add(module: ModuleType, *settings: dict) -> None:
        found.extend(Candidate(module.__name__.rsplit(".", 1)[-1], module, setting) for setting in settings)

    if fp32:
        add(counter, *(_shape(K, w, r) for K, w, r in [(16, 8, 128), (8, 16, 64), (16, 4, 128), (8, 8, 72)]))
        add(cluster, *({"ctas": c, "warps": w, "registers": r} for c, w, r in [(8, 8, 128), (16, 8, 80), (16, 16, 64)]))
        shapes = [(4, 16, 128, 1, 1), (4, 16, 128, 1, 3), (4, 32, 64, 1, 1), (4, 16, 64, 2, 1)]
    else:
        add(counter, *(_shape(K, w, r) for K, w, r in [(8, 8, 128), (4, 16, 64), (8, 4, 128), (4, 8, 64)]))
        add(cluster, *({"ctas": c, "warps": w, "registers": r} for c, w, r in [(8, 8, 128), (16, 8, 80), (8, 16, 64)]))
        shapes = [(4, 16, 128, 1, 1), (4, 16, 128, 1, 3), (2, 32, 64, 1, 1), (2, 32, 64, 1, 3), (2, 16, 64, 2, 1)]
    add(interleaved, *({**_shape(K, w, r), "per_processor": p, "stages": s} for K, w, r, p, s in shapes))
    wide = {"K": 4}
    add(hints, wide, {**wide, "first": "evict_last", "second": "evict_first"}, {**wide, "second": "evict_first"})
    grid = [(2, 32, 64), (2, 16, 64), (4, 16, 64), (8, 16, 128), (4, 8, 64), (8, 8, 128)]
    add(present, *(_shape(K, w, r) for K, w, r in grid))
    return found


def _shape(K: int, warps: int, registers: int) -> dict[str, int]:
    return {"K": K, "warps": warps, "registers": registers}
