"""Metrics of the mismatch between sampler and trainer: by hand, as TRL's, against the reference, over parts."""

import math

import pytest
import torch

from cases import BACKENDS, DEVICE, check, make_case, on_device
from grpo_kernels import fused_grpo_loss, fused_linear_grpo_loss, policy_loss
from grpo_kernels.objective.corrections import CORRECTIONS
from grpo_kernels.objective.metrics import METRIC_NAMES, combine
from tolerance import U, steps

NAN = math.nan
GAP, RATIO = "sampling/sampling_logp_difference/", "sampling/importance_sampling_ratio/"
MISMATCH = {GAP + "mean", GAP + "max", RATIO + "min", RATIO + "mean", RATIO + "max"}
CORRECTED = {"sampling/corrected_share", "sampling/weight_mean"}
INPUTS = ("completion_ids", "completion_mask", "old_logps", "advantages")


def sampled(case, seed=9):
    """The sampler's log-probabilities: near old, on both sides of usual bounds, NaN at places."""
    g = torch.Generator().manual_seed(seed)
    logps = case.old_logps + 0.5 * torch.randn(case.old_logps.shape, generator=g)
    logps[0, 1] = NAN
    return logps


def said(metrics):
    return {name: value.item() for name, value in metrics.items() if name.startswith("sampling/")}


def near(value, old, samp):
    """Means of at most as many fp32 terms of one sign, ratios among them: a sequence's adds up its log ratios."""
    drift = (old - samp).nan_to_num(0.0).abs().sum(-1).max().item()
    return pytest.approx(value, rel=(8 + steps(old.numel()) + steps(old.shape[-1]) * drift) * U, abs=0.0)


# --- by hand: log ratios ln 2, 0, ln 4 | −ln 2, unknown, masked -------------------------------------

BY_HAND = {
    None: {GAP + "mean": 4 / 4 * math.log(2), GAP + "max": math.log(4), RATIO + "min": 0.5,
           RATIO + "mean": (2 + 1 + 4 + 0.5 + 1) / 5, RATIO + "max": 4.0},
    "token_truncate": {RATIO + "min": 0.5, RATIO + "mean": (2 + 1 + 3 + 0.5 + 1) / 5, RATIO + "max": 3.0,
                       "sampling/corrected_share": 1 / 5, "sampling/weight_mean": 7.5 / 5},
    "token_mask": {RATIO + "min": 0.0, RATIO + "mean": 4.5 / 5, RATIO + "max": 2.0,
                   "sampling/corrected_share": 1 / 5, "sampling/weight_mean": 4.5 / 5},
    # sequences: exp(3·ln 2) = 8 → 3, ½, and 1 of the one without tokens
    "sequence_truncate": {RATIO + "min": 0.5, RATIO + "mean": 4.5 / 3, RATIO + "max": 3.0,
                          "sampling/corrected_share": 1 / 3, "sampling/weight_mean": (3 * 3 + 2 * 0.5) / 5},
    "sequence_mask": {RATIO + "min": 0.0, RATIO + "mean": 1.5 / 3, RATIO + "max": 1.0,
                      "sampling/corrected_share": 1 / 3, "sampling/weight_mean": 2 * 0.5 / 5},
    # geometric means 2 and √½: with a bound of 1.5 the first sequence goes
    "seq_mask_tis": {RATIO + "min": 0.0, RATIO + "mean": 1.5 / 5, RATIO + "max": 1.0,
                     "sampling/corrected_share": 3 / 5, "sampling/weight_mean": 1.5 / 5},
}  # fmt: skip


def by_hand():
    old = torch.full((3, 3), -math.log(4))
    d = torch.tensor([[2.0, 1.0, 4.0], [0.5, NAN, 7.0], [9.0, 9.0, 9.0]]).log()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
    return on_device({"logits": torch.zeros(3, 3, 4), "completion_ids": torch.zeros(3, 3, dtype=torch.long),
                      "completion_mask": mask, "sampling_logps": old - d, "advantages": torch.ones(3)})  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_old", (True, False))
@pytest.mark.parametrize("mode", BY_HAND)
def test_by_hand(mode, with_old, backend):
    inputs = by_hand()
    old = torch.full((3, 3), -math.log(4), device=DEVICE) if with_old else None
    correction = {} if mode is None else {
        "sampling_correction": mode, "sampling_correction_min": 0.0,
        "sampling_correction_max": 1.5 if mode == "seq_mask_tis" else 3.0,
    }  # fmt: skip
    out = fused_grpo_loss(**inputs, old_logps=old, **correction, backend=backend)
    got = said(out.metrics)
    assert got.keys() == MISMATCH | (CORRECTED if mode else set())
    for name, value in (BY_HAND[None] | BY_HAND[mode]).items():
        drawn = inputs["sampling_logps"].nan_to_num(0.0).abs().max().item()  # a log ratio is off by U of it, thrice
        assert got[name] == pytest.approx(value, rel=(8 + steps(9) + 3 * drawn) * U, abs=0.0), name
    assert ("sampling/corrected" in out.sums) == (mode is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ratio_at_its_bound_is_not_corrected(backend):
    """Ratios of exactly 1 and bounds of 1: of tokens, of sequences, and of a sequence without tokens."""
    inputs = by_hand() | {"sampling_logps": torch.full((3, 3), -math.log(4), device=DEVICE)}
    for mode in CORRECTIONS:
        out = fused_grpo_loss(**inputs, old_logps=inputs["sampling_logps"], sampling_correction=mode,
                              sampling_correction_min=1.0, sampling_correction_max=1.0, backend=backend)  # fmt: skip
        assert out.metrics["sampling/corrected_share"].item() == 0.0
        assert out.metrics["sampling/weight_mean"].item() == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", (None, "token_mask", "sequence_truncate"))
def test_nothing_counts(mode, backend):
    inputs = by_hand()
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    out = fused_grpo_loss(**inputs, sampling_correction=mode, sampling_correction_max=3.0, backend=backend)
    want = dict.fromkeys(MISMATCH | (CORRECTED if mode else set()), 0.0)
    if mode == "sequence_truncate":
        want |= dict.fromkeys((RATIO + "min", RATIO + "mean", RATIO + "max"), 1.0)
    assert said(out.metrics) == want


# --- as TRL computes them --------------------------------------------------------------------------


def trl_metrics(old, samp, mask, mode, low, high):
    """What TRL logs in `_generate_and_score_completions`, one process: of its ratio, after bounds."""
    d = torch.nan_to_num((old - samp) * mask, nan=0.0)
    ratio = d.sum(-1, keepdim=True).exp() if mode.startswith("sequence") else d.exp()
    if mode.endswith("truncate"):
        ratio = ratio.clamp(low, high)
    else:
        ratio = ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
    gap = (old - samp).abs()
    gap = gap[mask & ~gap.isnan()]
    flat = ratio.flatten() if mode.startswith("sequence") else ratio[mask]
    return {GAP + "mean": gap.mean(), GAP + "max": gap.max(), RATIO + "min": flat.min(), RATIO + "mean": flat.mean(),
            RATIO + "max": flat.max()}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [mode for mode in CORRECTIONS if mode != "seq_mask_tis"])
def test_as_trl(mode, backend):
    case = make_case(B=6, seed=1)
    samp = sampled(case)
    out = fused_grpo_loss(**on_device({"logits": case.logits, **case.inputs(*INPUTS), "sampling_logps": samp}),
                          sampling_correction=mode, sampling_correction_min=0.6, sampling_correction_max=1.4,
                          backend=backend)  # fmt: skip
    got = said(out.metrics)
    for name, value in trl_metrics(case.old_logps, samp, case.completion_mask, mode, 0.6, 1.4).items():
        assert got[name] == near(value.item(), case.old_logps, samp), name
    assert 0 < got["sampling/corrected_share"] < 1


# --- against the reference, and over parts ---------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ("grpo", "gspo"))
@pytest.mark.parametrize("mode", (None, *CORRECTIONS))
def test_against_the_reference(mode, loss_type, backend):
    case = make_case(B=6, seed=2)
    kwargs = {"sampling_correction": mode, "sampling_correction_max": 1.2} if mode else {}
    check(case.logits, backend, **case.inputs(*INPUTS), sampling_logps=sampled(case), loss_type=loss_type, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", (None, *CORRECTIONS))
@pytest.mark.parametrize("skip", (False, True))
def test_sums_of_parts(skip, mode, backend):
    case = make_case(B=6, seed=3)
    case.advantages[[0, 5]] = 0.0
    inputs = {"logits": case.logits, **case.inputs(*INPUTS), "sampling_logps": sampled(case)}
    kwargs = {"sampling_correction": mode, "sampling_correction_max": 1.2} if mode else {}
    kwargs |= {"skip_zero_advantage": skip, "backend": backend}

    def run(part):
        return fused_grpo_loss(**on_device({name: x[part] for name, x in inputs.items()}), **kwargs)

    whole = said(run(slice(0, 6)).metrics)
    joined = said(combine([run(slice(0, 1)).sums, run(slice(1, 4)).sums, run(slice(4, 6)).sums]))
    want = near(whole, case.old_logps, inputs["sampling_logps"])
    assert joined == want
    if skip:  # as if the rows that are not read were masked; sequences without tokens then do not count
        read = case.completion_mask & (case.advantages != 0)[:, None]
        inputs["completion_mask"] = read
        if mode not in ("sequence_truncate", "sequence_mask"):
            assert said(run(slice(0, 6)).metrics) == want


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", (None, *CORRECTIONS))
def test_other_ways_to_the_same(mode, backend):
    """Packed, from log-probabilities, from hidden states; with and without a gradient."""
    case = make_case(B=6, seed=4, V=33)
    inputs = on_device({**case.inputs(*INPUTS), "sampling_logps": sampled(case)})
    kwargs = {"sampling_correction": mode, "sampling_correction_max": 1.2} if mode else {}
    kwargs["backend"] = backend
    logits = case.logits.to(DEVICE)
    out = fused_grpo_loss(logits, **inputs, **kwargs)
    want = near(said(out.metrics), inputs["old_logps"], inputs["sampling_logps"])
    given = {name: x for name, x in inputs.items() if name != "completion_ids"}
    assert said(policy_loss(out.logps, **given, **kwargs).metrics) == want
    x = logits.clone().requires_grad_()
    assert said(fused_grpo_loss(x, **inputs, **kwargs).metrics) == want
    for loss_type in ("grpo", "gspo"):
        linear = fused_linear_grpo_loss(x, torch.eye(33, device=DEVICE), **inputs, **kwargs, loss_type=loss_type)
        assert said(linear.metrics) == want
    mask = inputs["completion_mask"]
    cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    packed = {name: inputs[name][mask] for name in ("completion_ids", "old_logps", "sampling_logps")}
    out = fused_grpo_loss(logits[mask], **packed, advantages=inputs["advantages"], cu_seqlens=cu, **kwargs)
    assert said(out.metrics) == want


def test_names_follow_from_what_is_given():
    case = make_case()
    inputs = {"logits": case.logits, **case.inputs(*INPUTS)}
    assert not said(fused_grpo_loss(**inputs).metrics)
    threshold = fused_grpo_loss(**inputs, sampling_logps=case.old_logps, off_policy_mask_threshold=0.1)
    assert said(threshold.metrics).keys() == MISMATCH
    assert MISMATCH | CORRECTED == {name for name in METRIC_NAMES if name.startswith("sampling/")}
