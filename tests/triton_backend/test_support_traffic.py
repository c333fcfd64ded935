"""What a launch reads of rows that are restricted: of id lists K entries, of a mask the row and the mask once."""

import pytest
import torch

from cases import make_case
from counting import interpreted, launches
from grpo_kernels import Support, fused_grpo_loss, token_logprobs
from support_cases import make_row
from test_traffic import rows_written

pytestmark = [interpreted, pytest.mark.unshifted]
V = 2500
KINDS = ("some", "outside", "token", "repeated", "empty", "most")


def restricted_case(dtype=torch.bfloat16):
    case = make_case(2, 4, V, dtype=dtype, extra=1)
    case.completion_ids = case.completion_ids.where(case.completion_mask, 0)
    case.completion_mask = torch.ones(2, 4, dtype=torch.bool)
    g = torch.Generator().manual_seed(0)
    rows = [make_row(KINDS[n % len(KINDS)], y, V, g) for n, y in enumerate(case.completion_ids.flatten().tolist())]
    return case, rows


def wanted(case, rows):
    """(B, T, V): the entries that are to be read."""
    ids = case.completion_ids.flatten().tolist()
    found = torch.zeros(len(rows), V, dtype=torch.bool)
    for entries, row, y in zip(found, rows, ids):
        entries[[*row, y] if row else slice(None)] = True
    return found.view(2, 4, V)


def kept(rows):
    mask = torch.zeros(len(rows), V, dtype=torch.bool)
    for entries, row in zip(mask, rows):
        entries[row] = True
    return mask.view(2, 4, V)


def step(case, support, **kwargs):
    """(logits, gradient, launches that touched either)"""
    x = case.logits.clone().requires_grad_() * 1
    with launches() as seen:
        out = fused_grpo_loss(x, case.completion_ids, torch.tensor([1.0, -1.0]), support=support, backend="triton",
                              **kwargs)  # fmt: skip
        (grad,) = torch.autograd.grad(out.loss, x, torch.ones_like(out.loss))
    return x, grad, [launch for launch in seen if launch.touches(x) or launch.touches(grad)]


@pytest.mark.parametrize("bonus", (None, 0.1), ids=("lean", "bonus"))
def test_id_lists_read_their_entries_and_write_once(bonus):
    case, rows = restricted_case()
    x, grad, (only,) = step(case, Support.from_lists(rows), entropy_coef=bonus)
    read = only.reads(x) > 0
    assert torch.equal(read[:, :4], wanted(case, rows)) and not read[:, 4:].any()
    assert (rows_written(only, grad) == 1).all()
    full = torch.tensor([not row for row in rows]).view(2, 4)
    assert (only.reads(x)[:, :4][~full] <= 3).all()  # the largest, the sum and the gradient
    assert (only.writes(grad)[:, :4].sum(-1)[~full] <= V + wanted(case, rows).sum(-1)[~full]).all()


def test_in_place():
    case, rows = restricted_case(torch.float32)
    x, grad, (only,) = step(case, Support.from_lists(rows), inplace=True)
    assert grad.data_ptr() == x.data_ptr() and (rows_written(only, grad) == 1).all()
    assert torch.equal((only.reads(x) > 0)[:, :4], wanted(case, rows))


def test_two_launches():
    case, rows = restricted_case()
    x, grad, (first, second) = step(case, Support.from_lists(rows), loss_type="gspo")
    for launch in (first, second):
        assert torch.equal((launch.reads(x) > 0)[:, :4], wanted(case, rows))
    assert not first.writes(grad).any() and (rows_written(second, grad) == 1).all()


def test_log_probabilities_touch_their_entries():
    case, rows = restricted_case()
    with launches() as seen:
        token_logprobs(case.logits, case.completion_ids, support=Support.from_lists(rows), return_entropy=True,
                       backend="triton")  # fmt: skip
    (only,) = [launch for launch in seen if launch.touches(case.logits)]
    assert torch.equal((only.reads(case.logits) > 0)[:, :4], wanted(case, rows))
    assert not only.writes(case.logits).any()


def test_a_mask_is_read_once_beside_its_row():
    case, rows = restricted_case()
    mask = kept(rows)
    x, grad, (only,) = step(case, mask)
    assert (only.reads(x)[:, :4] > 0).all() and not only.reads(x)[:, 4:].any() and (rows_written(only, grad) == 1).all()
    assert (only.reads(mask) > 0).all() and not only.writes(mask).any()
    assert only.reads(mask).max() <= 5  # for an entry at all, and in both passes, in those at the row's edges twice


@pytest.mark.parametrize("form", ("Support", "mask"))
def test_masked_rows_have_no_support_that_is_read(form):
    case, rows = restricted_case()
    counted = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]]).bool()
    support = Support.from_lists(rows) if form == "Support" else kept(rows)
    x, grad, (only,) = step(case, support, completion_mask=counted)
    assert not (only.reads(x) > 0)[:, :4][~counted].any() and (rows_written(only, grad) == 1).all()
    if form == "mask":
        assert not only.reads(support)[~counted].any()
    else:
        of_rows = torch.repeat_interleave(counted.flatten(), support.last - support.first)
        assert torch.equal(only.reads(support.ids) > 0, of_rows)


@pytest.mark.parametrize("offsets", ([0, 2, 900], [-5, 2, 3], [0, 10**12, 3]), ids=str)
def test_offsets_outside_are_no_addresses(offsets, monkeypatch):
    """Where values are not checked; whatever is counted must lie within the tensors of the launch."""
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    support = Support(torch.tensor([1, 2, 3]), torch.tensor(offsets))
    x = torch.randn(1, 2, 40)
    with launches():
        token_logprobs(x, torch.zeros(1, 2, dtype=torch.int64), support=support, backend="triton")
