"""What the tests of the reference share: float64 batches, and how close float64 must come."""

import math

import torch
from torch import Tensor

INF, NAN = math.inf, math.nan
F64 = torch.float64
# float64 against float64: some thousand roundings, u = 2⁻⁵³, of terms of size 1; no number here is made of so many.
TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=F64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal, and the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def random_logps(B: int = 6, T: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """What `policy_loss` takes, float64. Ratios of tokens and of sequences on both sides of usual bounds,
    one sequence without tokens, one without an advantage."""
    lp = -1.5 + 0.4 * noise(B, T, seed=seed)
    drift = 0.3 * noise(B, T, seed=seed + 1) + torch.linspace(-0.4, 0.4, B, dtype=F64)[:, None]
    mask = noise(B, T, seed=seed + 2) > -0.6
    mask[2] = False
    return {
        "logps": lp.requires_grad_(),
        "advantages": f64([1.3, -0.7, 2.0, 0.0, 0.9, -1.1] * (B // 6)),
        "old_logps": lp.detach() - drift,
        "ref_logps": lp.detach() + 0.5 * noise(B, T, seed=seed + 3),
        "completion_mask": mask,
        "entropy": noise(B, T, seed=seed + 4).abs(),
    }


def random_batch(B: int = 4, T: int = 5, V: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Float64; ratios on both sides of any usual clip range; one sequence without tokens."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    logits = normal(B, T, V).requires_grad_()
    ids = torch.randint(V, (B, T), generator=g)
    mask = torch.rand(B, T, generator=g) > 0.3
    mask[2] = False
    logps = logits.detach().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return {
        "logits": logits,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": f64([1.3, -0.7, 2.0, -1.1] * (B // 4)),
        "old_logps": logps + 0.4 * normal(B, T),
        "ref_logps": logps + 0.4 * normal(B, T),
    }


def grad(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]
