"""The traffic report: complete, within 80 columns, and it notices a law that is broken."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from benchmarks import linear_traffic, traffic_report
from benchmarks.counting import in_part
from counting import HostSync, interpreted
from grpo_kernels.linear import chunks, head
from grpo_kernels.objective.catalogue import LOSS_TYPES
from grpo_kernels.triton_backend import launch, row_kernels


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(text, JSON) of the whole report, from a process of its own, which interprets without being told."""
    file = tmp_path_factory.mktemp("traffic") / "rows.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "benchmarks.traffic_report", "--json", file],
                          env=env, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return done.stdout, json.loads(file.read_text())


def test_every_objective_keeps_the_law(report):
    text, found = report
    cases = {row["case"]: row for row in found["rows"]}
    assert set(LOSS_TYPES) <= set(cases) and len(cases) == len(list(traffic_report.cases()))
    assert not any(row["broken"] for row in found["rows"]) and "BROKEN" not in text


def test_every_head_keeps_the_law(report):
    text, found = report
    heads = {row["case"]: row for row in found["heads"]}
    assert list(heads) == [case.name for case in linear_traffic.CASES]
    assert not any(row["broken"] for row in heads.values())
    assert heads["head: grpo"]["products"] == 3 and heads["head: gspo, a mask"]["waits"] == 2
    assert f"All {len(found['rows']) + len(heads)} keep the law." in text


def test_the_table_is_narrow_and_says_what_it_cannot_know(report):
    text, _ = report
    assert max(map(len, text.splitlines())) <= 80
    assert "only a GPU's counters can say" in " ".join(text.split())


def test_bytes_are_those_of_the_dtype(report):
    """bf16 and fp32, 1 read + 1 write; the second pass counts as issued."""
    rows = {row["case"]: row for row in report[1]["rows"]}
    for name, size in (("grpo", 2), ("grpo, fp32", 4)):
        assert rows[name]["bytes"] == 2 * size and rows[name]["issued_bytes"] == pytest.approx(3 * size, rel=1e-3)
        (only,) = rows[name]["launches"]
        assert (only["kernel"], only["read"], only["write"]) == ("loss_kernel", 1, 1)


def test_lines_in_part_are_those_at_the_ends_of_rows(report):
    """None where rows start at lines; else few, and the launch as a whole leaves those at its own two ends."""
    rows = {row["case"]: row for row in report[1]["rows"]}
    for name in ("grpo", "gspo"):
        assert rows[f"{name}, rows on lines"]["part"] == 0 < rows[name]["part"] <= 3
        assert sum(each["part_of_launch"] for each in rows[name]["launches"]) <= 2
    assert rows["log-probs only"]["part"] == rows["  and without gradient"]["part"] == 0


def test_what_a_warp_writes_of_a_line():
    """512 bytes, of bf16: at a line, 16 bytes behind it, with lanes left out, and two warps that share a line."""
    lanes, every = 2 * np.arange(512, dtype=np.uint64), np.ones(512, bool)
    assert len(in_part(lanes + 1024, every, 2)) == 0
    assert sorted(in_part(lanes + 1040, every, 2) // 128) == [8, 12, 12, 16]
    assert sorted(in_part(lanes + 1024, lanes < 200, 2) // 128) == [9]
    assert sorted(in_part(lanes + 1024, lanes % 128 == 0, 2) // 128) == list(range(8, 16))


# --- a broken law shows ----------------------------------------------------------------------------


class Twice:
    """A kernel that is launched twice."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            for _ in range(2):
                self.kernel[grid](*args, **kwargs)

        return run


def reads_twice(monkeypatch):
    """The first pass over each row, once more in the same launch: memory may not see it, the issue slots do."""
    score_row = row_kernels.score_row
    monkeypatch.setattr(row_kernels, "score_row", lambda *args: (score_row(*args), score_row(*args))[1])


def launches_twice(monkeypatch):
    monkeypatch.setattr(launch, "logprob_kernel", Twice(launch.logprob_kernel))


def reads_masked_rows(monkeypatch):
    monkeypatch.setattr(row_kernels, "is_masked", lambda *_: False)


def writes_twice(monkeypatch):
    write_zeros = row_kernels.write_zeros
    monkeypatch.setattr(row_kernels, "write_zeros", lambda *args: (write_zeros(*args), write_zeros(*args))[1])


def leaves_rows_unwritten(monkeypatch):
    monkeypatch.setattr(row_kernels, "write_zeros", lambda *_: None)


def starts_at_16_bytes(monkeypatch):
    tile = launch._tile_of
    monkeypatch.setattr(
        launch, "_tile_of", lambda shape, V, size, wide, *rest: tile(shape, V, size, min(wide, 16), *rest)
    )


def copies_logits(monkeypatch):
    loss = launch.loss
    monkeypatch.setattr(launch, "loss", lambda logits, *args: loss(logits.clone(), *args))


def launches_many_small_ones(monkeypatch):
    monkeypatch.setattr(launch, "total_kernel", Twice(Twice(Twice(launch.total_kernel))))


def multiplies_in_fp32(monkeypatch):
    monkeypatch.setattr(head, "accumulate", lambda total, dz, h, first: total.add_(dz.float().T @ h.float()))


def projects_twice(monkeypatch):
    logits = head.ChunkedHead.logits
    monkeypatch.setattr(head.ChunkedHead, "logits", lambda self, h: (logits(self, h), logits(self, h))[1])


@functools.cache
def keeps_the_law(case: str) -> bool:
    """Here, as long as nothing is changed: once for each case."""
    return traffic_report.main(["--case", case]) == 0


@interpreted
def test_a_host_that_asks_once_more_is_noticed(monkeypatch):
    empty = chunks._empty
    monkeypatch.setattr(chunks, "_empty", lambda head, *a: (head.weight.sum().tolist(), empty(head, *a))[1])
    with pytest.raises(HostSync, match="the host would wait"):
        traffic_report.main(["--case", "head: grpo"])


@interpreted
@pytest.mark.parametrize(
    ("case", "defect", "says"),
    [
        ("head: grpo", multiplies_in_fp32, ["1 other, law 0", "aten._to_copy.default on a chunk's logits"]),
        ("head: gspo", projects_twice, ["4 products, law 3"]),
        ("head: log-probs only", launches_twice, ["2 launches, law 1"]),
        ("log-probs only", reads_twice, ["issued reads 2.000, law 1"]),
        ("grpo", reads_twice, ["issued reads 3.000, law 2"]),
        ("log-probs only", launches_twice, ["read 2.000, law 1", "2 launches over the logits, law 1"]),
        ("gspo", launches_twice, ["read 3.000, law 2", "3 launches over the logits, law 2"]),
        ("grpo, half masked", reads_masked_rows, ["read 1.000, law 0.5"]),
        ("grpo, half masked", writes_twice, ["issued writes 1.5"]),
        ("grpo, half masked", leaves_rows_unwritten, ["write 0.500, law 1"]),
        ("grpo", starts_at_16_bytes, ["102.5 lines of memory written in part per row, law 3"]),
        ("grpo", copies_logits, ["aten.clone.default on a tensor of the logits' size"]),
        ("grpo", launches_many_small_ones, ["10 small launches, law 8"]),
    ],
)
def test_a_broken_law_is_noticed(case, defect, says, monkeypatch, capsys):
    assert keeps_the_law(case) and "BROKEN" not in capsys.readouterr().out
    defect(monkeypatch)
    assert traffic_report.main(["--case", case]) == 1
    text = capsys.readouterr().out
    assert "1 of 1 break a law" in text
    for part in says:
        assert f"BROKEN: {part}" in text


@interpreted
def test_an_unknown_case_names_the_others(capsys):
    with pytest.raises(SystemExit):
        traffic_report.main(["--case", "nonsense"])
    assert "gspo" in capsys.readouterr().err


# --- the kept report -------------------------------------------------------------------------------


def test_the_kept_report_is_what_is_printed(report):
    """But for its first line, the versions: docs/performance.md links it."""
    kept = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "offline" / "traffic.txt"
    assert kept.read_text(encoding="utf-8").splitlines()[1:] == report[0].splitlines()[1:]
