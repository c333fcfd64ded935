"""A cluster kernel that another Triton has compiled, launched through the driver: for GPUs whose own is too old.

    python -m benchmarks.experiments --compile --only cluster --target sm_90 --cubins DIR    # Triton 3.8 or later
    python -m benchmarks.experiments --cubins DIR                                            # any

The size of the cluster is compiled in (.reqnctapercluster), so that a plain launch of as many programs forms them.
"""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path
from typing import Any

import torch

NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 13  # CUfunction_attribute; of clusters of more than 8
_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def path_of(folder: Path, V: int, dtype: torch.dtype, setting: dict) -> Path:
    words = [str(V), str(dtype).removeprefix("torch."), *(f"{key}{value}" for key, value in sorted(setting.items()))]
    return folder / ("-".join(["cluster", *words]) + ".cubin")


def save(path: Path, compiled: Any, types: dict[str, Any]) -> None:
    """The machine code, and beside it what a launch must know. ``types``: of the kernel's parameters, by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = compiled.metadata
    kinds = [each for each in types.values() if each != "constexpr"]
    flat = [kind for each in kinds for kind in ((each,) if isinstance(each, str) else each)]
    entry = compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    about = {"name": metadata.name, "threads": metadata.num_warps * 32, "ctas": metadata.num_ctas,
             "shared": metadata.shared, "types": flat, "parameters": entry.count(".param")}  # fmt: skip
    path.write_bytes(compiled.asm["cubin"])
    path.with_suffix(".json").write_text(json.dumps(about) + "\n")


def parameters(values: tuple, about: dict) -> list[Any]:
    """The values as the kernel takes them; Triton's own scratch pointers, which come last, are null."""
    flat = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    if len(flat) != len(about["types"]):
        raise ValueError(f"{len(flat)} values for {len(about['types'])} parameters: compile the cubins anew")
    made = [
        ctypes.c_uint64(x.data_ptr()) if kind.startswith("*") else _TYPES[kind](x)
        for x, kind in zip(flat, about["types"])
    ]
    return made + [ctypes.c_uint64(0)] * (about["parameters"] - len(made))


@functools.cache
def _load(path: Path) -> tuple[Any, ctypes.c_void_p, dict]:
    cuda, about = ctypes.CDLL("libcuda.so.1"), json.loads(path.with_suffix(".json").read_text())
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _require(cuda.cuModuleLoadData(ctypes.byref(module), path.read_bytes()), "cuModuleLoadData")
    _require(cuda.cuModuleGetFunction(ctypes.byref(function), module, about["name"].encode()), "cuModuleGetFunction")
    if about["ctas"] > 8:
        _require(cuda.cuFuncSetAttribute(function, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1), "cuFuncSetAttribute")
    return cuda, function, about


def launch(path: Path, clusters: int, values: tuple) -> None:
    """On the current stream. ``values``: the kernel's arguments that are no constants, in order."""
    cuda, function, about = _load(path)
    made = parameters(values, about)
    pointers = (ctypes.c_void_p * len(made))(*(ctypes.addressof(each) for each in made))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    grid, block = (clusters * about["ctas"], 1, 1), (about["threads"], 1, 1)
    _require(cuda.cuLaunchKernel(function, *grid, *block, about["shared"], stream, pointers, None), "cuLaunchKernel")


def _require(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: CUDA driver error {status}")
