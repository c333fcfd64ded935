"""Losses from hidden states over the sampler's kept set, against float64."""

import pytest
import torch

from cases import BACKENDS, DEVICE, Case, on_device
from grpo_kernels import Support, fused_linear_grpo_loss, linear_token_logprobs, token_logprobs
from linear_cases import B, T, V, assert_close, batch, expected, gradients, leaves_of, logits_of
from support_cases import make_rows, make_support

ROW = V * 4  # bytes of a row of fp32 logits
CALLS = {
    "lean": {},
    "bonus": {"entropy_coef": 0.05, "beta": 0.1, "return_entropy": True},
    "sequence": {"loss_type": "gspo", "entropy_coef": 0.05},
    "quantile": {"top_entropy_quantile": 0.5, "entropy_coef": 0.05},
    "none": {"reduction": "none"},
    "softcap": {"softcap": 2.0, "logit_scale": 0.5, "temperature": 0.9},
    "softcap, sequence": {"softcap": 1.5, "loss_type": "gspo", "entropy_coef": 0.05},
}


def supported(seed, **kwargs):
    head, inputs = batch(seed=seed, **kwargs)
    names = ("completion_ids", "completion_mask")
    case = Case(**{name: inputs.get(name) for name in Case.__dataclass_fields__})
    assert all(getattr(case, name) is not None for name in names)
    return head, inputs, make_rows(case, V, seed)


def ours(head, inputs, backend, **kwargs):
    leaves = leaves_of({name: None if x is None else x.to(DEVICE) for name, x in head.items()})
    out = fused_linear_grpo_loss(**leaves, **on_device(inputs), backend=backend, **kwargs)
    return out, [g.cpu() for g in gradients(out.loss, leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ("Support", "mask"))
@pytest.mark.parametrize("masked", (True, False), ids=("masked", "all"))
@pytest.mark.parametrize("name", CALLS)
def test_every_way_through_the_code(name, masked, form, backend):
    head, inputs, rows = supported(seed=1, extra=1)
    if not masked:
        inputs["completion_ids"] = inputs["completion_ids"].clamp(min=0)
        inputs["completion_mask"] = torch.ones(B, T, dtype=torch.bool)
        rows = [[j for j in row if 0 <= j < V] for row in rows]
    support = make_support(form, rows, (B, T, V), inputs["completion_mask"])
    want = expected(head, inputs, support=rows, **CALLS[name])
    for chunk in (None, 4 * ROW):
        assert_close(ours(head, inputs, backend, support=support, chunk_bytes=chunk, **CALLS[name]), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ("Support", "mask"))
def test_half_precision(form, backend):
    head, inputs, rows = supported(seed=2, dtype=torch.bfloat16)
    support = make_support(form, rows, (B, T, V), inputs["completion_mask"])
    want = expected(head, inputs, support=rows)
    assert_close(ours(head, inputs, backend, support=support, chunk_bytes=4 * V * 2), want, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ("Support", "mask"))
def test_log_probabilities_are_those_of_the_logits(form, backend):
    """To the rounding of the products; packed, in chunks."""
    head, inputs, rows = supported(seed=3)
    ids, mask = inputs["completion_ids"].flatten(), inputs["completion_mask"].flatten()
    support = make_support(form, rows, (B * T, V), mask)
    hidden, weight = head["hidden"].flatten(0, 1).to(DEVICE), head["weight"].to(DEVICE)
    kwargs = dict(mask=mask.to(DEVICE), support=support, return_entropy=True, backend=backend)
    got = linear_token_logprobs(hidden, weight, ids.to(DEVICE), chunk_bytes=4 * ROW, **kwargs)
    z = logits_of(hidden, weight, dtype=torch.float32)
    want = token_logprobs(z, ids.to(DEVICE), **kwargs)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0, atol=64 * 2.0**-23 * z.abs().max().item())


# --- gather_head -----------------------------------------------------------------------------------


def restricted_rows(seed, masked=True, **kwargs):
    """As `supported`, every row with an id; without the one that has all of them."""
    head, inputs, rows = supported(seed, **kwargs)
    if not masked:
        inputs["completion_ids"] = inputs["completion_ids"].clamp(min=0)
        inputs["completion_mask"] = torch.ones(B, T, dtype=torch.bool)
        rows = [[j for j in row if 0 <= j < V] for row in rows]
    ids = inputs["completion_ids"].flatten().tolist()
    return head, inputs, [row[:12] or [(y + 3) % V] for row, y in zip(rows, ids)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", (True, False), ids=("masked", "all"))
@pytest.mark.parametrize("name", CALLS)
def test_gathered_rows_of_the_head(name, masked, backend):
    head, inputs, rows = restricted_rows(5, masked, extra=1)
    want = expected(head, inputs, support=rows, **CALLS[name])
    support = make_support("Support", rows, (B, T, V), inputs["completion_mask"])
    for chunk in (None, 8 * ROW):
        got = ours(head, inputs, backend, support=support, gather_head=True, chunk_bytes=chunk, **CALLS[name])
        assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", (("weight",), ("hidden", "bias"), ()), ids=str)
def test_gathered_half_precision_and_frozen(frozen, backend):
    head, inputs, rows = restricted_rows(6, dtype=torch.bfloat16)
    support = make_support("Support", rows, (B, T, V), inputs["completion_mask"])
    want = expected(head, inputs, support=rows, frozen=frozen)
    leaves = leaves_of({name: x.to(DEVICE) for name, x in head.items()}, frozen)
    out = fused_linear_grpo_loss(**leaves, **on_device(inputs), support=support, gather_head=True, backend=backend)
    assert_close((out, [g.cpu() for g in gradients(out.loss, leaves)]), want, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gathered_log_probabilities_and_their_gradient(backend):
    head, inputs, rows = restricted_rows(7)
    ids, mask = inputs["completion_ids"].flatten().to(DEVICE), inputs["completion_mask"].flatten().to(DEVICE)
    found = []
    for gather in (True, False):
        leaves = leaves_of({"hidden": head["hidden"].flatten(0, 1).to(DEVICE), "weight": head["weight"].to(DEVICE)})
        support = Support.from_lists(rows).to(DEVICE)
        out = linear_token_logprobs(**leaves, completion_ids=ids, mask=mask, support=support, return_entropy=True,
                                    gather_head=gather, backend=backend)  # fmt: skip
        found.append((*out, *gradients((out.logps + out.entropy).sum(), leaves)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=0, atol=256 * 2.0**-23 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gathering_never_reads_the_rest_of_the_head(backend):
    """Rows of the head that no support names, the first and the last ones, may hold NaN."""
    head, inputs, rows = restricted_rows(8, masked=False)
    rows = [[j for j in row if 0 < j < V - 4] or [1] for row in rows]
    inputs["completion_ids"] = inputs["completion_ids"].clamp(1, V - 5)
    support = Support.from_lists(rows).to(DEVICE)
    _, want = ours(head, inputs, backend, support=support, gather_head=True)
    head["weight"][V - 4 :] = head["weight"][0] = torch.nan
    _, got = ours(head, inputs, backend, support=support, gather_head=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and not got[1][[0, -1]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gathering_an_id_outside_the_vocabulary(backend, monkeypatch):
    head, inputs, rows = restricted_rows(9, masked=False)
    support = Support.from_lists([[0, V], *rows[1:]]).to(DEVICE)
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "1")
    with pytest.raises(IndexError, match=f"id {V}, which is outside"):
        ours(head, inputs, backend, support=support, gather_head=True)
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    out, (hidden, *_) = ours(head, inputs, backend, support=support, gather_head=True)
    bad = torch.arange(B * T).view(B, T) == 0
    assert torch.equal(out.logps.isnan().cpu(), bad) and torch.equal(hidden.isnan().all(-1), bad)
    assert not hidden[~bad].isnan().any()


def test_gathering_says_what_it_needs():
    head, inputs, rows = restricted_rows(10, masked=False)
    mask = torch.ones(B, T, V, dtype=torch.bool).to(DEVICE)
    for support in (None, mask):
        with pytest.raises(ValueError, match="gather_head needs support as a Support"):
            ours(head, inputs, "torch", support=support, gather_head=True)
    with pytest.raises(ValueError, match="one has no id, and is over the whole vocabulary"):
        ours(head, inputs, "torch", support=Support.from_lists([[], *rows[1:]]).to(DEVICE), gather_head=True)
    with pytest.raises(ValueError, match="accumulate_in_fp32=False would round as often"):
        ours(head, inputs, "torch", support=Support.from_lists(rows).to(DEVICE), gather_head=True,
             accumulate_in_fp32=False)  # fmt: skip
    inputs["completion_mask"] = torch.zeros(B, T, dtype=torch.bool)
    out, grads = ours(head, inputs, "torch", support=Support.from_lists(rows).to(DEVICE), gather_head=True)
    assert out.loss == 0.0 and not any(g.any() for g in grads)


def test_errors():
    hidden, weight, ids = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="row per token, B·T = 6, got 5"):
        fused_linear_grpo_loss(hidden, weight, ids, torch.ones(2), support=Support.from_lists([[0]] * 5))
    with pytest.raises(IndexError, match="id 5, which is outside the vocabulary of 5"):
        linear_token_logprobs(hidden, weight, ids, support=Support.from_lists([[5]] * 6))
