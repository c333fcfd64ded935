"""`fused_grpo_loss` against the float64 reference, over shapes, dtypes, strides, knobs and backends."""

import itertools

import pytest
import torch

from cases import BACKENDS, DEVICE, assert_outputs, check, expected, make_case, on_device, ours
from grpo_kernels import LossConfig, fused_grpo_loss
from tolerance import assert_within, bounds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
FULL = ("completion_ids", "completion_mask", "old_logps", "ref_logps")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(loss_type, dtype, backend):
    case = make_case(dtype=dtype, extra=1)
    check(case.logits, backend, **case.inputs(*FULL, "advantages"), loss_type=loss_type, beta=0.1, return_entropy=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_kl_estimators(estimator, reduction, backend):
    case = make_case(seed=1)
    upstream = torch.linspace(-1, 1, 20).view(4, 5) if reduction == "none" else 1.0
    check(
        case.logits, backend, **case.inputs(*FULL), advantages=case.token_advantages, beta=0.3,
        kl_estimator=estimator, reduction=reduction, upstream=upstream,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "clip",
    [
        {"epsilon": 0.2},
        {"epsilon": 0.1, "epsilon_high": 0.3},
        {"epsilon": 0.2, "delta": 1.5},
        {"epsilon": 0.2, "epsilon_high": 0.4, "delta": 1.1},  # δ below the upper bound
        {"epsilon": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_clipping(clip, reduction, backend):
    case = make_case(B=4, T=16, seed=2)
    check(case.logits, backend, **case.inputs(*FULL), advantages=case.token_advantages, reduction=reduction, **clip)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 1, 17), (2, 3, 64), (3, 2, 513), (2, 2, 5000), (2, 1, 40000)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_shapes(shape, dtype, backend):
    B, T, V = shape
    case = make_case(B, T, V, dtype=dtype, seed=3, spread=3.0)
    case.completion_mask[:] = True
    case.completion_ids.clamp_(min=0)
    check(case.logits, backend, **case.inputs("completion_ids", "advantages"), temperature=0.7, return_entropy=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["(B,)", "(B, 1)", "(B, T)"])
def test_importance_weights(shape, dtype, backend):
    case = make_case(dtype=dtype, seed=4)
    full = case.importance_weights
    w = {"(B,)": full[:, 0], "(B, 1)": full[:, :1], "(B, T)": full}[shape]
    check(case.logits, backend, **case.inputs(*FULL, "advantages"), importance_weights=w, beta=0.2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ("group", "batch", "none"))
@pytest.mark.parametrize("unbiased", (True, False))
@pytest.mark.parametrize("G", (2, 4, 8))
def test_rewards(scale, unbiased, G, backend):
    case = make_case(B=8, seed=5)
    case.rewards[1] = float("nan")
    case.rewards[4:6] = 0.7
    check(
        case.logits, backend, **case.inputs(*FULL, "rewards"), num_generations=G, scale_rewards=scale,
        advantage_unbiased=unbiased, advantage_eps=1e-6,
    )  # fmt: skip


def test_rewards_of_large_groups(B=70):
    """More rewards than the kernel reads at a time."""
    case = make_case(B, T=1, V=7, seed=6)
    for scale in ("group", "batch"):
        check(case.logits, "triton", **case.inputs(*FULL, "rewards"), num_generations=B // 2, scale_rewards=scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("as_tensor", (False, True))
def test_scale_and_counts(loss_type, as_tensor, backend):
    case = make_case(seed=7)
    wrap = torch.tensor if as_tensor else (lambda x: x)
    check(
        case.logits, backend, **case.inputs(*FULL, "advantages"), loss_type=loss_type, loss_scale=wrap(0.25),
        num_items_in_batch=wrap(37), max_completion_length=11, entropy_coef=0.05, return_entropy=True,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", (1.0, 0.0, -3.0, 65536.0))
@pytest.mark.parametrize("entropy_coef", (0.0, 0.1))
def test_upstream_gradient(dtype, upstream, entropy_coef, backend):
    case = make_case(dtype=dtype, seed=8)
    check(
        case.logits, backend, **case.inputs(*FULL, "advantages"), beta=0.1, entropy_coef=entropy_coef,
        upstream=upstream, loss_scale=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("extra", (0, 1))
def test_inplace_gives_the_same(dtype, reduction, extra, backend):
    case = make_case(dtype=dtype, seed=9, extra=extra)
    kwargs = dict(**case.inputs(*FULL, "advantages"), beta=0.1, reduction=reduction)
    out, grad = ours(case.logits, backend, **kwargs)
    again, in_place = ours(case.logits, backend, **kwargs, inplace=True)
    # Rows are read from where both they and the gradient's are aligned: sums may go in another order.
    allowed = bounds(case.logits, **kwargs)
    assert_outputs(again, out, allowed, factor=2)
    assert_within(in_place, grad, allowed.grad, "gradient", factor=2)


def _strided(kind: str, x: torch.Tensor) -> torch.Tensor:
    """The same values in another layout."""
    B, T, V = x.shape
    if kind == "sliced sequence":
        return torch.cat([x.new_full((B, 3, V), 9.0), x, x.new_full((B, 2, V), 9.0)], 1)[:, 3 : 3 + T]
    if kind == "padded vocabulary":
        return torch.cat([x, x.new_full((B, T, 5), 9.0)], 2)[..., :V]
    if kind == "transposed batch":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "every second sequence":
        return torch.stack([x, x + 9], 1).flatten(0, 1)[::2]
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("sliced sequence", "padded vocabulary", "transposed batch", "every second sequence"))
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_strides(kind, inplace, reduction, backend):
    """No layout of the logits is copied or misread, and in place nothing around them is touched."""
    case = make_case(seed=10, extra=1)
    kwargs = dict(**case.inputs(*FULL, "advantages"), beta=0.1, reduction=reduction)
    _, want_grad = expected(case.logits, **kwargs)
    leaf = case.logits.to(DEVICE).clone().requires_grad_()
    z = _strided(kind, leaf * 1)
    assert z.stride() == _strided(kind, case.logits).stride() and torch.equal(z.cpu(), case.logits)
    around = (z._base if z._base is not None else z).detach().clone()
    z.retain_grad()
    out = fused_grpo_loss(z, **on_device(kwargs), backend=backend, inplace=inplace)
    torch.autograd.backward(out.loss, torch.ones_like(out.loss))
    assert_within(z.grad, want_grad, bounds(case.logits, **kwargs).grad, "gradient")
    after = z._base if z._base is not None else z
    if inplace:
        torch.as_strided(around, z.shape, z.stride(), z.storage_offset()).copy_(z.detach())
    assert torch.equal(after.detach(), around)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_token_inputs(backend):
    case = make_case(seed=11)
    wide = {name: torch.stack([value, value], 2)[..., 0] for name, value in case.inputs(*FULL).items()}
    assert not wide["old_logps"].is_contiguous()
    a, ga = ours(case.logits, backend, **case.inputs(*FULL, "advantages"), beta=0.1)
    b, gb = ours(case.logits, backend, **wide, advantages=case.advantages, beta=0.1)
    assert torch.equal(a.loss, b.loss) and torch.equal(ga, gb)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ("bool", "int32", "int64", "uint8", "float32", "bfloat16"))
def test_mask_and_id_dtypes(dtype, backend):
    case = make_case(seed=12)
    kwargs = case.inputs("completion_ids", "advantages")
    kwargs["completion_ids"] = kwargs["completion_ids"].int()
    check(case.logits, backend, **kwargs, completion_mask=case.completion_mask.to(getattr(torch, dtype)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", (0.3, 1, 2.5))
@pytest.mark.parametrize("entropy_coef", (0.0, -0.2))
def test_temperature(temperature, entropy_coef, backend):
    case = make_case(seed=13)
    check(
        case.logits, backend, **case.inputs(*FULL, "advantages"), temperature=temperature, entropy_coef=entropy_coef,
        return_entropy=True,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", (30.0, 1e3, 1e4))
def test_precision_does_not_depend_on_the_size_of_logits(size, backend):
    """The maximum is subtracted before anything is scaled or exponentiated."""
    case = make_case(seed=14)
    logits = case.logits + size
    logits[0] *= 1.5
    check(logits, backend, completion_ids=case.completion_ids, completion_mask=case.completion_mask,
          advantages=case.advantages, return_entropy=True)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_token_keeps_its_gradient(backend):
    """p − 1 of the sampled token is formed in fp32: bf16 loses all of it at p = 0.999."""
    V = 64
    for p in (0.9, 0.99, 0.995, 0.999, 0.9999):
        logits = torch.zeros(1, 1, V, dtype=torch.bfloat16)
        logits[..., 3] = torch.tensor(p * (V - 1) / (1 - p)).log()
        ids, adv = torch.tensor([[3]]), torch.tensor([1.0])
        _, grad = ours(logits, backend, completion_ids=ids, advantages=adv)
        _, want = expected(logits, completion_ids=ids, advantages=adv)
        allowed = bounds(logits, ids, advantages=adv).grad
        assert_within(grad, want, allowed, "gradient")
        assert allowed[0, 0, 3] < want[0, 0, 3].abs() / 4  # a lost gradient shows


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_and_plain_logits(backend):
    """Without a gradient to compute: the same values, no gradient, and logits stay, inplace or not."""
    case = make_case(seed=15)
    kwargs = dict(**case.inputs(*FULL, "advantages"), beta=0.1, return_entropy=True, backend=backend)
    want, _ = ours(case.logits, **kwargs)
    kwargs = on_device(kwargs)
    logits = case.logits.to(DEVICE)
    before = logits.clone()
    plain = fused_grpo_loss(logits, inplace=True, **kwargs)
    with torch.no_grad():
        leaf = logits.clone().requires_grad_()
        off = fused_grpo_loss(leaf, inplace=True, **kwargs)
    allowed = bounds(case.logits, **kwargs)
    for out in (plain, off):
        assert not out.loss.requires_grad
        assert_outputs(out, want, allowed, factor=2)
    assert torch.equal(logits, before) and torch.equal(leaf, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_config_and_keywords(backend):
    case = make_case(seed=16)
    inputs = on_device(case.inputs("logits", *FULL, "advantages"))
    config = LossConfig(loss_type="dapo", beta=0.1, epsilon_high=0.3)
    a = fused_grpo_loss(**inputs, config=config, backend=backend)
    b = fused_grpo_loss(**inputs, loss_type="dapo", beta=0.1, epsilon_high=0.3, backend=backend)
    c = fused_grpo_loss(**inputs, config=config, beta=0.0, backend=backend)
    assert torch.equal(a.loss, b.loss) and not torch.equal(a.loss, c.loss)


@pytest.mark.parametrize("seed", range(6))
def test_backends_agree_on_mixtures(seed):
    """Knobs drawn together, both backends against the reference."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda options: options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: E731
    for _ in range(6):
        T, V, extra = pick((1, 3, 8)), pick((5, 257, 1030)), pick((0, 1))
        case = make_case(4, T, V, dtype=pick(DTYPES), extra=extra, seed=seed)
        kwargs = dict(
            loss_type=pick(LOSS_TYPES), beta=pick((0.0, 0.2)), kl_estimator=pick(("k1", "k2", "k3")),
            epsilon_high=pick((None, 0.3)), delta=pick((None, 1.4)), temperature=pick((1.0, 0.8)),
            reduction=pick(("mean", "none")), inplace=pick((False, True)), entropy_coef=pick((0.0, 0.03)),
            return_entropy=pick((False, True)), loss_scale=pick((1.0, torch.tensor(0.5))),
        )  # fmt: skip
        names = list(FULL) + (["importance_weights"] if pick((False, True)) else [])
        given = pick(({"advantages": case.advantages}, {"rewards": case.rewards, "num_generations": 2}))
        for backend in BACKENDS:
            check(case.logits, backend, **case.inputs(*names), **given, **kwargs)


def test_combinations_are_distinct():
    """The loss types weigh tokens differently, so the tests above can tell them apart."""
    case = make_case(seed=19)
    losses = [
        fused_grpo_loss(case.logits, **case.inputs(*FULL, "advantages"), loss_type=t, max_completion_length=7,
                        num_items_in_batch=50).loss.item()
        for t in LOSS_TYPES
    ]
    assert all(abs(a - b) > 1e-4 for a, b in itertools.combinations(losses, 2))
