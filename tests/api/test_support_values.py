"""Log-probabilities and losses over the sampler's kept set, against the reference in float64."""

import pytest
import torch

import reference
from cases import BACKENDS, DEVICE, assert_outputs, expected, make_case, ours
from grpo_kernels import Support, fused_grpo_loss, token_logprobs
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.catalogue import TERMS
from grpo_kernels.triton_backend import ways
from support_cases import make_rows, make_support, near, restricted
from term_table import facts
from tolerance import assert_within, bounds, logprob_bounds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("Support", "mask")
INPUTS = ("completion_ids", "completion_mask", "advantages", "old_logps", "ref_logps")

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_form = pytest.mark.parametrize("form", FORMS)


def check(case, rows, form, backend, **kwargs):
    """A loss against the reference's, and its gradient; where the support has no entry it is 0."""
    B, T = case.completion_ids.shape
    V = case.logits.shape[2]
    support = make_support(form, rows, (B, T, V), case.completion_mask)
    out, grad = ours(case.logits, backend, support=support, **kwargs)
    want, want_grad = expected(case.logits, support=rows, **kwargs)
    allowed = bounds(restricted(case.logits, case, rows), **kwargs)
    assert_outputs(out, want, allowed)
    assert_within(grad, want_grad, allowed.grad, "gradient")
    left = restricted(torch.zeros_like(case.logits), case, rows) == -torch.inf
    assert (grad[left] == 0).all() and left.any()
    return out, grad


def supported(B=4, T=8, V=131, **kwargs):
    case = make_case(B, T, V, **kwargs)
    rows = make_rows(case, V, kwargs.get("seed", 0))
    near(case, rows)
    return case, rows


@each_backend
@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", (5, 131, 9000))
@pytest.mark.parametrize("use", ("logps", "both"))
def test_log_probabilities(use, V, dtype, form, backend):
    B, T = (3, 4) if V == 9000 else (4, 8)
    case, rows = supported(B, T, V, dtype=dtype, extra=1, spread=2.0)
    ids, mask = case.completion_ids, case.completion_mask
    support = make_support(form, rows, (B, T, V), mask)
    leaf = case.logits.to(DEVICE).clone().requires_grad_()
    out = token_logprobs(leaf, ids.to(DEVICE), mask=mask.to(DEVICE), temperature=0.9, support=support,
                         return_entropy=use == "both", backend=backend)  # fmt: skip
    g, h = torch.randn(2, B, T, generator=torch.Generator().manual_seed(1))
    h = h if use == "both" else 0 * h

    def objective(lp, H):
        return (lp * g.to(lp.device)).sum() + (0.0 if H is None else (H * h.to(lp.device)).sum())

    x = case.logits.double().requires_grad_()
    lp, H = reference.token_logprobs(x, ids, 0.9, mask, rows)
    allowed = logprob_bounds(restricted(case.logits, case, rows), ids, mask, 0.9, objective)
    assert_within(out.logps, lp, allowed.logps, "logps")
    if use == "both":
        assert_within(out.entropy, H, allowed.entropy, "entropy")
    objective(out.logps, out.entropy).backward()
    objective(lp, H).backward()
    assert_within(leaf.grad, x.grad, allowed.grad, "gradient")


@each_backend
@each_form
@pytest.mark.parametrize(("term", "level"), [(name, level) for name, entry in TERMS.items() for level in entry.levels])
def test_every_term_and_level(term, level, form, backend):
    case, rows = supported(B=3, seed=1)
    kwargs = {**case.inputs(*INPUTS), **facts(term).gentle, "policy_term": term, "importance_sampling_level": level}
    check(case, rows, form, backend, beta=0.1, **kwargs)


WAYS = {
    "lean": {},
    "bonus": {"entropy_coef": 0.1, "beta": 0.1, "return_entropy": True},
    "quantile": {"top_entropy_quantile": 0.6, "entropy_coef": 0.1},
    "in place": {"inplace": True, "entropy_coef": 0.1},
    "in place, twice": {"inplace": True, "loss_type": "gspo", "entropy_coef": 0.1},
    "none": {"reduction": "none", "beta": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo"},
}


@each_backend
@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_every_way_through_the_code(name, dtype, form, backend):
    case, rows = supported(dtype=dtype, extra=1, seed=2)
    check(case, rows, form, backend, **case.inputs(*INPUTS), **WAYS[name])


@each_backend
@each_form
@pytest.mark.parametrize("name", ("lean", "bonus", "in place"))
def test_supports_longer_than_a_tile(name, form, backend):
    case, rows = supported(B=2, T=8, V=9001, seed=3, dtype=torch.bfloat16)
    check(case, rows, form, backend, **case.inputs(*INPUTS), **WAYS[name])


@each_backend
@each_form
def test_temperature_per_token(form, backend):
    case, rows = supported(seed=4)
    heat = torch.linspace(0.5, 1.5, 32).view(4, 8)
    check(case, rows, form, backend, **case.inputs(*INPUTS), temperature=heat, entropy_coef=0.1)


@each_backend
@each_form
@pytest.mark.parametrize("loss_type", ("grpo", "gspo"))
def test_packed_is_padded(loss_type, form, backend):
    case, rows = supported(seed=5)
    V = case.logits.shape[2]
    kwargs = case.inputs(*INPUTS) | {"loss_type": loss_type, "entropy_coef": 0.1, "beta": 0.1}
    support = make_support(form, rows, (4, 8, V), case.completion_mask)
    out, grad = ours(case.logits, backend, support=support, **kwargs)
    inside = case.completion_mask.cumsum(1) + (~case.completion_mask).cumsum(1) > 0  # every token
    flat = {k: v.flatten(0, 1) if k in INPUTS and k != "advantages" else v for k, v in kwargs.items()}
    flat |= {"cu_seqlens": torch.tensor([0, 8, 16, 24, 32]), "support": support if form == "Support" else
             support.flatten(0, 1)}  # fmt: skip
    packed, packed_grad = ours(case.logits.flatten(0, 1), backend, **flat)
    assert torch.equal(packed.logps.cpu().view(4, 8), out.logps.cpu()) and inside.all()
    allowed = bounds(restricted(case.logits, case, rows), **kwargs)
    assert_within(packed.loss, out.loss, allowed.loss, "loss", 2)
    assert_within(packed_grad.view(4, 8, V), grad, allowed.grad, "gradient", 2)


@each_backend
@each_form
@pytest.mark.parametrize("inplace", (False, True))
def test_equals_logits_of_minus_infinity(inplace, form, backend):
    case, rows = supported(seed=6)
    kwargs = case.inputs(*INPUTS) | {"entropy_coef": 0.1, "return_entropy": True, "inplace": inplace}
    support = make_support(form, rows, (4, 8, 131), case.completion_mask)
    out, grad = ours(case.logits, backend, support=support, **kwargs)
    banned = restricted(case.logits, case, rows)
    want, want_grad = ours(banned, backend, **kwargs)
    allowed = bounds(banned, **kwargs)
    assert_outputs(out, want, allowed, 2)
    assert_within(grad, want_grad, allowed.grad, "gradient", 2)


@each_backend
@each_form
@pytest.mark.parametrize("inplace", (False, True))
def test_what_a_support_leaves_out_may_hold_anything(inplace, form, backend):
    case, rows = supported(seed=7)
    kwargs = case.inputs(*INPUTS) | {"entropy_coef": 0.1, "inplace": inplace}
    support = make_support(form, rows, (4, 8, 131), case.completion_mask)
    out, grad = ours(case.logits, backend, support=support, **kwargs)
    left = restricted(torch.zeros_like(case.logits), case, rows) == -torch.inf
    for value in (torch.nan, torch.inf, -torch.inf):
        other, other_grad = ours(case.logits.masked_fill(left, value), backend, support=support, **kwargs)
        assert torch.equal(out.loss, other.loss) and torch.equal(grad, other_grad), value


@each_backend
@each_form
@pytest.mark.parametrize("top", (0.0, 1e4, 1e30))
def test_improbable_tokens_and_large_logits(top, form, backend):
    """The token is 200 below the rest of its set, or so large that exponents need care; entries that are −inf."""
    x = torch.tensor([[[0.0, -200.0, 1.0, 3.0, -torch.inf, 50.0]]]) + torch.tensor([top, 0, top, top, 0, 2 * top])
    rows, ids = [[0, 2, 3, 4]], torch.tensor([[1]])
    support = Support.from_lists(rows).to(DEVICE) if form == "Support" else None
    if support is None:
        support = torch.tensor([[[True, False, True, True, True, False]]], device=DEVICE)
    leaf = x.to(DEVICE).requires_grad_()
    out = token_logprobs(leaf, ids.to(DEVICE), support=support, return_entropy=True, backend=backend)
    banned = x.clone()
    banned[..., 5] = -torch.inf
    want = token_logprobs(banned.to(DEVICE).requires_grad_(), ids.to(DEVICE), return_entropy=True, backend=backend)
    size = torch.tensor(8 * 2.0**-23) * (4 + banned[0, 0, [0, 1, 2, 3]].abs().max().double())
    assert_within(out.logps, want.logps, size, "logps")
    assert_within(out.entropy, want.entropy, size, "entropy")
    out.logps.sum().backward()
    assert leaf.grad[..., [4, 5]].eq(0).all() and leaf.grad.isfinite().all()


@each_backend
@each_form
def test_skipped_and_fully_masked(form, backend):
    case, rows = supported(seed=8)
    case.advantages[1] = 0.0
    support = make_support(form, rows, (4, 8, 131), case.completion_mask)
    kwargs = case.inputs("completion_ids", "completion_mask", "advantages", "old_logps")
    a, grad_a = ours(case.logits, backend, support=support, **kwargs)
    b, grad_b = ours(case.logits, backend, support=support, skip_zero_advantage=True, **kwargs)
    allowed = bounds(restricted(case.logits, case, rows), **kwargs)
    assert_within(b.loss, a.loss, allowed.loss, "loss", 2)
    assert_within(grad_b, grad_a, allowed.grad, "gradient", 2)
    assert not grad_b[1].any()
    kwargs["completion_mask"] = torch.zeros(4, 8)
    out, grad = ours(case.logits, backend, support=support, **kwargs)
    assert out.loss == 0 and not grad.any()


@each_backend
def test_micro_batches_slice_it(backend):
    case, rows = supported(seed=9)
    kwargs, V = case.inputs(*INPUTS), 131
    support = make_support("Support", rows, (4, 8, V), case.completion_mask)
    whole, grad = ours(case.logits, backend, support=support, **kwargs)
    parts = []
    for k in (0, 2):
        part = {name: x[k : k + 2] for name, x in kwargs.items()}
        out, d = ours(case.logits[k : k + 2], backend, support=support[8 * k : 8 * k + 16], loss_scale=0.5, **part)
        assert torch.equal(out.logps.cpu(), whole.logps[k : k + 2].cpu())
        parts.append(d)
    allowed = bounds(restricted(case.logits, case, rows), **kwargs)
    assert_within(torch.cat(parts), grad, allowed.grad, "gradient", 2)


@each_backend
@pytest.mark.parametrize("name", ("lean", "in place", "none", "bonus"))
def test_an_id_outside_the_vocabulary(name, backend, monkeypatch):
    """IndexError where values are checked; else the row is NaN, and the others are as they were."""
    case, rows = supported(seed=10)
    case.completion_mask[0, 0] = True
    case.completion_ids[0, 0] = 3
    kwargs = case.inputs(*INPUTS) | WAYS[name]
    rows[0] = [3, 4]
    _, clean = ours(case.logits, backend, support=Support.from_lists(rows).to(DEVICE), **kwargs)
    for strange in (131, -1, 2**40):
        rows[0] = [3, 4, strange]
        support = Support.from_lists(rows).to(DEVICE)
        monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "1")
        with pytest.raises(IndexError, match=r"row 0 of support has the id .* vocabulary of 131"):
            ours(case.logits, backend, support=support, **kwargs)
        monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
        out, grad = ours(case.logits, backend, support=support, **kwargs)
        assert out.logps[0, 0].isnan() and not out.logps.flatten()[1:].isnan().any()
        assert grad[0, 0].isnan().all() and torch.equal(grad.view(32, -1)[1:], clean.view(32, -1)[1:])


SHORT = Support.from_lists([[0]] * 5)
ERRORS = {
    "rows": (SHORT, ValueError, r"row per token, B·T = 6, got 5"),
    "lists": ([[0]] * 6, TypeError, "Support.from_lists"),
    "dtype": (torch.ones(2, 3, 4), TypeError, "must be bool.*from_padded"),
    "shape": (torch.ones(2, 4, 4).bool(), ValueError, r"support must be \(B, T, V\) = \(2, 3, 4\)"),
    "strides": (torch.ones(2, 4, 3).bool().mT, ValueError, "contiguous in the vocabulary"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    support, kind, message = ERRORS[name]
    for call in (token_logprobs, lambda *args, **kw: fused_grpo_loss(*args, torch.ones(2), **kw)):
        with pytest.raises(kind, match=message):
            call(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), support=support)


def test_packed_errors():
    ids, bounds_ = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 6])
    with pytest.raises(ValueError, match="row per token, N = 6, got 5"):
        fused_grpo_loss(torch.zeros(6, 4), ids, torch.ones(1), cu_seqlens=bounds_, support=SHORT)


@pytest.mark.unshifted
def test_the_on_chip_kernel_says_no():
    batch = Batch(torch.zeros(1, 1, dtype=torch.int64), support_mask=torch.ones(1, 1, 32768).bool())
    x = torch.zeros(1, 1, 32768, dtype=torch.bfloat16)
    assert ways.obstacle(x, x, batch) == "a support is not supported"
