"""Records of measurements: which kernels they speak of, and the sections of README and docs/performance.md."""

import json
import re
import shutil

import pytest

from benchmark_rows import ENVIRONMENT, made_up
from benchmarks import environment, plots, records, report
from benchmarks.cases import SUITES

NEW = ENVIRONMENT | {"liger_kernel": "0.8.5", "trl": "1.16.0", "kernels": "0123"}


@pytest.fixture
def place(monkeypatch, tmp_path):
    """Pages and results of its own."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "README", tmp_path / "README.md")
    monkeypatch.setattr(records, "PERFORMANCE", tmp_path / "performance.md")
    for page in (records.README, records.PERFORMANCE):
        page.write_text("before\n<!-- record:new -->\nold\n<!-- /record -->\nafter\n")
    report.write(tmp_path / "results" / "new", NEW, made_up(SUITES["gpu"]))
    return tmp_path


def flat(text):
    """A paragraph on a line."""
    return re.sub(r"(?<=[^\n|])\n(?=[^\n|])", " ", text)


def test_the_pages_are_up_to_date():
    assert records.main(["--check"]) == 0, "run `python -m benchmarks.records --write`"
    for name in records.names():
        assert (records.RESULTS / name / records.PLOT).read_bytes().startswith(b"\x89PNG")


def test_kernels_told_by_their_text(monkeypatch, tmp_path):
    before, copy = environment.kernels_digest(), tmp_path / "grpo_kernels"
    shutil.copytree(environment.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(environment, "PACKAGE", copy)
    (copy / "api" / "loss.py").write_text("# not compiled\n")
    assert environment.kernels_digest() == before
    names = {path.relative_to(copy).as_posix() for path in environment.kernel_files()}
    assert {"triton_backend/row_kernels.py", "triton_backend/launch.py", "objective/terms.py"} <= names
    (copy / "linear" / "chunks.py").write_text("# changed\n")
    assert environment.kernels_digest() != before


def test_old_records_are_said_to_be(place, monkeypatch, capsys):
    assert records.main(["--write"]) == 0
    text = (place / "README.md").read_text()
    assert "**The kernels have changed since this was measured.**" in text
    assert text.startswith("before\n<!-- record:new -->\n## On an H200\n")
    assert text.endswith("<!-- /record -->\nafter\n")
    with monkeypatch.context() as patch:
        patch.setattr(environment, "run", lambda *_: None)
        assert records.main([]) == 0
    said = capsys.readouterr().out
    assert "git does not tell" in said and "new: older kernels than these" in said
    monkeypatch.setattr(environment, "kernels_digest", lambda: "0123")
    assert records.main(["--check"]) == 1 and records.main(["--write"]) == 0 and records.main(["--check"]) == 0
    assert "changed since" not in (place / "README.md").read_text()
    assert records.main([]) == 0
    assert "new: these kernels (NVIDIA H200, 2026-01-02, kernels of 0123456 with changes)" in capsys.readouterr().out


def test_results_are_adopted_with_their_commit(place, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "PLOTS", {plots.PLOT: plots.copy_multiples})
    monkeypatch.setattr(environment, "run", lambda *command: "feedbeefcafe" if "rev-parse" in command else None)
    run, kept = place / "run", place / "results" / "h100"
    shutil.move(place / "results" / "new", run)
    assert records.main(["--adopt", str(run), "h100"]) == 1  # the kernels are other ones
    assert "--commit" in capsys.readouterr().err and not records.names()
    with monkeypatch.context() as patch:
        patch.setattr(environment, "kernels_digest", lambda: "0123")
        assert records.main(["--adopt", str(run), "h100"]) == 0 and records.main(["--check"]) == 0
    text = flat((place / "README.md").read_text())
    assert "<!-- record:h100 -->" in text and "kernels of commit feedbee" in text and "changed since" not in text
    assert (kept / records.PLOT).exists() and (kept / "results.csv").exists()
    assert records.main(["--adopt", str(run), "h100", "--commit", "abcdef0123"]) == 0
    assert "kernels of commit abcdef0" in flat((place / "README.md").read_text())
    assert plots.load(kept)["environment"]["commit"] == "abcdef0123"


def test_what_is_not_there_or_of_another_run_is_said(place, capsys):
    def says(words, *arguments):
        return records.main([*arguments]) == 1 and words in capsys.readouterr().err

    assert says("There are: new.", "--write", "none")
    assert says("results.json", "--adopt", str(place / "nothing"), "h100")
    (place / "results" / "new" / "record.json").write_text(json.dumps({"date": "2020", "kernels_commit": "feedbee"}))
    assert says("is of 2020, the results beside it are of 2026", "--check")
    (place / "README.md").write_text("no section")
    assert says("no section", "--write")


def test_the_section_says_all(place):
    text = flat(records.section(records.load("new")))
    (line,) = (row for row in text.splitlines() if row.startswith("| forward + backward, V = 151936 bf16 "))
    assert line.split(" | ")[1:] == ["1.00", "**1.25**", "1.25", "1.75 (1.75)", "2.00", "14.0 |"]
    assert "torch.compile: not measured." in text
    assert "| forward + backward, sequence level, V = 151936 bf16 | 1.50 |" in text
    assert "50% masked, V = 151936 bf16 | 0.75 |" in text and "log-probs only, V = 50257 bf16 | 0.50 |" in text
    assert "quack's cross-entropy with its gradient, the nearest kernel of another loss (it is no GRPO): 1.10" in text
    assert "Slower than another" not in text and "do_bench" not in text
    assert "2026-01-02, kernels of commit 0123456 with changes, driver 570.1, torch 2.13.0, Triton 3.7.1," in text
    assert "Liger-Kernel 0.8.5, TRL 1.16.0, `python -m benchmarks --suite gpu --out DIR`" in text


def test_the_readme_has_the_main_lines(place):
    assert records.main(["--write"]) == 0
    brief, whole = (flat(page.read_text()) for page in (records.README, records.PERFORMANCE))
    rows = [line for line in brief.splitlines() if line.startswith("| ")][2:]
    assert "(8192 rows, V = 151936 bf16), the head's" in brief and len(rows) < 8
    for wanted in ("forward + backward", "forward + backward, sequence level", "log-probs only",
                   "head, forward + backward, H = 4096"):  # fmt: skip
        (row,) = (row for row in rows if row.startswith(f"| {wanted} |"))
        assert row.split(" | ")[2:] in [line.split(" | ")[2:] for line in whole.splitlines()]
    assert "(benchmarks/results/new/copy_multiples.png)" in brief and "docs/performance.md#the-record" in brief
    assert "(../benchmarks/results/new/copy_multiples.png)" in whole and "kernels of commit" in brief


def test_what_was_lost_is_said_in_the_table_or_not(place):
    rows = made_up(SUITES["gpu"])
    for row in (row for row in rows if row.implementation == "grpo_kernels"):
        if row.mode == "loss" and (row.vocab == 50257 or row.batch * row.length == 512):
            row.copy_multiple = 3.2
        if row.mode == "inplace" and row.objective == "sequence":
            row.copy_multiple = 1.8
    rows[0].do_bench_ms, rows[0].do_bench_copy_multiple = 1.5, 1.3
    report.write(place / "results" / "new", NEW, rows)
    record = records.load("new")
    assert len(records.quoted(record.rows)) < 22 < len(records.all_lines(record.rows))
    assert "V = 50257 bf16 out of place (3.20 beside" in flat(records.section(record, brief=True))
    text = flat(records.section(record))
    assert "forward + backward, V = 50257 bf16 out of place (3.20 beside Liger-Kernel's 1.75)" in text
    assert "sequence level, V = 151936 bf16 in place (1.80 beside Liger-Kernel's 1.75)" in text
    assert "| forward + backward, V = 50257 bf16 | 1.00 | 3.20 |" in text  # not in bold
    assert "| forward + backward, V = 151936 bf16, 512 rows" not in text
    assert "forward + backward, V = 151936 bf16, 512 rows out of place (3.20 beside" in text
    assert "By `triton.testing.do_bench` the first line takes 1.500 ms, 1.30 × a copy by the same timer." in text
