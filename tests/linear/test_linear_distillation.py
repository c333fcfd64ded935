"""fused_linear_distillation_loss against float64, what it multiplies, and what it leaves out."""

import itertools

import pytest
import torch

import reference
from cases import BACKENDS, DEVICE, on_device
from counting import Device, bare_ops, interpreted, launches
from distillation_cases import BETAS, TAILS, TEACHERS, Pair, make_pair, wanted
from grpo_kernels import TopK, distillation_loss, fused_linear_distillation_loss
from grpo_kernels.linear import head as module
from linear_cases import leaves_of
from linear_tolerance import assert_gradients, capped, carried_on, product
from tolerance import assert_within

B, T, H, H_TEACHER, V = 4, 5, 9, 14, 37
ROW = 2 * V * 4  # bytes of a row of logits of both
SCALED = dict(logit_scale=0.5, softcap=2.0, teacher_logit_scale=1.5, teacher_softcap=3.0)


def batch(teacher="whole", *, dtype=torch.float32, extra=0, bias=True, seed=0, **kwargs):
    """(student's head, teacher's: hidden states and head, or a TopK; keywords)"""
    pair = make_pair(teacher, B=B, T=T, V=V, seed=seed, **kwargs)
    g = torch.Generator().manual_seed(seed + 100)
    heads = [
        {
            "hidden": torch.randn(B, T + extra, size, generator=g).to(dtype),
            "weight": (torch.randn(V, size, generator=g) / 3).to(dtype),
            "bias": torch.randn(V, generator=g).to(dtype) if bias else None,
        }
        for size in (H, H_TEACHER)
    ]
    told = pair.teacher if teacher != "whole" else heads[1]
    return heads[0], told, pair.kwargs


def keywords(told) -> dict:
    """The teacher, as the function takes it."""
    if isinstance(told, TopK):
        return {"teacher_hidden": TopK(*(x.to(DEVICE) for x in told))}
    return on_device({f"teacher_{name}": x for name, x in told.items()})


def ours(head, told, backend, kwargs, *, frozen=(), upstream=None, **changes):
    """(LossOutput, gradients on the CPU)"""
    leaves = leaves_of({name: None if x is None else x.to(DEVICE) for name, x in head.items()}, frozen)
    kwargs = on_device({**kwargs, **changes})
    out = fused_linear_distillation_loss(**leaves, **keywords(told), backend=backend, **kwargs)
    needed = [x for x in leaves.values() if x is not None and x.requires_grad]
    up = torch.ones_like(out.loss) if upstream is None else torch.as_tensor(upstream, dtype=torch.float32).to(DEVICE)
    return out, [g.cpu() for g in torch.autograd.grad(out.loss, needed, up.expand_as(out.loss))]


def logits(head, scale=1.0, softcap=None, dtype=None):
    """(logits in float64, as the dtype holds them, the head's or this; their slope; the errors of both)"""
    h, W, b = (None if x is None else x.double() for x in head.values())
    return capped(*product(h, W, b, dtype or head["hidden"].dtype), scale, softcap)


def check(head, told, backend, kwargs, *, frozen=(), upstream=None, **changes):
    """Ours within what rounding explains of float64."""
    out, grads = ours(head, told, backend, kwargs, frozen=frozen, upstream=upstream, **changes)
    kwargs = {k: v for k, v in {**kwargs, **changes}.items() if k not in ("chunk_bytes", "num_rows")}
    plain = dict(logit_scale=1.0, softcap=None, teacher_logit_scale=1.0, teacher_softcap=None)
    scaling = [kwargs.pop(name, default) for name, default in plain.items()]
    dtype = kwargs.pop("logits_dtype", None)
    z, slope, d_z, d_slope = logits(head, *scaling[:2], dtype)
    errors = {"x": d_z}
    if not isinstance(told, TopK):
        told, _, errors["told"], _ = logits(told, *scaling[2:], dtype)
    roundings = 1 if upstream is None else 2
    exact, allowed = wanted(Pair(z, told, None, kwargs), upstream=upstream, dtype=torch.float64, errors=errors)
    assert_within(out.loss, exact["loss"], allowed["loss"], "loss")
    assert_within(out.entropy, exact["entropy"], allowed["entropy"], "entropy")
    for name, value in out.metrics.items():
        assert_within(value, exact[f"mean {name}"], allowed[f"mean {name}"], name)
    h, W, b = (None if x is None else x.double() for x in head.values())
    of_gradients = carried_on(exact["grad"], allowed["grad"], slope, d_slope, h, W, b, head["hidden"].dtype, frozen,
                              roundings)  # fmt: skip
    leaves = leaves_of({name: x if x is None else x.double() for name, x in head.items()}, frozen)
    states = leaves["hidden"] @ leaves["weight"].T
    states = states if leaves["bias"] is None else states + leaves["bias"]
    exact_grads = torch.autograd.grad(
        states, [x for x in leaves.values() if x is not None and x.requires_grad], exact["grad"] * slope
    )
    assert_gradients(grads, exact_grads, of_gradients)
    return out, grads


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("chunk", (3 * ROW, None))
def test_every_divergence_of_every_teacher(chunk, beta, teacher, backend):
    head, told, kwargs = batch(teacher, temperature=1.3)
    check(head, told, backend, kwargs, beta=beta, chunk_bytes=chunk, loss_scale=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("beta", BETAS)
def test_scales_and_softcaps_of_both(beta, teacher, backend):
    head, told, kwargs = batch(teacher, temperature=0.8)
    check(head, told, backend, kwargs, beta=beta, chunk_bytes=5 * ROW, **SCALED)
    check(head, told, backend, kwargs, beta=beta, logit_scale=2.0, teacher_logit_scale=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_fp32_logits_of_half_precision(dtype, teacher, backend):
    head, told, kwargs = batch(teacher, dtype=dtype)
    for beta, changes in ((0.3, {}), (1.0, SCALED), (1.0, {"reduction": "none"})):
        up = torch.linspace(0.5, 1.5, B * T).view(B, T) if "reduction" in changes else 2.0
        check(head, told, backend, kwargs, beta=beta, chunk_bytes=3 * V * 10, upstream=up, logits_dtype=torch.float32,
              **changes)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision(dtype, teacher, backend):
    head, told, kwargs = batch(teacher, dtype=dtype)
    for beta in BETAS:
        check(head, told, backend, kwargs, beta=beta, chunk_bytes=3 * ROW, upstream=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("beta", BETAS)
def test_a_loss_per_token(beta, teacher, backend):
    head, told, kwargs = batch(teacher)
    up = torch.linspace(-1, 2, B * T).view(B, T)
    check(head, told, backend, kwargs, beta=beta, reduction="none", upstream=up, chunk_bytes=3 * ROW, **SCALED)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_position_more_no_bias_and_everything_unmasked(teacher, backend):
    head, told, kwargs = batch(teacher, extra=1, bias=False)
    for mask in (kwargs["completion_mask"], torch.ones(B, T)):
        _, grads = check(head, told, backend, {**kwargs, "completion_mask": mask}, beta=0.3, chunk_bytes=7 * ROW)
        assert (grads[0][:, -1] == 0).all() and (grads[0][:, :T][mask == 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("mode", ("global-tokens", "sequence-mean"))
def test_packed(mode, teacher, backend):
    head, told, kwargs = batch(teacher)
    mask = kwargs.pop("completion_mask")
    head["hidden"] = head["hidden"][mask]
    told = TopK(*(x[mask] for x in told)) if teacher != "whole" else {**told, "hidden": told["hidden"][mask]}
    kwargs["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    for beta in BETAS:
        check(head, told, backend, kwargs, beta=beta, loss_agg_mode=mode, chunk_bytes=4 * ROW)
    heat = torch.linspace(0.5, 1.5, B)
    check(head, told, "torch", {**kwargs, "temperature": 1.2}, loss_agg_mode=mode)
    out, _ = ours(head, told, backend, kwargs, temperature=heat)
    z = logits(head)[0].float().to(DEVICE)
    given = TopK(*(x.to(DEVICE) for x in told)) if teacher != "whole" else logits(told)[0].float().to(DEVICE)
    same = distillation_loss(z, given, **on_device({**kwargs, "temperature": heat}), backend=backend)
    torch.testing.assert_close(out.loss, same.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", (("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")))
def test_frozen_parts(frozen, backend):
    head, told, kwargs = batch()
    for reduction in ("mean", "none"):
        check(head, told, backend, kwargs, frozen=frozen, reduction=reduction, chunk_bytes=3 * ROW)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_masked_rows_take_no_part(teacher, backend):
    """NaN in the hidden states of both, anything in what is told."""
    head, told, kwargs = batch(teacher)
    mask = kwargs["completion_mask"]
    for reduction in ("mean", "none"):
        want, want_grads = ours(head, told, backend, kwargs, reduction=reduction)
        poisoned = {**head, "hidden": head["hidden"].masked_fill(~mask[..., None], torch.nan)}
        if teacher == "whole":
            other = {**told, "hidden": told["hidden"].masked_fill(~mask[..., None], torch.nan)}
        else:
            other = TopK(told.token_ids.masked_fill(~mask[..., None], 10**6), told.logps)
        for num_rows in (None, int(mask.sum())):
            out, grads = ours(poisoned, other, backend, kwargs, reduction=reduction, num_rows=num_rows)
            assert torch.equal(out.loss, want.loss) and all(map(torch.equal, grads, want_grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_nothing_counts(teacher, backend):
    head, told, kwargs = batch(teacher)
    for reduction in ("mean", "none"):
        out, grads = ours(head, told, backend, kwargs, completion_mask=torch.zeros(B, T), reduction=reduction)
        assert (out.loss == 0).all() and all((g == 0).all() for g in grads)


def test_four_products_and_none_twice(monkeypatch):
    """Rows that go through each product: those that count, once; again in the backward only where it has to wait."""
    seen = []
    project, add = module.ChunkedHead.logits, module.ChunkedHead.add

    def noted_project(self, h):
        seen.append(("logits", self.weight.shape[1], h.shape[0]))
        return project(self, h)

    def noted_add(self, into, start, end, h, dz, first):
        seen.append(("gradient", self.weight.shape[1], h.shape[0]))
        return add(self, into, start, end, h, dz, first)

    monkeypatch.setattr(module.ChunkedHead, "logits", noted_project)
    monkeypatch.setattr(module.ChunkedHead, "add", noted_add)
    for (reduction, times), teacher in itertools.product((("mean", 1), ("none", 2)), ("whole", "rest")):
        head, told, kwargs = batch(teacher)
        n = int(kwargs["completion_mask"].sum())
        seen.clear()
        ours(head, told, "torch", kwargs, reduction=reduction, chunk_bytes=3 * ROW)
        rows = {key: sum(rows for *what, rows in seen if tuple(what) == key) for key in
                (("logits", H), ("logits", H_TEACHER), ("gradient", H), ("gradient", H_TEACHER))}  # fmt: skip
        assert list(rows.values()) == [times * n, times * n * (teacher == "whole"), n, 0]
        assert max(rows for *_, rows in seen) == (3 if teacher == "whole" else 6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_without_a_gradient_and_a_module_as_head(teacher, backend):
    head, told, kwargs = batch(teacher)
    want, _ = ours(head, told, backend, kwargs)
    linear = torch.nn.Linear(H, V).to(DEVICE)
    linear.load_state_dict({"weight": head["weight"], "bias": head["bias"]})
    with torch.no_grad():
        out = fused_linear_distillation_loss(head["hidden"].to(DEVICE), linear, **keywords(told), **on_device(kwargs),
                                             backend=backend)  # fmt: skip
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-6, atol=1e-7)
    assert not out.loss.requires_grad and out.logps is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gradients_add_up_in_fp32(dtype, backend):
    """A row at a time; in the weight's own dtype the same, rounded more often."""
    head, told, kwargs = batch(dtype=dtype)
    check(head, told, backend, kwargs, chunk_bytes=ROW)
    if dtype == torch.float32:
        one, own = (ours(head, told, backend, kwargs, chunk_bytes=ROW, accumulate_in_fp32=x)[1] for x in (True, False))
        assert all(map(torch.equal, one, own))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", (0.0, 0.3, 0.5, 1.0))
@pytest.mark.parametrize("softcap", (None, 2.5))
def test_parity_with_trl(softcap, beta, backend):
    """Hidden states of different sizes, biases, scales and softcaps of both, a temperature."""
    chunked = pytest.importorskip("trl.kernels.chunked_divergence", reason="parity with TRL needs trl 1.16")
    head, told, kwargs = batch(temperature=1.3, completion_mask=None, reduction="none")
    scaling = dict(logit_scale=0.8, softcap=softcap, teacher_logit_scale=1.4, teacher_softcap=softcap)
    up = torch.linspace(0.5, 1.5, B * T)
    out, grads = check(head, told, backend, kwargs, beta=beta, upstream=up.view(B, T), **scaling)
    leaves = leaves_of({**head, "hidden": head["hidden"].flatten(0, 1)})
    theirs, entropy = chunked.ChunkedDivergenceFunction.apply(
        *leaves.values(),
        told["hidden"].flatten(0, 1),
        told["weight"],
        told["bias"],
        beta,
        1.3,
        0.8,
        softcap,
        1.4,
        softcap,
    )
    their_grads = torch.autograd.grad((theirs * up).sum(), list(leaves.values()))
    close = dict(rtol=2e-5, atol=2e-5)  # both lie within their bounds of float64, ours by the check above
    torch.testing.assert_close(out.loss.cpu().view(-1), theirs, **close)
    torch.testing.assert_close(out.entropy.cpu().view(-1), entropy, **close)
    for a, b in zip(grads, their_grads):
        torch.testing.assert_close(a.view_as(b), b, **close)


@pytest.mark.unshifted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", ("whole", "rest"))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_compiled_is_eager(reduction, teacher, backend):
    head, told, kwargs = batch(teacher)
    num_rows = int(kwargs["completion_mask"].sum())
    kwargs = {**on_device(kwargs), "reduction": reduction, "backend": backend, "num_rows": num_rows}
    torch._dynamo.reset()

    def train(head, told):
        return fused_linear_distillation_loss(**head, **told, **kwargs)

    results = []
    for run in (train, torch.compile(train, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of({name: x.to(DEVICE) for name, x in head.items()})
        out = run(leaves, keywords(told))
        results.append((out, torch.autograd.grad(out.loss.sum(), list(leaves.values()))))
    (want, want_grads), (out, grads) = results
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(grads, want_grads)
    torch._dynamo.reset()


HEAD, TOLD, KWARGS = batch()
FEW = batch("rest")[1]
BAD = {
    "vocabularies": (dict(teacher_weight=TOLD["weight"][:30], teacher_bias=None), ValueError, "of 30, but"),
    "head no tensor": (dict(teacher_weight=[1.0], teacher_bias=None), TypeError, "teacher_weight must be a torch.Tens"),
    "head a list": (dict(teacher_weight=torch.nn.ReLU(), teacher_bias=None), TypeError, "teacher_weight, .* got ReLU"),
    "bias no tensor": (dict(teacher_bias=0.0), TypeError, "teacher_bias must be a torch.Tensor, got float"),
    "no head": (dict(teacher_weight=None, teacher_bias=None), ValueError, "teacher_hidden needs teacher_weight"),
    "TopK and a head": (dict(teacher_hidden=FEW), ValueError, "a TopK needs no head"),
    "teacher a list": (dict(teacher_hidden=[1]), TypeError, "teacher_hidden must be a torch.Tensor or a TopK"),
    "teacher weight": (dict(teacher_weight=TOLD["weight"][:, :5]), ValueError, "with H = 14 from teacher_hidden"),
    "weight": (dict(weight=HEAD["weight"][0]), ValueError, r"weight must be \(V, H\) with H = 9"),
    "bias": (dict(teacher_bias=TOLD["bias"][:4]), ValueError, r"teacher_bias must be \(V,\) = \(37,\)"),
    "dtypes": (dict(teacher_weight=TOLD["weight"].bfloat16()), TypeError, "teacher_weight is torch.bfloat16"),
    "float64": (dict(hidden=HEAD["hidden"].double()), TypeError, "hidden must be float32"),
    "hidden grad": (dict(teacher_hidden=TOLD["hidden"].clone().requires_grad_()), ValueError, "hidden requires grad"),
    "weight grad": (dict(teacher_weight=TOLD["weight"].clone().requires_grad_()), ValueError, r"freeze the teacher"),
    "rows": (dict(teacher_hidden=TOLD["hidden"][:2]), ValueError, "each of the 4×5 tokens"),
    "softcap": (dict(teacher_softcap=0.0), ValueError, "teacher_softcap must be a finite number above 0"),
    "num_rows": (dict(num_rows=1), ValueError, "num_rows=1, but"),
    "logits": (dict(logits_dtype=torch.bfloat16), TypeError, "float32 as hidden is, got torch.bfloat16. Leave it out"),
    "chunk": (dict(chunk_bytes=0), ValueError, "chunk_bytes must be above 0"),
    "inplace": (dict(inplace=True), TypeError, "inplace"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises(name):
    changes, error, message = BAD[name]
    teacher = {f"teacher_{key}": x for key, x in TOLD.items()}
    with pytest.raises(error, match=message):
        fused_linear_distillation_loss(**{**HEAD, **teacher, **KWARGS, "backend": "torch", **changes})


def test_a_topk_of_the_teacher_is_the_whole_where_it_tells_everything():
    head, told, kwargs = batch(temperature=1.1)
    z = torch.log_softmax(logits(told)[0].float() / 1.1, -1)
    every = TopK(torch.arange(V).expand(B, T, V), z)
    want, want_grads = ours(head, told, "torch", kwargs, beta=0.3)
    for tail in (TAILS["few"], TAILS["raw"]):
        out, grads = ours(head, every, "torch", kwargs, beta=0.3, tail=tail)
        torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads, want_grads, rtol=1e-4, atol=1e-6)
    assert reference.TopK is not TopK


@interpreted
@pytest.mark.unshifted
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("masked", ("no mask", "counted", "told"))
def test_the_host_waits_once_at_most(masked, reduction, teacher):
    """To count the rows, where there is a mask and the caller does not say."""

    def on_meta(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device="meta")

    hidden, weight = on_meta(B, T, H).requires_grad_(), on_meta(V, H).requires_grad_()
    if teacher == "whole":
        told = {"teacher_hidden": on_meta(B, T, H_TEACHER), "teacher_weight": on_meta(V, H_TEACHER)}
    else:
        told = {"teacher_hidden": TopK(on_meta(B, T, 6, dtype=torch.int64), on_meta(B, T, 6)), "tail": TAILS[teacher]}
    kwargs = {} if masked == "no mask" else {"completion_mask": on_meta(B, T)}
    if masked == "told":
        kwargs["num_rows"] = 7
    with bare_ops(), launches(run=False) as seen, Device(answers=[None] * 9) as device:
        out = fused_linear_distillation_loss(
            hidden, weight, **told, **kwargs, reduction=reduction, chunk_bytes=3 * ROW, backend="triton"
        )
        torch.autograd.grad(out.loss, (hidden, weight), torch.empty_like(out.loss))
    assert device.waits == (masked == "counted")
    assert {launch.name for launch in seen} >= {"sequence_sums_kernel", "batch_sums_kernel"}
