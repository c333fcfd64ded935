"""`distillation_loss` where logits are infinite, NaN or far apart, where the rest is nothing, where ids are wrong."""

import math

import pytest
import torch

from cases import BACKENDS, DEVICE
from distillation_cases import BETAS, TEACHERS, check, make_pair, ours, pair_of, wanted
from grpo_kernels import TopK, distillation_loss
from grpo_kernels.objective.divergence import rest
from grpo_kernels.objective.language import on_torch
from tolerance import U, assert_within

INF, NAN = math.inf, math.nan


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
def test_a_student_that_bans_all_of_the_few(beta, backend):
    """Renormalised over them it is 0/0, which is NaN and no number; a row without a token is none of its business."""
    logits = torch.tensor([[[-INF, -INF, 0.0, 1.0], [0.0, 1.0, 2.0, 3.0]]]).to(DEVICE).requires_grad_()
    ids, logps = torch.tensor([[[0, 1], [-1, -1]]]), torch.tensor([[[-1.0, -2.0], [0.0, -1.0]]])
    teacher = TopK(ids.to(DEVICE), logps.to(DEVICE))
    out = distillation_loss(logits, teacher, beta=beta, tail=False, reduction="none", backend=backend)
    out.loss.sum().backward()
    assert out.loss[0, 0].isnan() and out.loss[0, 1] == 0.0
    assert logits.grad[0, 0].isnan().all() and (logits.grad[0, 1] == 0.0).all()


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
