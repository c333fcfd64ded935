"""Seconds and peaks of memory of the parts of a step. Nothing here waits for the GPU before a step is over."""

import time

import torch

from grpo_kernels.trainer.rollout import Row


class Stopwatch:
    """Seconds spent in its ``with`` blocks: on a GPU the device's, which runs behind the host, else the host's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple] = []

    def _mark(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def __enter__(self) -> None:
        self._start = self._mark()

    def __exit__(self, *exception: object) -> None:
        self._spans.append((self._start, self._mark()))

    def seconds(self) -> float:
        """Of all blocks so far; waits until the device is through the last."""
        if self._device.type != "cuda":
            return sum(end - start for start, end in self._spans)
        if self._spans:
            self._spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1e3


class MemoryPeak:
    """The most that torch's tensors held on a GPU at once since this was made; says nothing of a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def row(self, name: str) -> Row:
        """{name: GiB}"""
        if self._device.type != "cuda":
            return {}
        return {name: torch.cuda.max_memory_allocated(self._device) / 2**30}
