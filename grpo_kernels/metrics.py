"""Metrics of a whole batch from the sums of its parts: `combine`."""

from grpo_kernels.objective.metrics import METRIC_NAMES, SUM_NAMES, combine

__all__ = ["METRIC_NAMES", "SUM_NAMES", "combine"]
