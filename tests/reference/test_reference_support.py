"""Log-probabilities over the sampler's kept set, by hand: probabilities are 4/7, 2/7, 1/7 of logits log 4, log 2, 0."""

import math

import pytest
import torch

from reference import grpo_loss, token_logprobs
from reference_cases import f64, grad

ROW = [math.log(4), math.log(2), 0.0, math.log(8)]  # over all four: 4/15, 2/15, 1/15, 8/15
CASES = {
    # support: {token id: probability}, of the sampled token, id 1
    "three ids": ([0, 1, 2], {0: 4 / 7, 1: 2 / 7, 2: 1 / 7}),
    "any order, twice": ([2, 0, 1, 0], {0: 4 / 7, 1: 2 / 7, 2: 1 / 7}),
    "the token is outside": ([0, 2], {0: 4 / 7, 1: 2 / 7, 2: 1 / 7}),
    "the token alone": ([1], {1: 1.0}),
    "all": ([0, 1, 2, 3], {0: 4 / 15, 1: 2 / 15, 2: 1 / 15, 3: 8 / 15}),
    "none": ([], {0: 4 / 15, 1: 2 / 15, 2: 1 / 15, 3: 8 / 15}),
}


def both(token_ids, n=1):
    """A support as lists and as a mask."""
    return [token_ids] * n, torch.tensor([[j in token_ids for j in range(4)]] * n).view(1, n, 4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", (0, 1), ids=("lists", "mask"))
def test_by_hand(name, form):
    token_ids, p = CASES[name]
    x = f64([[ROW]]).requires_grad_()
    out = token_logprobs(x, torch.tensor([[1]]), support=both(token_ids)[form])
    assert out.logps.item() == pytest.approx(math.log(p[1]), abs=1e-12)
    H = -sum(q * math.log(q) for q in p.values())
    assert out.entropy.item() == pytest.approx(H, abs=1e-12)
    (d,) = torch.autograd.grad(out.logps.sum(), x, retain_graph=True)
    assert d[0, 0].tolist() == pytest.approx([(j == 1) - p.get(j, 0.0) for j in range(4)], abs=1e-12)
    (d,) = torch.autograd.grad(out.entropy.sum(), x)
    wanted = [-p[j] * (math.log(p[j]) + H) if j in p else 0.0 for j in range(4)]
    assert d[0, 0].tolist() == pytest.approx(wanted, abs=1e-12)
    assert all(d[0, 0, j] == 0 for j in range(4) if j not in p)


def test_what_lies_outside_is_not_read():
    x = f64([[[*ROW[:3], math.nan]]]).requires_grad_()
    out = token_logprobs(x, torch.tensor([[1]]), support=[[0, 1, 2]])
    assert out.logps.item() == pytest.approx(math.log(2 / 7), abs=1e-12)
    (out.logps + out.entropy).sum().backward()
    assert x.grad[0, 0, 3] == 0 and x.grad.isfinite().all()


def test_masked_rows_may_say_anything():
    x = f64([[ROW, ROW]])
    mask = torch.tensor([[True, False]])
    out = token_logprobs(x, torch.tensor([[1, -100]]), mask=mask, support=[[0, 1, 2], [99, -5]])
    assert out.logps[0].tolist() == pytest.approx([math.log(2 / 7), 0.0], abs=1e-12)


@pytest.mark.parametrize("form", (0, 1), ids=("lists", "mask"))
def test_the_loss_is_that_of_masked_logits_padded_and_packed(form):
    """ρ is 1 where the sampler's own log-probabilities are over the same set."""
    ids, A = torch.tensor([[1, 0]]), f64([2.0])
    x = f64([[ROW, ROW]]).requires_grad_()
    support = both([0, 1, 2], 2)[form]
    kwargs = {"old_logps": f64([[math.log(2 / 7), math.log(4 / 7)]]), "temperature": 1.0}
    out = grpo_loss(x, ids, A, support=support, **kwargs)
    assert out.loss.item() == pytest.approx(-2.0, abs=1e-12)
    d = grad(out.loss, x)
    banned = f64([[ROW, ROW]])
    banned[..., 3] = -torch.inf
    banned.requires_grad_()
    assert torch.equal(d, grad(grpo_loss(banned, ids, A, **kwargs).loss, banned))
    y = f64([ROW, ROW]).requires_grad_()
    flat = support if form == 0 else support[0]
    kwargs["old_logps"] = kwargs["old_logps"][0]
    packed = grpo_loss(y, ids[0], A, support=flat, cu_seqlens=torch.tensor([0, 2]), **kwargs)
    assert packed.loss.item() == out.loss.item() and torch.equal(grad(packed.loss, y), d[0])


def test_a_list_for_each_token():
    with pytest.raises(ValueError, match="1 lists for 2 tokens"):
        token_logprobs(f64([[ROW, ROW]]), torch.tensor([[1, 0]]), support=[[0]])
