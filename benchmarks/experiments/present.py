"""The kernel as the package launches it, `rows.loss_kernel`, under other launch parameters."""

from unittest import mock

import torch

from benchmarks.experiments.common import WAVE, Job, tile_shape
from grpo_kernels.inputs import Coefs, Inputs
from grpo_kernels.kernels import launch as package
from grpo_kernels.plan import Plan


def launch(
    job: Job, out: torch.Tensor, *, K: int = 0, warps: int = 32, registers: int = 64, wave: int = WAVE
) -> torch.Tensor:
    """The gradient goes to ``out``, which may be the logits; returns the log-probabilities (B, T).

    K = 0: the package's own launch parameters.
    """
    inputs = Inputs(job.ids, job.mask, job.old, adv=job.adv[:, None], count=job.count)
    coefs = Coefs(temperature=job.temperature, w_factor=1.0 / job.ids.shape[0], term=tuple(job.clip))
    own = package.tile_shape

    def shape(V: int, itemsize: int, vector: int, capped: bool = False) -> dict[str, int]:
        if K:
            return tile_shape(itemsize, vector, K, warps, registers, wave)
        return own(V, itemsize, vector, capped, wave=wave)

    with mock.patch.object(package, "tile_shape", shape):
        return package.loss(job.logits, out, inputs, coefs, Plan(term="clipped"), False)[0]
