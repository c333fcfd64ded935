"""What the losses from hidden states launch per chunk, counted without a GPU; part of `traffic_report`.

On tensors without data: kernels are noted and not run, and where the host has to ask the device, how often.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from benchmarks.counting import Device, bare_ops, launches
from grpo_kernels import TopK, fused_linear_distillation_loss, fused_linear_grpo_loss, linear_token_logprobs
from grpo_kernels.linear.head import logit_bytes

B, T, H, V = 4, 8, 2, 1001  # H is small: what is as large as the weight is not taken for a chunk
HEIGHT = 8  # rows of logits at a time


class Law(NamedTuple):
    """Per chunk, but ``waits``, which are per call."""

    launches: int = 1  # kernels over the logits
    products: int = 3  # matrix products
    other: int = 0  # torch's other operations of the size of a chunk's logits
    waits: int = 0  # times that the host waits for the device


class Case(NamedTuple):
    name: str
    law: Law
    kwargs: Mapping = MappingProxyType({})
    masked: bool = False
    bias: bool = False
    frozen: str = ""  # letters of "h", "w"
    height: int = HEIGHT
    logps_only: bool = False
    teacher: str = ""  # of a distillation: "whole", or "top"


GSPO = {"loss_type": "gspo"}
FP32 = {"logits_dtype": torch.float32}
CASES = (
    Case("head: log-probs only", Law(products=1), frozen="hw", logps_only=True),
    Case("head: log-probs, with gradient", Law(launches=2, products=4), logps_only=True),
    Case("head: grpo, loss only", Law(products=1), frozen="hw"),
    Case("head: grpo", Law()),
    Case("head: grpo, a mask", Law(waits=1), masked=True),
    Case("head: grpo, a mask, num_rows given", Law(), {"num_rows": B * T}, masked=True),
    Case("head: grpo, a bias", Law(other=1), bias=True),
    Case("head: grpo, head frozen", Law(products=2), frozen="w"),
    Case("head: grpo, hidden states frozen", Law(products=2), frozen="h"),
    Case("head: grpo, reduction none", Law(launches=2, products=4), {"reduction": "none"}),
    Case("head: grpo, none, a mask", Law(launches=2, products=4, waits=1), {"reduction": "none"}, masked=True),
    Case("head: grpo, fp32 logits", Law(), FP32),
    Case("head: grpo, fp32 logits, a bias", Law(other=2), FP32, bias=True),
    Case("head: log-probs only, fp32 logits", Law(products=1), FP32, frozen="hw", logps_only=True),
    Case("head: gspo", Law(launches=2), GSPO),
    Case("head: gspo, a mask", Law(launches=2, waits=2), GSPO, masked=True),
    Case("head: gspo, sequences of two chunks", Law(launches=2, products=4), GSPO, height=T // 2),
    Case("head: distil", Law(products=4), teacher="whole"),
    Case("head: distil, fp32 logits", Law(products=4), FP32, teacher="whole"),
    Case("head: distil, a mask", Law(products=4, waits=1), masked=True, teacher="whole"),
    Case("head: distil, head frozen", Law(products=3), frozen="w", teacher="whole"),
    Case("head: distil, loss only", Law(products=2), frozen="hw", teacher="whole"),
    Case("head: distil, reduction none", Law(launches=2, products=6), {"reduction": "none"}, teacher="whole"),
    Case("head: distil, top 4", Law(), teacher="top"),
)


def count(case: Case) -> dict:
    """One row of the report."""
    on_meta = {"device": "meta", "dtype": torch.bfloat16}
    hidden = torch.empty(B, T, H, **on_meta, requires_grad="h" not in case.frozen)
    weight = torch.empty(V, H, **on_meta, requires_grad="w" not in case.frozen)
    bias = torch.empty(V, **on_meta, requires_grad="w" not in case.frozen) if case.bias else None
    ids = torch.empty(B, T, dtype=torch.long, device="meta")
    mask = torch.empty(B, T, device="meta") if case.masked else None
    fp32 = "logits_dtype" in case.kwargs
    size = logit_bytes(weight, fp32)
    size += logit_bytes(weight, fp32, gradient=False) if case.teacher == "whole" else 0
    kwargs = {"bias": bias, "chunk_bytes": case.height * V * size, "backend": "triton", **case.kwargs}
    told = (torch.empty(B, T, 2 * H, **on_meta), torch.empty(V, 2 * H, **on_meta))
    if case.teacher == "top":
        told = (TopK(torch.empty(B, T, 4, dtype=torch.long, device="meta"), torch.empty(B, T, 4, device="meta")),)
    if not case.logps_only and not case.teacher:
        kwargs |= {"advantages": torch.empty(B, device="meta"), "old_logps": torch.empty(B, T, device="meta")}
    wanted = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    upstream = torch.empty(B, T, device="meta"), torch.empty((), device="meta")
    device = Device(answers=(None, [k * T for k in range(B + 1)])[: case.law.waits])
    with bare_ops(), launches(run=False) as seen, device:
        if case.teacher:
            out = fused_linear_distillation_loss(hidden, weight, *told, completion_mask=mask, **kwargs).loss
        elif case.logps_only:
            out = linear_token_logprobs(hidden, weight, ids, mask=mask, **kwargs).logps
        else:
            out = fused_linear_grpo_loss(hidden, weight, ids, completion_mask=mask, **kwargs).loss
        if wanted:
            torch.autograd.grad(out, wanted, upstream[out.dim() == 0])
    chunks, size = B * T // case.height, case.height * V
    large = [name for name, elements in device.ops if elements >= size]
    products = [name for name in large if "mm" in name]
    row = {
        "case": case.name, "chunks": chunks,
        "launches": sum(max(x.numel() for x in launch.tensors) >= size for launch in seen) / chunks,
        "products": len(products) / chunks, "other": (len(large) - len(products)) / chunks, "waits": device.waits,
        "others": sorted({name for name in large if "mm" not in name}), "law": case.law._asdict(),
    }  # fmt: skip
    row["broken"] = [f"{row[name]:g} {name}, law {law}" for name, law in row["law"].items() if row[name] != law]
    row["broken"] += [f"{name} on a chunk's logits" for name in row["others"]] if row["other"] > case.law.other else []
    return row


LEGEND = (
    f"From hidden states, per chunk of {HEIGHT} of {B * T} rows, V = {V}: launches over the logits, matrix products, "
    "torch's other operations of the size of a chunk's logits (of a bias the sum, with fp32 logits the addition too), "
    "and per call how often the host waits for the device."
)


def table(rows: list[dict]) -> Iterator[str]:
    """At most 80 columns."""
    yield f"{'':36}{'launches':>9}{'products':>9}{'other':>6}{'waits':>6}"
    for row in rows:
        yield f"{row['case']:36}{row['launches']:9g}{row['products']:9g}{row['other']:6g}{row['waits']:6}"
        for text in row["broken"]:
            yield from textwrap.wrap(f"BROKEN: {text}", 78, initial_indent="  ", subsequent_indent="    ")
