"""Where and when a result was measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import grpo_kernels

PACKAGE = Path(grpo_kernels.__file__).resolve().parent
PACKAGES = ("triton", "liger-kernel", "trl", "numpy")


def describe(device: torch.device) -> dict[str, object]:
    """Machine, versions, date and commit: flat, JSON-serialisable."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "device_type": device.type,
        "driver": run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name.replace("-", "_"): version(name) for name in PACKAGES},
        "grpo_kernels": grpo_kernels.__version__,
        "commit": commit(),
        "kernels": kernels_digest(),
    }


def kernel_files() -> list[Path]:
    """What the kernels' speed comes from: they, the functions they are compiled from, and the head's chunks."""
    files = {*PACKAGE.glob("triton_backend/*.py"), PACKAGE / "linear" / "chunks.py"}
    return sorted(files | {path for path in PACKAGE.rglob("*.py") if re.search(r"^@(\w+\.)?jit$", read(path), re.M)})


def kernels_digest() -> str:
    """The same for as long as no kernel file changes; by it a record is told from the present, without git too."""
    digest = hashlib.sha256()
    for path in kernel_files():
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\n{read(path)}".encode())
    return digest.hexdigest()[:16]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # no /proc outside Linux
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the working tree, with "+changes" where files differ from it; None outside a git checkout."""
    head = run("git", "rev-parse", "HEAD")
    return f"{head}+changes" if head and run("git", "status", "--porcelain", "-uno") else head


def run(*command: str) -> str | None:
    """First line of a command's output, or None if there is no such command or it fails."""
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return (result.stdout.splitlines() or [None])[0]
