"""Every objective of the catalogue against the float64 reference: loss, gradient and metrics, both backends."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import BACKENDS, check, expected, make_case, ours
from grpo_kernels import LossConfig, fused_grpo_loss
from grpo_kernels.objective.aggregations import AGGREGATIONS
from grpo_kernels.objective.catalogue import KL_ESTIMATORS, LEVELS, LOSS_TYPES, TERMS
from grpo_kernels.objective.corrections import CORRECTIONS
from term_table import facts, unnoticed
from tolerance import assert_within, bounds

FULL = ("completion_ids", "completion_mask", "old_logps", "ref_logps")
COMBINATIONS = [(term, level) for term, entry in TERMS.items() for level in entry.levels]
ZERO_IS_SILENT = [name for name, v in LOSS_TYPES.items() if not TERMS[v.term].acts_without_advantage]


def upstream_for(reduction: str, case):
    B, T = case.completion_ids.shape
    return torch.linspace(-1, 1, B * T).view(B, T) if reduction == "none" else 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(loss_type, dtype, backend):
    """Presets, with advantages per sequence and everything that folds into the weights."""
    case = make_case(B=4, T=4, dtype=dtype, extra=1, seed=1)
    check(
        case.logits, backend, **case.inputs(*FULL, "advantages", "importance_weights"), loss_type=loss_type, beta=0.1,
        entropy_coef=0.02, return_entropy=True, max_completion_length=9, num_items_in_batch=17, loss_scale=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize(("term", "level"), COMBINATIONS)
def test_terms_at_every_level(term, level, reduction, backend):
    case = make_case(B=4, T=5, seed=2)
    for knobs in facts(term).settings:
        check(
            case.logits, backend, **case.inputs(*FULL, "importance_weights"), advantages=case.token_advantages,
            policy_term=term, importance_sampling_level=level, **knobs, beta=0.2, use_bias_correction_kl=True,
            reduction=reduction, upstream=upstream_for(reduction, case),
        )  # fmt: skip


@pytest.mark.parametrize("term", TERMS)
def test_the_settings_bite(term):
    """On the data of the test above, two knobs that are swapped or one that is dropped would show."""
    case = make_case(B=4, T=5, seed=2)

    def evaluate(knobs: dict) -> list[float]:
        out, grad = expected(case.logits, **case.inputs(*FULL, "importance_weights"), policy_term=term, **knobs,
                             advantages=case.token_advantages)  # fmt: skip
        return [out.loss.item(), *grad.flatten().tolist()]

    assert not (unseen := unnoticed(term, evaluate)), f"settings of {term!r} in tests/helpers/term_table.py: {unseen}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimators_at_every_level(estimator, level, bias, backend):
    case = make_case(B=3, T=4, seed=3)
    for clamp in (None, 0.05):
        check(
            case.logits, backend, **case.inputs(*FULL, "advantages"), beta=0.5, kl_estimator=estimator,
            importance_sampling_level=level, use_bias_correction_kl=bias, kl_clamp=clamp,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_aggregations(mode, level, backend):
    case = make_case(B=4, T=4, seed=4)
    for knobs in ({}, {"max_completion_length": 11, "global_batch_size": 7, "num_items_in_batch": 29}):
        for names in (FULL, ("completion_ids", "old_logps", "ref_logps")):
            ids = case.completion_ids.clamp(min=0)
            check(
                case.logits, backend, **{**case.inputs(*names, "advantages"), "completion_ids": ids},
                loss_agg_mode=mode, importance_sampling_level=level, beta=0.1, loss_scale=0.25, **knobs,
            )  # fmt: skip


def sampled(case, seed=0):
    """The sampler's log-probabilities, near the old ones, NaN at one token."""
    noise = torch.randn(case.old_logps.shape, generator=torch.Generator().manual_seed(seed))
    out = case.old_logps + 0.3 * noise
    out[0, 0] = math.nan
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_policy", (False, True))
@pytest.mark.parametrize("term", ("clipped", "vespo", "gmpo", "fipo"))
@pytest.mark.parametrize("mode", CORRECTIONS)
def test_corrections(mode, term, on_policy, backend):
    """One-sided bounds and none with the clipped term alone: a bound is a number of the weights, whatever the term."""
    case = make_case(B=4, T=4, seed=5)
    names = tuple(name for name in FULL if not (on_policy and name == "old_logps"))
    one_sided = ((None, 1.4), (0.7, None), (None, None))
    for low, high in ((0.8, 1.2), *(one_sided if term == "clipped" else ())):
        check(
            case.logits, backend, **case.inputs(*names, "advantages"), sampling_logps=sampled(case), policy_term=term,
            sampling_correction=mode, sampling_correction_min=low, sampling_correction_max=high, beta=0.1,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("given", ("sampler", "old", "neither"))
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_off_policy_mask(level, given, per_token, backend):
    case = make_case(B=6, T=6, seed=6)
    names = tuple(name for name in FULL if not (given == "neither" and name == "old_logps"))
    extra = {"sampling_logps": sampled(case)} if given == "sampler" else {}
    advantages = case.token_advantages if per_token else -case.advantages.abs()
    check(
        case.logits, backend, **case.inputs(*names), **extra, advantages=advantages, importance_sampling_level=level,
        off_policy_mask_threshold=0.05, beta=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_off_policy_mask_removes_what_has_drifted(backend):
    """By hand: A < 0 everywhere, drifts of 0.5 and 0.1, threshold 0.2: the first leaves the policy term."""
    logits, ids = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    drift = torch.tensor([[0.5], [0.1]]).expand(2, 3)
    out, grad = ours(
        logits, backend, completion_ids=ids, advantages=torch.tensor([-1.0, -1.0]), reduction="none",
        sampling_logps=-math.log(4) + drift, off_policy_mask_threshold=0.2,
    )  # fmt: skip
    assert out.loss.tolist() == [[0.0] * 3, [1.0] * 3]
    assert not grad[0].any() and grad[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("top", (0.1, 0.25, 0.5, 0.9))
def test_entropy_quantile(top, level, backend):
    case = make_case(B=4, T=8, seed=7, spread=2.0)
    check(
        case.logits, backend, **case.inputs(*FULL, "advantages"), top_entropy_quantile=top, entropy_coef=0.1, beta=0.1,
        importance_sampling_level=level, return_entropy=True,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_quantile_keeps_ties(backend):
    """Uniform distributions all have the same entropy: every token is at the quantile, and stays."""
    logits, ids = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    kwargs = dict(completion_ids=ids, advantages=torch.tensor([1.0, 2.0]))
    out, grad = ours(logits, backend, **kwargs, top_entropy_quantile=0.2)
    want, want_grad = ours(logits, backend, **kwargs)
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(grad, want_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("term", "level"), [*(("clipped", level) for level in LEVELS), ("fipo", "token")])
def test_log_ratio_clamp(term, level, backend):
    case = make_case(B=4, T=6, seed=8)
    for clamp in (0.2, (-0.1, 0.3), (-math.inf, 0.1)):
        check(
            case.logits, backend, **case.inputs(*FULL, "advantages"), policy_term=term, importance_sampling_level=level,
            log_ratio_clamp=clamp, beta=0.1, use_bias_correction_kl=True,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ("(B,)", "(B, 1)", "(B, T)"))
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_temperature_tensors(level, shape, dtype, backend):
    case = make_case(B=4, T=6, seed=9, dtype=dtype, extra=1)
    full = 0.5 + torch.rand(4, 6, generator=torch.Generator().manual_seed(9))
    temperature = {"(B,)": full[:, 0], "(B, 1)": full[:, :1], "(B, T)": full}[shape]
    check(
        case.logits, backend, **case.inputs(*FULL, "advantages"), temperature=temperature, beta=0.1, entropy_coef=0.1,
        return_entropy=True, importance_sampling_level=level,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", (0.0, -3.0, 65536.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_upstream_gradient_at_sequence_level(dtype, upstream, backend):
    case = make_case(B=4, T=6, dtype=dtype, seed=10)
    check(case.logits, backend, **case.inputs(*FULL, "advantages"), loss_type="gspo", upstream=upstream,
          loss_scale=1e-3)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ("group", "batch", "none"))
@pytest.mark.parametrize("loss_type", ("gspo", "vespo", "gmpo", "fipo", "topr"))
def test_rewards(loss_type, scale, backend):
    case = make_case(B=8, T=4, seed=11)
    case.rewards[4:6] = 0.7
    check(case.logits, backend, **case.inputs(*FULL, "rewards"), num_generations=2, scale_rewards=scale,
          loss_type=loss_type, beta=0.1)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ZERO_IS_SILENT)
@pytest.mark.parametrize("per_token", (False, True))
def test_skipping_changes_nothing_but_what_is_read(per_token, loss_type, backend):
    """Rows of advantage 0: the same loss and gradient, whether or not they are read."""
    case = make_case(B=6, T=5, seed=12)
    advantages = case.token_advantages if per_token else case.advantages
    advantages = advantages.clone()
    advantages[::2] = 0.0
    if per_token:
        advantages[:, ::2] = 0.0
    kwargs = dict(**case.inputs(*FULL), advantages=advantages, loss_type=loss_type, max_completion_length=9)
    out, grad = ours(case.logits, backend, **kwargs)
    skipped, grad_skipped = ours(case.logits, backend, **kwargs, skip_zero_advantage=True)
    allowed = bounds(case.logits, **kwargs)
    assert_within(skipped.loss, out.loss, allowed.loss, "loss", factor=2)
    assert_within(grad_skipped, grad, allowed.grad, "gradient", factor=2)
    unread = skipped.logps.isnan().cpu()
    assert unread.any() and not (unread & (advantages if per_token else advantages[:, None]).bool()).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_sign_of_the_gradient(loss_type, backend):
    """On-policy, a step against the gradient makes a rewarded token more likely, a punished one less."""
    case = make_case(seed=17)
    case.completion_mask[:] = True
    case.completion_ids.clamp_(min=0)
    adv = torch.tensor([1.0, -1.0, 2.0, -0.5])
    _, grad = ours(case.logits, backend, completion_ids=case.completion_ids, advantages=adv, loss_type=loss_type)
    at_token = grad.gather(-1, case.completion_ids[..., None])[..., 0]
    assert (at_token.sign() == -adv.sign()[:, None]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_sum_to_the_batch(loss_type, backend):
    """Parts with the stated loss_scale or token count give the gradient of the whole; no sequence is split."""
    case = make_case(B=6, T=5, seed=18)
    inputs = case.inputs(*FULL)
    common = dict(loss_type=loss_type, beta=0.1, max_completion_length=9)
    whole, want = ours(case.logits, backend, **inputs, advantages=case.advantages, **common)
    N = case.completion_mask.sum().item()
    mode = LossConfig(loss_type=loss_type).aggregation
    grads, total = [], 0.0
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        mine = {name: value[part] for name, value in inputs.items()}
        n, size = mine["completion_mask"].sum().item(), part.stop - part.start
        extra = {"global-tokens": {"num_items_in_batch": N}, "batch-tokens": {"loss_scale": n / N}}
        extra = extra.get(mode, {"loss_scale": size / 6})
        out, grad = ours(case.logits[part], backend, **mine, advantages=case.advantages[part], **common, **extra)
        grads, total = [*grads, grad], total + out.loss.item()
    allowed = bounds(case.logits, **inputs, advantages=case.advantages, **common)
    assert_within(torch.tensor(total), whole.loss, allowed.loss, "loss", factor=2)
    assert_within(torch.cat(grads), want, allowed.grad, "gradient", factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_a_token_shows_in_its_whole_sequence(backend):
    """At a sequence level all its tokens share the ratio; the other sequences stay clean."""
    case = make_case(B=4, T=5, seed=19)
    case.completion_mask[:] = True
    case.completion_ids.clamp_(min=0)
    case.logits[1, 2, 3] = math.nan
    out, grad = ours(case.logits, backend, **case.inputs(*FULL, "advantages"), loss_type="gspo")
    assert out.loss.isnan() and grad[1].isnan().all() and grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_all_masked(loss_type, backend):
    case = make_case(seed=20)
    case.completion_mask[:] = False
    out, grad = ours(case.logits, backend, **case.inputs(*FULL, "advantages"), loss_type=loss_type, beta=0.1,
                     entropy_coef=0.1)  # fmt: skip
    assert out.loss == 0.0 and not grad.any()


@st.composite
def calls(draw):
    """A batch and keywords of any combination that has a meaning."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    B, T, V = pick((4, 5, 17), (3, 9, 31), (1, 7, 11))
    seed = draw(st.integers(0, 10**6))
    case = make_case(B, T, V, seed=seed, extra=pick(0, 1), dtype=pick(torch.float32, torch.float32, torch.bfloat16))
    case.completion_mask[0, 0] = True
    case.completion_ids.clamp_(min=0)
    term, level = draw(st.sampled_from(COMBINATIONS))
    g = torch.Generator().manual_seed(seed)
    kwargs = dict(
        policy_term=term, importance_sampling_level=level, **pick({}, *facts(term).settings), beta=pick(0.0, 0.2),
        kl_estimator=pick(*KL_ESTIMATORS), use_bias_correction_kl=pick(False, True), kl_clamp=pick(None, 0.05),
        entropy_coef=pick(0.0, 0.1), top_entropy_quantile=pick(1.0, 1.0, 0.3), max_completion_length=pick(None, 13),
        global_batch_size=pick(None, 9), num_items_in_batch=pick(None, 17), loss_scale=pick(1.0, 0.25),
        temperature=pick(1.0, 0.7, 0.5 + torch.rand(B, generator=g), 0.5 + torch.rand(B, T, generator=g)),
        reduction=pick("mean", "none"), off_policy_mask_threshold=pick(None, None, 0.05), inplace=pick(False, True),
        return_entropy=True,
    )  # fmt: skip
    if not TERMS[term].aggregations:
        kwargs["loss_agg_mode"] = pick(*AGGREGATIONS)
    if TERMS[term].statistic is None:
        kwargs["log_ratio_clamp"] = pick(None, None, 0.3, (-0.2, math.inf))
    if "delta" in TERMS[term].knobs:
        kwargs |= {"delta": pick(None, 1.1, 1.6), "dual_clip": pick(None, 1.3)}
    names = ["completion_ids", "ref_logps"]
    names += [name for name in ("completion_mask", "old_logps") if pick(True, True, False)]
    kwargs |= case.inputs(*names)
    kwargs["advantages"] = pick(case.advantages, case.token_advantages)
    mismatch = pick("none", "weights", "one weight", "correction")
    if mismatch == "weights":
        kwargs["importance_weights"] = case.importance_weights
    elif mismatch == "one weight":
        kwargs["importance_weights"] = case.importance_weights[:, 0]
    elif mismatch == "correction":
        kwargs |= {"sampling_correction": pick(*CORRECTIONS), "sampling_correction_min": pick(None, 0.7),
                   "sampling_correction_max": pick(None, 1.4)}  # fmt: skip
    if "sampling_correction" in kwargs or pick(True, False):
        kwargs["sampling_logps"] = sampled(case, seed)
    return case, kwargs


@pytest.mark.parametrize("backend", BACKENDS)
@settings(
    deadline=None, max_examples=15, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(call=calls())
def test_any_combination(call, backend):
    case, kwargs = call
    check(case.logits, backend, **kwargs, upstream=upstream_for(kwargs["reduction"], case))


def test_levels_and_terms_are_distinct():
    """The tests above can tell one from another: the losses of no two combinations are the same.

    So many tokens that each clip has some of its own, whatever the data.
    """
    case = make_case(B=16, T=33, seed=2)
    losses = {}
    for term, level in COMBINATIONS:
        if not facts(term).sees_level and level != "token":
            continue
        want, _ = expected(case.logits, **case.inputs(*FULL, "advantages"), policy_term=term,
                           importance_sampling_level=level, **facts(term).settings[0])  # fmt: skip
        got = fused_grpo_loss(case.logits, **case.inputs(*FULL, "advantages"), policy_term=term,
                              importance_sampling_level=level, **facts(term).settings[0])  # fmt: skip
        key = (round(want.loss.item(), 6), got.metrics["ratio/mean"].item())
        if level != "sequence_token":  # which differs from sequence in its gradient alone
            assert key not in losses, (term, level, losses[key])
            losses[key] = term, level
