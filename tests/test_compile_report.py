"""Every kernel compiles for GPUs that are not there: no spills, wide accesses, few exponentials."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

ROW_KERNELS = ("loss_kernel", "logprob_kernel", "slope_kernel", "scale_kernel")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The report, from a process of its own: here the kernels are interpreted."""
    folder = tmp_path_factory.mktemp("report")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_report", "--json", str(folder / "rows.json")],
        env={**env, "TRITON_CACHE_DIR": str(folder / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "rows.json").read_text())["rows"]


def test_every_kernel_for_every_target(rows):
    found = {(row["target"], row["kernel"].split()[0]) for row in rows}
    from benchmarks.compile_report import KERNELS

    assert found == {(target, kernel) for target in TARGETS for kernel in KERNELS}


def test_no_spills(rows):
    bad = [(row["target"], row["kernel"], row["spills"], row["stack"]) for row in rows if row["spills"] or row["stack"]]
    assert not bad


def test_wide_loads_and_stores(rows):
    """V is a multiple of 16, so whole rows move 16 bytes at a time; what is narrow is one value per row."""
    for row in rows:
        kernel = row["kernel"].split()[0]
        if kernel not in ROW_KERNELS:
            continue
        assert row["wide_loads"] > 0, row
        if kernel != "logprob_kernel":
            assert row["wide_stores"] > 0, row
            # narrow: log-probability, entropy and the token's entry, on each path through the kernel
            assert row["stores"] - row["wide_stores"] <= 8, row


def test_exponentials_per_element(rows):
    """At most 3.4 ex2 per element over both passes: one each, and one per lane and tile for rescaling."""
    for row in rows:
        if row["kernel"].startswith("loss_kernel"):
            lanes = row["elements_per_thread"] / row["lines"]
            per_element = (row["elements_per_thread"] + lanes) / row["elements_per_thread"] + 1
            assert per_element <= 3.4
