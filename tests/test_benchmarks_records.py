"""Records of measurements: which kernels they speak of, and the README's section."""

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
    """A README and results of its own."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("before\n<!-- record:new -->\nold\n<!-- /record -->\nafter\n")
    rows = made_up(SUITES["gpu"])
    report.write(tmp_path / "results" / "new", NEW, rows)
    return tmp_path


def flat(text):
    """A paragraph on a line."""
    return re.sub(r"(?<=[^\n|])\n(?=[^\n|])", " ", text)


def test_the_readme_is_up_to_date():
    assert records.main(["--check"]) == 0, "run `python -m benchmarks.records --write`"


def test_the_plot_that_the_readme_shows_is_there():
    for name in records.names():
        assert (records.RESULTS / name / records.PLOT).read_bytes().startswith(b"\x89PNG")


def test_kernels_told_by_their_text(monkeypatch, tmp_path):
    before = environment.kernels_digest()
    copy = tmp_path / "grpo_kernels"
    shutil.copytree(environment.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(environment, "PACKAGE", copy)
    assert environment.kernels_digest() == before
    (copy / "api" / "loss.py").write_text("# not compiled\n")
    assert environment.kernels_digest() == before
    names = {path.relative_to(copy).as_posix() for path in environment.kernel_files()}
    wanted = {"triton_backend/row_kernels.py", "triton_backend/launch.py", "objective/terms.py", "linear/chunks.py"}
    assert wanted <= names
    with (copy / "triton_backend" / "launch.py").open("a") as file:
        file.write("# changed\n")
    assert environment.kernels_digest() != before


def test_old_records_are_said_to_be(place, monkeypatch, capsys):
    assert records.main(["--write"]) == 0
    text = (place / "README.md").read_text()
    assert "**The kernels have changed since this was measured.**" in text
    assert text.startswith("before\n<!-- record:new -->\n## On an H200\n") and text.endswith(
        "<!-- /record -->\nafter\n"
    )
    monkeypatch.setattr(environment, "kernels_digest", lambda: "0123")
    assert records.main(["--check"]) == 1 and records.main(["--write"]) == 0 and records.main(["--check"]) == 0
    assert "changed since" not in (place / "README.md").read_text()
    capsys.readouterr()
    assert records.main([]) == 0
    assert "new: these kernels (NVIDIA H200, 2026-01-02, kernels of 0123456 with changes)" in capsys.readouterr().out


def test_without_git(place, monkeypatch, capsys):
    monkeypatch.setattr(environment, "run", lambda *_: None)
    assert records.main([]) == 0
    out = capsys.readouterr().out
    assert "git does not tell" in out and "new: older kernels than these" in out


def test_another_record_is_one_command(place, capsys):
    (place / "results" / "newer").mkdir()
    shutil.copy(place / "results" / "new" / "results.json", place / "results" / "newer")
    beside = {
        "date": NEW["date"],
        "kernels_commit": "feedbeefcafe",
        "command": "python -m benchmarks --suite gpu --minutes 2 --out DIR",
    }
    (place / "results" / "newer" / "record.json").write_text(json.dumps(beside))
    assert records.main(["--write", "newer"]) == 0
    text = flat((place / "README.md").read_text())
    assert "<!-- record:newer -->" in text
    assert "kernels of commit feedbee, `python -m benchmarks --suite gpu --minutes 2 --out DIR`" in text
    assert records.main(["--write", "none"]) == 1 and "There are: new, newer." in capsys.readouterr().err
    (place / "README.md").write_text("no section")
    assert records.main(["--write"]) == 1 and "no section" in capsys.readouterr().err


def test_results_are_adopted(place, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    def git(*command):
        return "feedbeefcafe" if "rev-parse" in command else None

    monkeypatch.setattr(environment, "run", git)
    source = place / "results" / "new"
    shutil.move(source, place / "run")
    assert records.main(["--adopt", str(place / "run"), "h100"]) == 1  # the kernels are other ones
    assert "--commit" in capsys.readouterr().err and not records.names()
    monkeypatch.setattr(environment, "kernels_digest", lambda: "0123")
    assert records.main(["--adopt", str(place / "run"), "h100"]) == 0
    text = flat((place / "README.md").read_text())
    assert "<!-- record:h100 -->" in text and "kernels of commit feedbee" in text and "changed since" not in text
    assert (place / "results" / "h100" / records.PLOT).exists() and records.main(["--check"]) == 0
    assert records.main(["--adopt", str(place / "run"), "h100", "--commit", "abcdef0123"]) == 0
    assert "kernels of commit abcdef0" in flat((place / "README.md").read_text())
    assert plots.load(place / "results" / "h100")["environment"]["commit"] == "abcdef0123"
    assert records.main(["--adopt", str(place / "nothing"), "h100"]) == 1


def test_a_record_json_of_another_run_is_refused(place, capsys):
    (place / "results" / "new" / "record.json").write_text(json.dumps({"date": "2020", "kernels_commit": "feedbee"}))
    assert records.main(["--check"]) == 1 and "is of 2020, the results beside it are of 2026" in capsys.readouterr().err


def test_the_section_says_all(place):
    text = flat(records.section(records.load("new")))
    (line,) = (row for row in text.splitlines() if row.startswith("| forward + backward, V = 151936 bf16 "))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [
        "1.00", "**1.25**", "1.25", "1.75 (1.75)", "2.00", "14.0", "not measured"
    ]  # fmt: skip
    assert "| forward + backward, sequence level, V = 151936 bf16 | 1.50 |" in text
    assert "50% masked, V = 151936 bf16 | 0.75 |" in text and "log-probs only, V = 50257 bf16 | 0.50 |" in text
    assert "quack's cross-entropy with its gradient, the nearest kernel of another loss (it is no GRPO): 1.10" in text
    assert "Slower than another" not in text and "do_bench" not in text


def test_what_was_lost_is_said(place):
    rows = made_up(SUITES["gpu"])
    for row in rows:
        if row.implementation == "grpo_kernels" and row.vocab == 50257 and row.mode == "loss":
            row.copy_multiple = 3.2
        if row.implementation == "grpo_kernels" and row.mode == "inplace" and row.objective == "sequence":
            row.copy_multiple = 1.8
    rows[0].do_bench_ms, rows[0].do_bench_copy_multiple = 1.5, 1.3
    report.write(place / "results" / "new", NEW, rows)
    text = flat(records.section(records.load("new")))
    assert "forward + backward, V = 50257 bf16 out of place (3.20 beside Liger-Kernel's 1.75)" in text
    assert "sequence level, V = 151936 bf16 in place (1.80 beside Liger-Kernel's 1.75)" in text
    assert "| forward + backward, V = 50257 bf16 | 1.00 | 3.20 |" in text  # not in bold
    assert "By `triton.testing.do_bench` the first line takes 1.500 ms, 1.30 × a copy by the same timer." in text


def test_the_table_is_short_and_hides_no_loss(place):
    rows = made_up(SUITES["gpu"])
    for row in rows:
        if row.implementation == "grpo_kernels" and row.mode == "loss" and row.batch * row.length == 512:
            row.copy_multiple = 3.0
    report.write(place / "results" / "new", NEW, rows)
    record = records.load("new")
    assert len(records.quoted(record.rows)) < 20 < len(records.all_lines(record.rows))
    text = flat(records.section(record))
    assert "| forward + backward, V = 151936 bf16, 512 rows" not in text
    assert "**Slower than another:** forward + backward, V = 151936 bf16, 512 rows out of place (3.00 beside" in text


def test_the_plot_holds_the_table(place):
    pytest.importorskip("matplotlib")
    lines = records.quoted(records.load("new").rows)
    fig = plots.copy_multiples(NEW, records.load("new").rows)
    logits, heads = fig.axes
    titles = [label.get_text() for ax in (logits, heads) for label in ax.get_yticklabels()]
    assert titles == [line.title for line in lines] and len(titles) > 12
    assert "copy" in logits.get_xlabel() and "products" in heads.get_xlabel()
    assert {"grpo_kernels", "Liger-Kernel", "grpo_kernels, in place"} <= {x.get_label() for x in logits.get_lines()}
