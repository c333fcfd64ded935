"""How far runs of a model, and whole runs of a trainer, may lie apart.

A model's sums go in another order, or over rows of another length, in one of two ways to the same loss: as if each of
its weights were off by the error of a row of logits (`tolerance.row_size`). `model_bounds` moves the weights by that
and sees what comes of it.

A run of some steps magnifies what the first step leaves. How much is a property of the model, its data and its
learning rate: the same run is made once more from weights that are off by a rounding, and `apart` says how far it went
off, over all that it logs, in multiples of the size of each number. Two ways to the loss may lie apart by four times
that, and by the roundings of a sum in any case.
"""

import contextlib
import copy
import math

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


def nudge(model: nn.Module, unit: float = U) -> None:
    """Every weight off by up to the error of a row; `unit`: the roundoff of what the model computes in."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += (2 * torch.rand(p.shape, generator=g) - 1).to(p) * row_size(p) * (unit / U)


@contextlib.contextmanager
def nudged_policies(unit: float = U):
    """What the trainer builds within the context has been nudged."""
    from grpo_kernels.trainer import cli

    build = cli.build

    def build_off(*args, **kwargs):
        built = build(*args, **kwargs)
        nudge(built.policy, unit)
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
    assert most < 0.05, f"the nudged run went another way: {most}"
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
