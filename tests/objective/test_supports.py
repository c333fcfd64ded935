"""`Support`: what its constructors make, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch

from cases import DEVICE
from grpo_kernels import Support, token_logprobs
from grpo_kernels.objective import supports
from grpo_kernels.objective.supports import REPEATED

ROWS = [[3, 1], [], [7], [2, 5, 4]]
MASK = torch.zeros(4, 9, dtype=torch.bool)
for _n, _row in enumerate(ROWS):
    MASK[_n, _row] = True


def lists(support):
    """The ids of every row, sorted, each once."""
    return [sorted(j for j in support.ids[a:b].tolist() if j != REPEATED)
            for a, b in zip(support.first.tolist(), support.last.tolist())]  # fmt: skip


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


PADDED = torch.tensor([[3, 1, -1], [-1, -1, -1], [-1, 7, -100], [2, 5, 4]])
MADE = {
    "offsets": lambda: Support(ints(3, 1, 7, 2, 5, 4), ints(0, 2, 2, 3, 6)),
    "int32": lambda: Support(ints(3, 1, 7, 2, 5, 4, dtype=torch.int32), ints(0, 2, 2, 3, 6, dtype=torch.int32)),
    "lists": lambda: Support.from_lists(ROWS),
    "tensors": lambda: Support.from_lists([torch.tensor(row) for row in ROWS]),
    "counts": lambda: Support.from_counts(ints(3, 1, 7, 2, 5, 4), ints(2, 0, 1, 3)),
    "counts (B, T)": lambda: Support.from_counts(ints(3, 1, 7, 2, 5, 4), torch.tensor([[2, 0], [1, 3]])),
    "padded": lambda: Support.from_padded(PADDED),
    "padded (B, T, K)": lambda: Support.from_padded(PADDED.view(2, 2, 3).int()),
    "sizes": lambda: Support.from_padded(torch.tensor([[3, 1, 8], [8, 8, 8], [7, 0, 0], [2, 5, 4]]), ints(2, 0, 1, 3)),
    "mask": lambda: Support.from_mask(MASK),
    "mask (B, T, V)": lambda: Support.from_mask(MASK.view(2, 2, 9)),
    "vllm": lambda: Support.from_vllm([output(ROWS[:2]), output(ROWS[2:])]),
}


def output(rows):
    return SimpleNamespace(sampling_mask=SimpleNamespace(token_ids=rows))


@pytest.mark.parametrize("name", MADE)
def test_every_constructor_makes_the_same(name):
    support = MADE[name]()
    assert lists(support) == [sorted(row) for row in ROWS]
    assert len(support) == 4 and support.ids.dtype == torch.int32


def test_without_rows_or_ids():
    assert len(Support.from_lists([])) == 0
    assert lists(Support.from_lists([[], []])) == [[], []]
    assert lists(Support.from_padded(torch.empty(2, 0, dtype=torch.int64))) == [[], []]


def test_rows_from_a_generator_and_of_no_vocabulary():
    assert lists(Support.from_lists(row for row in ROWS)) == [sorted(row) for row in ROWS]
    assert lists(Support.from_mask(torch.ones(2, 0).bool())) == [[], []]


def test_ids_that_come_twice_are_marked_in_their_own_row():
    support = Support.from_lists([[5, 5, 1, 5], [5], [2, 1, 2]])
    assert support.ids.tolist() == [5, REPEATED, 1, REPEATED, 5, 2, 1, REPEATED]


def test_an_id_outside_stays_outside():
    """An int64 that would wrap around, and the mark itself."""
    support = Support(ints(2**32 + 1, REPEATED, -(2**40), 1), ints(0, 4))
    assert support.ids[:3].tolist() == [2**31 - 1, 1 - 2**31, REPEATED] and support.ids[3] == 1


def test_slices_of_rows():
    support = Support.from_lists(ROWS)
    assert lists(support[2:]) == [[7], [2, 4, 5]] and lists(support[1:3]) == [[], [7]]
    assert lists(support[torch.tensor([3, 0])]) == [[2, 4, 5], [1, 3]]
    assert lists(support[1:][1:]) == [[7], [2, 4, 5]] and len(support[4:]) == 0
    with pytest.raises(TypeError, match="slice of rows"):
        support[0]


@pytest.mark.parametrize(("padding", "wanted"), [("right", [[1], [2, 3], [4], []]), ("left", [[1], [2, 3], [], [4]])])
def test_vllm_padding(padding, wanted):
    support = Support.from_vllm([output([[1], [2, 3]]), output([[4]])], num_tokens=2, padding=padding)
    assert lists(support) == wanted


def test_padded_ids_move_to_the_front():
    """What a GPU does, which does not tell the host how many are there."""
    front = supports._at_front(PADDED, PADDED >= 0)
    there = PADDED[PADDED >= 0].tolist()
    assert front.tolist() == there + [-1] * (PADDED.numel() - len(there))


@pytest.mark.unshifted
@pytest.mark.parametrize("name", ("offsets", "counts", "padded", "sizes"))
def test_nothing_waits_for_a_device(name, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    made = {"offsets": (Support, ints(3, 1, 7, 2, 5, 4), ints(0, 2, 2, 3, 6)),
            "counts": (Support.from_counts, ints(3, 1, 7, 2, 5, 4), ints(2, 0, 1, 3)),
            "padded": (Support.from_padded, PADDED),
            "sizes": (Support.from_padded, PADDED, ints(2, 0, 1, 3))}  # fmt: skip
    call, *given = made[name]
    given = [x.to("meta") for x in given]  # whatever asks a value of these raises
    support = call(*given)
    assert len(support) == 4 and support.ids.device.type == "meta" and support[1:3].first.shape == (2,)


WRONG = {
    "fall": (lambda: Support(ints(1, 2), ints(0, 2, 1, 2)), ValueError, "rise from 0 to 2.*falls after row 1"),
    "start": (lambda: Support(ints(1, 2), ints(1, 2)), ValueError, "rise from 0 to 2.*got 1 to 2"),
    "end": (lambda: Support(ints(1, 2), ints(0, 1)), ValueError, "rise from 0 to 2.*got 0 to 1"),
    "no offsets": (lambda: Support(ints(1, 2), ints()), ValueError, r"offsets must be \(N\+1,\)"),
    "shape": (lambda: Support(torch.ones(2, 2).long(), ints(0, 4)), ValueError, r"token_ids must be \(M,\)"),
    "dtype": (lambda: Support(torch.ones(2), ints(0, 2)), TypeError, "int32 or int64, got torch.float32"),
    "no tensor": (lambda: Support([1, 2], ints(0, 2)), TypeError, "Support.from_lists"),
    "counts": (lambda: Support.from_counts(ints(1, 2), ints(1, 2)), ValueError, "add up to the 2 token_ids.*3"),
    "negative counts": (lambda: Support.from_counts(ints(1), ints(-1, 2)), ValueError, "at least 0"),
    "padded": (lambda: Support.from_padded(ints(1)), ValueError, r"\(B, T, K\) or \(N, K\)"),
    "sizes": (lambda: Support.from_padded(PADDED, ints(1)), ValueError, r"sizes must be \(4,\)"),
    "mask": (lambda: Support.from_mask(PADDED), TypeError, "bool"),
    "mask shape": (lambda: Support.from_mask(MASK[0]), ValueError, r"\(B, T, V\) or \(N, V\)"),
    "nested": (lambda: Support.from_lists([[[1, 2]]]), TypeError, "joined first"),
    "vllm none": (lambda: Support.from_vllm([SimpleNamespace(sampling_mask=None)]), ValueError, "no sampling_mask"),
    "vllm long": (lambda: Support.from_vllm([output(ROWS)], num_tokens=3), ValueError, "4 tokens, more than"),
    "vllm side": (lambda: Support.from_vllm([], padding="up"), ValueError, "'right' or 'left'"),
    "counts elsewhere": (lambda: Support.from_counts(ints(1), ints(1).to("meta")), ValueError, "counts are on meta"),
    "sizes elsewhere": (lambda: Support.from_padded(PADDED, ints(1, 1, 1, 1).to("meta")), ValueError, "sizes are on m"),
    "sizes above K": (lambda: Support.from_padded(PADDED, ints(1, 4, 0, 0)), ValueError, "from 0 to K = 3, got 0 to 4"),
    "sizes below 0": (lambda: Support.from_padded(PADDED, ints(1, -1, 0, 0)), ValueError, "from 0 to K = 3, got -1 to"),
    "no rows": (lambda: Support.from_lists(None), TypeError, "made from a list of token ids per token, got NoneType"),
    "a row of none": (lambda: Support.from_lists([[1], None]), TypeError, "row 1 of a support must be a list.*None"),
    "a later id": (lambda: Support.from_lists([[1], [2, 2.5]]), TypeError, r"row 1 of .* integers, got \[2, 2.5\]"),
    "floats": (lambda: Support.from_lists(torch.ones(1, 2)), TypeError, "row 0 of a support must be a list .*integers"),
    "a set": (lambda: Support.from_lists([{1, 2}]), TypeError, "row 0 of a support must be a list of token ids"),
    "65 bits": (lambda: Support.from_lists([[3, 2**64]]), ValueError, f"more than 64 bits, from 3 to {2**64}"),
    "vllm nothing": (lambda: Support.from_vllm(None), TypeError, "outputs must be a list of completions, got NoneType"),
    "vllm no mask": (lambda: Support.from_vllm([SimpleNamespace(sampling_mask=[[1]])]), ValueError, "no sampling_mask"),
    "vllm T": (lambda: Support.from_vllm([output(ROWS)], num_tokens="4"), TypeError, "num_tokens must be .* an int"),
    "one row": (lambda: Support.from_lists(ROWS)[ints(1)[0]], ValueError, r"rows must be \(n,\), got \(\)"),
    "rows as floats": (lambda: Support.from_lists(ROWS)[torch.ones(1)], TypeError, "integer tensor of their numbers"),
    "backwards": (lambda: Support.from_lists(ROWS)[::-1], ValueError, "must go forwards"),
    "to a dtype": (lambda: Support.from_lists(ROWS).to(torch.float32), TypeError, "device"),
    "vllm request": (lambda: Support.from_vllm([SimpleNamespace(outputs=[])]), TypeError, "request.outputs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


def test_to_another_device():
    assert Support.from_lists(ROWS).to(DEVICE).ids.device.type == DEVICE


COMPILED = {
    "offsets": (Support, ints(3, 1, 7, 2, 5, 4), ints(0, 2, 2, 3, 6)),
    "counts": (Support.from_counts, ints(3, 1, 7, 2, 5, 4), ints(2, 0, 1, 3)),
    "sizes": (Support.from_padded, torch.tensor([[3, 1, 8], [8, 8, 8], [7, 0, 0], [2, 5, 4]]), ints(2, 0, 1, 3)),
}


@pytest.mark.unshifted
@pytest.mark.parametrize("name", COMPILED)
def test_made_inside_of_a_compiled_function(name):
    """Its values are not known while it is traced."""
    make, *given = COMPILED[name]
    logits, ids = torch.randn(4, 9), ints(3, 2, 8, 5)
    run = lambda x, *given: token_logprobs(x, ids, support=make(*given), backend="torch").logps  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, *given), run(logits, *given))
    torch._dynamo.reset()
