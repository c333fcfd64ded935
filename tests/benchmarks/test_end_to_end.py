"""`python -m benchmarks.end_to_end`: tiny policies on the CPU, and what becomes of numbers that only a GPU gives."""

import csv
import dataclasses
import json
import math
import warnings
import weakref

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[test]'")

from transformers.utils import logging

from benchmarks import end_to_end, step_rows, training_steps
from benchmarks import longest as search
from benchmarks.measure import Failed
from benchmarks.suite import ERROR, OK, OOM
from benchmarks.training_steps import FUSED, MODEL_ALONE, STOCK, ModelAlone, Run, Setting
from grpo_kernels.integrations.trl import FusedGRPOTrainer

CPU = torch.device("cpu")
TINY = Setting("tiny", 4, 16)
# fp32; a gradient sums over the 4 × 16 tokens, and each token's over 512 entries of the vocabulary.
TOLERANCE = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def talkative_again():
    """The command silences transformers."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def read(folder):
    with (folder / "end_to_end.csv").open(newline="") as file:
        return list(csv.DictReader(file)), json.loads((folder / "end_to_end.json").read_text())


def test_both_trainers_take_the_same_steps(tmp_path, capsys):
    given = ["--device", "cpu", "--steps", "3", "--beta", "0.1", "--shapes", "tiny-untied", "--checkpointing"]
    assert end_to_end.main([*given, "--minutes", "5", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert "tiny-untied, 4 x 16, checkpointing, beta 0.1, 3 steps" in lines
    rows, kept = read(tmp_path)
    assert [(row["trainer"], row["status"]) for row in rows] == [(MODEL_ALONE, OK), (STOCK, OK), (FUSED, OK)]
    assert {"commit", "date", "device", "torch", "trl", "transformers"} <= set(kept["environment"])
    stock, fused = kept["rows"][1:]
    for row in (stock, fused):
        assert len(row["losses"]) == len(row["grad_norms"]) == len(row["entropies"]) == 3
        assert min(row["grad_norms"]) > 0.1 and 0 < row["entropies"][0] < math.log(512)
        assert row["step_ms"] > 0 and row["rollout_ms"] > 0  # TRL still makes completions where the clock expects it
        assert row["least_ms"] <= row["step_ms"] <= row["most_ms"]
    for name in ("loss", "grad_norm", "entropy"):
        assert fused[f"{name}_difference"] <= TOLERANCE
    assert (tmp_path / "end_to_end.png").read_bytes().startswith(b"\x89PNG")


MODELS = []  # weak references


class Full(FusedGRPOTrainer):
    def _compute_loss(self, model, inputs):
        MODELS.append(weakref.ref(self.model))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 18.55 GiB.\nMore of it.")


class Broken(ModelAlone):
    def _compute_loss(self, model, inputs):
        raise ValueError("nothing\nworks")


def test_a_trainer_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(training_steps.TRAINERS, MODEL_ALONE, Broken)
    monkeypatch.setitem(training_steps.TRAINERS, FUSED, Full)
    given = ["--device", "cpu", "--steps", "1", "--hosts", "trl", "--out", str(tmp_path)]
    assert end_to_end.main(given) == 1  # for the error; memory that runs out is a result
    assert [model() for model in MODELS] == [None]  # the memory is free again
    said = capsys.readouterr().out
    assert "  model alone    error: ValueError: nothing\n" in said
    assert "  fused          out of memory: CUDA out of memory. Tried to allocate 18.55 GiB.\n" in said
    rows = read(tmp_path)[0]
    assert [row["status"] for row in rows] == [ERROR, OK, OOM]
    assert [bool(row["step_ms"]) for row in rows] == [False, True, False]
    assert (tmp_path / "end_to_end.png").exists()


@pytest.mark.parametrize(("shape", "untied"), [("tiny", False), ("tiny-untied", True)])
def test_the_model_alone_trains_what_every_loss_trains(shape, untied, monkeypatch):
    """The head of an untied model, too: what its gradient and its optimiser's state take is not the loss's."""
    with_gradient = []

    class Spy(ModelAlone):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            with_gradient.append({name for name, p in self.model.named_parameters() if p.grad is not None})
            return loss

    monkeypatch.setitem(training_steps.TRAINERS, MODEL_ALONE, Spy)
    training_steps.run(Setting(shape, 2, 4, steps=1), MODEL_ALONE, CPU)
    assert with_gradient == [{name for name, _ in training_steps.policy(shape, CPU).named_parameters()}]
    assert ("lm_head.weight" in with_gradient[0]) == untied


def test_the_same_weights_and_completions_each_time():
    first, second = (training_steps.policy("tiny", CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    made = [training_steps.random_rollouts(TINY)(["0"] * 4, None) for _ in range(2)]
    assert made[0] == made[1] and made[0]["logprobs"] is None
    assert [len(ids) for ids in made[0]["completion_ids"]] == [16] * 4
    assert min(map(min, made[0]["completion_ids"])) >= 2  # neither padding nor the end


# --- Numbers that only a GPU gives ------------------------------------------------------------------

GIB = 2**30


class Allocator:
    """What torch.cuda says of memory."""

    def __init__(self, monkeypatch):
        self.now = self.peak = 5
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.use())

    def use(self, *levels):
        self.peak = self.now
        for self.now in levels:
            self.peak = max(self.peak, self.now)


def test_peaks_of_passes_and_of_all(monkeypatch):
    memory = Allocator(monkeypatch)
    watch = training_steps.Watch(torch.device("cuda"))
    memory.use(100, 50)  # the model is made
    assert watch.pass_(lambda: memory.use(80, 60)) is None
    memory.use(90, 70)  # the optimiser
    watch.pass_(lambda: memory.use(75, 60))
    assert watch.bytes() == (100 - 5, 80 - 5)
    memory.use(200, 60)
    assert watch.bytes() == (200 - 5, 80 - 5)


@pytest.mark.parametrize(
    ("error", "found"),
    [(None, Failed(ERROR, "RuntimeError: launch failure")), (ValueError("first"), Failed(ERROR, "ValueError: first"))],
)
def test_a_device_that_takes_no_more_commands(error, found, monkeypatch):
    def run(*args):
        if error:
            raise error
        return ALL_RUN[STOCK]

    def free_memory(device):
        raise RuntimeError("launch failure\nand advice")

    monkeypatch.setattr(training_steps, "run", run)
    monkeypatch.setattr(training_steps, "free_memory", free_memory)
    assert training_steps.attempt(TINY, STOCK, CPU) == found


def made_up(step_ms, peak, in_passes, losses=(0.0, 1e-8)):
    return Run([1e4, step_ms, step_ms + 1], 3.0, peak, in_passes, list(losses), [2.0, 3.0], [6.0, 6.0])


def measured(monkeypatch, runs, fits=0, **given):
    """Rows of `measure`, of made-up runs whose peak is 1 GiB more every 1000 tokens; TRL's has room for ``fits``."""
    tried, room = [], 12 * GIB + fits * GIB // 1000

    def attempt(setting, trainer, device):
        more = (setting.length - TINY.length) * GIB // 1000
        if more:
            tried.append((trainer, setting.length, setting.steps))
        found = dataclasses.replace(runs[trainer], peak_bytes=runs[trainer].peak_bytes + more)
        return Failed(OOM, "no room") if more and found.peak_bytes > room else found

    monkeypatch.setattr(training_steps, "attempt", attempt)
    monkeypatch.setattr(training_steps, "room", lambda device: room)
    return end_to_end.measure(TINY, CPU, **{"search": False, "spent": lambda: False, **given}), tried


ALL_RUN = {
    MODEL_ALONE: made_up(100.0, 9 * GIB, 8 * GIB),
    STOCK: made_up(120.0, 12 * GIB, 11 * GIB),
    FUSED: made_up(108.0, 15 * GIB, 10 * GIB, losses=(0.0, 3e-8)),
}


def test_memory_of_the_loss_alone_and_what_changes(monkeypatch):
    rows, _ = measured(monkeypatch, ALL_RUN)
    assert [row.loss_bytes for row in rows] == [None, 3 * GIB, 2 * GIB]
    assert rows[1].step_ms == 120.5 and rows[1].least_ms == 120.0  # without the first step
    assert rows[2].loss_difference == pytest.approx(2e-8)  # relative to 1, not to 3e-8
    assert rows[2].grad_norm_difference == rows[2].entropy_difference == 0.0
    text = step_rows.table(rows).splitlines()
    assert text[2].split() == ["model", "alone", "100.5", "100.0-101.0", "9.00"]
    assert text[3].split() == ["TRL", "120.5", "120.0-121.0", "12.00", "3.00"]
    assert text[4].split() == ["fused", "108.5", "108.0-109.0", "15.00", "2.00", "-10.0%", "+25.0%"]
    assert max(map(len, text)) <= 80


def test_differences():
    difference = step_rows.relative_difference
    assert difference([1.0, 2.0], [1.0, 2.5], 0.0) == pytest.approx(0.2)
    assert difference([0.0], [0.0], 0.0) == 0.0
    assert math.isnan(difference([math.nan, 1.0], [1.0, 1.0], 0.0))
    assert math.isnan(difference([1.0], [1.0, 1.0], 0.0))


def test_numbers_that_are_not_finite_are_kept_as_none(tmp_path, monkeypatch):
    runs = {**ALL_RUN, FUSED: made_up(108.0, 15 * GIB, 10 * GIB, losses=(math.nan, 0.0))}
    rows, _ = measured(monkeypatch, runs)
    assert "difference, fused: loss nan" in step_rows.table(rows)
    step_rows.write(tmp_path, {"commit": None}, rows)
    assert read(tmp_path)[1]["rows"][2]["losses"] == [None, 0.0]


def test_the_longest_that_fits(monkeypatch, tmp_path):
    rows, tried = measured(monkeypatch, ALL_RUN, fits=5000, search=True)
    assert [row.longest is None for row in rows] == [True, False, False]
    for row, fits in zip(rows[1:], (5016, 2016)):  # fused has 3 GiB more there
        assert row.longest <= fits < row.too_long <= row.longest + 256
        assert sum(trainer == row.trainer for trainer, _, _ in tried) <= search.PROBES
    assert {steps for _, _, steps in tried} == {2}
    line = f"  longest T that fits, TRL: {rows[1].longest} ({rows[1].too_long} does not)"
    assert line in step_rows.table(rows).splitlines()
    where = end_to_end.environment.describe(CPU)
    assert step_rows.draw(where, rows, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_kept_as_they_come(monkeypatch):
    kept, times = [], iter([False] * 2 + [True] * 9)
    rows, _ = measured(monkeypatch, ALL_RUN, keep=lambda rows: kept.append(len(rows)))
    assert kept == [1, 2, 3]
    rows, _ = measured(monkeypatch, ALL_RUN, spent=lambda: next(times), search=True)
    assert [row.trainer for row in rows] == [MODEL_ALONE, STOCK, FUSED]  # and no search
    rows, tried = measured(monkeypatch, ALL_RUN, spent=lambda: True, search=True)
    assert [row.trainer for row in rows] == [MODEL_ALONE] and not tried
    assert step_rows.table(rows)


def test_what_was_kept_outlives_the_run(monkeypatch, tmp_path):
    def attempt(setting, trainer, device):
        if trainer == FUSED:
            raise KeyboardInterrupt
        return ALL_RUN[trainer]

    monkeypatch.setattr(training_steps, "attempt", attempt)
    with pytest.raises(KeyboardInterrupt):
        end_to_end.main(["--device", "cpu", "--out", str(tmp_path)])
    assert [row["trainer"] for row in read(tmp_path)[0]] == [MODEL_ALONE, STOCK]


def test_how_often_the_host_waits(monkeypatch):
    """As PyTorch warns of it: a run of each trainer whose steps wait twice, and of TRL's once more."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def attempt(setting, trainer, device):
        if modes and modes[-1] == "warn":
            for _ in range(setting.steps * (3 if trainer == STOCK else 2)):
                warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        return ALL_RUN[trainer]

    monkeypatch.setattr(training_steps, "attempt", attempt)
    rows = end_to_end.measure(TINY, CPU, False, lambda: False, waits=True)
    assert [row.host_waits for row in rows] == [None, 3.0, 2.0] and modes == ["warn", "default"] * 2
    assert "  times per step that the host waits for the GPU: TRL 3.0, fused 2.0" in step_rows.table(rows)


def test_an_error_on_the_way_to_the_longest(monkeypatch):
    def attempt(setting, trainer, device):
        return ALL_RUN[trainer] if setting.length < 100 else Failed(ERROR, "IndexError: too long")

    monkeypatch.setattr(training_steps, "attempt", attempt)
    monkeypatch.setattr(training_steps, "room", lambda device: 99 * GIB)
    rows = end_to_end.measure(TINY, CPU, True, lambda: False)
    assert rows[1].status == ERROR and rows[1].detail == "T = 512: IndexError: too long"


def line(T, constant=3.7, per_token=0.8e-3):
    return int((constant + per_token * T) * GIB)


def bent(T):
    """The optimiser's peak does not depend on T; above it, the passes' does."""
    return max(line(T), 5 * GIB)


@pytest.mark.parametrize("share", (1.0, 0.97, 0.9), ids=("no gaps", "3% gaps", "10% gaps"))
@pytest.mark.parametrize("peak", (line, bent))
@pytest.mark.parametrize("start", (16, 1024, 4000))
@pytest.mark.parametrize("GiB", (24, 80, 139))
def test_the_longest_in_few_runs(start, peak, share, GiB):
    tried, room = [], GiB * GIB

    def run(T):
        tried.append(T)
        return peak(T) if peak(T) <= share * room else None

    found = search.longest(run, start, peak(start), room, lambda: False)
    assert len(tried) == len(set(tried)) <= search.PROBES
    if peak is line and start > 16:
        assert len(tried) <= {1.0: 3, 0.97: 4, 0.9: 6}[share]
    if found.fits == search.LONGEST:
        assert found.too_long is None
        return
    assert peak(found.fits) <= share * room < peak(found.too_long)
    if peak is line or start > 1024:
        assert found.too_long - found.fits <= max(search.UNIT, search.STEP * found.too_long)


def test_the_longest_where_the_start_does_not_fit():
    tried = []

    def run(T):
        tried.append(T)
        return line(T) if T <= 1500 else None

    found = search.longest(run, 4000, None, line(1500), lambda: False)
    assert found == (1280, 1536) and len(tried) <= search.PROBES
    assert search.longest(lambda T: None, 100, None, GIB, lambda: False) == (None, 100)
    assert search.longest(run, 1024, line(1024), GIB, lambda: True) == (1024, None)


# --- The command ------------------------------------------------------------------------------------


def test_no_setting_begins_after_the_time(capsys):
    assert end_to_end.main(["--device", "cpu", "--minutes", "1e-9"]) == 1
    said = capsys.readouterr().out
    assert "left out, --minutes 1e-09 are over: tiny, 4 x 16, no checkpointing" in said


def test_verl_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(training_steps, "missing_for_verl", lambda: ["verl", "peft"])
    assert end_to_end.parse_arguments(["--device", "cpu"]).hosts == ["trl"]
    with pytest.raises(SystemExit):
        end_to_end.parse_arguments(["--device", "cpu", "--hosts", "verl"])
    assert "--hosts verl needs verl, peft, not installed here: pip install" in capsys.readouterr().err
    monkeypatch.setattr(training_steps, "missing_for_verl", lambda: [])
    assert end_to_end.parse_arguments(["--device", "cpu"]).hosts == ["trl", "verl"]
    assert end_to_end.parse_arguments(["--device", "cpu", "--beta", "0.1"]).hosts == ["trl"]
    with pytest.raises(SystemExit):
        end_to_end.parse_arguments(["--device", "cpu", "--hosts", "verl", "--beta", "0", "0.1"])
    assert "--beta must be 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512)],
)
def test_the_models_that_the_shapes_are_of(shape, parameters):
    """As many parameters as Qwen's, whose queries, keys and values have a bias."""
    c = training_steps.SHAPES[shape]
    H, V, inner = c["hidden_size"], c["vocab_size"], c["intermediate_size"]
    kv = H // c["num_attention_heads"] * c["num_key_value_heads"]
    layer = 2 * H * H + 2 * H * kv + H + 2 * kv + 3 * H * inner + 2 * H
    head = 0 if c["tie_word_embeddings"] else V * H
    assert V * H + c["num_hidden_layers"] * layer + H + head == parameters


def test_settings():
    given = end_to_end.parse_arguments("--device cpu --lengths 16 4000 --beta 0 0.1 --batch 2".split())
    assert [(s.length, s.checkpointing, s.beta) for s in end_to_end.settings(given)] == [
        (16, False, 0.0), (16, False, 0.1), (4000, True, 0.0), (4000, True, 0.1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "words"),
    [("--longest", "--longest needs a GPU"), ("--waits", "--waits needs a GPU"), ("--batch 1", "one group"),
     ("--steps 0", "at least 1"), ("--lengths 0", "at least 1"), ("--minutes 0", "positive")],
)  # fmt: skip
def test_bad_arguments(argv, words, capsys):
    with pytest.raises(SystemExit):
        end_to_end.parse_arguments(["--device", "cpu", *argv.split()])
    assert words in capsys.readouterr().err
