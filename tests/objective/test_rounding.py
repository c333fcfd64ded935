"""What a term may lose by its own arithmetic is allowed, and no more: `tests/helpers/term_tolerance.py`."""

import math

import pytest
import torch

import term_tolerance
from cases import BACKENDS, check, expected, make_case, ours
from grpo_kernels import LossConfig
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.catalogue import TERMS
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.sequences import suffix_sums
from reference.knobs import Knobs
from reference.terms import Tokens, policy_term
from term_table import facts
from tolerance import TINY, assert_within, bounds


def held_vespo() -> tuple[torch.Tensor, dict]:
    """The correction masks every token: a sequence's log w is log 10⁻⁸, and φ = exp(λ − 18.4·k)."""
    case = make_case(B=4, T=5, V=17, seed=30)
    kwargs = case.inputs("completion_ids", "completion_mask", "old_logps")
    kwargs |= dict(advantages=case.advantages, policy_term="vespo", sampling_logps=case.old_logps + 1.0,
                   sampling_correction="token_mask", sampling_correction_min=0.7)  # fmt: skip
    return case.logits, kwargs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", (2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7, 2.8, 2.9, 3.1))
def test_vespo_of_a_held_ratio(k, backend):
    """Its exponent is rounded at its size, −39 to −57, though no input moves it."""
    logits, kwargs = held_vespo()
    check(logits, backend, **kwargs, vespo_k_pos=k, vespo_k_neg=k + 0.03)


def influence_of(term: str, c, r: torch.Tensor, A: torch.Tensor) -> torch.Tensor | float:
    """What multiplies the losses of sequences (B, T) that have all their tokens, in fp32; 1 without a suffix."""
    if (suffix := TERMS[term].suffix) is None:
        return 1.0
    x, log2_decay = on_torch(suffix.function)(r, c)
    (log2_decay,) = torch.tensor([log2_decay]).tolist()  # fp32, as a call has its numbers
    return on_torch(suffix.influence)(suffix_sums(x, log2_decay, Batch(r)).float(), r, A, c)[0]


# What brings out more of a term's own arithmetic.
FURTHER = {"sapo": {"sapo_temperature_pos": 8.0}, "fipo": {"fipo_clip_range": None, "delta": None}}


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("term", TERMS)
def test_what_a_term_of_exact_inputs_is_off_by(term, weighted):
    """fp32 against float64 on log ratios up to 16 and weights from 0 to e¹²: what is derived, and 8 u besides."""
    g, entry = torch.Generator().manual_seed(33), TERMS[term]
    knobs = facts(term).settings[-1] | FURTHER.get(term, {})
    k, c = Knobs(policy_term=term, **knobs), entry.coefficients(LossConfig(policy_term=term, **knobs))
    lp, r = (torch.randint(-low, high, (2000, 3), generator=g) / 1024 for low, high in ((16384, 1), (8192, 2048)))
    r[::2] /= 64
    A = torch.randn(2000, 1, generator=g).expand(2000, 3)
    weights = torch.where(torch.rand(2000, 3, generator=g) < 0.1, 0.0, (4 * torch.randn(2000, 3, generator=g)).exp())
    weights = weights if weighted and entry.statistic else None

    x = r
    if entry.statistic:
        x, _ = on_torch(entry.statistic.function)(r, A, c)
        x = x if weights is None else x + on_torch(entry.statistic.correction)(weights)
        x = x.double().sum(1, keepdim=True) / (3 if entry.statistic.how == "mean" else 1)
        x = x.float().expand(2000, 3)
    got, *got_slopes = (y * influence_of(term, c, r, A) for y in on_torch(entry.function)(x, lp, lp - r, A, c))

    exact = lp.double().requires_grad_()
    old = (lp - r).double()
    tokens = Tokens(exact - old, exact, old, A.double(), torch.ones_like(A, dtype=torch.bool),
                    None if weights is None else weights.double())  # fmt: skip
    loss = policy_term(tokens, k)
    own = term_tolerance.roundings(tokens, k)
    allowed = term_tolerance.U * (own.value + 8) * loss.detach().abs()
    if term == "dro":  # a sum
        allowed = term_tolerance.U * 8 * ((A * lp).abs() + k.dro_beta / 2 * r.square()).double()
    assert_within(got, loss, allowed + TINY, "value")
    if not entry.statistic:
        (slope,) = torch.autograd.grad(loss.sum(), exact)
        allowed = term_tolerance.U * (own.slope + 8) * slope.abs()
        if term == "dro":
            allowed = term_tolerance.U * 8 * (A.abs() + k.dro_beta * r.abs()).double()
        assert_within(sum(got_slopes), slope, allowed + TINY, "slope")


def test_a_token_whose_kl_lies_at_the_bound_of_dppo():
    """Within the rounding of that KL both answers are right: all of the token's slope is allowed, and its flag."""
    p, p_old, A = 0.006, 0.004, 1.0
    kl = p_old * math.log(p_old / p) + (1 - p_old) * math.log((1 - p_old + 1e-8) / (1 - p + 1e-8))
    logits = torch.tensor([[[math.log(p), math.log(1 - p)]]])
    common = dict(completion_ids=torch.zeros(1, 1, dtype=torch.long), advantages=torch.tensor([A]),
                  old_logps=torch.tensor([[math.log(p_old)]]), policy_term="dppo_kl")  # fmt: skip
    kept, gone = (expected(logits, **common, epsilon_high=e) for e in (kl * 1.01, kl * 0.99))
    assert kept[1].any() and not gone[1].any()
    for off, is_near in ((0, True), (4, True), (-4, True), (20, False), (-20, False)):
        allowed = bounds(logits, **common, epsilon_high=kl + off * term_tolerance.U)
        assert bool((allowed.grad > (kept[1] - gone[1]).abs()).all()) == is_near
        assert bool(allowed.metrics["clip_ratio/high_mean"] > 1) == is_near


def test_a_broken_slope_is_not_allowed():
    """Not even where rounding is at its worst: where an exponent of −55 is rounded, 1e-4 too much shows in each row."""
    logits, kwargs = held_vespo()
    _, grad = ours(logits, "torch", **kwargs)
    _, want = expected(logits, **kwargs)
    allowed = bounds(logits, **kwargs).grad
    assert_within(grad, want, allowed, "gradient")
    read = want.ne(0).any(-1)
    assert read.any()
    for factor in (1 + 1e-4, 1 - 1e-4):
        for b, t in read.nonzero().tolist():
            broken = grad.clone()
            broken[b, t] *= factor
            with pytest.raises(AssertionError, match="differ by more than rounding explains"):
                assert_within(broken, want, allowed, "gradient")
