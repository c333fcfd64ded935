"""The on-chip kernel's exponentials by polynomials, on CPU tensors, against float64."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with Triton 3.6")

from gluon_standin import bind, language
from grpo_kernels.triton_backend import onchip_tiles


def tiles(name, **names):
    """A function of `onchip_tiles` on CPU tensors, with other functions in place of some that it calls."""
    return bind(getattr(onchip_tiles, name), {"gl": language(0, 1), **names}, {})


@pytest.mark.parametrize(("summed", "error"), ((True, 2.0**-22), (False, 2.0**-13)))
def test_exponentials_by_polynomials(summed, error):
    exp2 = tiles("exp2_by_fma")
    steps = torch.arange(-126 * 2**13, 127 * 2**13 + 1) / 2**13  # every half, where rounding turns, and both its sides
    moved = torch.empty(2**20).uniform_(-126.0, 127.0, generator=torch.Generator().manual_seed(0))
    d = torch.cat([steps, steps.nextafter(torch.tensor(200.0))[:-1], steps.nextafter(torch.tensor(-200.0))[1:], moved])
    assert d.dtype == torch.float32
    wanted = d.double().exp2()
    assert ((exp2(d, summed).double() - wanted).abs() <= error * wanted).all()
    assert torch.equal(exp2(torch.arange(-126.0, 128.0), summed).double(), torch.arange(-126.0, 128.0).double().exp2())
    low = torch.cat([torch.linspace(-128.0, -126.0, 4097), torch.tensor([-129.5, -255.5, -384.0, -1e4, -3e38])])
    assert ((exp2(low, summed) >= 0.0) & (exp2(low, summed) <= 2.0**-126)).all()
    assert exp2(torch.tensor([-torch.inf]), summed) == 0.0
    if summed:
        high = torch.tensor([127.0, 127.5, 128.0, 129.0, 255.5, 384.0, 385.0, 512.0, 1e4, 3e38, torch.inf, torch.nan])
        assert (exp2(high, True) == 2.0**127).all()
    else:
        high = torch.linspace(127.0, 128.0, 4097)[:-1]
        assert ((exp2(high, False).double() - high.double().exp2()).abs() <= error * high.double().exp2()).all()


@pytest.mark.parametrize("eighths", range(9))
def test_so_many_eighths_are_polynomials(eighths):
    """They are spread evenly: of each row of so many entries as long."""
    exp2_of = tiles("exp2_of", exp2_by_fma=lambda d, summed: -torch.ones_like(d))
    low, high = exp2_of(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), eighths, True, None)
    chosen = (torch.stack([low, high], -1).view(2, 3, 8) == -1.0).int()
    assert (chosen.sum(-1) == eighths).all() and (chosen == chosen[0, 0]).all()
    for length in (2, 4):
        parts = chosen.view(2, 3, -1, length).sum(-1)
        assert parts.max() - parts.min() <= 1
