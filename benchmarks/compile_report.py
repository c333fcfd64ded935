"""What the compiler makes of each kernel, for GPUs that need not be there.

    python -m benchmarks.compile_report [--json FILE] [--vocab V ...] [--target sm_90 ...]

Every kernel is compiled as the package launches it: the launches are recorded on small CPU tensors,
and their signatures compiled offline for each target. Registers, stack and spills come from the
compiler's own report, the rest from the disassembly. Run without TRITON_INTERPRET. Exit status 1
where there is a defect, see `defects`.

Exponentials and instructions per element are those of the loops over a row. A loop is a branch
backwards and what lies between it and its target. The elements of one iteration are the bytes that
its loads fetch, over the size of a logit; loops are often unrolled, so this is not a constant. The
first pass loads and exponentiates; the second stores too. A kernel's figure is the sum of its
passes.

"row" is what all of a row costs, per element: the loops over whole tiles, those over the rest of the
row, whose lines are not all full, and whatever stands outside of the loops, of which no row runs all.
"""

import argparse
import itertools
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import machine_code
from benchmarks.compile_launches import DTYPES, Extent, Launch, record_launches, repeats_loops, signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Which passes over a row a kernel makes; how many exponentials per element they may take together; and
# what is narrow outside of the loops: the token's log-probability, entropy and entry, and its own logit.
PASSES = {
    "loss_kernel": ("first", "second"), "logprob_kernel": ("first",), "slope_kernel": ("second",),
    "scale_kernel": ("scale",), "whole_teacher_kernel": ("first", "second"), "few_tokens_kernel": ("first", "second"),
}  # fmt: skip
MOST_EX2, NARROW_STORES, HALF_LOADS = 3.4, 8, 1
# Five numbers that are kept of two rows; lines behind the last whole tile, of 8 bytes a thread in half precision.
MORE_STORES = {"whole_teacher_kernel": 3, "fp32 logits": 8}


def compiled_for(each: Launch, target_name: str):
    """A launch as Triton compiles it for a target."""
    source = ASTSource(each.kernel, *signature(each))
    return triton.compile(source, target=TARGETS[target_name], options=dict(each.options))


def machine_code_of(each: Launch, target_name: str, brief: bool = False) -> dict:
    """What the machine code of a launch holds, the loops apart."""
    target, options = TARGETS[target_name], each.options
    compiled = compiled_for(each, target_name)
    row = {"kernel": each.label, "target": target_name, **each.options}
    binary, read = ("amdgcn", machine_code.amd) if target.backend == "hip" else ("cubin", machine_code.nvidia)
    if brief and binary == "cubin" and not passes_of(each, brief):
        read = machine_code.nvidia_usage
    row |= {**read(compiled.asm[binary]), "shared": compiled.metadata.shared}
    row["resident_programs"] = machine_code.resident_programs(target, row["registers"], options["num_warps"])
    row["resident_warps"] = row["resident_programs"] * options["num_warps"]
    return row


def compile_launch(each: Launch, target_name: str, brief: bool = False) -> dict:
    """The same as a flat dict, with the passes over a row in place of the loops."""
    target, options = TARGETS[target_name], each.options
    row = machine_code_of(each, target_name, brief)
    loops, x = row.pop("loops"), each.arguments.get("logits", each.arguments.get("grad"))
    tile = each.arguments.get("K", 0) * each.arguments.get("W", 0)
    passes, rests = ({}, {}) if x is None else _row_passes(loops, x.element_size(), tile)
    capped = each.arguments.get("cap") is not None
    row |= {"tile_per_thread": tile, "passes": passes, "rests": rests, "capped": capped}
    row["wanted"] = passes_of(each, brief)
    whole = passes and all(loop["elements"] % tile == 0 for loop in passes.values())
    for what in ("ex2", "instructions"):  # None: a loop was not found whole, as where rows are read in branches
        row[f"{what}_per_element"] = sum(loop[what] / loop["elements"] for loop in passes.values()) if whole else None
    if whole:
        outside = row["instructions"] - sum(loop["instructions"] for loop in loops)
        row["row_per_element"] = _row_cost(x.shape[2], options["num_warps"] * target.warp_size, passes, rests, outside)
    return row


def passes_of(each: Launch, brief: bool = False) -> tuple[str, ...]:
    """Those over a row that a launch should make; with `brief` none where another launch has the same."""
    passes, flags = PASSES.get(each.kernel.fn.__name__, ()), each.arguments
    few = flags.get("FEW") or flags.get("support") is not None  # a row is not read, but for a few tokens
    masked = flags.get("keep") is not None  # its mask is read beside it, a byte per entry
    if few or masked or (brief and repeats_loops(each.label)):
        return ()
    made = {"first": flags.get("VALUES", True), "second": flags.get("GRADIENT", True)}
    return tuple(name for name in passes if made.get(name, True))


def _row_cost(V: int, threads: int, passes: dict, rests: dict, outside: int) -> float:
    """Instructions of a program, over the entries of its row."""
    each = outside  # instructions of a thread
    for which, loop in passes.items():
        line = rests.get(which, loop)
        times, rest = divmod(V, threads * loop["elements"])
        each += times * loop["instructions"] + -(-rest // (threads * line["elements"])) * line["instructions"]
    return each * threads / V


def _row_passes(loops: list[dict], itemsize: int, tile: int = 1) -> tuple[dict, dict]:
    """The loops over a row: "first" (loads, exponentials), "second" (stores too), "scale" (no exponentials).

    First those over whole tiles, of ``tile`` elements a thread, then those over the rest of a row, which take more
    per element. Of a loop that the compiler has unrolled, its main part; of the rest's, the iterations left over.
    Of the first pass in its two forms, the sum anchored at the token and the running maximum, it is the cheaper.
    """
    found: dict[str, list] = {}
    for loop in loops:
        if loop["loaded"] and (loop["ex2"] or loop["stores"]):
            loop["elements"] = loop["loaded"] // itemsize
            found.setdefault("first" if not loop["stores"] else "second" if loop["ex2"] else "scale", []).append(loop)
    passes, rests = {}, {}
    for name, each in found.items():
        cost = lambda loop: (loop["elements"] % tile > 0, loop["instructions"] / loop["elements"])  # noqa: E731
        passes[name], *others = sorted(each, key=cost)
        if others:
            rests[name] = min(others, key=lambda loop: loop["elements"])
    return passes, rests


def defects(row: dict) -> list[str]:
    """What is wrong with a compiled launch. Rows of odd V have edges, narrow, once per pass."""
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"{row['spills']} spills, {row['stack']} bytes of stack")
    wanted = row.get("wanted", PASSES.get(row["kernel"].split()[0], ()))
    if not wanted:
        return found
    if set(row["passes"]) != set(wanted):
        return [*found, f"loops over a row: {', '.join(row['passes']) or 'none'}, not {', '.join(wanted)}"]
    edges = len(wanted) + ("first" in wanted) if row["V"] % 16 else 0  # the first pass in both its forms
    for which, loop in row["passes"].items():
        for what in ("loads", "stores"):
            if narrow := loop[what] - loop[f"wide_{what}"]:
                found.append(f"{narrow} narrow {what} in the loop of the {which} pass")
    # a loop over the rest of a row may be unrolled, and no loop then
    more = sum(count for part, count in MORE_STORES.items() if part in row["kernel"])
    if (narrow := row["stores"] - row["wide_stores"]) > NARROW_STORES + more + 2 * edges:
        found.append(f"{narrow} narrow stores")
    if row["half_loads"] > HALF_LOADS + edges:
        found.append(f"{row['half_loads']} loads of 2 bytes")
    if row["ex2_per_element"] is None:
        found.append("a loop over a row does not cover whole tiles")
    if (row["ex2_per_element"] or 0.0) > MOST_EX2 + row["capped"] * len(wanted):  # a soft cap takes one a pass
        found.append(f"{row['ex2_per_element']:.2f} exponentials per element")
    return found


def report(
    vocabularies: list[int], dtypes: list[str], targets: list[str], brief: bool = False, only: str = ""
) -> list[dict]:
    """One row per launch form × target × dtype × vocabulary.

    `brief`: a brief record for the first target, a representative one for the others, see `compile_launches.Extent`.
    NVIDIA's kernels are disassembled where they read a row, and no other launch has the same loops.
    """
    jobs = {}  # the [B, T] kernels are the same for every dtype of the logits
    for target, V, dtype in itertools.product(targets, vocabularies, dtypes):
        extent = Extent.EVERY if not brief else Extent.BRIEF if target == targets[0] else Extent.REPRESENTATIVE
        for each in record_launches(V, dtype, TARGETS[target].warp_size, extent):
            if re.search(only, each.label):
                jobs.setdefault((target, V, each.kernel, str(signature(each))), each)

    def compiled(job):
        (target, V, *_), each = job
        return {"V": V, **compile_launch(each, target, brief)}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, jobs.items()))


WIDTH = 100
LEGEND = (
    "reg: registers per thread; stk: stack, bytes; spl: spills; ld, st: wide/all loads and stores (wide: 16 bytes a "
    "thread); ex2, ins: exponentials and instructions per element, of the loops over whole tiles; row: instructions "
    "per element of all of a row, at most; prog, warps: resident on a multiprocessor by registers."
)


def table(rows: list[dict]) -> Iterator[str]:
    """Lines of at most WIDTH columns."""
    yield (f"{'target':7}{'V':>6} {'kernel':32}{'reg':>4}{'stk':>4}{'spl':>4}{'ld':^7}{'st':^7}"
           f"{'ex2':>5}{'ins':>6}{'row':>6}{'prog':>5}{'warps':>6}")  # fmt: skip
    for row in rows:
        ex2, instructions, all_of_it = (row.get(f"{what}_per_element") for what in ("ex2", "instructions", "row"))
        loop = f"{'-':>5}{'-':>6}{'-':>6}" if ex2 is None else f"{ex2:5.2f}{instructions:6.1f}{all_of_it:6.1f}"
        accesses = "".join(f"{row.get('wide_' + what, '-'):>3}/{row.get(what, '-'):<3}" for what in ("loads", "stores"))
        yield (f"{row['target']:7}{row['V']:6} {_label(row['kernel']):32}{row['registers']:4}{row['stack']:4}"
               f"{row['spills']:4}{accesses}{loop}{row['resident_programs']:5}{row['resident_warps']:6}")  # fmt: skip


def _label(kernel: str) -> str:
    name = kernel.replace("_kernel", "").replace("sequence", "seq")
    return name if len(name) <= 31 else name[:30] + "…"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON too")
    parser.add_argument("--vocab", type=int, nargs="+", default=[151936], help="vocabulary sizes (default: 151936)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"], help="dtypes of the logits")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPUs to compile for")
    parser.add_argument("--brief", action="store_true", help="fewer launches, as the tests have them: see `report`")
    parser.add_argument("--only", metavar="REGEX", default="", help="launches whose label matches")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("compile_report compiles: unset TRITON_INTERPRET.")
    rows = report(args.vocab, args.dtype, args.target, args.brief, args.only)
    bad = [(row, text) for row in rows for text in defects(row)]
    print(textwrap.fill(f"Triton {triton.__version__}, {len(rows)} kernels. {LEGEND}", WIDTH) + "\n")
    print("\n".join(table(rows)))
    for row, text in bad:
        print(textwrap.fill(f"DEFECT {row['target']} {row['V']} {row['kernel']}: {text}", WIDTH))
    print(f"\n{len(bad)} defects")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"triton": triton.__version__, "rows": rows}, file, indent=1)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
