"""pass@k of the trainer: the estimate, its samples, which training does not notice, and where it shows."""

import io
import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_kernels.trainer import checkpoint, cli, plots
from grpo_kernels.trainer.arguments import parse
from grpo_kernels.trainer.console import Reporter
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.pass_at_k import ks_of, pass_at_k, pass_rates, rates_in
from grpo_kernels.trainer.randomness import seed_all, set_aside
from grpo_kernels.trainer.records import Rows
from trainer_cases import rows_of, run, saved_model, starts_even

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = math.nan


def one(c, n, k):
    return pass_at_k(torch.tensor([c]), n, k).item()


# --- the estimate ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c", "n", "k", "wanted"),
    [
        (1, 4, 1, 1 / 4),
        (1, 4, 2, 1 / 2),  # 1 − C(3, 2)/C(4, 2) = 1 − 3/6
        (2, 4, 2, 5 / 6),  # 1 − 1/6
        (3, 10, 5, 11 / 12),  # 1 − C(7, 5)/C(10, 5) = 1 − 21/252
        (3, 4, 2, 1.0),  # of two one is right, since only one is wrong
        (1, 4, 4, 1.0),
        (0, 4, 4, 0.0),
        (0, 4, 1, 0.0),
        (4, 4, 1, 1.0),
        (4, 4, 4, 1.0),
        (1, 1, 1, 1.0),
        (0, 1, 1, 0.0),
    ],
)
def test_by_hand(c, n, k, wanted):
    assert one(c, n, k) == pytest.approx(wanted, rel=4 * n * 2**-53, abs=0.0)


def test_against_the_binomials():
    """To the rounding of c factors in float64, and of 1 minus their product."""
    for n in (1, 2, 3, 7, 16):
        for k in range(1, n + 1):
            got = pass_at_k(torch.arange(n + 1), n, k)
            assert got.dtype == torch.float64 and got.shape == (n + 1,)
            for c in range(n + 1):
                wanted = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
                assert abs(Fraction(got[c].item()) - wanted) <= Fraction(3 * n + 1, 2**53), (n, c, k)


@pytest.mark.parametrize(
    ("c", "k", "wanted"), [(1, 5000, 0.5), (2, 5000, 1 - 0.5 * 4999 / 9999), (5001, 5000, 1.0), (5000, 1, 0.5)]
)
def test_many_samples_overflow_nothing(c, k, wanted):
    """C(10000, 5000) has 3008 digits."""
    assert one(c, 10_000, k) == pytest.approx(wanted, rel=0.0, abs=(3 * c + 1) * 2**-53)


def test_it_is_unbiased():
    """Over all outcomes of four samples of a policy that is right three times in ten."""
    p, n = Fraction(3, 10), 4
    for k in range(1, n + 1):
        expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * Fraction(one(c, n, k)) for c in range(n + 1))
        assert float(expected) == pytest.approx(float(1 - (1 - p) ** k), abs=16 * 2**-53)


@pytest.mark.parametrize(("n", "k"), [(4, 5), (4, 0), (4, -1)])
def test_k_is_from_1_to_n(n, k):
    with pytest.raises(ValueError, match=f"k must be from 1 to n = 4, got {k}. Sample at least k"):
        one(1, n, k)


@pytest.mark.parametrize("c", (-1, 5))
def test_counts_are_from_0_to_n(c):
    with pytest.raises(ValueError, match="correct must be from 0 to n = 4"):
        one(c, 4, 2)


def test_ks():
    assert [ks_of(n) for n in (1, 2, 3, 8, 10)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 10]]


def test_rates_of_rewards():
    """Problems with 1, 0, 2 and 1 of 3 correct: not below 1, and not None. A problem of None alone is left out."""
    rewards = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.9, 0.0], [1.0, 0.0, 2.0], [NAN, 1.0, NAN], [NAN, NAN, NAN]])
    rates = pass_rates(rewards)
    wanted = {"eval/pass@1": (1 + 0 + 2 + 1) / 12, "eval/pass@2": (2 / 3 + 0 + 1 + 2 / 3) / 4, "eval/pass@3": 3 / 4}
    assert list(rates) == list(wanted) and rates == pytest.approx(wanted, rel=20 * 2**-53)
    assert math.isnan(pass_rates(torch.full((2, 1), NAN))["eval/pass@1"])


# --- random generators ----------------------------------------------------------------------------


def drawn():
    return torch.rand(2).tolist(), random.random(), np.random.rand()


def test_generators_go_on_as_if_nothing_had_been_drawn():
    seed_all(3)
    first = [drawn(), drawn()]
    seed_all(3)
    again = [drawn()]
    with pytest.raises(RuntimeError), set_aside(7):
        inside = drawn()
        raise RuntimeError
    again.append(drawn())
    seed_all(7)
    assert again == first and inside == drawn()


# --- runs -----------------------------------------------------------------------------------------

SETTINGS = {"batch_size": 2, "num_generations": 4, "num_minibatches": 2, "learning_rate": 0.02, "samples_every": 0,
            "steps": 4}  # fmt: skip
NAMES = ("eval/pass@1", "eval/pass@2", "eval/pass@4", "eval/pass@5")


def draws_too(prompts, completions, **columns):
    """A reward that uses the generators, as a judge that breaks ties may."""
    return [float(random.random() + np.random.rand() + torch.rand(()).item() > 1.5) for _ in completions]


@pytest.fixture
def settings(tmp_path):
    """Problems without answers: the accuracy is the mean of the first reward, which is 1 now and then."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{a}+{a + 1}="}}\n' for a in range(40)))
    return {**SETTINGS, "model": saved_model(tmp_path / "start"), "dataset": str(data), "held_out": 30,
            "max_completion_length": 3, "reward": ("trainer_cases:starts_even",)}  # fmt: skip


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)  # what takes the time


def weights(directory):
    return load_file(directory / "model" / "model.safetensors")


def test_a_run_measures_it(tmp_path, settings, monkeypatch):
    """At each evaluation; and what it says of the last policy is what its completions say, pair by pair."""
    pictures = []
    monkeypatch.setattr(cli, "save_curves", lambda rows, *_: pictures.append(rates_in(rows)))
    result, rows, said = run(tmp_path / "run", **settings, eval_samples=5, temperature=0.7, top_k=6)
    measured = [row for row in rows if "eval/accuracy" in row]
    assert [row["step"] for row in measured] == [0, 2, 4] and pictures == [list(NAMES)]
    for row in measured:
        assert list(row) == ["step", "eval/accuracy", *NAMES]
        values = [row[name] for name in NAMES]
        assert values == sorted(values) and 0 < values[0] < values[-1] <= 1
    assert measured[0]["eval/pass@1"] != measured[-1]["eval/pass@1"]

    options = Options(**settings, top_k=6, temperature=0.7)
    tokenizer = AutoTokenizer.from_pretrained(result.model, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(result.model).eval()
    held_out = cli.build(options, torch.device("cpu")).task.held_out
    assert len(held_out) == 30
    prompts = [each.prompt for each in held_out for _ in range(5)]
    torch.manual_seed(0)
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = policy.generate(**encoded, do_sample=True, temperature=0.7, top_k=6, top_p=1.0, max_new_tokens=3)
    texts = tokenizer.batch_decode(ids[:, encoded["input_ids"].shape[1] :])  # a special token is wrong
    right = [starts_even(None, texts[i : i + 5]) for i in range(0, len(texts), 5)]
    for k in (1, 2, 4, 5):
        chosen = [[max(each) for each in itertools.combinations(rewards, k)] for rewards in right]
        wanted = sum(sum(each) / len(each) for each in chosen) / len(chosen)
        assert measured[-1][f"eval/pass@{k}"] == pytest.approx(wanted, rel=1e-12)

    assert all(f"{name.removeprefix('eval/')}, held-out, sampled" in said for name in NAMES)
    before, after = (f"{measured[i]['eval/pass@5']:.3f}" for i in (0, -1))
    (line,) = [line for line in said.splitlines() if line.startswith("pass@5, held-out")]
    assert line.replace("│", " ").split()[-2:] == [before, after]
    assert f"  pass@1 {measured[-1]['eval/pass@1']:.3f}  pass@5 {after}\n" in said
    assert max(len(line) for line in said.splitlines() if str(tmp_path) not in line) <= 80


@pytest.mark.parametrize("at_once", (512, 12, 3))
def test_batches_of_any_size(tmp_path, settings, monkeypatch, no_picture, at_once):
    """Every held-out problem once; a problem's completions stay together."""
    seen = []
    monkeypatch.setattr("grpo_kernels.trainer.loop.EVALUATED_AT_ONCE", at_once)
    monkeypatch.setattr("grpo_kernels.trainer.loop.pass_rates", lambda rewards: seen.append(rewards.shape) or {})
    run(tmp_path / "run", **settings | {"steps": 1}, eval_samples=5)
    assert seen == [(30, 5), (30, 5)]


@pytest.mark.parametrize("reward", ("trainer_cases:starts_even", "test_trainer_pass_at_k:draws_too"))
def test_training_does_not_notice(tmp_path, settings, no_picture, reward):
    """The same weights, bit by bit, and the same rows but for the new numbers."""
    settings = settings | {"reward": (reward,)}
    _, without, _ = run(tmp_path / "without", **settings)
    _, rows, _ = run(tmp_path / "with", **settings, eval_samples=5)
    assert any(name in row for row in rows for name in NAMES)
    assert [{name: x for name, x in row.items() if name not in NAMES} for row in rows] == without
    a, b = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Exception):
    """In the place of a kill."""


def test_a_resumed_run_gives_the_same_numbers(tmp_path, settings, no_picture, monkeypatch):
    settings = settings | {"save_every": 1, "eval_samples": 5}
    run(tmp_path / "whole", **settings)
    save = checkpoint.RunSaver.save

    def stopping(self, optimizer, progress, last):
        save(self, optimizer, progress, last)
        if progress.step == 3:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.RunSaver, "save", stopping)
        with pytest.raises(Stopped):
            run(tmp_path / "part", **settings)
    _, rows, said = run(tmp_path / "part", **settings, resume=True)
    assert "going on from the checkpoint of step 3" in said
    assert rows == rows_of(tmp_path / "whole") and NAMES[-1] in rows[-1]


def test_it_may_change_when_a_run_goes_on(tmp_path, settings, no_picture):
    run(tmp_path / "run", **settings)
    _, rows, said = run(tmp_path / "run", **settings | {"steps": 5}, eval_samples=2, resume=True)
    assert [row["step"] for row in rows if "eval/pass@2" in row] == [5]
    (line,) = [line for line in said.splitlines() if line.startswith("pass@2, held-out")]
    assert line.replace("│", " ").split()[-2] == "-"


# --- options, console, curves, TensorBoard --------------------------------------------------------


def test_options():
    assert Options().eval_samples == 0 and parse(["--eval-samples", "16"]).eval_samples == 16
    with pytest.raises(OptionError, match="--eval-samples must be 0 or more"):
        Options(eval_samples=-1)
    with pytest.raises(OptionError, match="--eval-samples are sampled every --eval-every steps, which is 0"):
        Options(eval_samples=4, eval_every=0)


@pytest.mark.parametrize(("n", "line"), [(1, "  pass@1 0.250"), (64, "  pass@1 0.250  pass@64 0.750")])
def test_a_line_of_progress_fits_80_columns(n, line):
    console = Console(file=io.StringIO(), width=80)
    row = {f"eval/pass@{k}": 0.25 if k == 1 else 0.5 if k < n else 0.75 for k in ks_of(n)}
    with Reporter(Options(eval_samples=n), console) as reporter:
        reporter.row({"step": 10, "reward": 0.5, "kl": 0.1, "entropy": 0.5, "step_time": 1.0})
        reporter.row({"step": 10, "eval/accuracy": 0.4, **row})
    lines = console.file.getvalue().splitlines()
    assert lines[1] == line and max(map(len, lines)) <= 80


@pytest.mark.parametrize("measured", (True, False))
def test_curves_have_it(monkeypatch, tmp_path, measured):
    """Smallest k first, whatever the order that a run has measured them in; the legend is the other way round."""
    figures, real = [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda title: figures.append(real(title)) or figures[-1])
    monkeypatch.setattr(plots.Figure, "savefig", lambda *_: None)  # what takes the time
    rows = [{"step": i, "eval/accuracy": 0.1} for i in range(2)]
    if measured:
        rows[0] |= {"eval/pass@1": 0.1, "eval/pass@16": 0.5}
        rows[1] |= {"eval/pass@1": 0.2, "eval/pass@4": 0.4, "eval/pass@16": 0.7}
    plots.save_curves(Rows(rows), Options(), "a task", tmp_path / "curves.png")
    (axes,) = [axes for axes in figures[-1][1] if axes.get_title(loc="left") == "Held-out accuracy"]
    if not measured:
        assert axes.get_legend() is None and len(axes.lines) == 1 and axes.get_ylabel() == "greedy"
        return
    labels = ["greedy", "pass@1", "pass@4", "pass@16"]
    assert axes.get_legend_handles_labels()[1] == labels
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels[::-1]
    assert axes.lines[3].get_ydata().tolist() == [0.5, 0.7] and axes.get_ylabel() == "share of problems"


def test_tensorboard_has_it(tmp_path, settings, no_picture):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install '.[trainer]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, rows, _ = run(tmp_path / "run", **settings, eval_samples=5)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in NAMES:
        got = {event.step: event.value for event in events.Scalars(name)}
        assert got == {row["step"]: pytest.approx(row[name], rel=2**-23) for row in rows if name in row}
