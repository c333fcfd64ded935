"""`python -m grpo_kernels.env`: what a bug report needs to know of a machine."""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Sequence

import torch

import grpo_kernels
from grpo_kernels.objective.language import is_interpreted, triton

_PACKAGES = ("torch", "triton", "transformers", "trl", "verl", "liger-kernel", "numpy")


def environment() -> dict[str, str]:
    """Versions and devices, by name."""
    facts = {
        "grpo_kernels": grpo_kernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in _PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts["cuda"] = torch.version.cuda or "none"
    facts["rocm"] = torch.version.hip or "none"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["gpus"] = ", ".join(devices) or "none"
    facts["backend"] = _backend(bool(devices))
    facts["GRPO_KERNELS_VALIDATE"] = os.environ.get("GRPO_KERNELS_VALIDATE", "not set: values are checked on the CPU")
    facts["GRPO_KERNELS_ROWS"] = os.environ.get("GRPO_KERNELS_ROWS", "not set: auto")
    return facts


def _backend(has_gpu: bool) -> str:
    if triton is None:
        return "torch (Triton is not installed)"
    from grpo_kernels.triton_backend.row_kernels import loss_kernel

    if is_interpreted(loss_kernel):
        return "triton, interpreted (TRITON_INTERPRET=1): for tests, not for speed"
    return "triton on GPU tensors, torch on CPU tensors" if has_gpu else "torch (no GPU is seen)"


def print_lines(lines: Iterable[str]) -> None:
    """Prints them, and stops without a word where nobody reads on, as ``| head`` does."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m grpo_kernels.env", description="Versions and devices, by name.")
    parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    print_lines(f"{name:22} {value}" for name, value in environment().items())


if __name__ == "__main__":
    main()
