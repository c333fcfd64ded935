"""How far runs of a model, and whole runs of a trainer, may lie apart.

A model's sums go in another order, or over rows of another length, in one of two ways to the same loss: as if each of
its weights were off by the error of a row of logits (`tolerance.row_size`). `model_bounds` moves the weights by that
and sees what comes of it.

A run of some steps magnifies what the first step leaves. How much is a property of the model, its data and its
learning rate: the same run is made once more from weights that are off by a rounding, and `apart` says how far it went
off, over all that it logs, in multiples of the size of each number. Two ways to the loss may lie apart by four times
that, and by the roundings of a sum in any case. A nudged run that samples another token is another run, and says
nothing: the next nudge is tried.
"""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

from tolerance import U, assert_within, bounds_of, row_size, steps

LEAST = 2 * steps(32) * U  # roundings of a number that a run logs, for terms of size 1


def model_bounds(model: nn.Module, run, draws: int = 2) -> dict[str, torch.Tensor]:
    """Bounds of run(model) -> {name: number or tensor}, fp32."""

    def evaluate(**weights):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.copy_(weights[name])
        return {name: torch.as_tensor(x).detach().double() for name, x in run(moved).items()}

    return bounds_of(evaluate, dict(model.named_parameters()), draws=draws)


def nudge(model: nn.Module, seed: int = 0, unit: float = U, only: str = "") -> None:
    """Weights off by up to the error of a row in fp32, or by up to `unit` of themselves, a coarser dtype's roundoff.

    `only`: those with this in their names, where two runs share the rest.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for name, p in model.named_parameters() if only in name):
            size = row_size(p) if unit == U else unit * p.abs()
            p += (2 * torch.rand(p.shape, generator=g) - 1).to(p) * size


def nudged_run(want: tuple, make, most: int = 12) -> tuple:
    """The first of make(seed) -> (rows, weights) that samples what `want` has sampled."""

    def sampled(rows):
        return [{k: v for k, v in row.items() if "length" in k or "reward" in k.split("_time")[0]} for row in rows]

    for seed in range(most):
        run = make(seed)
        if all(a == pytest.approx(b, rel=1e-6, nan_ok=True) for a, b in zip(sampled(run[0]), sampled(want[0]))):
            return run
    raise AssertionError(f"each of {most} nudged runs sampled something else")


@contextlib.contextmanager
def nudged_policies(seed: int, unit: float = U):
    """What the trainer builds within the context has been nudged."""
    from grpo_kernels.trainer import cli

    build = cli.build

    def build_off(*args, **kwargs):
        built = build(*args, **kwargs)
        nudge(built.policy, seed, unit)
        return built

    cli.build = build_off
    try:
        yield
    finally:
        cli.build = build


def apart(run: tuple, other: tuple) -> list[float]:
    """After each row: the largest relative difference so far of (rows, weights), of numbers above 1; absolute below."""
    (rows, weights), (others, other_weights) = run, other
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    seen, most = [], 0.0
    for row, also in zip(rows, others):
        for name, value in row.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                most = max(most, abs(value - also[name]) / max(1.0, abs(value)))
        seen.append(most)
    for name, x in weights.items():
        x, y = x.double(), other_weights[name].double()
        most = max(most, ((x - y).abs().max() / x.abs().max().clamp(min=1.0)).item())
    assert most < 0.05, f"this run magnifies a rounding to {most}: it shows nothing"
    return [*seen, most]


def assert_same_run(run: tuple, want: tuple, nudged: tuple) -> None:
    """Every number of every row, and the weights, of (rows, weights)."""
    (rows, weights), (wanted, wanted_weights) = run, want
    allowed = [max(4 * most, LEAST) for most in apart(want, nudged)]
    assert len(rows) == len(wanted)
    for i, (row, also) in enumerate(zip(rows, wanted)):
        assert row.keys() == also.keys(), row.keys() ^ also.keys()
        for name, value in also.items():
            if not isinstance(value, (int, float)):
                assert row[name] == value, (i, name)
                continue
            size = max(1.0, abs(value)) if math.isfinite(value) else 0.0
            assert_within(torch.tensor(row[name]), torch.tensor(value), allowed[i] * size, f"row {i}: {name}")
    for name, x in wanted_weights.items():
        size = x.double().abs().max().clamp(min=1.0)
        assert_within(weights[name], x, allowed[-1] * size, name)
