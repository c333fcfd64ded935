"""Edges of the contract: masks, −inf and NaN logits, advantage 0, odd ids, empty sequences."""

import math

import pytest
import torch

from cases import BACKENDS, DEVICE, assert_outputs, check, expected, make_case, on_device, ours
from grpo_kernels import fused_grpo_loss, group_advantages, token_logprobs
from tolerance import assert_within, bounds

FULL = ("completion_ids", "completion_mask", "old_logps", "ref_logps")
INF = math.inf
REDUCTIONS = ("mean", "none")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_type", ("grpo", "bnpo", "dapo", "dr_grpo"))
def test_everything_masked(loss_type, reduction, backend):
    case = make_case()
    case.completion_mask[:] = False
    case.logits[:] = math.nan
    out, grad = ours(case.logits, backend, **case.inputs(*FULL, "advantages"), loss_type=loss_type, beta=0.1,
                     reduction=reduction, entropy_coef=0.1, return_entropy=True)  # fmt: skip
    assert (out.loss == 0).all() and (grad == 0).all()
    assert (out.logps == 0).all() and (out.entropy == 0).all()
    assert all(value.item() == 0 for value in out.metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("inplace", (False, True))
def test_masked_positions_may_hold_anything(inplace, reduction, backend):
    case = make_case(seed=1, extra=1)
    dirty = make_case(seed=1, extra=1)
    off = ~case.completion_mask
    for x in (dirty.old_logps, dirty.ref_logps, dirty.token_advantages, dirty.importance_weights):
        x[off] = math.nan
    dirty.completion_ids[off] = torch.randint(-(2**62), 2**62, (int(off.sum()),))
    dirty.logits[:, :-1][off] = math.nan
    dirty.logits[:, -1] = math.nan
    kwargs = dict(beta=0.1, reduction=reduction, inplace=inplace, entropy_coef=0.1, return_entropy=True)
    (a, ga), (b, gb) = (
        ours(c.logits, backend, **c.inputs(*FULL, "importance_weights"), advantages=c.token_advantages, **kwargs)
        for c in (case, dirty)
    )
    assert torch.equal(a.loss, b.loss) and torch.equal(ga, gb) and torch.equal(a.entropy, b.entropy)
    assert (gb[:, :-1][off] == 0).all() and (gb[:, -1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("banned", [slice(0, 40), slice(90, 131), slice(0, 130), slice(1, None, 2)], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_banned_tokens(reduction, dtype, banned, backend):
    """−inf logits, whole leading tiles of them included: p = 0, gradient 0, a finite entropy."""
    case = make_case(dtype=dtype, seed=2)
    case.logits[..., banned] = -INF
    allowed = torch.isfinite(case.logits[0, 0]).nonzero()[:, 0]
    case.completion_ids[case.completion_mask] = allowed[case.completion_ids[case.completion_mask] % len(allowed)]
    case.completion_ids[~case.completion_mask] = -100
    out, grad = check(case.logits, backend, **case.inputs(*FULL, "advantages"), beta=0.1, entropy_coef=0.3,
                      return_entropy=True, reduction=reduction)  # fmt: skip
    assert grad.isfinite().all() and (grad[..., banned] == 0).all() and out.entropy.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_tiles_of_banned_tokens_in_a_large_vocabulary(backend):
    """Longer than what a program reads at a time."""
    logits = torch.randn(1, 2, 40000)
    logits[..., :30000] = -INF
    logits[0, 1, 35000:] = -INF
    ids, adv = torch.tensor([[39999, 30001]]), torch.tensor([1.0])
    _, grad = check(logits, backend, completion_ids=ids, advantages=adv, return_entropy=True, entropy_coef=0.1)
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_banned_token_that_was_sampled(backend):
    """lp = −inf: on-policy the ratio is still 1; the row's gradient stays finite."""
    logits = torch.randn(1, 1, 9)
    logits[..., 4] = -INF
    out, grad = ours(logits, backend, completion_ids=torch.tensor([[4]]), advantages=torch.tensor([1.0]))
    assert out.logps.item() == -INF and out.loss.item() == -1.0 and grad.isfinite().all()
    assert grad[0, 0, 4].item() == -1.0  # −A·(1 − p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("value", (math.nan, INF))
def test_nan_in_a_row_shows(value, reduction, backend):
    """A broken row makes its loss and its gradient row NaN, and leaves the others alone, A = 0 included."""
    case = make_case(seed=3)
    case.completion_mask[:] = True
    case.completion_ids.clamp_(min=0)
    case.logits[1, 2, 5] = value
    case.token_advantages[1, 2] = 0.0
    out, grad = ours(case.logits, backend, **case.inputs("completion_ids"), advantages=case.token_advantages,
                     reduction=reduction)  # fmt: skip
    assert grad[1, 2].isnan().all() and grad.isnan().sum() == grad.shape[-1]
    assert (out.loss.isnan().nonzero().tolist() == [[1, 2]]) if reduction == "none" else out.loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("old_logps", "ref_logps", "token_advantages", "importance_weights"))
def test_nan_in_another_input_shows(name, backend):
    case = make_case(seed=4)
    case.completion_mask[:] = True
    case.completion_ids.clamp_(min=0)
    getattr(case, name)[1, 2] = math.nan
    out, grad = ours(case.logits, backend, **case.inputs(*FULL, "importance_weights"), beta=0.1,
                     advantages=case.token_advantages)  # fmt: skip
    assert out.loss.isnan() and grad[1, 2].isnan().all() and grad.isnan().sum() == grad.shape[-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("old", (-1e5, 1e5, -INF))
def test_advantage_zero_gives_zero_whatever_the_ratio(old, backend):
    case = make_case(seed=5)
    case.old_logps[:] = old
    out, grad = ours(case.logits, backend, **case.inputs(*FULL), advantages=torch.zeros(4))
    assert out.loss.item() == 0.0 and (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_policy_ratio_is_one_and_has_a_gradient(backend):
    case = make_case(seed=6)
    inputs = case.inputs("completion_ids", "completion_mask", "advantages")
    out, grad = check(case.logits, backend, **inputs)
    lp = token_logprobs(case.logits, case.completion_ids, mask=case.completion_mask).logps
    same, same_grad = ours(case.logits, backend, **inputs, old_logps=lp)
    assert out.metrics["ratio/mean"].item() == 1.0 and grad.abs().max() > 0
    allowed = bounds(case.logits, **inputs)
    assert_within(grad, same_grad, allowed.grad, "gradient", factor=2)
    assert_within(out.loss, same.loss, allowed.loss, "loss", factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", (-1, 131, 2**40, -(2**40)))
@pytest.mark.parametrize("mode", ("loss", "none", "logprobs", "no_grad"))
def test_id_outside_the_vocabulary(outside, mode, backend, monkeypatch):
    """On the CPU an IndexError; where values are not checked, never an address, and a NaN row."""
    case = make_case(seed=7)
    case.completion_mask[0, 0] = True
    case.completion_ids[0, 0] = outside

    def call():
        inputs = case.inputs("completion_ids", "completion_mask")
        if mode == "logprobs":
            x, (ids, mask) = case.logits.to(DEVICE).requires_grad_(), on_device(inputs).values()
            lp = token_logprobs(x, ids, mask=mask, backend=backend).logps
            lp.sum().backward()
            return lp, x.grad
        if mode == "no_grad":
            out = fused_grpo_loss(**on_device(case.inputs("logits", *inputs, "advantages")), backend=backend)
            return out.loss, None
        out, grad = ours(case.logits, backend, **inputs, advantages=case.advantages,
                         reduction="none" if mode == "none" else "mean")  # fmt: skip
        return out.loss, grad

    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "1")
    with pytest.raises(IndexError, match=r"completion_ids\[0, 0\].*131"):
        call()
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    value, grad = call()
    assert value.isnan().any()
    if mode in ("none", "logprobs"):
        assert value.isnan().nonzero().tolist() == [[0, 0]]
    if grad is not None and mode != "logprobs":
        assert grad[0, 0].isnan().all() and grad.isnan().sum() == 131


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("given", ("advantages", "rewards"))
def test_skip_zero_advantage(given, reduction, dtype, backend):
    """The same loss and gradient; rows of advantage 0 are not read, and their log-probabilities are NaN."""
    case = make_case(B=4, dtype=dtype, seed=8)
    case.completion_mask[:] = True
    case.completion_ids.clamp_(min=0)
    inputs = case.inputs("completion_ids", "completion_mask", "old_logps")
    if given == "advantages":
        adv = case.token_advantages
        adv[0, 1:3] = 0.0
        adv[3] = 0.0
        kwargs, idle = {"advantages": adv}, adv == 0
    else:
        case.rewards[2:] = 0.3
        kwargs = {"rewards": case.rewards, "num_generations": 2}
        idle = torch.tensor([False, False, True, True])[:, None].expand(4, 5)
    want, want_grad = ours(case.logits, backend, **inputs, **kwargs, reduction=reduction)
    case.logits[idle] = math.nan
    out, grad = ours(case.logits, backend, **inputs, **kwargs, reduction=reduction, skip_zero_advantage=True,
                     return_entropy=True)  # fmt: skip
    # Kernels with entropies and without are compiled apart, so sums and contractions may differ: in fp32 roundings of
    # a log-sum-exp of V = 131 entries and of the log ratio, and in one rounding of what is stored.
    roundings = 2 * torch.finfo(torch.float32).eps * (math.log2(131) + want.logps.abs().max().item())
    taken = kwargs.get("advantages", group_advantages(case.rewards, 2))
    loss = {"rtol": roundings, "atol": roundings * taken.abs().max().item() * want.metrics["ratio/max"].item()}
    torch.testing.assert_close(out.loss, want.loss, **loss)
    ulp, least = (2**-10, 2**-24) if dtype == torch.float16 else (0.0, 0.0)
    atol = max(roundings * want_grad.abs().max().item(), least)
    torch.testing.assert_close(grad, want_grad, rtol=roundings + ulp, atol=atol)
    assert torch.equal(out.logps.isnan().cpu(), idle) and torch.equal(out.entropy.isnan().cpu(), idle)
    assert out.sums["tokens"].item() == (~idle).sum().item()
    off = fused_grpo_loss(**on_device({"logits": case.logits.detach(), **inputs, **kwargs}), skip_zero_advantage=True,
                          backend=backend)  # fmt: skip
    torch.testing.assert_close(off.loss, out.loss.mean(1).mean() if reduction == "none" else out.loss, **loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_skip_has_no_effect_with_a_kl(backend):
    case = make_case(seed=9)
    kwargs = dict(**case.inputs(*FULL), advantages=torch.zeros(4), beta=0.1)
    (a, ga), (b, gb) = (ours(case.logits, backend, **kwargs, skip_zero_advantage=skip) for skip in (False, True))
    assert torch.equal(a.loss, b.loss) and torch.equal(ga, gb) and ga.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "T"), [(150, 1), (1, 300)], ids=str)
def test_more_than_the_reductions_take_at_a_time(B, T, backend):
    """Over sequences and over tokens; a gradient is not needed for that, which spares the rows' second pass."""
    case = make_case(B, T, V=3, seed=10)
    kwargs = case.inputs(*FULL, "advantages") | {"beta": 0.1, "loss_type": "dapo"}
    out = fused_grpo_loss(**on_device({"logits": case.logits, **kwargs}), backend=backend)
    want, _ = expected(case.logits, **kwargs)
    assert_outputs(out, want, bounds(case.logits, **kwargs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_not_lost_in_fp16(backend):
    """A loss scaler's 65536 reaches the gradient before it is rounded to fp16."""
    case = make_case(B=4, T=64, dtype=torch.float16, seed=12)
    kwargs = dict(**case.inputs(*FULL, "advantages"), loss_scale=1e-4)
    _, grad = ours(case.logits, backend, **kwargs, upstream=65536.0)
    _, want = expected(case.logits, **kwargs, upstream=65536.0)
    assert_within(grad, want, bounds(case.logits, **kwargs, upstream=65536.0).grad, "gradient")
    small = (want.abs() > 0) & (want.abs() / 65536 < 2**-24)
    assert small.sum() > 0.5 * (want != 0).sum() and (grad[small] != 0).all()


@pytest.mark.parametrize("kwargs", [{}, {"importance_sampling_level": "sequence"}], ids=["one launch", "two"])
def test_autocast_leaves_the_sums_in_fp32(kwargs):
    case = make_case(V=1000, seed=50)
    inputs = case.inputs("completion_ids", "completion_mask", "old_logps", "advantages") | kwargs
    inputs |= {"return_entropy": True, "entropy_coef": 0.1}
    want, want_grad = expected(case.logits, **inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, grad = ours(case.logits, "torch", **inputs)
    allowed = bounds(case.logits, **inputs)
    assert_outputs(out, want, allowed)
    assert_within(grad, want_grad, allowed.grad, "gradient")


def test_a_default_device_does_not_reach_inside():
    """Nor does it last: what is kept between calls is on the CPU."""
    case = make_case(seed=51, V=97)
    inputs = case.inputs("completion_ids", "advantages") | {"beta": 0.0123, "ref_logps": case.ref_logps}
    inputs["completion_ids"] = inputs["completion_ids"].clamp(min=0)
    with torch.device("meta"):
        inside = fused_grpo_loss(case.logits, **inputs, backend="torch", return_entropy=True)
    after = fused_grpo_loss(case.logits, **inputs, backend="torch", return_entropy=True)
    assert torch.equal(inside.loss, after.loss)
