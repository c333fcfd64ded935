"""Parts of a batch: the same keys whatever the values, and sums that are the whole batch's."""

import dataclasses

import pytest
import torch

from cases import BACKENDS, DEVICE, make_case, on_device
from grpo_kernels import LossConfig, fused_grpo_loss, fused_linear_grpo_loss, microbatch, policy_loss
from grpo_kernels.objective.aggregations import AGGREGATIONS
from grpo_kernels.objective.metrics import combine
from linear_tolerance import assert_gradients, linear_bounds
from tolerance import U, assert_within, bounds

NAMES = ("completion_ids", "completion_mask", "old_logps", "ref_logps", "advantages")


def counts(mask, config):
    """(tokens, sequences) as `microbatch` counts them."""
    sequences = mask.shape[0]
    if config.aggregation.startswith("seq-mean"):
        sequences = int(mask.any(1).sum())
    return int(mask.sum()), sequences


def loss_and_gradient(logits, inputs, config, backend, **kwargs):
    x = logits.to(DEVICE).requires_grad_()
    out = fused_grpo_loss(x, **on_device(inputs), config=config, backend=backend, **kwargs)
    return out, torch.autograd.grad(out.loss, x)[0]


def parts_of(case, config, backend, size=2, as_tensors=False):
    total_tokens, total_sequences = counts(case.completion_mask, config)
    for start in range(0, case.logits.shape[0], size):
        rows = slice(start, start + size)
        inputs = {name: value[rows] for name, value in case.inputs(*NAMES).items()}
        tokens, sequences = counts(inputs["completion_mask"], config)
        sizes = dict(tokens=tokens, total_tokens=total_tokens, sequences=sequences, total_sequences=total_sequences)
        if as_tensors:
            sizes = {name: torch.tensor(value, device=DEVICE) for name, value in sizes.items()}
        yield loss_and_gradient(case.logits[rows], inputs, config, backend, **microbatch(config, **sizes))


def assert_parts_are_the_whole(case, config, backend, **kwargs):
    whole, gradient = loss_and_gradient(case.logits, case.inputs(*NAMES), config, backend)
    parts = list(parts_of(case, config, backend, **kwargs))
    allowed = bounds(case.logits, **case.inputs(*NAMES), config=config)
    # A weight is a product of a few fp32 factors, and each part's loss is a number of its own.
    size = sum(part.loss.detach().abs() for part, _ in parts)
    assert_within(sum(p.loss.detach() for p, _ in parts), whole.loss, 2 * allowed.loss + len(parts) * U * size.item())
    assert_within(torch.cat([g for _, g in parts]), gradient, allowed.grad, "gradient", factor=2)
    metrics = combine([part.sums for part, _ in parts])
    assert metrics.keys() == whole.metrics.keys()
    for name in metrics:
        assert_within(metrics[name], whole.metrics[name], allowed.metrics[name], name, factor=2)


def masked_case(rows):
    case = make_case(B=len(rows), T=3, V=37, seed=4)
    case.completion_mask = torch.tensor([[int(x) for x in row] for row in rows], dtype=torch.bool)
    case.completion_ids.clamp_(min=0)
    return case


@pytest.mark.parametrize(("backend", "as_tensors"), [("torch", False), ("torch", True), ("triton", True)])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_parts_sum_to_the_batch(mode, backend, as_tensors):
    """With an entropy bonus, and a part that has no token."""
    case = masked_case(("111", "110", "000", "000", "010", "101"))
    config = LossConfig(loss_agg_mode=mode, entropy_coef=0.1, beta=0.1, max_completion_length=5)
    assert_parts_are_the_whole(case, config, backend, as_tensors=as_tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ("sequence-mean", "batch-tokens"))
def test_a_part_without_a_token_has_the_same_sums(mode, backend):
    case = masked_case(("111", "110", "000", "000"))
    config = LossConfig(loss_agg_mode=mode, entropy_coef=0.01)
    assert_parts_are_the_whole(case, config, backend)
    (first, _), (second, gradient) = parts_of(case, config, backend)
    assert list(first.sums) == list(second.sums) and "entropy" in second.sums
    assert second.loss.item() == 0.0 and not gradient.any()


@pytest.mark.parametrize("coef", (0, 0.0, torch.tensor(0.0)))
def test_a_coefficient_of_0_is_on(coef):
    case = make_case(T=3, V=37)
    on = fused_grpo_loss(case.logits, **case.inputs(*NAMES), entropy_coef=coef)
    off = fused_grpo_loss(case.logits, **case.inputs(*NAMES))
    assert "entropy" in on.metrics and "entropy" in on.sums
    assert "entropy" not in off.metrics and "entropy" not in off.sums
    assert on.loss == off.loss
    with pytest.raises(ValueError, match="needs entropy"):
        policy_loss(case.old_logps, case.advantages, entropy_coef=coef)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", ({}, {"loss_type": "gspo"}, {"top_entropy_quantile": 0.5}, {"reduction": "none"}))
def test_a_coefficient_may_be_a_tensor(kwargs, backend):
    case = make_case(T=3, V=37)
    inputs = case.inputs("completion_ids", "completion_mask", "old_logps", "advantages")
    found = []
    for coef in (0.3, torch.tensor(0.3, device=DEVICE), torch.tensor(0.3, dtype=torch.float64)):
        x = case.logits.to(DEVICE).requires_grad_()
        out = fused_grpo_loss(x, **on_device(inputs), **kwargs, entropy_coef=coef, backend=backend)
        found.append((out.loss.detach(), torch.autograd.grad(out.loss.sum(), x)[0], out.sums["loss"]))
    allowed = bounds(case.logits, **inputs, **kwargs, entropy_coef=0.3)
    for other in found[1:]:
        assert_within(other[0], found[0][0], allowed.loss, "loss", factor=2)
        assert_within(other[1], found[0][1], allowed.grad, "gradient", factor=2)
        assert_within(other[2], found[0][2], allowed.loss.sum(), "sum", factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", ({}, {"loss_type": "gspo"}, {"chunk_bytes": 3 * 37 * 4}))
def test_a_coefficient_may_be_a_tensor_with_a_head(kwargs, backend):
    case = make_case(V=37)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 5, 8, generator=g).to(DEVICE), torch.randn(37, 8, generator=g).to(DEVICE)
    inputs = on_device(case.inputs("completion_ids", "completion_mask", "old_logps", "advantages"))
    found = []
    for coef in (0.3, torch.tensor(0.3, device=DEVICE)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = fused_linear_grpo_loss(*leaves, **inputs, **kwargs, entropy_coef=coef, backend=backend)
        found.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaves)))
    head = {"hidden": hidden, "weight": weight}
    allowed, of_gradients = linear_bounds(head, inputs, **kwargs, entropy_coef=0.3)
    assert_within(found[1][0], found[0][0], allowed.loss, "loss", factor=2)
    assert_gradients(found[1][1:], found[0][1:], of_gradients, factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", ({}, {"loss_type": "gspo"}, {"loss_type": "gspo", "use_bias_correction_kl": True}))
def test_a_reference_is_watched_without_beta(kwargs, backend):
    """The metric is there and the loss is as without; whatever the reference says, NaN and infinite included."""
    case = make_case(T=3, V=37)
    inputs = case.inputs("completion_ids", "completion_mask", "old_logps", "advantages")
    plain, gradient = loss_and_gradient(case.logits, inputs, LossConfig(**kwargs), backend)
    watched, same = loss_and_gradient(
        case.logits, {**inputs, "ref_logps": case.ref_logps}, LossConfig(**kwargs), backend
    )
    strong, _ = loss_and_gradient(
        case.logits, {**inputs, "ref_logps": case.ref_logps}, LossConfig(**kwargs, beta=0.1), backend
    )
    assert "kl" not in plain.metrics and watched.sums.keys() == strong.sums.keys()
    allowed = bounds(case.logits, **inputs, ref_logps=case.ref_logps, **kwargs, beta=0.1).metrics["kl"]
    assert_within(watched.metrics["kl"], strong.metrics["kl"], allowed, "kl", factor=2)
    assert torch.equal(watched.loss, plain.loss) and torch.equal(same, gradient)
    for value in (torch.nan, torch.inf, 1e30):
        strange = torch.full_like(case.ref_logps, value)
        out, same = loss_and_gradient(case.logits, {**inputs, "ref_logps": strange}, LossConfig(**kwargs), backend)
        assert torch.equal(out.loss, plain.loss) and torch.equal(same, gradient)


def test_keywords():
    sizes = dict(tokens=30, total_tokens=100, sequences=2, total_sequences=8)
    config = LossConfig(loss_type="grpo", entropy_coef=0.1)
    assert microbatch(config, **sizes) == {"loss_scale": 0.25, "entropy_coef": pytest.approx(0.1 * 0.3 / 0.25)}
    assert microbatch(LossConfig(loss_type="dapo"), **sizes) == {"num_items_in_batch": 100}
    assert microbatch(LossConfig(loss_type="bnpo"), **sizes) == {"loss_scale": 0.3}
    assert microbatch(LossConfig(loss_agg_mode="token-sum"), **sizes) == {}
    assert microbatch(LossConfig(loss_agg_mode="seq-mean-token-mean"), **sizes) == {"global_batch_size": 8}
    nothing = dict.fromkeys(sizes, 0)
    for mode in AGGREGATIONS:
        found = microbatch(dataclasses.replace(config, loss_agg_mode=mode), **nothing)
        assert set(found.values()) == {0.0}
    with pytest.raises(ValueError, match="tokens=300 of a part are more than total_tokens=100"):
        microbatch(config, **{**sizes, "tokens": 300})
    with pytest.raises(ValueError, match="sequences must be 0 or more"):
        microbatch(config, **{**sizes, "sequences": -1})
    with pytest.raises(TypeError, match="total_tokens must be a number"):
        microbatch(config, **{**sizes, "total_tokens": None})
