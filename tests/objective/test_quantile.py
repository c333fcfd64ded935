"""The entropy threshold: `torch.quantile` of the unmasked entropies, at any size, without a host sync."""

import pytest
import torch

from cases import DEVICE
from grpo_kernels.call.ops import threshold_op
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.quantile import sorted_entropies

BACKENDS = ("torch", "triton")


def threshold(H, mask, top, backend):
    ordered, everywhere = sorted_entropies(H, mask)
    packed = Batch(None, quantile=1.0 - top).pack()
    value, kept = threshold_op(ordered.to(DEVICE), everywhere.to(DEVICE), *packed, backend)
    return value.cpu(), kept.cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", (1, 2, 3, 10, 101, 4097))
@pytest.mark.parametrize("top", (0.0, 0.1, 0.2, 1 / 3, 0.5, 0.8, 0.999))
def test_is_torch_quantile(top, n, backend):
    """A token on the threshold falls on the side that it does elsewhere: between entries alone a rounding is free."""
    g = torch.Generator().manual_seed(n)
    H = torch.rand(n, generator=g).round(decimals=2)  # with ties
    mask = torch.rand(n, generator=g) < 0.7
    mask[0] = True
    value, kept = threshold(H[None], mask[None], top, backend)
    want = torch.quantile(H[mask], 1 - top)
    assert value.item() == pytest.approx(want.item(), rel=torch.finfo(torch.float32).eps, abs=0)
    assert kept.item() == (H[mask] >= want).sum().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "top"), ((16, 1 / 3), (41, 0.95), (49, 1 / 3), (61, 0.2), (64, 1 / 3), (66, 0.2)))
def test_ranks_that_would_be_whole_without_rounding(n, top, backend):
    """Up to torch 2.13 they are; with torch 2.14, which ranks in fp64, q's own rounding to fp32 shows."""
    H = 1.25 ** torch.arange(n)  # so far apart that a rank's rounding reaches the threshold
    kept = threshold(H[None], torch.ones(1, n), top, backend)[1]
    assert kept.item() == (H >= torch.quantile(H, 1 - top)).sum().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_masked(backend):
    value, kept = threshold(torch.rand(1, 5), torch.zeros(1, 5), 0.5, backend)
    assert value.item() == torch.inf and kept.item() == 0.0


def test_beyond_the_limit_of_torch_quantile():
    """2^24 + 5 evenly spaced entropies: fp32 ranks would be off by one there."""
    n = (1 << 24) + 5
    ordered = torch.arange(n, dtype=torch.float32)  # not all are exact, but never in the wrong order
    for q in (0.25, 0.5, 0.75):
        rank = q * (n - 1)
        packed = Batch(None, quantile=q).pack()
        value, kept = threshold_op(ordered, ordered, *packed, "torch")
        again = threshold_op(ordered, ordered, *packed, "triton") if DEVICE == "cpu" else (value, kept)
        assert value.item() == pytest.approx(rank, abs=0.5) and kept.item() == pytest.approx(n - rank, abs=1)
        assert value.item() == again[0].item() and kept.item() == again[1].item()
