"""Chooses how kernels run, and poisons fresh memory, so that whatever is left unwritten shows."""

import os

import torch

# Before the first import of grpo_kernels: kernels compile on a GPU, and are interpreted without one.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
if os.environ["TRITON_INTERPRET"] == "0":
    del os.environ["TRITON_INTERPRET"]

import pytest

from benchmarks.interpreter import hasten

hasten()
torch.set_num_threads(2)


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if isinstance(x, torch.Tensor) and x.dtype.is_floating_point and x.device.type != "meta":
            if not torch.compiler.is_compiling():
                x.detach().fill_(float("nan"))  # a leaf may require grad
        return x

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty and its kin return NaN, so that an entry nobody wrote cannot pass for a zero."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    yield


@pytest.fixture(scope="module")
def one_thread():
    """Models this small run as fast on one thread, and do not wait for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_report_header(config):
    mode = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"grpo_kernels: Triton kernels {mode}, device {device}, torch {torch.__version__}"
