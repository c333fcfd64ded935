"""`distillation_loss` on both backends: values and gradients against the float64 reference, and at the edges."""

import itertools
import math

import pytest
import torch

import reference
from cases import BACKENDS, DEVICE
from distillation_cases import BETAS, TEACHERS, make_pair, ours, wanted
from grpo_kernels import TopK, distillation_loss, policy_loss, token_logprobs
from grpo_kernels.metrics import combine
from grpo_kernels.objective.divergence import rest
from grpo_kernels.objective.language import on_torch
from tolerance import U, assert_within

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METRICS = ("divergence", "entropy", "teacher_entropy")


def check(pair, backend, *, upstream=None, roundings=1, **changes):
    """Ours within what rounding explains of the reference."""
    out, grad = ours(pair, backend, upstream=upstream, **changes)
    exact, allowed = wanted(pair, upstream=upstream, roundings=roundings, **changes)
    assert_within(out.loss, exact["loss"], allowed["loss"], "loss")
    assert_within(grad, exact["grad"], allowed["grad"], "gradient")
    assert_within(out.entropy, exact["entropy"], allowed["entropy"], "entropy")
    assert out.logps is None and tuple(out.metrics) == METRICS
    for name in METRICS:
        assert_within(out.metrics[name], exact[f"mean {name}"], allowed[f"mean {name}"], name)
    return out, grad


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


# --- extremes --------------------------------------------------------------------------------------


def pair_of(x, z):
    """One row."""
    pair = make_pair(B=1, T=1, completion_mask=None)
    pair.logits, pair.teacher = torch.tensor([[x]]), torch.tensor([[z]])
    return pair


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("V", (131, 4096))
def test_minus_infinity_in_either(V, dtype, backend):
    """As OBJECTIVES: rows 0 to 3 have −∞ in the student, the teacher, both at the same place, in the first half."""
    pair = make_pair(B=1, T=5, V=V, dtype=dtype, completion_mask=None, reduction="none")
    pair.logits[0, 0, 7] = pair.teacher[0, 1, 7] = pair.logits[0, 2, 7] = pair.teacher[0, 2, 7] = -INF
    pair.logits[0, 3, : V // 2] = pair.teacher[0, 3, : V // 2] = -INF
    infinite = {0.0: [0], 1.0: [1], 0.3: []}
    for beta in BETAS:
        out, grad = ours(pair, backend, beta=beta)
        exact, allowed = wanted(pair, beta=beta)
        assert out.loss[0].isinf().nonzero()[:, 0].tolist() == infinite[beta]
        assert grad[0].isnan().all(-1).nonzero()[:, 0].tolist() == (infinite[beta] if beta == 1.0 else [])
        assert_within(out.loss, exact["loss"], allowed["loss"], "loss")
        assert_within(grad, exact["grad"], allowed["grad"], "gradient")
        assert_within(out.entropy, exact["entropy"], allowed["entropy"], "entropy")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("x", "z"),
    [
        ([0.0, -200.0, 1.0], [-200.0, 0.0, 1.0]),  # p and q that fp32 cannot hold, at different places
        ([0.0, -95.0, 1.0], [0.0, -95.0, 2.0]),
        ([1e4, 1e4 - 3, 9e3], [-1e4, -1e4 + 2, -9.5e3]),
        ([80.0, 0.0, 0.0], [0.0, 80.0, 0.0]),
        ([1e38, 0.0, 1.0], [1.0, 0.0, 2.0]),
    ],
    ids=str,
)
def test_extreme_logits(x, z, beta, backend):
    check(pair_of(x, z), backend, beta=beta)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_logits_come_late(backend):
    """The maximum rises from tile to tile, in one model, then in the other, by more than 2^d can say."""
    x, z = (torch.linspace(0, 900, 5000) for _ in range(2))
    z = z.flip(0).clone()
    x[4000:], z[:1000] = -50.0, 3.0
    for a, b in ((x, z), (z, x), (x, x)):
        for beta in BETAS:
            check(pair_of(a.tolist(), b.tolist()), backend, beta=beta)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("early", (3, 2500))
def test_an_infinity_of_what_turns_out_to_be_nothing(early, backend):
    """An entry of the row that weighs is all there is, and infinitely far, until a larger one leaves nothing of it."""
    weighing, other = torch.zeros(5000), torch.linspace(-1, 1, 5000)
    weighing[4500], other[early] = 900.0, -INF
    for beta, x, z in ((0.0, other, weighing), (1.0, weighing, other)):
        out, grad = check(pair_of(x.tolist(), z.tolist()), backend, beta=beta)
        assert out.loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("of", ("student", "teacher"))
def test_nan_is_passed_on(of, beta, teacher, backend):
    pair = make_pair(teacher, B=1, T=4, reduction="none", completion_mask=None)
    target = pair.logits if of == "student" else pair.teacher if teacher == "whole" else pair.teacher.logps
    place = pair.teacher.token_ids[0, 1, 2] if teacher == "few" and of == "student" else 2
    target[0, 1, place] = NAN
    out, grad = ours(pair, backend, beta=beta)
    hit = torch.tensor([False, True, False, False])
    assert torch.equal(out.loss[0].cpu().isnan(), hit)
    if teacher == "few":
        ids = pair.teacher.token_ids[0, 1]
        assert grad[0, 1, ids].isnan().all() and not grad[0, ~hit].isnan().any()
    else:
        assert torch.equal(grad[0].isnan().all(-1), hit) and torch.equal(grad[0].isnan().any(-1), hit)


@pytest.mark.parametrize("tail", (True, False, None), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_the_student_cannot_say(backend, tail):
    for beta in BETAS:
        pair = make_pair("rest", B=1, T=2, completion_mask=None, reduction="none", tail=tail)
        pair.teacher.token_ids[:] = torch.arange(6)
        pair.teacher.logps[:] = torch.tensor([0.1, 0.2, 0.05, 0.15, 0.3, 0.1]).log()
        pair.logits[0, 0, 3] = -INF
        pair.kwargs["tail"] = tail
        out, grad = ours(pair, backend, beta=beta)
        exact, allowed = wanted(pair, beta=beta)
        assert out.loss[0].isinf().tolist() == [beta == 0.0, False]
        assert_within(out.loss, exact["loss"], allowed["loss"], "loss")
        assert_within(grad, exact["grad"], allowed["grad"], "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("sure", ("student", "teacher", "both"))
def test_the_rest_is_clamped(sure, beta, backend):
    """Whoever is sure leaves less than 1e-7 to all others: constant in the student, as much as that in the teacher."""
    pair = make_pair("rest", B=1, T=1, V=64, K=3, completion_mask=None)
    pair.teacher.token_ids[:] = torch.tensor([3, 9, 40])
    pair.teacher.logps[:] = torch.tensor([0.5, 0.5, 1e-12] if sure != "student" else [0.5, 0.2, 0.1]).log()
    pair.logits[:] = -1.0
    if sure != "teacher":
        pair.logits[:] = -60.0
        pair.logits[0, 0, [3, 9, 40]] = torch.tensor([0.0, 0.3, -1.0])
    check(pair, backend, beta=beta)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", (True, False, None), ids=str)
def test_an_id_outside_the_vocabulary(tail, backend, monkeypatch):
    """On a CPU an error; where values are not looked at the row is NaN, and nothing outside of it is read."""
    pair = make_pair("rest", B=1, T=2, completion_mask=None, reduction="none")
    pair.kwargs["tail"] = tail
    pair.teacher.token_ids[0, 1, 2] = 131
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "1")
    with pytest.raises(IndexError, match=r"token_ids\[0, 1, 2\] = 131 .* vocabulary of 131"):
        ours(pair, backend)
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    for beta in BETAS:
        out, grad = ours(pair, backend, beta=beta)
        assert out.loss[0].isnan().tolist() == [False, True]
        assert grad[0, 1].isnan().all() and grad[0, 0].isfinite().all()


def test_the_rest_keeps_its_digits():
    """1 − 2^x where it is small, by a series, and where the series ends."""
    x = -torch.cat([torch.logspace(-6.5, 0, 400), torch.linspace(0.4, 0.46, 100), torch.linspace(1, 90, 200)])
    left, moves = on_torch(rest)(x)
    exact = -torch.special.expm1(x.double() * math.log(2.0))
    error = (left.double() - exact.log2()).abs()
    # x·ln 2 is rounded, which moves 1 − 2^x by as much as itself at most; then some ten roundings, and those of the log
    assert (error <= U * (12 / math.log(2.0) + 2 * exact.log2().abs())).all() and (moves == 1).all()
    left, moves = on_torch(rest)(torch.tensor([0.0, -1e-9, 1.0]))
    assert (left == math.log2(1e-7)).all() or (left - math.log2(1e-7)).abs().max() < 64 * U
    assert (moves == 0).all()


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
