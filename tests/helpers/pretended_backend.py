"""Stands for the compiled kernels on a pretended GPU: their conditions, and the torch backend's results."""

from grpo_kernels.cpu_backend import backend
from grpo_kernels.triton_backend.launch import require_available

__all__ = ["require_available"]


def __getattr__(name: str):
    return getattr(backend, name)
