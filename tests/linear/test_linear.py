"""fused_linear_grpo_loss and linear_token_logprobs against float64, and what they leave out."""

import itertools

import pytest
import torch

import reference
from cases import BACKENDS, DEVICE, assert_outputs, on_device
from grpo_kernels import fused_grpo_loss, fused_linear_grpo_loss, linear_token_logprobs
from grpo_kernels.objective.catalogue import LOSS_TYPES
from linear_cases import B, H, T, V, assert_close, batch, expected, gradients, leaves_of, logits_of, ours
from linear_tolerance import assert_gradients, linear_bounds, linear_logprob_bounds
from tolerance import assert_within

ROW = V * 4  # bytes of a row of fp32 logits
CHUNKS = {"one row": ROW, "two rows": 2 * ROW, "a sequence and a bit": 8 * ROW, "all": None}
CALLS = {
    "KL": {"beta": 0.1},
    "KL, biased": {"beta": 0.1, "use_bias_correction_kl": True, "loss_type": "gspo"},
    "bonus": {"entropy_coef": 0.05, "return_entropy": True},
    "bonus, sequence": {"entropy_coef": 0.05, "loss_type": "gspo"},
    "quantile": {"top_entropy_quantile": 0.5, "entropy_coef": 0.05},
    "none": {"reduction": "none"},
    "none, sequence": {"reduction": "none", "loss_type": "gspo"},
    "none, statistic": {"reduction": "none", "loss_type": "gmpo"},
    "none, suffix": {"reduction": "none", "loss_type": "fipo"},
    "temperature": {"temperature": 0.7, "logit_scale": 2.0},
    "softcap": {"softcap": 2.0, "logit_scale": 0.5, "temperature": 0.9},
    "softcap, sequence": {"softcap": 1.5, "loss_type": "gspo", "entropy_coef": 0.05},
    "softcap, none": {"softcap": 3.0, "reduction": "none"},
    "scale": {"num_items_in_batch": 50, "loss_scale": 0.25, "loss_type": "dapo"},
}


def call(name, inputs):
    """Keywords of a call, with the inputs that go with it."""
    kwargs = CALLS.get(name, {"loss_type": name})
    inputs = dict(inputs)
    if "beta" not in kwargs:
        del inputs["ref_logps"]
    return inputs, kwargs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*CALLS, *LOSS_TYPES])
def test_every_objective(name, backend):
    head, inputs = batch(seed=1)
    inputs, kwargs = call(name, inputs)
    upstream = torch.linspace(0.5, 1.5, B * T).view(B, T) if "none" in name else torch.tensor(0.5)
    for chunk in (None, 8 * ROW):
        got = ours(head, inputs, backend, upstream=upstream, chunk_bytes=chunk, **kwargs)
        assert_close(got, expected(head, inputs, upstream=upstream, **kwargs))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("loss_type", ("grpo", "gspo", "vespo", "fipo"))
def test_chunks_do_not_matter(loss_type, chunk):
    """A row at a time too, which is shorter than any sequence."""
    head, inputs = batch(seed=2)
    inputs, _ = call(loss_type, inputs)
    want = expected(head, inputs, loss_type=loss_type)
    assert_close(ours(head, inputs, "torch", chunk_bytes=CHUNKS[chunk], loss_type=loss_type), want)


@pytest.mark.parametrize("setting", ("environment", "default"))
def test_chunks_come_from_the_environment(setting, monkeypatch):
    heights = []
    from grpo_kernels.linear import head as module

    real = module.ChunkedHead.__init__

    def noted(self, hidden, weight, bias, tokens, T, height, *rest):
        heights.append(height)
        real(self, hidden, weight, bias, tokens, T, height, *rest)

    monkeypatch.setattr(module.ChunkedHead, "__init__", noted)
    if setting == "environment":
        monkeypatch.setenv("GRPO_KERNELS_CHUNK_BYTES", str(5 * ROW))
    head, inputs = batch()
    ours(head, call("grpo", inputs)[0], "torch")
    assert heights == [5 if setting == "environment" else 4096]
    if setting == "default":
        for V, H, dtype, itemsize, rows in DEFAULT_CHUNKS:
            assert module.chunk_rows(None, torch.empty(V, H, dtype=dtype, device="meta"), itemsize) == rows
        on_cpu = [module.chunk_rows(None, torch.empty(V, 8), 4) for V in (16000, 32000, 151936)]
        assert on_cpu == [512, 256, 256]


BF16 = torch.bfloat16
# (V, H, dtype, bytes of a logit, rows), all in whole 128s
DEFAULT_CHUNKS = (
    (151936, 896, BF16, 2, 1280),  # 400 MiB
    (151936, 1536, BF16, 2, 1536),  # as large as the weight
    (151936, 3584, BF16, 2, 3456),  # 1 GiB
    (128256, 4096, BF16, 2, 4096),
    (32000, 4096, BF16, 2, 4096),  # 250 MiB
    (262144, 640, BF16, 2, 1024),
    (151936, 896, BF16, 6, 1024),  # fp32 logits and their gradient
    (262144, 640, torch.float32, 4, 1024),
    (600000, 640, torch.float32, 4, 384),  # 1 GiB
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("loss_type", ("grpo", "gspo"))
def test_half_precision(loss_type, dtype, backend):
    """The gradients of weight and hidden states carry one rounding of the logits' gradient and one of their own."""
    head, inputs = batch(seed=3, dtype=dtype)
    inputs, kwargs = call(loss_type, inputs)
    got = ours(head, inputs, backend, chunk_bytes=8 * V * 2, **kwargs)
    assert_close(got, expected(head, inputs, **kwargs), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extra", (0, 1))
@pytest.mark.parametrize("loss_type", ("grpo", "gspo", "dapo"))
def test_without_mask_and_with_the_position_that_predicts_nothing(loss_type, extra, backend):
    head, inputs = batch(seed=4, extra=extra, bias=False)
    inputs, kwargs = call(loss_type, inputs)
    del inputs["completion_mask"]
    inputs["completion_ids"] = inputs["completion_ids"].clamp(min=0)
    if extra:
        head["hidden"][:, -1] = torch.nan  # never read
        want = expected({**head, "hidden": head["hidden"][:, :-1]}, inputs, **kwargs)
        out, (d_hidden, d_weight) = ours(head, inputs, backend, chunk_bytes=8 * ROW, **kwargs)
        assert (d_hidden[:, -1] == 0).all()
        assert_close((out, [d_hidden[:, :-1], d_weight]), want)
    else:
        assert_close(ours(head, inputs, backend, chunk_bytes=8 * ROW, **kwargs), expected(head, inputs, **kwargs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "gspo", "fipo", "topr"))
@pytest.mark.parametrize("per", ("sequence", "token"))
def test_rows_that_do_not_count_take_no_part(per, loss_type, backend):
    """Masked rows, and those of advantage 0: anything may stand there, and no product is made."""
    head, inputs = batch(seed=5)
    inputs, kwargs = call(loss_type, inputs)
    if per == "token":
        inputs["advantages"] = inputs["advantages"][:, None].expand(B, T).clone()
        if loss_type == "grpo":
            inputs["advantages"][0, 2] = 0.0
    inputs["advantages"][1] = 0.0
    A = inputs["advantages"] if per == "token" else inputs["advantages"][:, None].expand(B, T)
    unread = ~inputs["completion_mask"] | (A == 0.0)
    read = int((~unread).sum())
    want, grads = exact = expected(head, inputs, **kwargs)
    allowed, of_gradients = exact.allowed()
    head["hidden"][unread] = torch.nan
    for num_rows in (None, read):
        out, got = ours(head, inputs, backend, skip_zero_advantage=True, chunk_bytes=8 * ROW, num_rows=num_rows,
                        **kwargs)  # fmt: skip
        assert (got[0][unread] == 0).all()
        assert_gradients(got, grads, of_gradients)
        assert_within(out.loss, want.loss, allowed.loss, "loss")
        idle = unread & inputs["completion_mask"]
        assert out.logps.cpu()[idle].isnan().all() and (out.logps.cpu()[~inputs["completion_mask"]] == 0).all()
        assert out.sums["tokens"] == read


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "gspo", "gmpo", "fipo", "dapo"))
@pytest.mark.parametrize("per", ("sequence", "token"))
def test_packed(per, loss_type, backend):
    lengths = (4, 0, 6, 1, 3)
    head, inputs = batch(seed=6)
    inputs, kwargs = call(loss_type, inputs)
    inside = torch.arange(T) < torch.tensor(lengths)[:, None]
    inputs["completion_mask"] = inputs["completion_mask"] & inside
    if per == "token":
        inputs["advantages"] = inputs["advantages"][:, None].expand(B, T).clone()
    packed = {name: x[inside] if x.shape == (B, T) else x for name, x in inputs.items()}
    packed["cu_seqlens"] = torch.tensor((0, *lengths)).cumsum(0).int()
    packed_head = {**head, "hidden": head["hidden"][inside]}
    want, (d_hidden, *others) = exact = expected(head, inputs, **kwargs)
    allowed, (of_hidden, *of_others) = exact.allowed()
    for chunk in (None, 5 * ROW):
        out, got = ours(packed_head, packed, backend, chunk_bytes=chunk, **kwargs)
        assert_within(out.loss, want.loss, allowed.loss, "loss")
        assert_gradients(got, (d_hidden[inside], *others), (of_hidden[inside], *of_others))


@pytest.mark.parametrize("frozen", ["weight", "hidden", "bias", "hidden bias", "weight bias"])
@pytest.mark.parametrize("name", ("grpo", "gspo", "none"))
def test_frozen_parts(name, frozen):
    head, inputs = batch(seed=7)
    inputs, kwargs = call(name, inputs)
    frozen = frozen.split()
    assert_close(ours(head, inputs, "torch", frozen=frozen, **kwargs), expected(head, inputs, frozen=frozen, **kwargs))


def test_everything_frozen_needs_no_gradient():
    head, inputs = batch()
    with torch.no_grad():
        out = fused_linear_grpo_loss(**head, **inputs, backend="torch")
    assert not out.loss.requires_grad
    want = expected(head, inputs)
    assert_within(out.loss, want[0].loss, want.allowed()[0].loss, "loss")


@pytest.mark.parametrize("name", ("grpo", "gspo"))
def test_all_masked(name):
    head, inputs = batch()
    inputs, kwargs = call(name, inputs)
    inputs["completion_mask"] = torch.zeros(B, T, dtype=torch.bool)
    out, grads = ours(head, inputs, "torch", **kwargs)
    assert out.loss == 0.0 and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("correction", ("token_truncate", "sequence_mask", "seq_mask_tis"))
@pytest.mark.parametrize("late", (False, True))
def test_corrections_and_the_off_policy_mask(correction, late):
    head, inputs = batch(seed=8)
    inputs, _ = call("grpo", inputs)
    del inputs["importance_weights"]
    inputs["sampling_logps"] = inputs["old_logps"] + 0.2 * torch.randn(B, T, generator=torch.Generator().manual_seed(0))
    if late:
        del inputs["old_logps"]
    kwargs = {"sampling_correction": correction, "off_policy_mask_threshold": 0.05}
    assert_close(ours(head, inputs, "torch", chunk_bytes=8 * ROW, **kwargs), expected(head, inputs, **kwargs))


@pytest.mark.parametrize("per", ("sequence", "token"))
def test_temperature_tensors_and_rewards(per):
    head, inputs = batch(seed=9)
    inputs, _ = call("grpo", inputs)
    g = torch.Generator().manual_seed(1)
    inputs["temperature"] = 0.5 + torch.rand(B if per == "sequence" else (B, T), generator=g)
    del inputs["advantages"]
    inputs["rewards"] = torch.randn(B, generator=g)
    for loss_type in ("grpo", "gspo"):
        kwargs = {"num_generations": 5, "loss_type": loss_type}
        for chunk in (None, 8 * ROW):
            assert_close(ours(head, inputs, "torch", chunk_bytes=chunk, **kwargs), expected(head, inputs, **kwargs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("entropy", "softcap"), [(False, None), (True, None), (True, 1.5)])
def test_logprobs(entropy, softcap, backend):
    head, inputs = batch(seed=10)
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    g = torch.Generator().manual_seed(2)
    up = torch.randn(2, B, T, generator=g)
    leaves = leaves_of({name: x.to(DEVICE) for name, x in head.items()})
    out = linear_token_logprobs(**leaves, completion_ids=ids.to(DEVICE), mask=mask.to(DEVICE), temperature=0.8,
                                softcap=softcap, return_entropy=entropy, chunk_bytes=7 * ROW,
                                backend=backend)  # fmt: skip
    got = gradients((out.logps * up[0].to(DEVICE)).sum() + ((out.entropy * up[1].to(DEVICE)).sum() if entropy else 0),
                    leaves)  # fmt: skip
    wanted = leaves_of(head)
    want = reference.token_logprobs(logits_of(**wanted, softcap=softcap), ids, temperature=0.8, mask=mask)
    assert (out.entropy is None) == (not entropy)
    objective = lambda lp, H: (lp * up[0]).sum() + ((H * up[1]).sum() if entropy else 0)  # noqa: E731
    allowed, of_gradients = linear_logprob_bounds(head, ids, mask, 0.8, objective, softcap=softcap)
    assert_within(out.logps, want.logps, allowed.logps, "logps")
    assert_gradients(got, gradients(objective(*want), wanted), of_gradients)


def test_the_logits_path_says_the_same():
    head, inputs = batch(seed=11)
    out, grads = ours(head, inputs, "torch", beta=0.1, return_entropy=True, chunk_bytes=4 * ROW)
    leaves = leaves_of(on_device(head))
    z = leaves["hidden"] @ leaves["weight"].T + leaves["bias"]
    want = fused_grpo_loss(z, **on_device(inputs), beta=0.1, return_entropy=True, backend="torch")
    allowed, of_gradients = linear_bounds(head, inputs, beta=0.1)
    assert_gradients(grads, gradients(want.loss, leaves), of_gradients, factor=2)
    assert out.sums.keys() == want.sums.keys()
    assert_outputs(out, want, allowed, factor=2)


def test_a_backward_can_run_twice_and_not_differentiate_twice():
    head, inputs = batch()
    leaves = leaves_of(head)
    out = fused_linear_grpo_loss(**leaves, **inputs, backend="torch")
    wanted = list(leaves.values())
    first = torch.autograd.grad(out.loss, wanted, torch.tensor(2.0), retain_graph=True)
    again = torch.autograd.grad(out.loss, wanted, torch.tensor(1.0), retain_graph=True)
    for a, b in zip(first, again):
        assert torch.equal(a, 2 * b)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(out.loss, wanted, create_graph=True)


def test_two_runs_give_the_same_bits():
    head, inputs = batch(seed=12)
    inputs, _ = call("gspo", inputs)
    (a, grads), (b, again) = (ours(head, inputs, "torch", chunk_bytes=8 * ROW, loss_type="gspo") for _ in range(2))
    assert torch.equal(a.loss, b.loss) and all(map(torch.equal, grads, again))


def test_the_weight_gradient_adds_up_in_fp32():
    """Many chunks whose products in bf16 would each be rounded on being added; the option does just that."""
    g = torch.Generator().manual_seed(0)
    n = 256
    head = {"hidden": torch.randn(1, n, H, generator=g).bfloat16(),
            "weight": torch.randn(V, H, generator=g).bfloat16(), "bias": None}  # fmt: skip
    inputs = {"completion_ids": torch.randint(V, (1, n), generator=g), "advantages": torch.ones(1)}
    whole = ours(head, inputs, "torch")[1][1].float()
    errors = [
        (ours(head, inputs, "torch", chunk_bytes=V * 2, accumulate_in_fp32=exact)[1][1].float() - whole).norm()
        for exact in (True, False)
    ]
    assert errors[0] <= 2**-8 * whole.norm() and errors[1] > 4 * errors[0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ("grpo", "gspo", "none"))
def test_autocast_casts_nothing(name, dtype):
    head, inputs = batch(seed=15, dtype=dtype)
    inputs, kwargs = call(name, inputs)
    want = ours(head, inputs, "torch", chunk_bytes=8 * ROW, **kwargs)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = ours(head, inputs, "torch", chunk_bytes=8 * ROW, **kwargs)
    assert torch.equal(got[0].logps, want[0].logps) and all(map(torch.equal, got[1], want[1]))


def test_strided_hidden_states():
    head, inputs = batch(seed=13)
    inputs, _ = call("grpo", inputs)
    want = ours(head, inputs, "torch")
    wide = torch.randn(B, 2 * T, H)
    wide[:, ::2] = head["hidden"]
    got = ours({**head, "hidden": wide[:, ::2]}, inputs, "torch")
    assert_gradients(got[1], want[1], linear_bounds(head, inputs)[1], factor=2)


@pytest.mark.unshifted
@pytest.mark.parametrize("dynamic", (None, True))
@pytest.mark.parametrize(("loss_type", "reduction"), [*itertools.product(("grpo", "gspo"), ("mean", "none"))])
def test_compiled_is_eager(loss_type, reduction, dynamic):
    head, inputs = batch(seed=14)
    inputs, _ = call(loss_type, inputs)
    torch._dynamo.reset()

    def step(hidden, weight, bias):
        return fused_linear_grpo_loss(hidden, weight, bias=bias, **inputs, loss_type=loss_type, reduction=reduction,
                                      backend="torch").loss.sum()  # fmt: skip

    leaves = leaves_of(head)
    want = gradients(step(**leaves), leaves)
    got = gradients(torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")(**leaves), leaves)
    upstream = None if reduction == "mean" else torch.ones(B, T)
    allowed = linear_bounds(head, inputs, loss_type=loss_type, reduction=reduction, upstream=upstream)[1]
    assert_gradients(got, want, allowed, factor=2)
