"""Made-up rows, for the tests of what is drawn and written of them."""

from benchmarks.baselines_peers import implementations
from benchmarks.cases import MODES
from benchmarks.suite import MISSING, OOM, new_rows

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00", "device": "NVIDIA H200", "device_type": "cuda", "driver": "570.1",
    "torch": "2.13.0", "triton": "3.7.1", "grpo_kernels": "0.1.0", "commit": "0123456789abcdef+changes", "threads": 8,
}  # fmt: skip
SLOWNESS = {
    "grpo_kernels": 1.25, "eager PyTorch": 14.0, "torch.compile": 4.0, "TRL kernel": 2.0, "Liger-Kernel": 1.75,
    "quack": 1.1,
}  # fmt: skip


def made_up(cases):
    """Rows as of a device that copies 4 TB/s; eager PyTorch runs out of memory at 32768 rows."""
    rows = [r for case in cases for mode in MODES for r in new_rows(case, mode, implementations())]
    for row in rows:
        if row.implementation == "torch.compile":
            row.status, row.detail = MISSING, "no compiler"
        elif row.implementation == "eager PyTorch" and row.batch * row.length == 32768:
            row.status, row.detail = OOM, "full"
        else:
            row.copy_ms = 2 * row.logits_bytes / 4e9
            row.copy_multiple = SLOWNESS[row.implementation] * (0.5 if row.mode == "logprobs" else 1.0)
            row.median_ms = row.copy_ms * row.copy_multiple
            row.share_of_copy_bandwidth = row.minimum_bytes / (2 * row.logits_bytes) / row.copy_multiple
            row.extra_bytes = 4 * row.logits_bytes if "eager" in row.implementation else row.logits_bytes
    return rows
