"""Log-probabilities of several targets per row, against the reference in float64."""

import re

import pytest
import torch

from cases import BACKENDS, DEVICE
from grpo_kernels import Support, Targets, linear_token_logprobs, token_logprobs
from target_cases import FORMS, TargetCase, expected, make_targets, target_bounds
from tolerance import assert_within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBER, PER_ROW = 0.7, "per row"

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_form = pytest.mark.parametrize("form", FORMS)


def per_row(case: TargetCase) -> torch.Tensor:
    return 0.5 + torch.rand(case.mask.shape, generator=torch.Generator().manual_seed(9))


def run(case, form, backend, *, entropy=True, temperature=1.0, g=None):
    """(TokenLogprobs, gradient of the logits on the CPU)"""
    leaf = case.per_token(form, case.logits).clone().requires_grad_()
    out = token_logprobs(
        leaf, case.targets(form), mask=case.per_token(form, case.mask), return_entropy=entropy, backend=backend,
        temperature=case.per_token(form, temperature),
    )  # fmt: skip
    outputs, ups = [out.logps], [case.per_target(form, case.g if g is None else g)]
    if entropy:
        outputs, ups = [*outputs, out.entropy], [*ups, case.per_token(form, case.h)]
    (grad,) = torch.autograd.grad(outputs, leaf, ups)
    return out, grad.cpu()


def check(case, form, backend, *, entropy=True, temperature=1.0):
    out, grad = run(case, form, backend, entropy=entropy, temperature=temperature)
    wanted = expected(case, temperature, entropy)
    allowed = target_bounds(case, temperature, entropy)
    to_form = (case.per_target, case.per_token, case.per_token)
    got = (out.logps, out.entropy, grad)
    assert out.logps.dtype == torch.float32 and grad.dtype == case.logits.dtype
    for name, a, b, most, put in zip(("logps", "entropy", "gradient"), got, wanted, allowed, to_form):
        if a is not None:
            assert_within(a, put(form, b), put(form, most), name)
    return out, grad


@each_backend
@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", (1, 3, 17))
@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "both"))
def test_values_and_gradients(entropy, K, dtype, form, backend):
    extra = 0 if "packed" in form else 1
    check(make_targets(K=K, dtype=dtype, extra=extra, seed=K), form, backend, entropy=entropy, temperature=0.7)


@each_backend
@each_form
@pytest.mark.parametrize("temperature", (NUMBER, PER_ROW))
@pytest.mark.parametrize("V", (3, 9001))
@pytest.mark.parametrize("mask", (True, False), ids=("masked", "all"))
def test_temperatures_and_vocabularies(mask, V, temperature, form, backend):
    case = make_targets(B=2, K=4, V=V, seed=7, mask=mask)
    check(case, form, backend, temperature=per_row(case) if temperature is PER_ROW else temperature)


@each_backend
@pytest.mark.parametrize("spread", (0.01, 40.0))
def test_flat_and_peaked_rows(spread, backend):
    check(make_targets(K=5, seed=8, spread=spread), "padded", backend)


@each_backend
@pytest.mark.parametrize("form", ("padded", "packed"))
def test_one_target_is_the_plain_function(form, backend):
    """To the bit in values, to rounding in the gradient."""
    case = make_targets(K=1, seed=3)
    case.ids = case.ids.abs() % 131
    out, grad = run(case, form, backend, temperature=0.7)
    leaf = case.per_token(form, case.logits).clone().requires_grad_()
    want = token_logprobs(leaf, case.targets(form)[..., 0], mask=case.per_token(form, case.mask), temperature=0.7,
                          return_entropy=True, backend=backend)  # fmt: skip
    assert torch.equal(out.logps[..., 0], want.logps) and torch.equal(out.entropy, want.entropy)
    ups = [case.per_token(form, case.g[..., 0]), case.per_token(form, case.h)]
    (want_grad,) = torch.autograd.grad([want.logps, want.entropy], leaf, ups)
    allowed = case.per_token(form, target_bounds(case, 0.7)[2])
    assert_within(grad, want_grad, allowed, "gradient", factor=2)


@each_backend
def test_lists_equal_padded_ids(backend):
    case = make_targets(K=5, seed=4)
    (padded, d_padded), (lists, d_lists) = (run(case, form, backend) for form in ("padded", "lists"))
    assert torch.equal(padded.logps[case.listed.to(DEVICE)], lists.logps)
    assert torch.equal(padded.entropy, lists.entropy) and torch.equal(d_padded, d_lists)


@each_backend
@each_form
def test_two_runs_give_the_same_bits(form, backend):
    case = make_targets(K=17, V=11, seed=5)
    (a, d_a), (b, d_b) = (run(case, form, backend) for _ in range(2))
    assert torch.equal(a.logps, b.logps) and torch.equal(d_a, d_b)


@each_backend
def test_the_order_of_a_row_does_not_matter(backend):
    """Beyond the order of fp64 sums: the anchor is the same."""
    case = make_targets(K=6, seed=6)
    out, _ = run(case, "padded", backend)
    case.ids, case.g = case.ids.flip(-1), case.g.flip(-1)
    other, _ = run(case, "padded", backend)
    assert torch.equal(out.logps, other.logps.flip(-1))


@each_backend
def test_many_equal_targets_add_up_beyond_fp32(backend):
    """2¹⁴ slopes of 0.1 on one token, which fp32 would round on every addition."""
    K = 2**14
    x = torch.zeros(1, 1, 2, device=DEVICE, requires_grad=True)
    out = token_logprobs(x, torch.zeros(1, 1, K, dtype=torch.int32, device=DEVICE), backend=backend)
    up = torch.full((1, 1, K), 0.1, device=DEVICE)
    (grad,) = torch.autograd.grad(out.logps, x, up)
    half = K * up[0, 0, 0].item() / 2
    assert grad.flatten().tolist() == pytest.approx([half, -half], rel=2.0**-21, abs=0)


@each_backend
def test_strides_and_dtypes_of_ids(backend):
    case = make_targets(K=3, seed=10, mask=False)
    out, grad = run(case, "padded", backend)
    allowed = target_bounds(case)
    wide = torch.zeros(5, 3, 2 * 131)
    wide[..., :131] = case.logits.transpose(0, 1)
    leaf = wide.to(DEVICE).requires_grad_()
    ids = case.ids.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for dtype in (torch.int64, torch.int32, torch.int16):
        again = token_logprobs(leaf[..., :131].transpose(0, 1), ids.to(DEVICE, dtype), return_entropy=True,
                               backend=backend)  # fmt: skip
        assert_within(again.logps, out.logps, allowed[0], "logps", factor=2)
    (d,) = torch.autograd.grad([again.logps, again.entropy], leaf, [case.g.to(DEVICE), case.h.to(DEVICE)])
    assert_within(d[..., :131].transpose(0, 1), grad, allowed[2], "gradient", factor=2)


@each_backend
@pytest.mark.parametrize("h", (0.0, 1.0))
def test_nan_reaches_its_row_alone(h, backend):
    case = make_targets(K=3, seed=11, mask=False)
    _, clean = run(case, "padded", backend)
    case.logits[1, 1, 5] = torch.nan
    case.h[:] = h
    out, grad = run(case, "padded", backend)
    there = (case.ids >= 0)[1, 1].to(DEVICE)
    assert out.logps[1, 1][there].isnan().all() and (out.logps[1, 1][~there] == 0).all()
    assert grad[1, 1].isnan().all() and not grad.flatten(0, 1)[[*range(6), *range(7, 15)]].isnan().any()
    case.h[:] = 0.0  # a row whose slopes are all 0 is not read
    _, grad = run(case, "padded", backend, g=torch.zeros_like(case.g))
    assert not grad.any() and clean.any()


@each_backend
def test_slopes_that_cancel(backend):
    """Σ g = 0: the entries of the targets alone, and a NaN is not hidden."""
    x = torch.randn(1, 2, 9)
    x[0, 1, 3] = torch.nan
    leaf = x.to(DEVICE).requires_grad_()
    out = token_logprobs(leaf, torch.tensor([[[1, 4], [1, 4]]], device=DEVICE), backend=backend)
    (grad,) = torch.autograd.grad(out.logps, leaf, torch.tensor([[[1.0, -1.0]] * 2], device=DEVICE))
    assert grad[0, 0].tolist() == [0, 1, 0, 0, -1, 0, 0, 0, 0]
    assert grad[0, 1, [1, 4]].isnan().all()


@each_backend
@pytest.mark.parametrize("form", ("padded", "lists"))
def test_an_id_outside_the_vocabulary(form, backend, monkeypatch):
    """IndexError where values are checked; else the row is NaN, and the others are as they were."""
    case = make_targets(K=3, seed=12, mask=False)
    clean, d_clean = run(case, form, backend)
    case.ids[0, 4] = torch.tensor([3, 131, 4])
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "1")
    with pytest.raises(IndexError, match=r"row 4 of completion_ids has the target 131.*vocabulary of 131"):
        run(case, form, backend)
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    out, grad = run(case, form, backend)
    row = case.per_target(form, torch.zeros(3, 5, 3, dtype=torch.bool).index_fill(1, torch.tensor([4]), True)
                          & (torch.arange(3) == 0)[:, None, None])  # fmt: skip
    assert out.logps[row].isnan().all() and torch.equal(out.logps[~row], clean.logps[~row])
    assert grad[0, 4, [3, 4]].isnan().all()
    others = [n for n in range(15) if n != 4]
    assert torch.equal(grad.flatten(0, 1)[others], d_clean.flatten(0, 1)[others])


@each_backend
@pytest.mark.parametrize("offsets", ([0, 2, 900], [-5, 2, 3], [0, 10**12, 3], [2, 1, 0]), ids=str)
def test_offsets_outside_are_no_addresses(offsets, backend, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    targets = Targets(torch.tensor([1, 2, 3]), torch.tensor(offsets)).to(DEVICE)
    x = torch.randn(1, 2, 40).to(DEVICE).requires_grad_()
    token_logprobs(x, targets, backend=backend).logps.sum().backward()
    hidden, weight = torch.randn(1, 2, 4).to(DEVICE).requires_grad_(), torch.randn(40, 4).to(DEVICE)
    linear_token_logprobs(hidden, weight, targets, chunk_bytes=160, backend=backend).logps.sum().backward()


@each_backend
@pytest.mark.parametrize("shape", ((0, 3), (2, 0)), ids=str)
def test_empty_batches(shape, backend):
    x = torch.zeros(*shape, 7, device=DEVICE, requires_grad=True)
    rows = shape[0] * shape[1]
    nothing = Targets.from_lists([[]] * rows).to(DEVICE)
    for ids, wanted in ((torch.zeros(*shape, 4, dtype=torch.int64, device=DEVICE), (*shape, 4)), (nothing, (0,))):
        out = token_logprobs(x, ids, return_entropy=True, backend=backend)
        assert out.logps.shape == wanted and out.entropy.shape == shape
        (out.logps.sum() + out.entropy.sum()).backward()


@each_backend
@pytest.mark.parametrize("form", ("padded", "lists"))
def test_no_targets_at_all(form, backend):
    """K = 0: entropies alone, and their gradient."""
    x = torch.randn(2, 3, 7)
    ids = torch.zeros(2, 3, 0, dtype=torch.int64, device=DEVICE) if form == "padded" else Targets.from_lists([[]] * 6)
    leaf, plain = (x.to(DEVICE).requires_grad_() for _ in range(2))
    out = token_logprobs(leaf, ids if form == "padded" else ids.to(DEVICE), return_entropy=True, backend=backend)
    want = token_logprobs(plain, torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), return_entropy=True,
                          backend=backend)  # fmt: skip
    assert out.logps.numel() == 0 and torch.equal(out.entropy, want.entropy)
    out.entropy.sum().backward()
    want.entropy.sum().backward()
    assert torch.equal(leaf.grad, plain.grad)


@each_backend
def test_no_grad_and_no_double_backward(backend):
    case = make_targets(seed=13)
    with torch.no_grad():
        assert not token_logprobs(case.logits.to(DEVICE).requires_grad_(), case.targets("padded"),
                                  mask=case.mask.to(DEVICE), backend=backend).logps.requires_grad  # fmt: skip
    leaf = case.logits.to(DEVICE).requires_grad_()
    out = token_logprobs(leaf, case.targets("padded"), mask=case.mask.to(DEVICE), backend=backend)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(out.logps.sum(), leaf, create_graph=True)


# --- errors ----------------------------------------------------------------------------------------

IDS = torch.zeros(2, 3, 4, dtype=torch.int64)
LISTS = Targets.from_lists([[0]] * 6)
FIVE = Targets.from_lists([[0]] * 5)
ERRORS = {
    "shape": (lambda call: call(IDS[:, :1]), ValueError, r"several targets.*\(B, T, K\).*got \(2, 1, 4\)"),
    "sparse": (lambda call: call(IDS.to_sparse()), TypeError, "completion_ids must be a dense tensor"),
    "entropy": (lambda call: call(IDS, return_entropy=1.0), TypeError, "return_entropy must be True or False, got fl"),
    "float": (lambda call: call(IDS.float()), TypeError, "completion_ids must be integers"),
    "rows": (lambda call: call(FIVE), ValueError, r"a row per token, B·T = 6, or 4 without.*got 5"),
    "4-D": (lambda call: call(IDS[None]), ValueError, r"completion_ids must be \(B, T\), or packed"),
    "support": (lambda call: call(IDS, support=Support.from_lists([[0]] * 6)), ValueError,
                r"support is not supported with several targets.*to -inf"),
    "support of lists": (lambda call: call(LISTS, support=torch.ones(2, 3, 5).bool()), ValueError, "once per target"),
    "mask": (lambda call: call(IDS, mask=torch.ones(2, 3, 4)), ValueError, r"mask must be \(B, T\) = \(2, 3\)"),
    "mask of 2": (lambda call: call(IDS, mask=2 * torch.ones(2, 3)), ValueError, "only 0 and 1"),
    "id": (lambda call: call(IDS + 5), IndexError, "target 5, which is outside the vocabulary of 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("path", ("logits", "hidden"))
def test_errors(path, name):
    def call(ids, **kwargs):
        if path == "logits":
            return token_logprobs(torch.zeros(2, 3, 5), ids, **kwargs)
        return linear_token_logprobs(torch.zeros(2, 3, 4), torch.zeros(5, 4), ids, **kwargs)

    attempt, kind, message = ERRORS[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        attempt(call)


def test_packed_errors():
    with pytest.raises(ValueError, match=r"packed logits must be \(N, V\) with N = 5"):
        token_logprobs(torch.zeros(6, 4), FIVE)
    with pytest.raises(ValueError, match=r"\(B, T\) = \(2, 3\) from completion_ids"):
        token_logprobs(torch.zeros(6, 4), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(B, T, K\), packed \(N, K\); got \(2, 3, 4\) for \(6, 4\)"):
        token_logprobs(torch.zeros(6, 4), IDS)


def test_a_vocabulary_over_ranks_says_what_to_do(monkeypatch):
    from grpo_kernels.call import checks

    monkeypatch.setattr(checks, "check_vocab_group", lambda group: group)
    for ids in (IDS, LISTS):
        with pytest.raises(ValueError, match=r"not supported with vocab_group. Call once per target"):
            token_logprobs(torch.zeros(2, 3, 5), ids, vocab_group=object())


OF_LISTS = {
    "falling": (torch.arange(3), torch.tensor([0, 2, 1, 3]), ValueError, "falls after row 1"),
    "end": (torch.arange(3), torch.tensor([0, 2]), ValueError, "rise from 0 to 3, the number of token_ids, got 0 to 2"),
    "none": (torch.arange(3), torch.tensor([], dtype=torch.int64), ValueError, "got none"),
    "dtype": (torch.arange(3.0), torch.tensor([0, 3]), TypeError, "token_ids must be int32 or int64"),
    "list": ([1, 2], torch.tensor([0, 2]), TypeError, re.escape("Targets.from_lists")),
    "2-D": (torch.zeros(2, 2).long(), torch.tensor([0, 2]), ValueError, r"token_ids must be \(M,\)"),
}


@pytest.mark.parametrize("name", OF_LISTS)
def test_targets_are_checked(name):
    ids, offsets, kind, message = OF_LISTS[name]
    with pytest.raises(kind, match=message):
        Targets(ids, offsets)


def test_targets():
    targets = Targets.from_lists([[3, 4], [], [5]])
    assert len(targets) == 3 and repr(targets) == "Targets(3 rows, 3 ids, cpu)"
    assert targets.token_ids.tolist() == [3, 4, 5] and targets.offsets.tolist() == [0, 2, 2, 3]
    with pytest.raises(TypeError, match="row 0 of Targets must be a list of token ids"):
        Targets.from_lists([[[1]]])


@each_backend
def test_a_mask_of_another_dtype_counts_the_same(backend):
    case = make_targets(K=2, seed=14)
    out, grad = run(case, "padded", backend)
    leaf = case.logits.to(DEVICE).requires_grad_()
    other = token_logprobs(leaf, case.targets("padded"), mask=case.mask.float().to(DEVICE), backend=backend)
    assert torch.equal(other.logps, out.logps)
    other.logps.sum().backward()
    assert (leaf.grad[:, :5][~case.mask.to(DEVICE)] == 0).all() and grad.any()
