"""`benchmarks.same_code`: whether a record still speaks of the kernels after a change of their text."""

import json
import shutil
from types import SimpleNamespace

import pytest

from benchmarks import environment, records, same_code

BEFORE = {"loss_kernel a": "1", "onchip_kernel b": "2"}


@pytest.fixture
def record(monkeypatch, tmp_path):
    """A copy of the H200's record, of older kernels."""
    shutil.copytree(records.RESULTS / "h200", tmp_path / "h200")
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    path = tmp_path / "h200" / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "same_code": "of older kernels"}))
    results = tmp_path / "h200" / "results.json"
    measured = json.loads(results.read_text())["environment"]["kernels"]
    results.write_text(results.read_text().replace(measured, "measured"))
    return path


@pytest.mark.parametrize(
    "now, status", ((BEFORE, 0), (BEFORE | {"onchip_kernel b": "3"}, 1), ({"loss_kernel a": "1"}, 1), ({}, 1))
)
def test_a_record_is_noted_if_nothing_differs(monkeypatch, record, capsys, now, status):
    assert records.load("h200").is_old
    monkeypatch.setattr(same_code, "files_of", lambda commit, into: None)
    monkeypatch.setattr(same_code, "codes_of", lambda tree, only: now if tree == same_code.ROOT else BEFORE)
    assert same_code.main(["1bb074a", "--note", "h200"]) == status
    assert records.load("h200").is_old == bool(status)
    said = capsys.readouterr().out
    assert ("differs: onchip_kernel b" in said) == (status == 1)
    if not status:
        assert environment.kernels_digest() == json.loads(record.read_text())["same_code"]
        monkeypatch.setattr(environment, "kernels_digest", lambda: "changed again")
        assert records.load("h200").is_old


def test_a_note_is_of_all_launches():
    with pytest.raises(SystemExit):
        same_code.main(["HEAD", "--note", "h200", "--only", "loss"])


def test_the_code_of_a_launch():
    """Compiled without a GPU; the same twice, and other code for another kernel."""
    found = same_code.codes_of(same_code.ROOT, r"^(scale_kernel|logprob_kernel clipped old) .*151936 bf16")
    assert len(set(found.values())) >= 2 and {name.split()[0] for name in found} == {"scale_kernel", "logprob_kernel"}


def test_lines_of_files_are_no_code():
    """Nor are the labels by which a debugger finds them. A branch's label is."""
    code = "$L__BB0_1:\n{}{}ld.global.b32 %r1, [%rd1];\nbra $L__BB0_1;\n\t.section .debug_str\n{}"
    digest = lambda *parts: same_code.digest(SimpleNamespace(asm={"ptx": code.format(*parts)}))  # noqa: E731
    plain = digest("", "", "")
    assert digest("\t.loc 1 37 29 // onchip.py\n", "$L__tmp31:\n", ".b32 $L__tmp31\n") == plain
    assert digest("mov.b32 %r1, 0;\n", "", "") != plain and digest("$L__BB0_2:\n", "", "") != plain


def test_a_commit_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="git has no files of no-such-commit"):
        same_code.files_of("no-such-commit", tmp_path)
