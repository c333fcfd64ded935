"""The kept sets that slime and miles record (docs/truncated-sampling.md), as a Support."""

import pytest
import torch

from grpo_kernels import token_logprobs
from host_calls import V, load

IDS = ([3, 1, 4, 2], torch.tensor([0, 3]))  # a list or a tensor of each sample
OFFSETS = ([0, 2, 2, 4], torch.tensor([0, 2]))
RESPONSES = ([1, 5, 2], torch.tensor([4]))
ROWS = ([3, 1], [], [4, 2], [0, 3])
BOUND = 4 * torch.finfo(torch.float32).eps * 8  # a few roundings of fp32 numbers, none above 8 in size


def logps(monkeypatch, **conventions):
    make = load(monkeypatch, "kept_sets").support_of_samples
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    sampled = torch.tensor([1, 5, 2, 4])
    found = token_logprobs(logits, sampled, support=make(IDS, OFFSETS, RESPONSES, **conventions)).logps
    return logits.double(), sampled.tolist(), found.double()


def by_hand(logits, sampled, rows):
    return torch.stack([x[y] - x[sorted({y, *kept})].logsumexp(0) for x, y, kept in zip(logits, sampled, rows)])


def test_slime(monkeypatch):
    """An empty record is the token alone; a token outside of its record is added."""
    logits, sampled, found = logps(monkeypatch)
    torch.testing.assert_close(found, by_hand(logits, sampled, ROWS), rtol=0, atol=BOUND)
    assert found[1] == 0


def test_miles(monkeypatch):
    """An empty record restricts nothing; a token outside of its record raises."""
    with pytest.raises(ValueError, match="token 4 was not kept"):
        logps(monkeypatch, empty_is_the_token=False, y_may_be_outside=False)
    logits, sampled, found = logps(monkeypatch, empty_is_the_token=False)
    rows = [kept or range(V) for kept in ROWS]
    torch.testing.assert_close(found, by_hand(logits, sampled, rows), rtol=0, atol=BOUND)


def test_records_of_different_lengths_raise(monkeypatch):
    make = load(monkeypatch, "kept_sets").support_of_samples
    with pytest.raises(ValueError):
        make(IDS, OFFSETS, RESPONSES[:1])
    with pytest.raises(ValueError):
        make(IDS, ([0, 2, 4], OFFSETS[1]), RESPONSES)


@pytest.mark.parametrize("wrong", ([0, 2, 1, 4], [0, 2, 2, 5], [-1, 2, 2, 4]), ids=("falls", "too far", "negative"))
def test_offsets_outside_of_their_ids_raise(wrong, monkeypatch):
    """Python's slices would take what is there, and an empty one as the token alone."""
    with pytest.raises(ValueError, match="offsets must rise from 0 or more to at most the 4 token_ids"):
        load(monkeypatch, "kept_sets").support_of_samples(IDS, (wrong, OFFSETS[1]), RESPONSES)
