"""logits_dtype=torch.float32: fp32 logits of hidden states and a head in half precision, against float64."""

import pytest
import torch

import reference
from cases import BACKENDS, DEVICE, on_device
from counting import Device, bare_ops, interpreted, launches
from grpo_kernels import fused_linear_distillation_loss, fused_linear_grpo_loss, linear_token_logprobs
from grpo_kernels.linear import gathered, head
from linear_cases import B, H, T, V, assert_close, batch, expected, gradients, leaves_of, logits_of, ours
from linear_tolerance import assert_gradients, linear_bounds, linear_logprob_bounds
from support_cases import make_support
from tolerance import EPS, assert_within

FP32, HALF = {"logits_dtype": torch.float32}, (torch.bfloat16, torch.float16)
LOGIT = 4 + 2  # bytes: in fp32, and of its gradient
CALLS = {
    "grpo": {},
    "KL, bonus": {"beta": 0.1, "entropy_coef": 0.05, "return_entropy": True},
    "gspo": {"loss_type": "gspo", "entropy_coef": 0.05},
    "quantile": {"top_entropy_quantile": 0.5, "entropy_coef": 0.05},
    "none": {"reduction": "none"},
    "temperature": {"temperature": 0.7, "logit_scale": 2.0},
    "softcap": {"softcap": 2.0, "logit_scale": 0.5, "temperature": 0.9},
    "softcap, gspo": {"softcap": 1.5, "loss_type": "gspo"},
}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_half = pytest.mark.parametrize("dtype", HALF, ids=str)


def problem(name="grpo", dtype=torch.bfloat16, seed=20, **kwargs):
    """(head, inputs, keywords of the call)"""
    head, inputs = batch(seed=seed, dtype=dtype, **kwargs)
    kwargs = CALLS[name]
    if "beta" not in kwargs:
        del inputs["ref_logps"]
    return head, inputs, kwargs


@each_backend
@each_half
@pytest.mark.parametrize("name", CALLS)
def test_every_way_through_the_code(name, dtype, backend):
    head, inputs, kwargs = problem(name, dtype, bias=name != "none")
    upstream = torch.linspace(0.5, 1.5, B * T).view(B, T) if name == "none" else None
    want = expected(head, inputs, upstream=upstream, **FP32, **kwargs)
    for rows in (None, 4, 8):
        chunk = rows and rows * V * LOGIT
        got = ours(head, inputs, backend, upstream=upstream, chunk_bytes=chunk, **FP32, **kwargs)
        assert_close(got, want, dtype)


@each_backend
@each_half
def test_log_probabilities_are_off_by_fp32_rounding(dtype, backend):
    """Rounded logits are off by as much as rounding alone makes of them in float64.

    That is by so many roundings of fp32 as one of the dtype has; fp32 is allowed less than a thousand.
    """
    head, inputs, _ = problem(dtype=dtype, seed=21)
    head["weight"] *= 4
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    plain, rounded = (
        reference.token_logprobs(logits_of(**head, logits_dtype=x).detach(), ids.clamp(min=0), mask=mask).logps
        for x in (torch.float32, None)
    )
    allowed, _ = linear_logprob_bounds(head, ids.clamp(min=0), mask, 1.0, lambda lp, H: lp.sum(), **FP32)
    found = [
        linear_token_logprobs(**on_device(head), completion_ids=ids.to(DEVICE), mask=mask.to(DEVICE), backend=backend,
                              **kwargs).logps.cpu()
        for kwargs in (FP32, {})
    ]  # fmt: skip
    assert_within(found[0], plain, allowed.logps, "fp32 logits")
    off = (rounded - plain).abs().max()
    assert off > EPS[dtype] / EPS[torch.float32] / 1000 * allowed.logps.max()
    assert (found[1] - plain).abs().max() > 0.9 * off


@each_backend
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_the_own_dtype_is_the_default(dtype, backend):
    head, inputs, kwargs = problem("KL, bonus", dtype)
    a, b = (ours(head, inputs, backend, chunk_bytes=999, **x, **kwargs) for x in ({}, {"logits_dtype": dtype}))
    assert torch.equal(a[0].loss, b[0].loss) and all(map(torch.equal, a[1], b[1]))


def test_logits_that_fp16_cannot_hold():
    head, inputs, _ = problem(dtype=torch.float16, bias=False)
    head["hidden"] = 200 * head["hidden"].sign()
    head["weight"] = 200 * head["weight"].sign()
    assert not ours(head, inputs, "torch")[0].loss.isfinite()
    out, grads = ours(head, inputs, "torch", **FP32)
    assert out.loss.isfinite() and all(g.isfinite().all() for g in grads)


@each_backend
@each_half
@pytest.mark.parametrize("form", ("Support", "mask", "gathered"))
@pytest.mark.parametrize("name", ("grpo", "none", "softcap, gspo"))
def test_supports(name, form, dtype, backend):
    head, inputs, kwargs = problem(name, dtype, seed=22)
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [[*order[n % V : n % V + 6], max(y, 0)] for n, y in enumerate(ids.flatten().tolist())]
    support = make_support("Support" if form == "gathered" else form, rows, (B, T, V), mask)
    upstream = torch.linspace(0.5, 1.5, B * T).view(B, T) if name == "none" else None
    want = expected(head, inputs, upstream=upstream, support=rows, **FP32, **kwargs)
    leaves = leaves_of({key: x.to(DEVICE) for key, x in head.items()})
    out = fused_linear_grpo_loss(**leaves, **on_device(inputs), support=support, gather_head=form == "gathered",
                                 backend=backend, chunk_bytes=4 * V * LOGIT, **FP32, **kwargs)  # fmt: skip
    assert_close((out, [g.cpu() for g in gradients(out.loss, leaves, upstream)]), want, dtype)


@each_backend
@each_half
def test_log_probabilities_and_entropies_with_their_gradients(dtype, backend):
    head, inputs, _ = problem(dtype=dtype, seed=23)
    head["weight"] *= 8  # what rounding the logits again would make of a gradient is more than rounding the gradient
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    up = torch.randn(2, B, T, generator=torch.Generator().manual_seed(2))
    objective = lambda lp, H: (lp * up[0]).sum() + (H * up[1]).sum()  # noqa: E731
    leaves = leaves_of({name: x.to(DEVICE) for name, x in head.items()})
    out = linear_token_logprobs(**leaves, completion_ids=ids.to(DEVICE), mask=mask.to(DEVICE), return_entropy=True,
                                chunk_bytes=7 * V * LOGIT, backend=backend, **FP32)  # fmt: skip
    got = gradients((out.logps * up[0].to(DEVICE)).sum() + (out.entropy * up[1].to(DEVICE)).sum(), leaves)
    wanted = leaves_of(head)
    want = reference.token_logprobs(logits_of(**wanted, **FP32), ids.clamp(min=0), mask=mask)
    allowed, of_gradients = linear_logprob_bounds(head, ids.clamp(min=0), mask, 1.0, objective, **FP32)
    assert_within(out.logps, want.logps, allowed.logps, "logps")
    assert_within(out.entropy, want.entropy, allowed.entropy, "entropy")
    assert_gradients([g.cpu() for g in got], gradients(objective(*want), wanted), of_gradients)


@pytest.mark.parametrize("name", ("grpo", "gspo", "none"))
def test_autocast_casts_nothing(name):
    head, inputs, kwargs = problem(name)
    want = ours(head, inputs, "torch", chunk_bytes=8 * V * LOGIT, **FP32, **kwargs)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = ours(head, inputs, "torch", chunk_bytes=8 * V * LOGIT, **FP32, **kwargs)
    assert torch.equal(got[0].logps, want[0].logps) and all(map(torch.equal, got[1], want[1]))


@pytest.mark.unshifted
@pytest.mark.parametrize("name", ("grpo", "gspo", "none"))
def test_compiled_is_eager(name):
    head, inputs, kwargs = problem(name, seed=24)
    torch._dynamo.reset()

    def step(hidden, weight, bias):
        return fused_linear_grpo_loss(hidden, weight, bias=bias, **inputs, backend="torch", **FP32,
                                      **kwargs).loss.sum()  # fmt: skip

    leaves = leaves_of(head)
    want = gradients(step(**leaves), leaves)
    got = gradients(torch.compile(step, fullgraph=True, backend="aot_eager")(**leaves), leaves)
    upstream = torch.ones(B, T) if name == "none" else None
    allowed = linear_bounds(head, inputs, upstream=upstream, **FP32, **kwargs)[1]
    assert_gradients(got, want, allowed, factor=2)


# --- how many bytes, and by which product ----------------------------------------------------------


def heights(monkeypatch):
    """Of each head that is made the rows, and the bytes of a row, of what a chunk holds."""
    seen, real = [], head.ChunkedHead.gradient_of

    def noted(self, z):
        dz = real(self, z)
        held = {x.data_ptr(): x.shape[1] * x.element_size() for x in (self.buffer, dz)}
        seen.append((self.buffer.shape[0], sum(held.values())))
        return dz

    monkeypatch.setattr(head.ChunkedHead, "gradient_of", noted)
    return seen


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_a_chunk_is_counted_as_what_it_holds(dtype, monkeypatch):
    seen = heights(monkeypatch)
    states, inputs, _ = problem(dtype=dtype)
    size = 4 if dtype == torch.float32 else LOGIT
    for budget in (5 * V * size, 6 * V * size - 1):
        ours(states, inputs, "torch", chunk_bytes=budget, **FP32)
    assert set(seen) == {(5, V * size)}


def test_a_chunk_of_distillation_counts_both_models(monkeypatch):
    seen = heights(monkeypatch)
    states, _, _ = problem()
    leaves = leaves_of(states)
    told = {f"teacher_{name}": x for name, x in states.items()}
    fused_linear_distillation_loss(**leaves, **told, chunk_bytes=5 * V * (LOGIT + 4), backend="torch", **FP32)
    assert set(seen) == {(5, V * LOGIT)}


def test_a_head_that_is_gathered_counts_its_rows(monkeypatch):
    made, real = [], gathered.GatheredHead.__init__

    def noted(self, *args):
        real(self, *args)
        made.append((args[-2], self.buffer.dtype))

    monkeypatch.setattr(gathered.GatheredHead, "__init__", noted)
    states, inputs, _ = problem()
    rows = [[max(y, 0)] for y in inputs["completion_ids"].flatten().tolist()]
    support = make_support("Support", rows, (B, T, V), inputs["completion_mask"])
    fused_linear_grpo_loss(**on_device(states), **on_device(inputs), support=support, gather_head=True,
                           chunk_bytes=5 * V * 2, backend="torch", **FP32)  # fmt: skip
    assert made == [(5, torch.float32)]


@interpreted
@pytest.mark.unshifted
def test_a_device_makes_fp32_of_half_precision_in_one_product():
    """No operand is copied in fp32, and nothing but the kernel rounds the gradient."""
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    hidden, weight = (torch.empty(*shape, **meta).requires_grad_() for shape in ((B, T, H), (V, H)))
    ids, advantages = torch.empty(B, T, dtype=torch.long, device="meta"), torch.empty(B, device="meta")
    with bare_ops(), launches(run=False) as seen, Device() as device:
        loss = fused_linear_grpo_loss(hidden, weight, ids, advantages, backend="triton", **FP32).loss
        torch.autograd.grad(loss, (hidden, weight))
    large = [name for name, elements in device.ops if elements >= B * T * V]
    assert large == ["aten.mm.dtype_out", "aten.mm.out", "aten.mm.dtype_out"]  # z, dh, dW
    rows = [[x.dtype for x in launch.tensors if x.numel() == B * T * V] for launch in seen]
    assert [torch.float32, torch.bfloat16] in rows
    a, b, out = (torch.empty(3, *shape, **meta) for shape in ((2, 7), (7, 5), (2, 5)))
    with Device() as device:
        head.multiply(a, b, out.float())
    assert device.ops[-1][0] == "aten.bmm.dtype_out"
