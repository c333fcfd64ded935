"""Log-probabilities of several targets per row, by hand: probabilities are 4/7, 2/7, 1/7 of logits log 4, log 2, 0."""

import math

import pytest
import torch

from reference import target_logprobs, token_logprobs
from reference_cases import f64

ROW = [math.log(4), math.log(2), 0.0]
P = [4 / 7, 2 / 7, 1 / 7]


def test_by_hand():
    """Two targets, one of them twice, one absent: the gradient is Σ g·onehot − (Σ g)·p."""
    x = f64([[ROW, ROW]]).requires_grad_()
    ids, mask = torch.tensor([[[0, 2, 2, -1], [7, 7, 7, 7]]]), torch.tensor([[1, 0]])
    out = target_logprobs(x, ids, mask=mask)
    wanted = [math.log(P[0]), math.log(P[2]), math.log(P[2]), 0.0, 0.0, 0.0, 0.0, 0.0]
    assert out.logps.flatten().tolist() == pytest.approx(wanted, abs=1e-12)
    assert out.entropy.tolist()[0] == pytest.approx([-sum(p * math.log(p) for p in P), 0.0], abs=1e-12)
    (d,) = torch.autograd.grad(out.logps, x, f64([[[1.0, 2.0, 3.0, 100.0], [5.0] * 4]]))
    assert d[0, 0].tolist() == pytest.approx([1 - 6 * P[0], -6 * P[1], 5 - 6 * P[2]], abs=1e-12)
    assert (d[0, 1] == 0).all()


def test_lists_are_padded_ids():
    x, mask = f64([[ROW, ROW[::-1]]]), torch.ones(1, 2)
    lists = target_logprobs(x, [[1], []], mask=mask)
    assert lists.logps.tolist() == pytest.approx([math.log(P[1])], abs=1e-12)
    lists = target_logprobs(x, [[1, -1], [2, 0, 0]], temperature=0.5, mask=mask)
    padded = target_logprobs(x, torch.tensor([[[1, -1, -1], [2, 0, 0]]]), temperature=0.5)
    assert torch.equal(lists.logps, padded.logps.flatten()[[0, 1, 3, 4, 5]])
    assert torch.equal(lists.entropy, padded.entropy)
    with pytest.raises(ValueError, match="3 lists"):
        target_logprobs(x, [[1], [2], []], mask=mask)


def test_one_target_is_the_plain_function():
    x, ids = f64([[ROW, ROW]]), torch.tensor([[2, 0]])
    got, want = target_logprobs(x, ids[..., None], 2.0), token_logprobs(x, ids, 2.0)
    assert torch.equal(got.logps[..., 0], want.logps) and torch.equal(got.entropy, want.entropy)
