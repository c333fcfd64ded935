"""What every objective moves, counted without a GPU, next to what it should move.

    python -m benchmarks.traffic_report [--json FILE]

Triton's interpreter executes every load and store of a kernel one by one, and each is counted. Reads
and writes are given per logit: 1 is the whole tensor once. "Distinct" counts an element once per
launch however often the launch touches it, which is what memory sees if the second pass over a row
finds the row on chip; "issued" counts each time. Whether that second read does hit on chip, only a
GPU's counters can say. "Part" are lines of a GPU's memory, 128 bytes, that a warp's store does not fill: where rows
start anywhere, those at their ends. Launches, and torch's own operations, are counted on tensors without data.
Exit status 1 where a law is broken.
"""

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of grpo_kernels

import argparse
import contextlib
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch.utils._pytree import tree_map_only

from benchmarks import linear_traffic
from benchmarks.counting import Device, Launch, bare_ops, launches, lines_as_on_a_gpu
from benchmarks.interpreter import hasten
from grpo_kernels import Support, TopK, distillation_loss, fused_grpo_loss, token_logprobs
from grpo_kernels.objective.catalogue import LEVELS, LOSS_TYPES, TERMS

KEPT = 64  # ids that a support keeps of each row, besides the token
TOLD = 64  # tokens that a teacher tells, where it does not tell all
B, T, V = 4, 2, 17001  # whole tiles of bf16 logits, lines of the rest, and rows that start anywhere
ALIGNED = 17024  # a V with which every row starts at a line of memory
PARTS = 3  # of lines, per row: the line of its start, and that of its end in whole accesses and by the entry
SMALL_LAUNCHES = 8


SUMMED = ("read", "write", "issued_read", "issued_write", "part")  # over launches


class Law(NamedTuple):
    """What may be moved: per logit, summed over launches."""

    read: float  # distinct elements
    write: float
    issued: float  # reads, by both passes
    rows: int = 1  # launches that move logits or their gradient
    over: float = 0.0  # writes issued over others: the entries of id lists, over zeros; of a teacher's tokens


READ_ONCE = Law(1, 0, 1)
ONE_LAUNCH = Law(1, 1, 2)  # both passes in one launch: the row is still on chip
TWO_LAUNCHES = Law(2, 1, 2, rows=2)


class Case(NamedTuple):
    """A call: keywords of `fused_grpo_loss`, or of `distillation_loss`, and the law it is under."""

    name: str
    law: Law
    kwargs: Mapping = MappingProxyType({})
    dtype: torch.dtype = torch.bfloat16
    gradient: bool = True
    half: str = ""  # which half of the rows is "masked", without "advantage", "clipped"
    packed: bool = False
    extra: int = 0  # positions after the last token
    upstream: float = 1.0
    logps_only: bool = False
    V: int = V
    kept: bool = False  # rows are restricted to id lists
    teacher: str = ""  # of a distillation: "whole", or "top"


def law_of(loss_type: str) -> Law:
    """By the catalogue: what depends on the rest of its sequence takes a second launch."""
    variant = LOSS_TYPES[loss_type]
    alone = LEVELS[variant.level].how == "" and not TERMS[variant.term].of_sequence
    return ONE_LAUNCH if alone else TWO_LAUNCHES


def cases() -> Iterator[Case]:
    """Everything that is counted."""
    everything = {"beta": 0.1, "entropy_coef": 0.01, "return_entropy": True}
    half_zero = {"half": "advantage", "kwargs": {"skip_zero_advantage": True}}
    yield Case("log-probs only", READ_ONCE, gradient=False, logps_only=True)
    yield Case("log-probs and entropy", READ_ONCE, {"return_entropy": True}, gradient=False, logps_only=True)
    yield Case("log-probs, with gradient", TWO_LAUNCHES, logps_only=True)
    yield Case("grpo, loss only", READ_ONCE, gradient=False)
    yield Case("grpo, in place", ONE_LAUNCH, {"inplace": True})
    yield Case("grpo, rows on lines", ONE_LAUNCH, V=ALIGNED)
    yield Case("gspo, rows on lines", TWO_LAUNCHES, {"loss_type": "gspo"}, V=ALIGNED)
    yield Case("gspo, in place", TWO_LAUNCHES, {"inplace": True, "loss_type": "gspo"})
    yield Case("grpo, fp32", ONE_LAUNCH, dtype=torch.float32)
    yield Case("grpo, fp16", TWO_LAUNCHES, dtype=torch.float16)
    yield Case("grpo, reduction none", TWO_LAUNCHES, {"reduction": "none"})
    yield Case("grpo, KL, bonus, entropy", ONE_LAUNCH, everything)
    yield Case("grpo, upstream 0.5", Law(2, 2, 3, rows=2), upstream=0.5)
    yield Case("grpo, (B, T+1, V)", Law(T / (T + 1), 1, 2 * T / (T + 1)), extra=1)
    yield Case("grpo, packed", ONE_LAUNCH, packed=True)
    yield Case("gspo, packed", TWO_LAUNCHES, {"loss_type": "gspo"}, packed=True)
    yield Case("grpo, half masked", Law(0.5, 1, 1), half="masked")
    yield Case("gspo, half masked", Law(1, 1, 1, rows=2), {"loss_type": "gspo"}, half="masked")
    yield Case("grpo, half clipped", Law(1, 1, 1.5), half="clipped")
    yield Case("grpo, half advantage 0", Law(1, 1, 1.5), half="advantage")
    yield Case("  skip_zero_advantage", Law(0.5, 1, 1), **half_zero)
    yield Case("  and without gradient", Law(0.5, 0, 0.5), **half_zero, gradient=False)
    entries = (KEPT + 1) / V
    yield Case("log-probs only, id lists", Law(entries, 0, 2 * entries), gradient=False, logps_only=True, kept=True)
    yield Case("grpo, id lists", Law(entries, 1, 3 * entries, over=entries), kept=True)
    yield Case("gspo, id lists", Law(2 * entries, 1, 3 * entries, 2, entries), {"loss_type": "gspo"}, kept=True)
    yield from distillations()
    for loss_type in LOSS_TYPES:
        yield Case(loss_type, law_of(loss_type), {"loss_type": loss_type})


def distillations() -> Iterator[Case]:
    """Both rows count as reads. Each token that is told is read once more, and written over what the row's rest has."""
    both, told = Law(2, 1, 4), TOLD / V
    top = Law(1, 1, 2 + told, over=told)
    for name, beta, law in (("forward", 0.0, both), ("reverse", 1.0, both), ("mixed", 0.5, Law(2, 1, 6))):
        yield Case(f"distil: {name}", law, {"beta": beta}, teacher="whole")
    yield Case("distil: in place", both, {"inplace": True}, teacher="whole")
    yield Case("distil: reduction none", Law(4, 1, 4, rows=2), {"reduction": "none"}, teacher="whole")
    yield Case("distil: loss only", Law(2, 0, 2), gradient=False, teacher="whole")
    yield Case("distil: half masked", Law(1, 1, 2), half="masked", teacher="whole")
    yield Case("distil: top 64", top, {"tail": True}, teacher="top")
    yield Case("distil: top 64, in place", top, {"tail": True, "inplace": True}, teacher="top")
    yield Case("distil: top 64 as is", top, {"tail": None}, teacher="top")
    yield Case("distil: top 64 alone", Law(told, 1, told, over=told), {"tail": False}, teacher="top")


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(logits, ids or a teacher, keywords), in which no row but a chosen half is without a gradient."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T + case.extra, case.V, generator=g).to(case.dtype)
    ids = torch.randint(0, case.V, (B, T), generator=g)
    kept = (ids[..., None] + torch.arange(KEPT + 1)) % case.V  # the token, and those after it
    x = logits[:, :T].float()
    lse = (x.gather(-1, kept) if case.kept else x).logsumexp(-1)
    lp = x.gather(-1, ids[..., None])[..., 0] - lse
    token = {"old_logps": lp + 0.05, "ref_logps": lp - 0.05, "completion_mask": torch.ones(B, T)}
    sequence = {"advantages": torch.tensor([1.0, -1.0, 0.5, 2.0])}
    half = torch.arange(B * T).view(B, T) % 2 == 0
    if case.half == "masked":
        token["completion_mask"][half] = 0.0
    elif case.half == "advantage":
        sequence["advantages"][::2] = 0.0
    elif case.half == "clipped":
        sequence["advantages"][:] = 1.0
        token["old_logps"][half] -= 1.0  # ρ = e^0.95, above 1 + ε
    if case.packed:
        logits, ids, *values = (x.flatten(0, 1) for x in (logits, ids, *token.values()))
        token = dict(zip(token, values)) | {"cu_seqlens": torch.arange(0, B * T + 1, T, dtype=torch.int32)}
    if case.kept:
        token["support"] = Support.from_padded(kept[..., 1:])
    if case.teacher:
        teacher = torch.randn(logits.shape, generator=g).to(case.dtype)
        few = kept[..., :TOLD]
        top = TopK(few, torch.log_softmax(teacher.float(), -1).gather(-1, few))
        return logits, top if case.teacher == "top" else teacher, {"completion_mask": token["completion_mask"],
                                                                  **case.kwargs}  # fmt: skip
    return logits, ids, {**token, **sequence, **case.kwargs}


def run(case: Case, x: torch.Tensor, ids: torch.Tensor | TopK, upstream: torch.Tensor, kwargs: dict) -> None:
    """The call, forward and backward."""
    if case.teacher:
        out = distillation_loss(x, ids, backend="triton", **kwargs).loss
    elif case.logps_only:
        entropy = kwargs.get("return_entropy", False)
        mask, support = kwargs["completion_mask"], kwargs.get("support")
        out = token_logprobs(x, ids, mask=mask, support=support, return_entropy=entropy, backend="triton").logps
    else:
        out = fused_grpo_loss(x, ids, backend="triton", **kwargs).loss
    if case.gradient:
        torch.autograd.grad(out, x, upstream)


def bytes_moved(seen: list[Launch], logits: torch.Tensor) -> list[dict]:
    """Per launch that moves anything of the size of the logits: reads and writes per logit."""
    found = []
    for launch in seen:
        large = {x.untyped_storage().data_ptr(): x for x in launch.tensors if x.numel() >= logits.numel()}
        reads, writes = ([count(x) for x in large.values()] for count in (launch.reads, launch.writes))
        per_logit = lambda counts: float(sum(counts)) / logits.numel()  # noqa: E731
        row = {
            "kernel": launch.name,
            "read": per_logit((x > 0).sum() for x in reads), "write": per_logit((x > 0).sum() for x in writes),
            "issued_read": per_logit(x.sum() for x in reads), "issued_write": per_logit(x.sum() for x in writes),
            "part": sum(map(launch.parts_of_lines, large.values())) * logits.shape[-1] / logits.numel(),  # per row
            "part_of_launch": sum(map(launch.lines_in_part, large.values())),
        }  # fmt: skip
        if row["issued_read"] or row["issued_write"]:
            found.append(row)
    return found


def counted(case: Case, logits, told, *arguments, interpret: bool = True) -> tuple[list[Launch], list[tuple[str, int]]]:
    """Launches of a call, and torch's own operations if it is on ``meta`` tensors."""
    device = contextlib.nullcontext() if interpret else Device()
    with lines_as_on_a_gpu() as output:
        x = logits.requires_grad_() if case.gradient else logits
        x = output(x) if interpret else x * 1  # as a model's output: no leaf
        told = output(told) if interpret and case.teacher == "whole" else told
        with launches(run=interpret) as seen, device, np.errstate(invalid="ignore", over="ignore"):  # −inf at the end
            run(case, x, told, *arguments)
    return seen, [] if interpret else device.ops


def _without_data(x: torch.Tensor | Support) -> torch.Tensor | Support:
    return x.to("meta") if isinstance(x, Support) else x.detach().to("meta")


def count(case: Case) -> dict:
    """One row of the report."""
    logits, ids, kwargs = inputs(case)
    per_token = case.logps_only or kwargs.get("reduction") == "none"
    upstream = torch.full((B, T) if per_token else (), case.upstream)
    arguments = [logits, ids, upstream, kwargs]
    seen, _ = counted(case, *arguments)
    moved = bytes_moved(seen, logits)
    arguments = tree_map_only((torch.Tensor, Support), _without_data, arguments)
    with bare_ops():
        noted, own = counted(case, *arguments, interpret=False)
    small = sum(max(x.numel() for x in launch.tensors) < logits.numel() for launch in noted) + len(own)
    row = {
        "case": case.name, "dtype": str(case.dtype).removeprefix("torch."), "launches": moved,
        **{name: sum(each[name] for each in moved) for name in SUMMED},
        "V": case.V, "rows": len(moved), "small": small, "large_ops": [name for name, size in own if size > B * T],
        "law": case.law._asdict(),
    }  # fmt: skip
    size = case.dtype.itemsize
    row["bytes"], row["issued_bytes"] = (size * (row[f"{p}read"] + row[f"{p}write"]) for p in ("", "issued_"))
    row["broken"] = broken(row, case.law)
    return row


def broken(row: dict, law: Law) -> list[str]:
    """Which laws a row breaks. Each pass may touch the token's own logit once more."""
    once_more = (2 * law.rows + 1) / row["V"]
    found = [f"{name} {row[name]:.3f}, law {getattr(law, name):g}" for name in ("read", "write")
             if abs(row[name] - getattr(law, name)) > 1e-9]  # fmt: skip
    if row["issued_read"] > law.issued + once_more:
        found.append(f"issued reads {row['issued_read']:.3f}, law {law.issued:g}")
    if row["issued_write"] > law.write + law.over + once_more:
        found.append(f"issued writes {row['issued_write']:.3f}, law {law.write + law.over:g}")
    if row["rows"] != law.rows:
        found.append(f"{row['rows']} launches over the logits, law {law.rows}")
    if row["small"] > SMALL_LAUNCHES:
        found.append(f"{row['small']} small launches, law {SMALL_LAUNCHES}")
    parts = PARTS * law.write if row["V"] == V else 0
    if law.over:  # neighbouring ids, two bytes each: the lines they lie in
        parts += 2 + (KEPT + 1) * 2 // 128
    if row["part"] > parts:
        found.append(f"{row['part']:.1f} lines of memory written in part per row, law {parts:g}")
    return found + [f"{name} on a tensor of the logits' size" for name in row["large_ops"]]


LEGEND = (
    f"Per logit, N = {B * T} rows, V = {V}; with rows on lines {ALIGNED}. read, write: distinct elements per launch, "
    "summed over launches; iss: every read, twice in one launch counted twice; B: bytes of the distinct reads and "
    "writes, iss B: of all. part: how often per row a warp's store, 512 bytes, leaves a line of memory filled in part. "
    "law: reads + writes it should be. rows: launches over the logits; small: other launches, torch's own included, "
    f"at most {SMALL_LAUNCHES}; N·V: torch operations of the logits' size. Whether the second read of a row in one "
    "launch hits on chip, only a GPU's counters can say."
)


def table(rows: list[dict]) -> Iterator[str]:
    """At most 80 columns."""
    yield (f"{'':24}{'read':>5}{'write':>6}{'iss':>5}{'B':>5}{'iss B':>6}{'part':>5}{'law':>9}{'rows':>5}{'small':>6}"
           f"{'N·V':>4}")  # fmt: skip
    for row in rows:
        law, large = f"{round(row['law']['read'], 2):g}R+{row['law']['write']:g}W", len(row["large_ops"])
        yield (f"{row['case']:24}{row['read']:5.2f}{row['write']:6.2f}{row['issued_read']:5.2f}{row['bytes']:5.1f}"
               f"{row['issued_bytes']:6.1f}{row['part']:5.1f}{law:>9}{row['rows']:5}{row['small']:6}"
               f"{large:4}")  # fmt: skip
        for text in row["broken"]:
            yield from textwrap.wrap(f"BROKEN: {text}", 78, initial_indent="  ", subsequent_indent="    ")


def main(argv: list[str] | None = None) -> int:
    hasten()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic_report", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows, launch by launch, as JSON too")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these rows")
    args = parser.parse_args(argv)
    chosen = [case for case in cases() if not args.case or case.name.strip() in args.case]
    heads = [case for case in linear_traffic.CASES if not args.case or case.name in args.case]
    if not chosen and not heads:
        names = [case.name.strip() for case in (*cases(), *linear_traffic.CASES)]
        parser.error(f"no such case; there are: {', '.join(names)}")
    rows, of_heads = [count(case) for case in chosen], [linear_traffic.count(case) for case in heads]
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    print(f"torch {torch.__version__}, Triton {triton.__version__}.")
    for found, legend, lines in ((rows, LEGEND, table), (of_heads, linear_traffic.LEGEND, linear_traffic.table)):
        if found:
            print("\n" + textwrap.fill(legend, 80) + "\n")
            print("\n".join(lines(found)))
    bad, total = sum(bool(row["broken"]) for row in (*rows, *of_heads)), len(rows) + len(of_heads)
    print(f"\n{bad} of {total} break a law" if bad else f"\nAll {total} keep the law.")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**versions, "rows_of_logits": B * T, "V": V, "rows": rows, "heads": of_heads}, file, indent=1)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
