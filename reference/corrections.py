"""Which tokens the policy term is for, and how much each counts: nothing here carries a gradient.

The engine that sampled and the trainer that scores the same tokens disagree a little even with the same
weights: samp ≠ old.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reference.knobs import Knobs
from reference.tensors import choose, masked_sum, sequence_mean


def difference(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a − b; 0 where masked, and where the sampler could not say (NaN): no evidence of a mismatch."""
    d = a - b
    return torch.where(mask & ~d.isnan(), d, 0)


# --- Sampling corrections: (d, mask, low, high) → is_weight, (B, T) or one for each sequence, (B, 1) ------
#
# d = old − samp.


def within(ratio: Tensor, low: float, high: float) -> Tensor:
    return (ratio >= low) & (ratio <= high)


def token_truncate(d: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    return d.exp().clamp(low, high)


def token_mask(d: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    return torch.where(within(d.exp(), low, high), d.exp(), 0)


def sequence_truncate(d: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    return token_truncate(masked_sum(d, mask), mask, low, high)


def sequence_mask(d: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    return token_mask(masked_sum(d, mask), mask, low, high)


def seq_mask_tis(d: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """Whole sequences are kept by their geometric mean; the tokens of those then have their own ratio."""
    return torch.where(within(sequence_mean(d, mask).exp(), low, high), d.exp(), 0)


CORRECTIONS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "token_truncate": token_truncate,
    "token_mask": token_mask,
    "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
    "seq_mask_tis": seq_mask_tis,
}


ONE_WEIGHT_PER_SEQUENCE = ("sequence_truncate", "sequence_mask")


def sampling_weights(old: Tensor, samp: Tensor, mask: Tensor, k: Knobs) -> Tensor:
    """π_old/π_sampler, made bounded: (B, T) or (B, 1)."""
    correct = choose(CORRECTIONS, k.sampling_correction, "sampling_correction")
    low = -torch.inf if k.sampling_correction_min is None else k.sampling_correction_min
    high = torch.inf if k.sampling_correction_max is None else k.sampling_correction_max
    return correct(difference(old, samp, mask).detach(), mask, low, high)


# --- Masks, (B, T) bool --------------------------------------------------------------------------------------


def off_policy_mask(lp: Tensor, samp: Tensor, A: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Keep what has gone well, and of the rest the sequences that the policy has not drifted from:
    mean log π_sampler − log π_θ ≤ threshold (DeepSeek-V3.2)."""
    drift = sequence_mean(difference(samp, lp.detach(), mask), mask)
    return (A >= 0) | (drift <= threshold)


def entropy_mask(entropy: Tensor, mask: Tensor, top: float) -> Tensor:
    """Keep the share `top` of the tokens where the policy is most undecided, ties included."""
    if not mask.any():
        return mask
    H = entropy.detach().float()
    return mask & (H >= torch.quantile(H[mask], 1 - top))
