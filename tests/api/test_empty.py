"""A batch without a token, as a data-parallel rank without samples has it: loss 0 with a graph, metrics as masked."""

import pytest
import torch
import triton

from cases import BACKENDS, DEVICE, make_case, on_device
from counting import interpreted
from grpo_kernels import (
    Targets,
    fused_grpo_loss,
    fused_linear_grpo_loss,
    group_advantages,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from grpo_kernels.objective.catalogue import TERMS
from grpo_kernels.objective.metrics import combine
from tolerance import U, steps

V, H = 37, 8
OF_REWARDS = {"rtol": (8 + steps(2)) * U, "atol": 0}  # 0 and 1: sums and differences of them are exact
PADDED = ("completion_ids", "completion_mask", "old_logps", "ref_logps", "importance_weights")
SHAPES = {"B = 0": (0, 3), "T = 0": (2, 0), "B = T = 0": (0, 0)}
CALLS = {
    "token": {},
    "bonus": {"entropy_coef": 0.1, "return_entropy": True, "beta": 0.1},
    "sequence": {"loss_type": "gspo", "beta": 0.1},
    **{name: {"policy_term": name} for name, term in TERMS.items() if term.of_sequence},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 5},
    "verl's": {"loss_agg_mode": "seq-mean-token-mean"},
    "quantile": {"top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    "off-policy": {"off_policy_mask_threshold": 0.1},
    "per token": {"reduction": "none", "loss_type": "gspo"},
    "skip": {"skip_zero_advantage": True},
    "in place": {"inplace": True},
    "heated": {"temperature": torch.tensor(0.7)},
}


def empty_case(B, T, packed=False):
    """(logits (B, T+1, V) or (0, V), hidden states as long, inputs), all of them without a token."""
    case = make_case(B=2, T=3, V=V)
    inputs = {name: value[:B, :T] for name, value in case.inputs(*PADDED).items()}
    inputs["advantages"] = case.advantages[:B]
    logits, hidden = torch.randn(B, T + 1, V), torch.randn(B, T + 1, H)
    if packed:
        inputs = {name: value.flatten() for name, value in inputs.items()}
        inputs["cu_seqlens"] = torch.zeros(B + 1, dtype=torch.int32)
        logits, hidden = torch.randn(0, V), torch.randn(0, H)
    return logits.to(DEVICE), hidden.to(DEVICE), on_device(inputs)


def with_rewards(inputs):
    B = inputs["advantages"].shape[0]
    given = {name: value for name, value in inputs.items() if name != "advantages"}
    return given | {"rewards": torch.linspace(0, 1, B, device=DEVICE), "num_generations": 2}


def assert_nothing(out, *gradients):
    """Loss 0 with a graph, and gradients of the leaves' shape."""
    assert out.loss.requires_grad and out.loss.dtype == torch.float32 and not out.loss.any()
    for gradient, leaf in gradients:
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype and not gradient.any()


def masked_metrics(B, given, kwargs):
    """Of a batch of B sequences that is masked altogether; of none 0, as means of nothing are."""
    case = make_case(B=2, T=3, V=V)
    case.completion_mask[:] = False
    inputs = on_device({**case.inputs(*PADDED), "advantages": case.advantages})
    if "rewards" in given:
        inputs = with_rewards(inputs)
    out = fused_grpo_loss(case.logits.to(DEVICE), **inputs, **{**kwargs, "inplace": False}, backend="torch")
    return out.metrics if B else {name: torch.zeros_like(value) for name, value in out.metrics.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CALLS)
def test_losses(name, shape, packed, backend):
    logits, hidden, inputs = empty_case(*SHAPES[shape], packed)
    if "reduction" in CALLS[name]:
        wanted = inputs["completion_ids"].shape
    else:
        wanted = ()
    for given in (inputs, with_rewards(inputs)):
        x = logits.clone().requires_grad_()
        out = fused_grpo_loss(x * 1, **given, **CALLS[name], backend=backend)
        (gradient,) = torch.autograd.grad(out.loss.sum(), x)
        assert_nothing(out, (gradient, x))
        wanted_metrics = masked_metrics(SHAPES[shape][0], given, CALLS[name])
        torch.testing.assert_close(out.metrics, wanted_metrics, **OF_REWARDS)
        assert out.loss.shape == wanted and out.logps.shape == inputs["completion_ids"].shape
        if "inplace" in CALLS[name]:
            continue
        leaves = hidden.clone().requires_grad_(), torch.randn(V, H, device=DEVICE, requires_grad=True)
        linear = fused_linear_grpo_loss(*leaves, **given, **CALLS[name], backend=backend)
        gradients = torch.autograd.grad(linear.loss.sum(), leaves)
        assert_nothing(linear, *zip(gradients, leaves))
        torch.testing.assert_close(linear.metrics, wanted_metrics, **OF_REWARDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities(shape, packed, backend):
    logits, hidden, inputs = empty_case(*SHAPES[shape], packed)
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    x, h = logits.clone().requires_grad_(), hidden.clone().requires_grad_()
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    keywords = {"mask": mask, "return_entropy": True, "backend": backend}
    for leaves, out in (
        ((x,), token_logprobs(x, ids, **keywords)),
        ((h, weight), linear_token_logprobs(h, weight, ids, **keywords)),
    ):
        assert out.logps.shape == out.entropy.shape == ids.shape
        gradients = torch.autograd.grad((out.logps + out.entropy).sum(), leaves)
        assert all(g.shape == leaf.shape and not g.any() for g, leaf in zip(gradients, leaves))
    lp, entropy = (torch.empty(ids.shape, device=DEVICE).requires_grad_() for _ in range(2))
    given = {name: value for name, value in inputs.items() if name != "completion_ids"}
    for kwargs in ({}, {"loss_type": "gspo"}, {"top_entropy_quantile": 0.5}, {"sampling_correction": "sequence_mask"}):
        more = dict(given)
        if "sampling_correction" in kwargs:
            more["sampling_logps"] = more.pop("importance_weights")
        out = policy_loss(lp, entropy=entropy, **more, **kwargs, entropy_coef=0.1, backend=backend)
        gradients = torch.autograd.grad(out.loss, (lp, entropy))
        assert_nothing(out, *zip(gradients, (lp, entropy)))


@pytest.mark.parametrize("scale", ("group", "batch", "none"))
def test_advantages(scale):
    assert group_advantages(torch.empty(0), 2, scale_rewards=scale).shape == (0,)
    assert group_advantages(torch.empty(0, dtype=torch.float64), 2, scale_rewards=scale).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_combine_with_those_of_others(backend):
    """An empty part changes no metric of the batch."""
    case = make_case(B=2, T=3, V=V)
    inputs = on_device(case.inputs("completion_ids", "completion_mask", "old_logps", "ref_logps", "advantages"))
    kwargs = {"beta": 0.1, "return_entropy": True, "backend": backend}
    whole = fused_grpo_loss(case.logits.to(DEVICE), **inputs, **kwargs)
    empty = fused_grpo_loss(case.logits[:0].to(DEVICE), **{name: x[:0] for name, x in inputs.items()}, **kwargs)
    metrics = combine([whole.sums, empty.sums])
    for name, value in whole.metrics.items():
        torch.testing.assert_close(metrics[name], value, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_no_launch_over_nothing(shape, monkeypatch):
    """CUDA refuses a grid of size 0, of which the interpreter would not tell."""
    plain, grids = triton.runtime.KernelInterface.__getitem__, []

    def checked(kernel, grid):
        grids.append(grid)
        return plain(kernel, grid)

    monkeypatch.setattr(triton.runtime.KernelInterface, "__getitem__", checked)
    for packed in (False, True):
        logits, hidden, inputs = empty_case(*SHAPES[shape], packed)
        for loss_type in ("grpo", "gspo"):
            x = logits.clone().requires_grad_()
            fused_grpo_loss(x, **inputs, loss_type=loss_type, backend="triton").loss.backward()
            fused_linear_grpo_loss(hidden, torch.randn(V, H, device=DEVICE), **inputs, backend="triton")
    assert grids and all(size > 0 for grid in grids for size in grid)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ("several", "lists"))
def test_several_targets_of_no_row(form, shape, backend):
    """With logits (B, T+1, V) of no sequence the mask alone says what T is."""
    B, T = SHAPES[shape]
    ids = Targets.from_lists([], DEVICE) if form == "lists" else torch.zeros(B, T, 4, dtype=torch.int64, device=DEVICE)
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    for extra in (0, 1):
        x, h = (torch.randn(B, T + extra, size, device=DEVICE, requires_grad=True) for size in (V, H))
        kwargs = {"mask": torch.ones(B, T, device=DEVICE), "return_entropy": True, "backend": backend}
        for out in (token_logprobs(x, ids, **kwargs), linear_token_logprobs(h, weight, ids, **kwargs)):
            assert out.logps.numel() == 0 and out.entropy.shape == (B, T)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", (False, True))
def test_several_targets_of_which_there_are_none(masked, backend):
    """K = 0 beside rows that are read, and rows that are not: the entropies are there all the same."""
    mask = torch.tensor([[1, 0, 1]], device=DEVICE) if masked else None
    leaves = [torch.randn(*size, device=DEVICE, requires_grad=True) for size in ((1, 3, H), (V, H))]
    found = []
    for ids in (torch.zeros(1, 3, 0, dtype=torch.int64), torch.full((1, 3, 2), -1)):
        out = linear_token_logprobs(*leaves, ids.to(DEVICE), mask=mask, return_entropy=True, backend=backend)
        assert out.logps.shape == ids.shape and not out.logps.any()
        found.append((out.entropy.detach(), *torch.autograd.grad(out.entropy.sum(), leaves)))
    assert all(map(torch.equal, *found))


def test_in_place_without_a_token():
    """A tensor without an entry may have strides of 0, and yet shares no memory; an expanded one does."""
    for T in (0, 3):
        leaf = torch.zeros(2, T, 1, device=DEVICE, requires_grad=True)
        logits = (leaf[:1] * 1).expand(2, T, 1)
        given = logits, torch.zeros(2, T, dtype=torch.int64, device=DEVICE), torch.ones(2, device=DEVICE)
        if T:
            with pytest.raises(ValueError, match="an expanded tensor"):
                fused_grpo_loss(*given, inplace=True)
            continue
        out = fused_grpo_loss(*given, inplace=True)
        assert_nothing(out, (torch.autograd.grad(out.loss, leaf)[0], leaf))
