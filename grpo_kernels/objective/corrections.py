"""Importance weights that correct for a sampler whose log-probabilities differ from the trainer's.

d = log π_old − log π_sampler at unmasked tokens, 0 where the sampler's is NaN. A token's ratio is
exp d, a sequence's exp Σ d; both are truncated to the bounds, or masked out beyond them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.language import jit, on_torch, tl
from grpo_kernels.objective.sequences import expand, per_sequence


class Correction(NamedTuple):
    per_sequence: bool  # one weight per sequence
    truncate: bool  # clamp to the bounds; else 0 beyond
    gated: bool  # token ratios, where the sequence's geometric mean lies within the bounds

    @property
    def of(self) -> str:
        """What has a weight of its own: a "sequence", or a "token", "gated" by its sequence or not."""
        return "sequence" if self.per_sequence else "gated" if self.gated else "token"


CORRECTIONS = {
    "token_truncate": Correction(False, True, False),
    "token_mask": Correction(False, False, False),
    "sequence_truncate": Correction(True, True, False),
    "sequence_mask": Correction(True, False, False),
    "seq_mask_tis": Correction(False, False, True),
}


@jit
def mismatch(old, sampled):
    """d, 0 where the sampler has no log-probability."""
    return tl.where(sampled == sampled, old - sampled, 0.0)


@jit
def outside(ratio, low, high):
    return (ratio > high) | (ratio < low)


@jit
def within(ratio, low, high, TRUNCATE: tl.constexpr):
    if TRUNCATE:
        return tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    else:
        return tl.where(outside(ratio, low, high), 0.0, ratio)


def correct(old, batch: Batch, correction: Correction) -> Tensor:
    """Importance weights, (B, T) or (B, 1), from the sampler's log-probabilities."""
    d = on_torch(mismatch)(old.float(), batch.sampling.float())
    live = torch.ones_like(d, dtype=torch.bool) if batch.mask is None else batch.mask != 0
    d = torch.where(live, d, 0.0)
    low, high = batch.correction_low, batch.correction_high
    if correction.gated:
        mean = (per_sequence(d, batch) / per_sequence(live, batch).clamp(min=1.0)).float().exp()[:, None]
        gone = on_torch(outside)(mean, low, high)
        return torch.where(expand(gone.float(), batch) != 0.0, 0.0, d.exp())
    ratio = per_sequence(d, batch)[:, None].float().exp() if correction.per_sequence else d.exp()
    return on_torch(within)(ratio, low, high, correction.truncate)
