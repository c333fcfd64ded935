"""`distillation_loss` on both backends: values and gradients against the float64 reference, and at the edges."""

import itertools
import math

import pytest
import torch

import reference
from cases import BACKENDS, DEVICE
from distillation_cases import BETAS, TEACHERS, check, make_pair, ours, wanted
from grpo_kernels import TopK, distillation_loss, policy_loss, token_logprobs
from grpo_kernels.metrics import combine
from tolerance import U, assert_within

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- the grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("beta", BETAS)
def test_every_divergence_of_every_teacher(beta, teacher, dtype, backend):
    check(make_pair(teacher, dtype=dtype, temperature=1.3), backend, beta=beta, loss_scale=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("V", (16, 48, 4100))
def test_rows_that_fit_a_tile_and_rows_that_do_not(V, teacher, backend):
    """16 and 48 start at whole accesses; 4100 takes several tiles, and starts anywhere."""
    for beta in BETAS:
        check(make_pair(teacher, B=1, T=2, V=V, completion_mask=None), backend, beta=beta)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_many_whole_tiles(teacher, backend):
    """Fewer threads would be needed on a GPU; here 1024 of them have 16 entries each, and there are 40,000."""
    for beta in BETAS:
        check(make_pair(teacher, B=1, T=1, V=40_000, dtype=torch.bfloat16, completion_mask=None), backend, beta=beta)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("of", ("number", "0-d", "(B,)", "(B, T)"))
def test_temperatures(of, beta, backend):
    heat = {"number": 2, "0-d": torch.tensor(0.6), "(B,)": torch.tensor([0.5, 1.0, 2.0]),
            "(B, T)": torch.linspace(0.7, 1.6, 12).view(3, 4)}[of]  # fmt: skip
    check(make_pair("whole", temperature=heat), backend, beta=beta)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_more_tokens_told_than_a_power_of_two_and_half_precision_of_what_is_told(teacher, backend):
    pair = make_pair(teacher, K=9, V=50)
    if teacher != "whole":
        pair.teacher = TopK(pair.teacher.token_ids.int(), pair.teacher.logps.bfloat16())
    else:
        pair.teacher = pair.teacher.bfloat16()
    for beta in BETAS:
        check(pair, backend, beta=beta)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", reference.distillation.WEIGHTS)
def test_aggregations(mode, backend):
    more = {"max_completion_length": 9} if mode in ("constant", "seq-mean-token-sum-norm") else {}
    check(make_pair(), backend, loss_agg_mode=mode, **more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_tensors", (False, True))
def test_counts_of_the_whole_batch(as_tensors, backend):
    number = torch.tensor if as_tensors else float
    pair = make_pair("rest")
    check(pair, backend, num_items_in_batch=number(40.0), loss_scale=number(0.25))
    check(pair, backend, loss_agg_mode="seq-mean-token-sum", global_batch_size=number(7.0))


# --- layouts ---------------------------------------------------------------------------------------


def flat(pair, mask):
    """The unmasked tokens of a pair, packed, of sequences of their lengths."""
    teacher = TopK(*(x[mask] for x in pair.teacher)) if isinstance(pair.teacher, TopK) else pair.teacher[mask]
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    kwargs = {k: v for k, v in pair.kwargs.items() if k != "completion_mask"}
    return type(pair)(pair.logits[mask], teacher, torch.ones(int(mask.sum())), {**kwargs, "cu_seqlens": cu})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("mode", ("global-tokens", "sequence-mean"))
def test_packed(mode, teacher, backend):
    """One sequence is empty; a mask hides tokens besides."""
    packed = flat(pair := make_pair(teacher), pair.mask)
    for beta in BETAS:
        check(packed, backend, beta=beta, loss_agg_mode=mode)
    hidden = torch.arange(packed.logits.shape[0]) % 3 != 1
    out, grad = check(packed, backend, loss_agg_mode=mode, completion_mask=hidden)
    assert (grad[~hidden] == 0).all() and (out.entropy[~hidden] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_packed_tokens_of_no_sequence(teacher, backend, monkeypatch):
    """Where values are not looked at: behind the last bound nothing is read, and everything is 0."""
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    packed = flat(pair := make_pair(teacher), pair.mask)
    packed.kwargs["cu_seqlens"][-1] -= 2
    packed.logits[-2:] = NAN
    for kwargs in ({}, {"reduction": "none"}):
        out, grad = ours(packed, backend, **kwargs)
        assert out.loss.isfinite().all() and grad.isfinite().all() and (grad[-2:] == 0).all()
        assert (out.entropy[-2:] == 0).all() and out.sums["tokens"] == len(packed.logits) - 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_position_more_is_not_read_and_gets_gradient_zero(teacher, backend):
    pair = make_pair(teacher, extra=1)
    pair.logits[:, -1] = NAN
    for part in (pair.teacher, pair.teacher[:, :4]) if teacher == "whole" else (pair.teacher,):
        pair.teacher = part
        for beta in BETAS:
            _, grad = check(pair, backend, beta=beta, **({} if teacher == "whole" else {"completion_mask": None}))
            assert (grad[:, -1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_strides(teacher, backend):
    """Sequences and tokens far apart, the teacher's otherwise; every second of what is told."""
    pair = make_pair(teacher, V=40)
    want, want_grad = ours(pair, backend)
    wide = torch.full((3, 9, 51), NAN)
    wide[:, 1:9:2, 5:45] = pair.logits
    if teacher == "whole":
        spaced = torch.full((4, 3, 48), NAN)
        spaced[..., 8:] = pair.teacher.transpose(0, 1)
        told = spaced[..., 8:].transpose(0, 1)
    else:
        told = TopK(*(torch.stack([x, x.clone()], -1)[..., 0] for x in pair.teacher))
    x = wide[:, 1:9:2, 5:45].to(DEVICE).requires_grad_()
    told = TopK(*(y.to(DEVICE) for y in told)) if isinstance(told, TopK) else told.to(DEVICE)
    out = distillation_loss(x, told, backend=backend, **{**pair.kwargs, "completion_mask": pair.mask.to(DEVICE)})
    (grad,) = torch.autograd.grad(out.loss, x)
    _, allowed = wanted(pair)
    assert_within(out.loss, want.loss, allowed["loss"], "loss", factor=2)
    assert_within(grad, want_grad, allowed["grad"], "gradient", factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("beta", BETAS)
def test_masked_rows_may_hold_anything(beta, teacher, backend):
    pair = make_pair(teacher)
    out, grad = ours(pair, backend, beta=beta)
    pair.logits[~pair.mask] = NAN
    if teacher == "whole":
        pair.teacher[~pair.mask] = NAN
    else:
        pair.teacher.token_ids[~pair.mask], pair.teacher.logps[~pair.mask] = 10**6, NAN
    again, same = ours(pair, backend, beta=beta)
    assert torch.equal(out.loss, again.loss) and torch.equal(grad, same) and out.loss.isfinite()
    assert (grad[~pair.mask] == 0).all() and (grad[pair.mask] != 0).any(-1).sum() >= pair.mask.sum() - 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_nothing_counts(teacher, backend):
    for reduction in ("mean", "none"):
        pair = make_pair(teacher)
        mask = torch.zeros_like(pair.mask)
        out, grad = ours(pair, backend, completion_mask=mask, reduction=reduction)
        assert (out.loss == 0).all() and (grad == 0).all() and all(x == 0 for x in out.metrics.values())
    for B, T in ((0, 4), (2, 0)):
        x = torch.zeros(B, T, 7, device=DEVICE).requires_grad_()
        told = torch.zeros(B, T, 3, dtype=torch.int64, device=DEVICE)
        told = torch.zeros(B, T, 7, device=DEVICE) if teacher == "whole" else TopK(told, told.float())
        out = distillation_loss(x, told, backend=backend)
        out.loss.backward()
        assert out.loss == 0 and x.grad.shape == x.shape


# --- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_in_place(reduction, dtype, teacher, backend):
    pair = make_pair(teacher, dtype=dtype)
    for beta in BETAS:
        want, want_grad = ours(pair, backend, beta=beta, reduction=reduction)
        x = pair.logits.to(DEVICE).requires_grad_() * 1
        told = TopK(*(y.to(DEVICE) for y in pair.teacher)) if teacher != "whole" else pair.teacher.to(DEVICE)
        kept = [y.clone() for y in (told if teacher != "whole" else (told,))]
        kwargs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in pair.kwargs.items()}
        out = distillation_loss(x, told, beta=beta, reduction=reduction, inplace=True, backend=backend, **kwargs)
        (grad,) = torch.autograd.grad(out.loss.sum(), x)
        _, allowed = wanted(pair, beta=beta, reduction=reduction)
        assert grad.data_ptr() == x.data_ptr()  # which may start elsewhere than a gradient of its own, and be cut so
        assert_within(grad, want_grad, allowed["grad"], "gradient", factor=2)
        assert_within(out.loss, want.loss, allowed["loss"], "loss", factor=2)
        assert all(map(torch.equal, kept, told if teacher != "whole" else (told,)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradients(dtype, teacher, backend):
    pair = make_pair(teacher, dtype=dtype)
    check(pair, backend, upstream=-3.0, beta=0.3, roundings=2)
    up = torch.linspace(-1, 2, 12).view(3, 4)
    out, _ = check(pair, backend, upstream=up, beta=0.0, reduction="none")
    assert (out.loss[~pair.mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_gradients_survive_a_loss_scaler(backend):
    """In fp16 the upstream 65536 comes before rounding."""
    pair = make_pair(dtype=torch.float16, V=3000, loss_scale=2.0**-16)
    _, grad = check(pair, backend, upstream=65536.0)
    assert (grad[pair.mask] != 0).double().mean() > 0.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_backward_twice_and_double_backward(reduction, backend):
    pair = make_pair()
    x = pair.logits.to(DEVICE).requires_grad_()
    loss = distillation_loss(x, pair.teacher.to(DEVICE), reduction=reduction, backend=backend).loss.sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (third,) = torch.autograd.grad(loss, x, torch.tensor(3.0, device=DEVICE), retain_graph=True)
    assert torch.equal(first * 3, third) or (first * 3 - third).abs().max() <= 4 * U * third.abs().max()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_without_a_gradient(reduction, teacher, backend):
    pair = make_pair(teacher)
    want, _ = ours(pair, backend, reduction=reduction)
    told = TopK(*(y.to(DEVICE) for y in pair.teacher)) if teacher != "whole" else pair.teacher.to(DEVICE)
    kwargs = {**pair.kwargs, "completion_mask": pair.mask.to(DEVICE)}
    out = distillation_loss(pair.logits.to(DEVICE), told, reduction=reduction, backend=backend, **kwargs)
    _, allowed = wanted(pair, reduction=reduction)
    assert not out.loss.requires_grad
    assert_within(out.loss, want.loss, allowed["loss"], "loss", factor=2)


# --- metrics, parity -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_of_parts_combine(backend):
    pair = make_pair(B=6, T=3, num_items_in_batch=11.0)
    whole, _ = ours(pair, backend)
    parts = []
    for at in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = type(pair)(pair.logits[at], pair.teacher[at], pair.mask[at],
                          {**pair.kwargs, "completion_mask": pair.mask[at]})  # fmt: skip
        parts.append(ours(part, backend)[0])
    together = combine(part.sums for part in parts)
    assert together.keys() == whole.metrics.keys()
    _, allowed = wanted(pair)
    for name, value in together.items():
        assert_within(value, whole.metrics[name], allowed[f"mean {name}"], name, factor=2)
    assert_within(sum(part.loss for part in parts), whole.loss, allowed["loss"], "loss", factor=2)
    assert whole.sums["tokens"] == pair.mask.sum() and whole.sums["loss"].float() == whole.loss
    with pytest.raises(ValueError, match="names differ"):
        combine([parts[0].sums, {"loss": torch.zeros(())}])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("beta", (0.0, 0.3, 0.5, 1.0))
def test_parity_with_trl(beta, temperature, backend):
    """`ChunkedDivergenceFunction` under heads that are the unit matrix; both are off from float64 by rounding."""
    chunked = pytest.importorskip("trl.kernels.chunked_divergence", reason="parity with TRL needs trl 1.16")
    pair = make_pair(V=67, temperature=temperature, reduction="none", completion_mask=None)
    up = torch.linspace(0.5, 1.5, 12).view(3, 4)
    h, eye = pair.logits.view(12, 67).clone().requires_grad_(), torch.eye(67)
    theirs, entropy = chunked.ChunkedDivergenceFunction.apply(
        h, eye, None, pair.teacher.view(12, 67), eye, None, beta, temperature
    )
    (their_grad,) = torch.autograd.grad((theirs * up.view(12)).sum(), h)
    out, grad = ours(pair, backend, beta=beta, upstream=up)
    _, allowed = wanted(pair, beta=beta, upstream=up)
    assert_within(out.loss, theirs.view(3, 4), allowed["loss"], "loss", factor=2)
    assert_within(grad, their_grad.view(3, 4, 67), allowed["grad"], "gradient", factor=2)
    assert_within(out.entropy, entropy.view(3, 4), allowed["entropy"], "entropy", factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", ("rest", "few"))
@pytest.mark.parametrize("beta", (0.0, 0.3, 0.5, 1.0))
def test_parity_with_trl_of_few_tokens(beta, teacher, backend):
    """The functions behind `ServerDistillationTrainer`, with its tail and without."""
    server = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    pair = make_pair(teacher, V=67, temperature=1.3, completion_mask=None, reduction="none", B=1, T=2)
    pair.teacher = TopK(*(y[:, :1].expand(1, 2, 6).clone() for y in pair.teacher))
    pair.teacher.token_ids[0, :, 1] = (pair.teacher.token_ids[0, 0].max() + 1) % 67  # all six are there
    ids, told = pair.teacher
    x = pair.logits.double().requires_grad_()
    p, q = torch.log_softmax(x / 1.3, -1).gather(-1, ids), told.double()
    here = torch.ones_like(ids, dtype=torch.bool)
    if teacher == "rest":
        (p, here), (q, _) = server._add_tail_bucket(p, here), server._add_tail_bucket(q, here)
    else:
        p, q = p.log_softmax(-1), q.log_softmax(-1)
    theirs = server._jsd_divergence(p, q, beta, here).sum(-1)
    (their_grad,) = torch.autograd.grad(theirs.sum(), x)
    out, grad = ours(pair, backend, beta=beta)
    _, allowed = wanted(pair, beta=beta)
    assert_within(out.loss, theirs, allowed["loss"], "loss")
    assert_within(grad, their_grad, allowed["grad"], "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sampled_tokens_log_ratio_as_an_advantage_is_the_reverse_kl_on_average(backend):
    """docs/distillation.md: the policy gradient of A = log q − log p, over every token that might be sampled, by p."""
    pair = make_pair(B=1, T=1, V=12, completion_mask=None)
    _, grad = ours(pair, backend, beta=1.0)
    x = pair.logits.to(DEVICE)
    p = torch.log_softmax(x, -1).exp()[0, 0]
    mean = torch.zeros_like(x)
    for token in range(12):
        leaf = x.clone().requires_grad_()
        ids = torch.tensor([[token]], device=DEVICE)
        logps = token_logprobs(leaf, ids, backend=backend).logps
        told = token_logprobs(pair.teacher.to(DEVICE), ids, backend=backend).logps
        policy_loss(logps, (told - logps).detach(), loss_type="reinforce", backend=backend).loss.backward()
        mean += p[token] * leaf.grad
    torch.testing.assert_close(mean.cpu(), grad, rtol=0, atol=12 * 64 * U)


def test_both_backends_agree_on_the_bits_of_what_is_exact():
    """Equal models: no divergence, and no gradient."""
    for backend, beta in itertools.product(BACKENDS, BETAS):
        pair = make_pair(V=64)
        pair.teacher = pair.logits.clone()
        out, grad = check(pair, backend, beta=beta)
        if beta == 0.0:
            assert out.loss == 0 and (grad == 0).all()
