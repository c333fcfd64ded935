"""Stands for the compiled kernels on a pretended GPU: their conditions, and the torch backend's results."""

from grpo_kernels import torch_backend
from grpo_kernels.kernels.launch import require_available

__all__ = ["require_available"]


def __getattr__(name: str):
    return getattr(torch_backend, name)
