"""torch.set_default_dtype changes no bit of what the functions return: their computation is in fp32."""

import contextlib

import pytest
import torch

from cases import BACKENDS, DEVICE, make_case, on_device
from distillation_cases import TEACHERS, make_pair
from grpo_kernels import (
    Support,
    Targets,
    TopK,
    distillation_loss,
    fused_grpo_loss,
    fused_linear_distillation_loss,
    fused_linear_grpo_loss,
    group_advantages,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from grpo_kernels.objective.catalogue import LOSS_TYPES

B, T, V, H = 4, 3, 19, 6
CALLS = {
    **{name: {"loss_type": name} for name in LOSS_TYPES},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": torch.tensor(5, device=DEVICE)},
    "kl": {"beta": 0.1, "use_bias_correction_kl": True, "temperature": 0.7},
    "counts": {"loss_type": "dapo", "num_items_in_batch": torch.tensor(7, device=DEVICE)},
    "verl's": {"loss_agg_mode": "seq-mean-token-mean"},
    "bonus": {"entropy_coef": 0.1, "top_entropy_quantile": 0.5, "return_entropy": True},
    "per token": {"reduction": "none", "temperature": 2},
    "corrected": {"sampling_correction": "token_truncate", "sampling_correction_max": 2.0},
    "off-policy": {"off_policy_mask_threshold": 0.1},
    "skip": {"skip_zero_advantage": True},
    "in place": {"inplace": True},
}


@contextlib.contextmanager
def default(dtype):
    saved = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(saved)


def assert_no_bit_changes(call, *leaves):
    """``call`` of copies of the leaves, which returns tensors, the first differentiable."""
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        copies = [x.detach().clone().requires_grad_() for x in leaves]
        with default(dtype):
            values = call(*(x * 1 for x in copies))
            grads = torch.autograd.grad(values[0].sum(), copies) if copies else ()
        found.append([x for x in (*values, *grads) if x is not None])
    for others in found[1:]:
        for x, y in zip(found[0], others, strict=True):
            assert x.dtype == y.dtype and torch.equal(x.nan_to_num(123.0), y.nan_to_num(123.0))


def parts_of(out):
    return out.loss, out.logps, out.entropy, *out.metrics.values(), *out.sums.values()


def inputs_of(name):
    case = make_case(B, T, V)
    names = ("completion_ids", "completion_mask", "advantages", "old_logps", "ref_logps")
    inputs = on_device(case.inputs(*names)) | {"completion_mask": case.completion_mask.long().to(DEVICE)}
    if name == "corrected":
        inputs["sampling_logps"] = inputs["old_logps"] + 0.1
    return case, inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_losses(name, backend):
    case, inputs = inputs_of(name)
    kwargs = {**CALLS[name], "backend": backend}
    assert_no_bit_changes(lambda x: parts_of(fused_grpo_loss(x, **inputs, **kwargs)), case.logits.to(DEVICE))
    if name != "in place":
        leaves = torch.randn(B, T, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
        assert_no_bit_changes(lambda h, w: parts_of(fused_linear_grpo_loss(h, w, **inputs, **kwargs)), *leaves)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("inplace", "temperature", "return_entropy")}
    inputs.pop("completion_ids")
    if name not in ("skip",):
        lp, entropy = (-torch.rand(B, T, device=DEVICE) for _ in range(2))
        assert_no_bit_changes(lambda x: parts_of(policy_loss(x, entropy=-entropy, **inputs, **kwargs)), lp)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ("group", "batch", "none", "rloo", "maxrl", "gdpo"))
def test_rewards(how, backend):
    case, inputs = inputs_of("")
    inputs = {**inputs, "advantages": None, "rewards": torch.rand(B, device=DEVICE), "num_generations": 2}
    kwargs = {"scale_rewards": how} if how in ("group", "batch", "none") else {"advantage_estimator": how}
    call = dict(**inputs, **kwargs, backend=backend)
    assert_no_bit_changes(lambda x: parts_of(fused_grpo_loss(x, **call)), case.logits.to(DEVICE))
    call["num_generations"] = [1, 3]
    assert_no_bit_changes(lambda x: parts_of(fused_grpo_loss(x, **call)), case.logits.to(DEVICE))
    assert_no_bit_changes(lambda: (group_advantages(inputs["rewards"], 2, **kwargs),))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ("one", "several", "lists", "support"))
@pytest.mark.parametrize("entropy", (False, True))
def test_log_probabilities(entropy, form, backend):
    case = make_case(B, T, V)
    ids, mask, more = case.completion_ids.to(DEVICE), case.completion_mask.int().to(DEVICE), {}
    if form == "several":
        ids = torch.randint(-1, V, (B, T, 4), device=DEVICE)
    elif form == "lists":
        ids = Targets.from_lists([[1, 2, 2], [], [5]] * B, DEVICE)
    elif form == "support":
        more["support"] = Support.from_lists([[1, 2, 3], [4], [5, 6]] * B, DEVICE)
    leaves = torch.randn(B, T, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    kwargs = dict(mask=mask, temperature=0.5, return_entropy=entropy, backend=backend, **more)
    assert_no_bit_changes(lambda x: token_logprobs(x, ids, **kwargs), case.logits.to(DEVICE))
    assert_no_bit_changes(lambda h, w: linear_token_logprobs(h, w, ids, **kwargs), *leaves)
    if entropy:  # differentiated alone
        assert_no_bit_changes(lambda x: token_logprobs(x, ids, **kwargs)[::-1], case.logits.to(DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("beta", (0.0, 0.3))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_distillation(reduction, beta, teacher, backend):
    pair = make_pair(teacher, B, T, V, K=3, beta=beta, reduction=reduction, backend=backend)
    kwargs = on_device(pair.kwargs)
    told = pair.teacher.to(DEVICE) if teacher == "whole" else TopK(*(x.to(DEVICE) for x in pair.teacher))
    assert_no_bit_changes(lambda x: parts_of(distillation_loss(x, told, **kwargs)), pair.logits.to(DEVICE))
    leaves = torch.randn(B, T, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    if teacher == "whole":
        told = torch.randn(B, T, 2, device=DEVICE), torch.randn(V, 2, device=DEVICE)
    else:
        told = (told,)
    assert_no_bit_changes(lambda h, w: parts_of(fused_linear_distillation_loss(h, w, *told, **kwargs)), *leaves)
