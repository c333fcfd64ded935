"""Chooses how kernels run, and poisons fresh memory, so that whatever is left unwritten shows."""

import os
from contextlib import nullcontext

import torch

# Before the first import of grpo_kernels: kernels compile on a GPU, and are interpreted without one.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
if os.environ["TRITON_INTERPRET"] == "0":
    del os.environ["TRITON_INTERPRET"]

import pytest

import pretend_gpu
import variation
from benchmarks.interpreter import hasten

hasten()
# Processes that share the cores take one each: with more, threads wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_addoption(parser):
    parser.addoption("--pretend-gpu", action="store_true", help="fail where tests mix devices; needs no GPU")
    group = parser.getgroup("grpo_kernels", "other data and other addresses (tests/helpers/variation.py)")
    group.addoption("--seed-offset", type=int, default=0, metavar="N", help="add N to every seed that tests set")
    group.addoption("--shift", type=int, default=0, metavar="K", help="tensors start K elements into their storages")


def pytest_configure(config):
    # A process that a test starts imports what the tests import, from whatever directory pytest was started.
    paths = [*map(str, config.getini("pythonpath")), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    config.addinivalue_line("markers", "unshifted: counts operations or bytes, or compiles; --shift leaves it alone")
    variation.move_seeds(config.getoption("--seed-offset"))
    os.environ[variation.SHIFT] = str(config.getoption("--shift"))
    if config.getoption("--pretend-gpu"):
        if os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available():
            raise pytest.UsageError("--pretend-gpu needs CUDA_VISIBLE_DEVICES= and TRITON_INTERPRET=1: no GPU")
        pretend_gpu.pretend()


# Tests that train on the CPU: curves, seeds and sampled tokens are those that it makes. A process that sees a GPU
# would train there.
ON_THE_CPU = ("test_trainer", "test_trl_trainer", "test_trl_distillation", "test_examples", "test_group_size",
              "test_ppo_vs_grpo", "test_four_ways", "test_end_to_end")  # fmt: skip


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        skip = pytest.mark.skip(reason="trains on the CPU, and this process sees a GPU: CUDA_VISIBLE_DEVICES= hides it")
        for item in items:
            if item.path.name.startswith(ON_THE_CPU):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def variation_of_the_run(request, poisoned_memory):
    """A test that sets no seed draws the same in every order; its tensors lie where --shift says."""
    torch.manual_seed(0)
    shift = request.config.getoption("--shift")
    with variation.Shifted(shift) if shift and not request.node.get_closest_marker("unshifted") else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _devices(request, monkeypatch):
    """With --pretend-gpu every test runs as if cases.DEVICE were a GPU."""
    if not pretend_gpu.pretended():
        yield
        return
    with pretend_gpu.pretended_gpu(monkeypatch):
        yield


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if isinstance(x, torch.Tensor) and x.dtype.is_floating_point and x.device.type != "meta":
            if not torch.compiler.is_compiling():
                with torch.no_grad():  # it may be a leaf that requires grad
                    x.fill_(float("nan"))
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
