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


def test_errors():
    hidden, weight, ids = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="row per token, B·T = 6, got 5"):
        fused_linear_grpo_loss(hidden, weight, ids, torch.ones(2), support=Support.from_lists([[0]] * 5))
    with pytest.raises(IndexError, match="id 5, which is outside the vocabulary of 5"):
        linear_token_logprobs(hidden, weight, ids, support=Support.from_lists([[5]] * 6))
