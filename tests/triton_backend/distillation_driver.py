"""How often Triton would compile the kernels of distillation, counted as `fake_driver` does. Run by its law tests."""

import itertools
import json

import torch
import triton

import fake_driver
from counting import bare_ops
from fake_driver import FakeDriver, keys, launches, note, tensor
from grpo_kernels import TopK, distillation_loss
from grpo_kernels.triton_backend import launch

# What a kernel may be compiled for anew. Not the values below.
STRUCTURES = [
    {"beta": beta, "teacher": teacher, **more}
    for beta, teacher in itertools.product((0.0, 0.3, 1.0), ("whole", True, False, None))
    for more in ({}, {"reduction": "none", "mask": True}, {"dtype": torch.bfloat16, "tensors": True, "mask": True})
]
VALUES = [
    {},
    *({"B": B, "T": T} for B, T in itertools.product((1, 2, 3, 16, 17), (1, 2, 7, 16, 31))),
    *({"temperature": t} for t in (1, 2, 0.7)),
    *({"loss_scale": s} for s in (1, 16, 0.5)),
    *({"num_items_in_batch": n} for n in (1, 16, 100.0)),
    *({"mixed": b} for b in (0.5, 0.7, 0.999)),
    *({"kind": kind} for kind in ("offset", "gaps", "huge")),
    {"extra": 1},
]


def call(structure: dict, value: dict, V: int) -> None:
    s = {**structure, **value}
    B, T, extra, kind, dtype = s.pop("B", 8), s.pop("T", 7), s.pop("extra", 0), s.pop("kind", "whole"), s.pop(
        "dtype", torch.float32)  # fmt: skip
    if (mixed := s.pop("mixed", None)) and s["beta"] == 0.3:
        s["beta"] = mixed
    device = "meta" if kind == "huge" or V > 1000 else "cpu"
    like = {"device": device, "kind": kind}
    if s.pop("mask", False):
        s["completion_mask"] = tensor((B, T), **like)
    if s.pop("tensors", False):
        s |= {name: torch.zeros((), device=device) for name in ("loss_scale", "num_items_in_batch")}
        s["temperature"] = tensor((B,), device=device) + 1
    x, z = (tensor((B, T + extra, V), dtype, device=device) for _ in range(2))
    if kind == "huge":
        strides = (2**40 + V, 2**32 + V, 1)
        x, z = (torch.empty_strided(y.shape, strides, dtype=dtype, device="meta") for y in (x, z))
    tail = s.pop("teacher")
    if tail == "whole":
        told = z
    else:
        told = TopK(tensor((B, T, 6), torch.int64, **like), tensor((B, T, 6), **like))
        s["tail"] = tail
    x = x.requires_grad_()
    loss = distillation_loss(x, told, backend="triton", **s).loss
    torch.autograd.grad(loss, x, torch.full_like(loss, 0.5))


def main() -> None:
    triton.runtime.driver.set_active(FakeDriver())
    triton.runtime.JITFunction._do_compile = note
    launch.require_available = lambda device: None
    counts = []
    with bare_ops():
        for V, structure in itertools.product((128, 50257), STRUCTURES):
            sliced = [v for v in VALUES if v.get("kind") == "huge" and V % 16]  # rows that start elsewhere
            for values in ([v for v in VALUES if v not in sliced], sliced):
                keys.clear()
                launches.clear()
                for value in values:
                    call(structure, value, V)
                counts += [
                    {"V": V, "structure": str(structure), "kernel": kernel, "launches": launches[kernel],
                     "keys": sorted(keys[kernel])}
                    for kernel in keys
                ]  # fmt: skip
        print(json.dumps({"control": fake_driver.control(), "counts": counts}))


if __name__ == "__main__":
    main()
