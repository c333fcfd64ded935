"""benchmarks.host_report: what a call costs the host where the batch is tiny."""

import subprocess
import sys

import torch

from benchmarks import host_report


def test_a_call_takes_at_most_twice_the_operations_of_the_loss_alone():
    """Operations, not seconds, which other processes would change."""
    logits = torch.randn(host_report.B, host_report.T, host_report.V, generator=torch.Generator().manual_seed(1))
    counts = {name: host_report.operations(loss, logits) for name, loss in host_report.ways().items()}
    assert counts["grpo_kernels, all outputs"] <= 2 * counts["eager, the loss alone"], counts


def test_all_ways_are_the_same_loss():
    x = torch.randn(host_report.B, host_report.T, host_report.V, generator=torch.Generator().manual_seed(2))
    values = [loss(x).item() for loss in host_report.ways().values()]
    assert max(values) - min(values) < 1e-6 and values[0] != 0.0


def test_the_report_has_a_row_for_each():
    done = subprocess.run([sys.executable, "-m", "benchmarks.host_report", "--calls", "2"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(host_report.ways()) and max(map(len, lines)) <= 80
    assert all(" us " in line for line in lines[1:])
