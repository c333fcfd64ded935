"""The trainer's command line has every field of `LossConfig`; what is given there reaches the loss of the run."""

import dataclasses
import json
import math
import typing

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from grpo_kernels import LossConfig, group_advantages
from grpo_kernels.trainer import __main__ as entry
from grpo_kernels.trainer import loop
from grpo_kernels.trainer.arguments import parse
from grpo_kernels.trainer.loss_options import LEFT_OUT, in_flags, loss_fields, members
from grpo_kernels.trainer.options import OptionError, Options, flag
from trainer_cases import run, saved_model

pytestmark = pytest.mark.usefixtures("one_thread")

FIELDS = LossConfig.field_names()
# Where a field's second name or number is not to be had alone, or has to be in a range.
GIVEN = {
    "loss_type": "dapo", "policy_term": "sapo", "importance_sampling_level": "sequence",
    "loss_agg_mode": "batch-tokens", "kl_estimator": "k2", "scale_rewards": "none", "top_entropy_quantile": "0.5",
    "advantage_estimator": "rloo", "fipo_gamma": "0.5",
}  # fmt: skip
WITH = {"cispo_min": ["--loss-type", "cispo"], "fipo_gamma": ["--loss-type", "fipo"]}


def test_no_field_is_left_out_unless_named():
    assert LEFT_OUT.keys() == {
        "max_completion_length", "global_batch_size", "reward_weights", "sampling_correction",
        "sampling_correction_min", "sampling_correction_max",
    }  # fmt: skip
    assert set(FIELDS) - LEFT_OUT.keys() <= Options.__dataclass_fields__.keys()


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in LEFT_OUT or name == "max_completion_length"])
def test_every_field_is_an_option(name):
    if isinstance(LossConfig.__dataclass_fields__[name].default, bool):
        for given, value in ((flag(name), True), (flag(name).replace("--", "--no-", 1), False)):
            assert getattr(parse([given]).loss_config(7), name) is value
        return
    given = GIVEN.get(name, "1.5" if name != "max_completion_length" else "9")
    options = parse([*WITH.get(name, []), flag(name), given])
    length = 7 if options.max_completion_length is None else options.max_completion_length  # as a task has it
    value = getattr(options.loss_config(length), name)
    assert value == (given if isinstance(value, str) else float(given))
    assert value != LossConfig.__dataclass_fields__[name].default
    if type(None) in typing.get_args(typing.get_type_hints(LossConfig)[name]) and name not in LEFT_OUT:
        assert getattr(parse([flag(name), "none"]), name) is None
        assert parse([flag(name), "none"]).loss_config(7) == dataclasses.replace(
            Options().loss_config(7), **{name: None}
        )


@dataclasses.dataclass(frozen=True)
class Extended:
    """A config with new fields.

    Attributes:
        knob: how much of ε̂² there is, at ½;
            None: off.
        low, high: the ends; 100 % is
            possible.
        kind: one of `grpo_kernels.objective.catalogue.LEVELS`; None: no kind.
        style: ``"plain"`` or ``"fancy"``.

    Not a field: text.
    """

    knob: torch.Tensor | float | None = None
    low: int = 0
    high: "typing.Optional[int]" = None  # noqa: UP045
    kind: str | None = None
    style: str = "plain"


def test_a_new_field_becomes_an_option():
    made = {name: (hint, field.default, *field.metadata.values()) for name, hint, field in loss_fields(Extended)}
    ends = "the ends; 100 % is possible"
    names = ("token", "sequence", "sequence_token", "sequence_sum")
    assert made == {
        "knob": (float | None, None, "how much of epsilon^2 there is, at 1/2; none: off", None, False, True),
        "low": (int, 0, ends, None, False, True),
        "high": (int | None, None, ends, None, False, True),
        "kind": (str | None, None, f"one of {', '.join(names)}; none: no kind", (None, *names), False, True),
        "style": (str, "plain", "plain or fancy", ("plain", "fancy"), False, True),
    }


def test_every_name_has_choices():
    for name, hint in typing.get_type_hints(LossConfig).items():
        if str in members(hint) and name not in LEFT_OUT:
            assert Options.__dataclass_fields__[name].metadata["choices"], name
    assert all(field.metadata["help"] for field in dataclasses.fields(Options))


@pytest.mark.parametrize(
    ("given", "value"),
    [("none", None), ("20", 20.0), ("-inf 10", (-math.inf, 10.0)), ("-.5 1e3", (-0.5, 1e3)), ("-1e-3 1", (-1e-3, 1.0))],
)
def test_a_number_or_a_pair(given, value):
    assert parse(["--log-ratio-clamp", *given.split()]).log_ratio_clamp == value


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--loss-type cispo --epsilon-high 5", ["--epsilon-high means two things", "Say --cispo-max epsilon_high"]),
        ("--delta 0", ["--delta must be above 0"]),
        ("--delta 4 --loss-type sapo", ["--delta is read by clipped", "leave it none"]),
        ("--log-ratio-clamp 1 2 3", ["--log-ratio-clamp (1.0, 2.0, 3.0): it must be none, a number above 0"]),
        ("--log-ratio-clamp none 1", ["--log-ratio-clamp takes none alone"]),
        ("--loss-type gmpo --log-ratio-clamp 20", ["leave --log-ratio-clamp none"]),
        ("--loss-type gmpo --importance-sampling-level sequence", ["at --importance-sampling-level 'sequence'"]),
        ("--policy-term ppo", ["--policy-term must be one of none, clipped", "got ppo"]),
        ("--dual-clip many", ["--dual-clip", "'many'"]),
        ("--cispo-max none", ["--cispo-max", "'none'"]),
        ("--cispo-min 7 --loss-type cispo", ["--cispo-min 7.0 is above --cispo-max 5.0"]),
        ("--top-entropy-quantile 0.2 --gradient-accumulation-steps 2", ["--top-entropy-quantile", "-steps 1"]),
        ("--sampling-correction token_mask", ["--sampling-correction"]),
    ],
)
def test_what_the_config_refuses_is_said_in_flags(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse(argv.split())
    message = capsys.readouterr().err
    assert all(word in message for word in words) and message.count("\n") == 1


def test_names_in_formulas_stay():
    said = in_flags("cispo_max=1 + epsilon_high, dro_beta and None")
    assert said == "--cispo-max 1 + epsilon_high, --dro-beta and none"


# --- in a run -------------------------------------------------------------------------------------

SEVERAL = {"loss_type": "gspo", "policy_term": "clipped", "importance_sampling_level": "sequence_token", "delta": 4.0,
           "loss_agg_mode": "batch-tokens", "log_ratio_clamp": (-20.0, 10.0), "use_bias_correction_kl": True,
           "entropy_coef": 0.01, "top_entropy_quantile": 0.8, "dual_clip": 3.0}  # fmt: skip


def test_they_reach_the_loss_of_a_run(tmp_path, monkeypatch):
    seen, loss = [], loop.completion_loss
    monkeypatch.setattr(
        loop, "completion_loss", lambda *args, **kwargs: seen.append(kwargs["config"]) or loss(*args, **kwargs)
    )
    _, rows, _ = run(tmp_path, **SEVERAL, max_completion_length=3, steps=1)
    assert set(seen) == {LossConfig(beta=0.04, max_completion_length=3, **SEVERAL)}
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("how", [{"advantage_eps": 0.5}, {"advantage_unbiased": False}])
def test_advantages_are_as_asked_for(how, tmp_path):
    """Rewards of 0 and 1: the largest advantage of a group with one 1 is (1 − ¼)/(std + eps)."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    names = {"eps": how.get("advantage_eps", 1e-4), "unbiased": how.get("advantage_unbiased", True)}
    want = group_advantages(rewards, 4, **names).max().item()
    model = saved_model(tmp_path / "model")
    _, rows, _ = run(tmp_path / "run", model=model, reward=("test_trainer_loss_options:first_of_four",), steps=1, **how)
    assert rows[1]["advantage/max"] == pytest.approx(want, rel=1e-6)
    assert want != pytest.approx(group_advantages(rewards, 4).max().item(), rel=1e-3)


def first_of_four(prompts, completions, **columns):
    return [float(i % 4 == 0) for i in range(len(completions))]


# --- a run that goes on ---------------------------------------------------------------------------


def test_they_are_kept_in_checkpoints(tmp_path, capsys):
    model = saved_model(tmp_path / "model")
    run(tmp_path, model=model, steps=1, **SEVERAL)
    options = parse(["--resume", "--output-dir", str(tmp_path), "--steps", "2"])
    assert {name: getattr(options, name) for name in SEVERAL} == SEVERAL
    assert options.loss_config(3) == LossConfig(beta=0.04, max_completion_length=3, **SEVERAL)
    capsys.readouterr()
    for given, words in (("--delta none", "--delta is 4.0 in the checkpoint and not set here"),
                         ("--log-ratio-clamp 20", "--log-ratio-clamp is -20.0 10.0 in the checkpoint and 20.0 here"),
                         ("--no-use-bias-correction-kl", "--use-bias-correction-kl is True in the")):  # fmt: skip
        assert entry.main(["--resume", "--output-dir", str(tmp_path), *given.split()]) == 2
        assert words in capsys.readouterr().err
    assert entry.main(["--resume", "--output-dir", str(tmp_path), "--steps", "2"]) == 0


def test_a_checkpoint_from_before_an_option(tmp_path, capsys):
    """It was trained with the option's default: that may be said, and nothing else."""
    run(tmp_path, model=saved_model(tmp_path / "model"), steps=1)
    (path,) = (tmp_path / "checkpoints").glob("step-*/state.json")
    state = json.loads(path.read_text())
    del state["options"]["delta"], state["options"]["cispo_max"]
    path.write_text(json.dumps(state))
    capsys.readouterr()
    assert entry.main(["--resume", "--output-dir", str(tmp_path), "--delta", "4"]) == 2
    assert "--delta is not set in the checkpoint and 4.0 here" in capsys.readouterr().err
    assert entry.main(["--resume", "--output-dir", str(tmp_path), "--steps", "2", "--cispo-max", "5"]) == 0


def test_options_from_python_have_them_too():
    assert Options(loss_type="cispo", cispo_max=8).loss_config(1).cispo_max == 8
    with pytest.raises(OptionError, match="--advantage-unbiased must be True or False, got 2"):
        Options(advantage_unbiased=2)
