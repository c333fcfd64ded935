"""The cases of supports in `benchmarks.smoke`: the ids that a sampler kept, and the logits that say the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.smoke_job import Job
from grpo_kernels import Support
from grpo_kernels.call.ops import local_support_op


class SupportJob(Job):
    """The truth's logits are −inf outside of the supports; the fourth row has none, which restricts nothing, but for
    ``gather``, which needs one of every row."""

    def _logits(self) -> Tensor:
        return self._restricted(super()._logits())

    def _logits_of_head(self) -> Tensor:
        return self._restricted(super()._logits_of_head())

    def _restricted(self, z: Tensor) -> Tensor:
        n, V = self.mask.numel(), self.V
        kept = torch.rand(n, V, device=self.device, generator=self.generator).argsort(-1)[:, : self.case.kept]
        kept[:, 0] = self.ids.view(n)
        mask = torch.zeros(n, V, dtype=torch.bool, device=self.device).scatter_(-1, kept, True)
        rows = kept.tolist()
        if not self.case.gather:
            mask[3], rows[3] = True, []
        mask = mask.view(z.shape)
        self.more = {"support": mask if self.case.dense else Support.from_lists(rows, device=self.device)}
        if self.case.gather:
            self.more["gather_head"] = True
        self.whole = z
        return torch.where(mask, z, -math.inf)

    def _support_of(self, rank: int, half: int) -> dict[str, Tensor]:
        support, shape = self.more["support"], self.ids.shape
        if self.case.dense:
            part = support[..., :half] if rank == 0 else support[..., half:]
            return {"support_mask": part, "support_last": support.any(-1).int()}
        first, last = support.first.view(shape), support.last.view(shape)
        sizes = torch.tensor([half, self.V - half], device=self.device)
        ids = local_support_op(support.ids, first, last, self.mask, sizes, rank)
        return {"support": ids, "support_first": first, "support_last": last}

    def _spoilt(self) -> tuple[Tensor, Tensor]:
        restricted, self.z = self.z, self.whole
        found = super()._spoilt()
        self.z = restricted
        return found
