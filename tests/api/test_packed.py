"""Packed input, (N, V) with cu_seqlens: the same numbers as the padded batch, at every level."""

import itertools

import pytest
import torch

from cases import BACKENDS, DEVICE, check, make_case, ours
from grpo_kernels import fused_grpo_loss, policy_loss, token_logprobs
from grpo_kernels.objective.aggregations import AGGREGATIONS
from grpo_kernels.objective.catalogue import LOSS_TYPES, TERMS
from grpo_kernels.objective.metrics import combine
from tolerance import assert_within, bounds, logprob_bounds

TOKEN = ("completion_ids", "completion_mask", "old_logps", "ref_logps", "token_advantages", "importance_weights")
LENGTHS = (4, 1, 0, 5, 2)  # with an empty sequence, and N ≠ S
T = max(LENGTHS)
COMBINATIONS = [(term, level) for term, entry in TERMS.items() for level in entry.levels]


def both_layouts(seed=0, dtype=torch.float32, V=37):
    """(case, where its tokens are (B, T), padded inputs, packed inputs)."""
    B = len(LENGTHS)
    case = make_case(B, T, V, seed=seed, dtype=dtype)
    inside = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    case.completion_mask &= inside
    padded = case.inputs("logits", *TOKEN)
    packed = {name: value[inside] for name, value in padded.items()}
    packed["cu_seqlens"] = torch.tensor((0, *LENGTHS)).cumsum(0).int()
    return case, inside, padded, packed


def assert_equal(packed_out, padded_out, packed_grad, padded_grad, inside, allowed):
    """Rows start elsewhere and sums go in another order: both are off from float64 by what is allowed to one."""
    assert_within(packed_grad, padded_grad[inside], allowed.grad[inside], "gradient", factor=2)
    tokens = (lambda x: x.cpu()[inside]) if padded_out.loss.dim() else (lambda x: x.cpu())
    assert_within(packed_out.loss, tokens(padded_out.loss), tokens(allowed.loss), "loss", factor=2)
    for name in ("logps", "entropy"):
        want = getattr(padded_out, name)
        if want is not None:
            got = getattr(packed_out, name)
            assert got.shape == (sum(LENGTHS),)
            assert_within(got, want.cpu()[inside], getattr(allowed, name)[inside], name, factor=2)
    assert packed_out.metrics.keys() == padded_out.metrics.keys() and packed_out.sums.keys() == padded_out.sums.keys()
    from_sums = combine([packed_out.sums])
    for name, want in padded_out.metrics.items():
        assert_within(packed_out.metrics[name], want, allowed.metrics[name], name, factor=2)
        assert_within(from_sums[name], want, allowed.metrics[name], name, factor=2)


def run_both(
    backend, *, drop=(), upstream=None, seed=0, dtype=torch.float32, padded_extra=None, packed_extra=None, **kwargs
):
    """Both layouts with the same keywords; the extras are functions of (case, inside)."""
    case, inside, padded, packed = both_layouts(seed, dtype)
    for inputs in (padded, packed):
        inputs["advantages"] = inputs.pop("token_advantages")
        for name in drop:
            del inputs[name]
    padded |= padded_extra(case, inside) if padded_extra else {}
    packed |= packed_extra(case, inside) if packed_extra else {}
    up = 1.0 if upstream is None else upstream
    allowed = bounds(**padded, **kwargs, upstream=upstream)
    a, da = ours(padded.pop("logits"), backend, **padded, **kwargs, upstream=up)
    b, db = ours(packed.pop("logits"), backend, **packed, **kwargs,
                 upstream=up if upstream is None else upstream[inside])  # fmt: skip
    assert_equal(b, a, db, da, inside, allowed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize(("term", "level"), COMBINATIONS)
def test_every_term_and_level(term, level, reduction, backend):
    upstream = torch.linspace(-1, 1, 5 * T).view(5, T) if reduction == "none" else None
    run_both(backend, policy_term=term, importance_sampling_level=level, beta=0.1, use_bias_correction_kl=True,
             reduction=reduction, upstream=upstream, return_entropy=True)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("masked", (False, True))
def test_every_aggregation(mode, masked, backend):
    """Without a mask in the packed batch, the padded one has the mask of its padding."""

    def extra(case, inside, packed):
        ids = case.completion_ids.clamp(min=0)
        if masked:
            return {"completion_ids": ids[inside] if packed else ids}
        return {"completion_ids": ids[inside], "completion_mask": None} if packed else {
            "completion_ids": ids, "completion_mask": inside}  # fmt: skip

    run_both(
        backend, loss_agg_mode=mode, importance_sampling_level="sequence", beta=0.1, max_completion_length=9,
        padded_extra=lambda case, inside: extra(case, inside, False),
        packed_extra=lambda case, inside: extra(case, inside, True),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("loss_type", "dtype"),
    [*((name, torch.float32) for name in LOSS_TYPES),
     # a preset is maths in float32 behind the rows: of those in one launch and in two, one each
     *itertools.product(("grpo", "gspo"), (torch.bfloat16, torch.float16))],
    ids=str,
)  # fmt: skip
def test_presets_with_advantages_per_sequence(loss_type, dtype, backend):
    per_sequence = lambda case, inside: {  # noqa: E731
        "advantages": case.advantages, "importance_weights": case.importance_weights[:, 0],
        "temperature": 0.5 + case.advantages.abs(),
    }  # fmt: skip
    run_both(backend, loss_type=loss_type, dtype=dtype, entropy_coef=0.1, max_completion_length=9, return_entropy=True,
             padded_extra=per_sequence, packed_extra=per_sequence)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drop", [(), ("old_logps",)], ids=str)
@pytest.mark.parametrize("mode", ("token_truncate", "sequence_mask", "seq_mask_tis"))
def test_masks_and_corrections(mode, drop, backend):
    samp = lambda case: case.old_logps + 0.3 * (case.ref_logps - case.old_logps)  # noqa: E731
    temperature = lambda case: 0.5 + case.importance_weights.clamp(max=1.0)  # noqa: E731
    run_both(
        backend, drop=(*drop, "importance_weights"), sampling_correction=mode, sampling_correction_max=1.1,
        off_policy_mask_threshold=0.01, top_entropy_quantile=0.5, loss_type="gspo",
        padded_extra=lambda c, i: {"sampling_logps": samp(c), "temperature": temperature(c)},
        packed_extra=lambda c, i: {"sampling_logps": samp(c)[i], "temperature": temperature(c)[i]},
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "gspo", "vespo", "fipo"))
@pytest.mark.parametrize("per_token", (False, True))
def test_skip_zero_advantage(per_token, loss_type, backend):
    some = lambda case, inside: {"advantages": case.advantages * torch.tensor([0.0, 1, 1, 0, 1])}  # noqa: E731
    zeros = torch.ones(5, T).index_fill(0, torch.tensor([0, 3]), 0.0)
    zeros[4, 1] = 0.0
    padded = (lambda c, i: {"advantages": c.token_advantages * zeros}) if per_token else some
    packed = (lambda c, i: {"advantages": (c.token_advantages * zeros)[i]}) if per_token else some
    case, inside, padded_in, packed_in = both_layouts()
    for inputs, extra in ((padded_in, padded), (packed_in, packed)):
        inputs.pop("token_advantages")
        inputs |= extra(case, inside)
    kwargs = dict(loss_type=loss_type, backend=backend, skip_zero_advantage=True)
    allowed = bounds(**padded_in, **kwargs)
    a, da = ours(padded_in.pop("logits"), **padded_in, **kwargs)
    b, db = ours(packed_in.pop("logits"), **packed_in, **kwargs)
    assert_within(b.loss, a.loss, allowed.loss, "loss", factor=2)
    assert_within(db, da[inside], allowed.grad[inside], "gradient", factor=2)
    assert torch.equal(b.logps.isnan().cpu(), a.logps.cpu()[inside].isnan()) and b.logps.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards(backend):
    """Rewards belong to sequences, here two groups of two."""
    _, inside, padded, packed = both_layouts()
    keep = slice(0, 4)
    padded = {name: value[keep] for name, value in padded.items() if name != "token_advantages"}
    N = sum(LENGTHS[:4])
    packed = {name: value[:N] for name, value in packed.items() if name != "token_advantages"}
    packed["cu_seqlens"] = packed["cu_seqlens"][:5]
    kwargs = dict(rewards=torch.tensor([1.0, 0.0, 0.3, 0.8]), num_generations=2, backend=backend, beta=0.1)
    allowed = bounds(**padded, **kwargs)
    a, da = ours(padded.pop("logits"), **padded, **kwargs)
    b, db = ours(packed.pop("logits"), **packed, **kwargs)
    assert_within(db, da[inside[:4]], allowed.grad[inside[:4]], "gradient", factor=2)
    for name in a.metrics:
        assert_within(b.metrics[name], a.metrics[name], allowed.metrics[name], name, factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("dapo", "gspo"))
@pytest.mark.parametrize("inplace", (False, True))
def test_against_the_reference(inplace, loss_type, backend):
    """Which packs in its own way."""
    _, _, _, packed = both_layouts(seed=3)
    packed["advantages"] = packed.pop("token_advantages")
    check(packed.pop("logits"), backend, **packed, loss_type=loss_type, beta=0.1, inplace=inplace, return_entropy=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_one_sequence(backend):
    case = make_case(1, 6, 37, seed=4)
    case.completion_mask[0, 0] = True
    case.completion_ids.clamp_(min=0)
    flat = {name: value[0] for name, value in case.inputs(*TOKEN[:4]).items()}
    wide = torch.cat([case.logits[0], case.logits[0]], -1)[:, :37]
    assert not wide.is_contiguous()
    cu = torch.tensor([0, 6])
    a, da = ours(case.logits, backend, **case.inputs(*TOKEN[:4]), advantages=case.advantages, loss_type="gspo")
    b, db = ours(wide, backend, **flat, advantages=case.advantages, cu_seqlens=cu, loss_type="gspo")
    allowed = bounds(case.logits, **case.inputs(*TOKEN[:4]), advantages=case.advantages, loss_type="gspo")
    assert_within(b.loss, a.loss, allowed.loss, "loss", factor=2)
    assert_within(db, da[0], allowed.grad[0], "gradient", factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entropy", (False, True))
def test_token_logprobs(entropy, backend):
    _, inside, padded, packed = both_layouts()
    outs = []
    for inputs in (padded, packed):
        x = inputs["logits"].to(DEVICE).requires_grad_()
        out = token_logprobs(
            x, inputs["completion_ids"].to(DEVICE), mask=inputs["completion_mask"].to(DEVICE), temperature=0.7,
            return_entropy=entropy, backend=backend,
        )  # fmt: skip
        (out.logps.square().sum() + (out.entropy.exp().sum() if entropy else 0.0)).backward()
        outs.append((out, x.grad.cpu()))
    (a, da), (b, db) = outs
    assert b.logps.shape == (sum(LENGTHS),)
    mask = padded["completion_mask"]
    objective = lambda lp, H: lp.square().sum() + (H.exp()[mask].sum() if entropy else 0.0)  # noqa: E731
    allowed = logprob_bounds(padded["logits"], padded["completion_ids"], mask, 0.7, objective)
    assert_within(b.logps, a.logps.cpu()[inside], allowed.logps[inside], "logps", factor=2)
    assert_within(db, da[inside], allowed.grad[inside], "gradient", factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "gspo", "vespo", "gmpo", "fipo", "topr"))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_policy_loss(reduction, loss_type, backend):
    """The same objective from log-probs, padded and packed, as from logits."""
    _, _, padded, packed = both_layouts(seed=5)
    results = []
    for inputs, shape in ((padded, (5, T)), (packed, (sum(LENGTHS),))):
        inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
        inputs["advantages"] = inputs.pop("token_advantages")
        logits, ids = inputs.pop("logits"), inputs.pop("completion_ids")
        kwargs = dict(**inputs, loss_type=loss_type, beta=0.1, entropy_coef=0.1, reduction=reduction, backend=backend)
        grads = []
        for from_logits in (False, True):
            x = logits.clone().requires_grad_()
            if from_logits:
                out = fused_grpo_loss(x, ids, return_entropy=True, **kwargs)
            else:
                t = token_logprobs(x, ids, mask=inputs["completion_mask"], return_entropy=True, backend=backend)
                out = policy_loss(t.logps, entropy=t.entropy, **kwargs)
            out.loss.sum().backward()
            grads.append(x.grad)
            results.append(out)
            assert out.logps.shape == shape
        kwargs = {name: x.cpu() if torch.is_tensor(x) else x for name, x in kwargs.items()}
        allowed = bounds(logits.cpu(), ids.cpu(), **kwargs)
        assert_within(*grads, allowed.grad, "gradient", factor=2)
    for a, b in itertools.pairwise(results):
        assert_within(a.loss.sum(), b.loss.sum(), allowed.loss.sum(), "loss", factor=2)
        for name in a.metrics:
            assert_within(a.metrics[name], b.metrics[name], allowed.metrics[name], name, factor=2)
