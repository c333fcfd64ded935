"""What --seed-offset and --shift do, tried on a Python of their own, and that they do nothing unasked."""

import pytest
import torch

import variation


def draws():
    torch.manual_seed(3)
    return torch.rand(2, generator=torch.Generator().manual_seed(3)).tolist() + torch.rand(2).tolist()


def test_the_offset_reaches_both_kinds_of_seed(monkeypatch, request):
    given = request.config.getoption("--seed-offset")
    monkeypatch.setattr(torch, "Generator", torch.Generator)  # both put back afterwards
    monkeypatch.setattr(torch, "manual_seed", torch.manual_seed)
    monkeypatch.setenv(variation.SEED_OFFSET, str(given))
    before = draws()
    assert draws() == before
    variation.move_seeds(given + 1)
    assert not set(draws()) & set(before)


@pytest.mark.unshifted
@pytest.mark.parametrize("shift", (1, 2))
def test_results_start_later_and_views_do_not(shift):
    with variation.Shifted(shift):
        leaf = torch.arange(6.0).requires_grad_()
        made = [leaf, torch.tensor([1.0, 2.0]), torch.randn(2, 3), leaf * 2, leaf.bfloat16(), torch.zeros(3).add_(1.0)]
        x = leaf * 2
        (g,) = torch.autograd.grad(x.square().sum(), leaf)
        assert x.grad_fn is not None and not x._is_view() and x.view(2, 3)[1].storage_offset() == shift + 3
        top, at = torch.randn(2, 3).max(-1)
        made += [g, top, at, torch.ones(4).split(2)[0], torch.randn(3, 2).t().contiguous()]
    assert [each.storage_offset() for each in made] == [shift] * len(made)
    assert torch.equal(g, 8 * torch.arange(6.0)) and torch.equal(made[4], torch.arange(6.0).bfloat16())
