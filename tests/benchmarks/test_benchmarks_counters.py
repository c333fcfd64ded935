"""`benchmarks.kernels --ncu`: what Nsight Compute is asked, and how its answer is read."""

import subprocess
import types

import pytest

from benchmarks import counters
from benchmarks.kernels import CASES

ROW = '"0","1","python","host","loss_kernel","1","7","(8192, 1, 1)","{}","{}","{}"\n'
HEADER = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Grid Size","Metric Name",' \
         '"Metric Unit","Metric Value"\n'  # fmt: skip
ANSWER = (
    "==PROF== Connected\n" + HEADER + ROW.format("dram__bytes_read.sum", "Gbyte", "2.49")
    + ROW.format("dram__bytes_write.sum", "byte", "2,500,000,000")
)  # fmt: skip


def test_bytes_in_their_units():
    assert counters.bytes_of(ANSWER) == {"read": 2.49e9, "written": 2.5e9}


@pytest.mark.parametrize("answer, problem", (("", "no output"), ("==ERROR== no permission", "no permission"),
                                             (HEADER, "counted nothing")))  # fmt: skip
def test_no_answer_is_an_error(answer, problem):
    with pytest.raises(ValueError, match=problem):
        counters.bytes_of(answer)


def test_report(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return types.SimpleNamespace(stdout=ANSWER if command[-3] == "triton" else "==ERROR== gone")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    assert "not installed" in next(counters.report(CASES, ("triton",))) and not asked
    monkeypatch.setattr(counters.shutil, "which", lambda name: "/bin/ncu")
    lines = list(counters.report(CASES[:1] + CASES[3:4], ("triton", "onchip")))  # half masked: not counted
    assert len(lines) == 2 == len(asked) and asked[0][-3:] == ["triton", str(CASES[0].vocab), "bf16"]
    ratio = 2.49e9 / CASES[0].logits_bytes
    assert f"read {ratio:.3f}  written" in lines[0] and "gone" in lines[1]
