"""The cases of supports in `benchmarks.smoke`: the ids that a sampler kept, and the logits that say the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.smoke_job import Job
from grpo_kernels import Support


class SupportJob(Job):
    """The truth's logits are −inf outside of the supports; the fourth row has none, which restricts nothing."""

    def _logits(self) -> Tensor:
        return self._restricted(super()._logits())

    def _logits_of_head(self) -> Tensor:
        return self._restricted(super()._logits_of_head())

    def _restricted(self, z: Tensor) -> Tensor:
        n, V = self.mask.numel(), self.V
        kept = torch.rand(n, V, device=self.device, generator=self.generator).argsort(-1)[:, : self.case.kept]
        kept[:, 0] = self.ids.view(n)
        mask = torch.zeros(n, V, dtype=torch.bool, device=self.device).scatter_(-1, kept, True)
        mask[3] = True
        mask = mask.view(z.shape)
        rows = [*kept[:3].tolist(), [], *kept[4:].tolist()]
        self.more = {"support": mask if self.case.dense else Support.from_lists(rows, device=self.device)}
        self.whole = z
        return torch.where(mask, z, -math.inf)

    def _spoilt(self) -> tuple[Tensor, Tensor]:
        restricted, self.z = self.z, self.whole
        found = super()._spoilt()
        self.z = restricted
        return found
