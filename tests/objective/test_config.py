"""LossConfig: presets, their parts one by one, and how keywords are laid over a config."""

import dataclasses
import inspect

import pytest

import reference
from grpo_kernels import LossConfig, fused_grpo_loss
from grpo_kernels.objective.catalogue import LEVELS, LOSS_TYPES, TERMS
from grpo_kernels.objective.config import _ARGUMENTS, resolve_config
from term_table import facts

PRESETS = {name: tuple(parts) for name, parts in reference.LOSS_TYPES.items()}  # read from the papers, not from ours


def parts(config):
    return config.term, config.level, config.aggregation


def test_presets():
    assert {name: parts(LossConfig(loss_type=name)) for name in LOSS_TYPES} == PRESETS


def test_defaults_are_plain_grpo():
    config = LossConfig()
    assert (config.loss_type, config.level, config.kl_estimator) == ("grpo", "token", "k3")
    assert (config.epsilon, config.beta, config.cispo_max, config.use_bias_correction_kl) == (0.2, 0.0, 5.0, False)


def test_parts_can_be_set_one_by_one():
    config = LossConfig(loss_type="gspo", importance_sampling_level="token", loss_agg_mode="token-sum")
    assert parts(config) == ("clipped", "token", "token-sum")
    assert parts(LossConfig(policy_term="sapo")) == ("sapo", "token", "sequence-mean")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 1.0


def test_a_new_loss_type_brings_its_own_parts():
    """Keywords over a config: what was the old preset's follows the new one, what was chosen stays."""
    gspo = LossConfig(loss_type="gspo", beta=0.1)
    assert parts(resolve_config(gspo, {"loss_type": "dapo"})) == PRESETS["dapo"]
    chosen = LossConfig(loss_type="gspo", loss_agg_mode="token-sum")
    assert parts(resolve_config(chosen, {"loss_type": "dapo"})) == ("clipped", "token", "token-sum")
    assert resolve_config(gspo, {"loss_type": "dapo"}).beta == 0.1
    assert resolve_config(gspo, {}) is gspo


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("term", TERMS)
def test_every_combination_is_defined_or_refused(term, level):
    if level in facts(term).levels:
        assert LossConfig(policy_term=term, importance_sampling_level=level).level == level
    else:
        with pytest.raises(ValueError, match=rf"{term}.*no meaning.*{level}"):
            LossConfig(policy_term=term, importance_sampling_level=level)


def test_replace_brings_the_new_loss_types_parts():
    gspo = LossConfig(loss_type="gspo")
    assert parts(dataclasses.replace(gspo, loss_type="dapo")) == PRESETS["dapo"]
    assert parts(LossConfig(**{**dataclasses.asdict(gspo), "loss_type": "topr"})) == PRESETS["topr"]
    chosen = LossConfig(loss_type="luspo", importance_sampling_level="token")  # what luspo has anyway, but chosen
    assert dataclasses.replace(chosen, loss_type="gspo").level == "token"
    assert resolve_config(chosen, {"loss_type": "gspo"}).level == "token"
    assert gspo == dataclasses.replace(gspo) and hash(gspo) == hash(dataclasses.replace(gspo))


def test_fields_hold_what_was_given():
    """And nothing but plain strings, numbers and None, which Dynamo can trace; the parts are read elsewhere."""
    config = LossConfig(loss_type="gspo", loss_agg_mode="token-sum")
    given = (config.policy_term, config.importance_sampling_level, config.loss_agg_mode)
    assert given == (None, None, "token-sum") and type(config.loss_agg_mode) is str
    assert parts(config) == ("clipped", "sequence", "token-sum")
    assert all(type(part) is str for part in parts(config))


@pytest.mark.parametrize(
    ("knobs", "error", "says"),
    [
        ({"beta": None}, TypeError, "beta must be a number, got None"),
        ({"epsilon": "0.2"}, TypeError, "epsilon must be a number"),
        ({"epsilon_high": True}, TypeError, "epsilon_high must be a number or None"),
        ({"cispo_max": None}, TypeError, "cispo_max must be a number"),
        ({"sapo_temperature_pos": 0.0}, ValueError, "sapo_temperature_pos must be above 0 and finite"),
        ({"use_bias_correction_kl": "no"}, TypeError, "use_bias_correction_kl must be True or False"),
        ({"loss_type": "cispo", "cispo_min": 6.0}, ValueError, "cispo_min=6.0 is above cispo_max=5.0"),
        ({"sampling_correction_min": 5.0}, ValueError, "sampling_correction_min=5.0 is above"),
        ({"sampling_correction_max": float("nan")}, ValueError, "sampling_correction_max must be"),
        ({"log_ratio_clamp": True}, TypeError, "log_ratio_clamp=True"),
        ({"log_ratio_clamp": (1, 2, 3)}, TypeError, "log_ratio_clamp="),
        ({"top_entropy_quantile": 1.5}, ValueError, "at most 1"),
        ({"loss_type": ["grpo"]}, ValueError, "loss_type="),
    ],
)
def test_values_out_of_range_are_named(knobs, error, says):
    with pytest.raises(error, match=says):
        LossConfig(**knobs)


def test_log_ratio_bounds():
    assert hash(LossConfig(log_ratio_clamp=[-1.0, 1.0])) == hash(LossConfig(log_ratio_clamp=(-1.0, 1.0)))
    assert LossConfig(log_ratio_clamp=20.0).log_ratio_bounds == (-20.0, 20.0)
    assert LossConfig(log_ratio_clamp=(float("-inf"), 10.0)).log_ratio_bounds == (float("-inf"), 10.0)


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(TypeError, match=r"unknown keyword 'epsilom'.*epsilon_high"):
        resolve_config(None, {"epsilom": 0.1})


@pytest.mark.parametrize(("given", "meant"), [
    ("eplison_high", "epsilon_high"), ("old_per_token_logps", "old_logps"), ("mask", "completion_mask"),
])  # fmt: skip
def test_an_unknown_name_is_answered_by_the_nearest(given, meant):
    with pytest.raises(TypeError, match=rf"unknown keyword '{given}'\. Did you mean {meant}\b"):
        resolve_config(None, {given: None})


def test_nothing_is_proposed_for_a_name_like_no_other_nor_for_a_name_by_itself():
    for name in ("xyzzy", "loss_scale", "rewards"):
        with pytest.raises(TypeError) as error:
            resolve_config(None, {name: None})
        assert f"mean {name}?" not in str(error.value) and ("xyzzy" not in name or "Did you" not in str(error.value))


def test_the_keywords_that_are_proposed_are_the_loss_s():
    """The list stands below the function that has them."""
    assert set(_ARGUMENTS) <= set(inspect.signature(fused_grpo_loss).parameters)
    assert not set(_ARGUMENTS) & set(LossConfig.__dataclass_fields__)
