"""Several targets per row from hidden states, against the reference in float64."""

import dataclasses

import pytest
import torch

from cases import BACKENDS, DEVICE
from grpo_kernels import linear_token_logprobs, token_logprobs
from linear_cases import B, H, T, V, batch, gradients, leaves_of, logits_of
from linear_tolerance import assert_gradients, capped, carried_on, product
from target_cases import FORMS, expected, make_targets, target_bounds
from tolerance import assert_within

ROW = V * 4  # bytes of a row of fp32 logits
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_form = pytest.mark.parametrize("form", FORMS)


def problem(K=3, seed=0, dtype=torch.float32, mask=True, bias=True, extra=0):
    """(head, targets; the logits of the case are the head's)"""
    head, _ = batch(seed=seed, dtype=dtype, bias=bias, extra=extra)
    case = make_targets(B, T, V, K, seed=seed, mask=mask)
    case.logits = logits_of(**head)
    return head, case


def run(head, case, form, backend, entropy=True, temperature=1.0, frozen=(), **kwargs):
    """(TokenLogprobs, gradients of what is not frozen)"""
    leaves = {name: x if x is None else x.to(DEVICE) for name, x in head.items()}
    leaves["hidden"] = case.per_token(form, leaves["hidden"])
    leaves = leaves_of(leaves, frozen)
    out = linear_token_logprobs(
        **leaves, completion_ids=case.targets(form), mask=case.per_token(form, case.mask), return_entropy=entropy,
        temperature=case.per_token(form, temperature), backend=backend, **kwargs,
    )  # fmt: skip
    return out, [g.cpu() for g in gradients(scalar(out, case, form, entropy), leaves)]


def scalar(out, case, form, entropy):
    total = (out.logps * case.per_target(form, case.g)).sum()
    return total + (out.entropy * case.per_token(form, case.h)).sum() if entropy else total


def check(head, case, form, backend, *, entropy=True, temperature=1.0, softcap=None, logit_scale=1.0,
          logits_dtype=None, **kwargs):  # fmt: skip
    dtype, of_head = head["hidden"].dtype, dict(softcap=softcap, logit_scale=logit_scale, logits_dtype=logits_dtype)
    out, grads = run(head, case, form, backend, entropy, temperature, **of_head, **kwargs)
    leaves = leaves_of(head)
    z = logits_of(**leaves, **of_head)
    at = dataclasses.replace(case, logits=z.detach())
    lp, entropies, dz = expected(at, temperature, entropy)
    wanted = gradients((z * dz).sum(), leaves)

    h, W, b = (x if x is None else x.double() for x in head.values())
    exact, slope, d_z, d_slope = capped(*product(h, W, b, logits_dtype or dtype), logit_scale, softcap)
    allowed = target_bounds(dataclasses.replace(at, logits=exact), temperature, entropy, d_z, torch.float64)
    of_gradients = carried_on(dz, allowed[2], slope, d_slope, h, W, b, dtype)
    assert_within(out.logps, case.per_target(form, lp), case.per_target(form, allowed[0]), "logps")
    if entropy:
        assert_within(out.entropy, case.per_token(form, entropies), case.per_token(form, allowed[1]), "entropy")
    grads[0] = grads[0].view(head["hidden"].shape)
    assert all(g.dtype == dtype and g.any() for g in grads)
    assert_gradients(grads, wanted, of_gradients)


@each_backend
@each_form
@pytest.mark.parametrize("K", (1, 17))
@pytest.mark.parametrize("chunk", (None, 4), ids=("whole", "chunks"))
@pytest.mark.parametrize("mask", (True, False), ids=("masked", "all"))
@pytest.mark.parametrize("softcap", (None, 1.5))
def test_values_and_gradients(softcap, mask, chunk, K, form, backend):
    head, case = problem(K, seed=1, mask=mask)
    check(head, case, form, backend, chunk_bytes=chunk and chunk * ROW, softcap=softcap, logit_scale=0.8,
          temperature=0.9)  # fmt: skip


@each_backend
@pytest.mark.parametrize("form", ("padded", "lists"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "both"))
def test_half_precision_and_temperatures(entropy, dtype, form, backend):
    head, case = problem(4, seed=2, dtype=dtype, extra=1)
    heat = 0.5 + torch.rand(B, T, generator=torch.Generator().manual_seed(3))
    check(head, case, form, backend, entropy=entropy, temperature=heat, chunk_bytes=4 * V * 2)


@each_backend
@each_form
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("softcap", (None, 1.5))
def test_fp32_logits_of_half_precision(softcap, dtype, form, backend):
    head, case = problem(4, seed=9, dtype=dtype)
    check(head, case, form, backend, softcap=softcap, chunk_bytes=4 * V * 6, logits_dtype=torch.float32)


@each_backend
def test_lists_equal_padded_ids(backend):
    head, case = problem(5, seed=3)
    padded, d_padded = run(head, case, "padded", backend, chunk_bytes=4 * ROW)
    for form in ("lists", "packed", "packed lists"):
        other, d_other = run(head, case, form, backend, chunk_bytes=4 * ROW)
        assert torch.equal(other.logps, case.per_target(form, padded.logps.cpu()))
        assert torch.equal(other.entropy, case.per_token(form, padded.entropy))
        assert all(torch.equal(a.view_as(b), b) for a, b in zip(d_other, d_padded))


@each_backend
def test_a_count_of_rows_and_frozen_parts(backend):
    head, case = problem(seed=4)
    out, (of_hidden, _, _) = run(head, case, "lists", backend, chunk_bytes=4 * ROW)
    other, (alone,) = run(head, case, "lists", backend, chunk_bytes=4 * ROW, num_rows=int(case.mask.sum()),
                          frozen=("weight", "bias"))  # fmt: skip
    assert torch.equal(out.logps, other.logps) and torch.equal(of_hidden, alone)


@each_backend
@pytest.mark.parametrize("form", ("padded", "lists"))
def test_all_masked(form, backend):
    head, case = problem(seed=5)
    case.mask[:] = False
    out, grads = run(head, case, form, backend)
    assert not out.logps.any() and not out.entropy.any() and not any(g.any() for g in grads)


@each_backend
@pytest.mark.parametrize("form", ("padded", "lists"))
def test_the_logits_path_says_the_same(form, backend):
    head, case = problem(seed=6)
    out, grads = run(head, case, form, backend, chunk_bytes=4 * ROW)
    leaves = leaves_of({name: x.to(DEVICE) for name, x in head.items()})
    z = leaves["hidden"] @ leaves["weight"].T + leaves["bias"]
    want = token_logprobs(z, case.targets(form), mask=case.mask.to(DEVICE), return_entropy=True, backend=backend)
    h, W, b = (x.double() for x in head.values())
    exact, slope, d_z, d_slope = capped(*product(h, W, b, torch.float32), 1.0, None)
    at = dataclasses.replace(case, logits=exact)
    allowed = target_bounds(at, d_logits=d_z, dtype=torch.float64)
    assert_within(out.logps, want.logps, case.per_target(form, allowed[0]), "logps", factor=2)
    of_gradients = carried_on(expected(at)[2], allowed[2], slope, d_slope, h, W, b, torch.float32)
    assert_gradients(grads, gradients(scalar(want, case, form, True), leaves), of_gradients, factor=2)


@each_backend
@pytest.mark.parametrize("form", ("padded", "lists"))
def test_two_backwards_and_two_runs_give_the_same_bits(form, backend):
    head, case = problem(17, seed=7)
    leaves = leaves_of({name: x.to(DEVICE) for name, x in head.items()})
    out = linear_token_logprobs(**leaves, completion_ids=case.targets(form), mask=case.mask.to(DEVICE),
                                chunk_bytes=4 * ROW, backend=backend)  # fmt: skip
    total = scalar(out, case, form, False)
    first, again = (torch.autograd.grad(total, list(leaves.values()), retain_graph=True) for _ in range(2))
    _, other = run(head, case, form, backend, entropy=False, chunk_bytes=4 * ROW)
    assert all(map(torch.equal, first, again)) and all(torch.equal(a.cpu(), b) for a, b in zip(first, other))


@each_backend
def test_an_id_outside_the_vocabulary(backend, monkeypatch):
    head, case = problem(seed=8, mask=False)
    case.ids[0, 3] = torch.tensor([3, V, 4])
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "1")
    with pytest.raises(IndexError, match=f"row 3 of completion_ids has the target {V}"):
        run(head, case, "lists", backend)
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    out, _ = run(head, case, "padded", backend)
    assert out.logps[0, 3].isnan().all() and not out.logps.flatten(0, 1)[4:].isnan().any()


@pytest.mark.unshifted
@each_backend
@pytest.mark.parametrize("form", ("padded", "lists"))
def test_compiled_is_eager(form, backend):
    head, case = problem(seed=9)
    torch._dynamo.reset()

    def step(hidden, weight, bias, targets, mask):
        out = linear_token_logprobs(hidden, weight, targets, bias=bias, mask=mask, return_entropy=True, softcap=2.0,
                                    backend=backend)  # fmt: skip
        return out.logps.exp().sum() + out.entropy.sum()

    leaves = leaves_of({name: x.to(DEVICE) for name, x in head.items()})
    given = (case.targets(form), case.mask.to(DEVICE))
    want = gradients(step(*leaves.values(), *given), leaves)
    got = gradients(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves.values(), *given), leaves)
    assert all(map(torch.equal, got, want))
    torch._dynamo.reset()


def test_hidden_states_of_a_head_have_the_shape_that_is_asked():
    weight, hidden = torch.zeros(V, H), torch.zeros(6, H)
    assert linear_token_logprobs(hidden, weight, torch.zeros(6, 2, dtype=torch.int64)).logps.shape == (6, 2)
