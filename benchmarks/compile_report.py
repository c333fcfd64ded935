"""What the compiler makes of each kernel, for GPUs that need not be there.

    python -m benchmarks.compile_report [--json FILE] [--vocab V ...] [--target sm_90 ...]

Every kernel is compiled as the package launches it: the launches are recorded on small CPU tensors,
and their signatures compiled offline for each target. Registers, stack and spills come from the
compiler's own report, the rest from the disassembly. Run without TRITON_INTERPRET.
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo_kernels.correction import CORRECTIONS
from grpo_kernels.inputs import Coefs, Inputs
from grpo_kernels.kernels import launch
from grpo_kernels.plan import Plan
from grpo_kernels.variants import KL_ESTIMATORS, TERMS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = (
    "logprob_kernel", "loss_kernel", "slope_kernel", "scale_kernel", "sequence_kernel", "total_kernel", "spread_kernel",
    "correction_kernel", "segments_kernel", "threshold_kernel",
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class Launch(NamedTuple):
    """A recorded launch: the kernel and its arguments by name."""

    label: str
    kernel: object
    arguments: dict
    options: dict


class _Recorder:
    def __init__(self, kernel, launches: list, label: str) -> None:
        self.kernel, self.launches, self.label = kernel, launches, label

    def __getitem__(self, grid):
        def record(*args, **kwargs) -> None:
            options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
            arguments = inspect.signature(self.kernel.fn).bind(*args, **kwargs).arguments
            self.launches.append(Launch(f"{self.kernel.fn.__name__} {self.label}", self.kernel, arguments, options))

        return record


@contextlib.contextmanager
def recording(launches: list, label: str, wave: int) -> Iterator[None]:
    """Launches are recorded instead of run, with the tile shapes of a GPU of this wave size."""
    shapes = ("tile_shape", "block_shape")
    saved = {name: getattr(launch, name) for name in (*KERNELS, *shapes)}
    for name in KERNELS:
        setattr(launch, name, _Recorder(saved[name], launches, label))
    for name in shapes:
        setattr(launch, name, functools.partial(saved[name], wave=wave))
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(launch, name, value)


def record_launches(V: int, dtype: str, wave: int) -> list[Launch]:
    """Each kernel in its leanest form (fewest inputs), its fullest, and with every term and KL."""
    B, T = 2, 2
    logits = torch.zeros(B, T, V, dtype=DTYPES[dtype])
    ids = torch.zeros(B, T, dtype=torch.int64)
    token, sequence, one = torch.zeros(B, T), torch.zeros(B), torch.ones(())
    column = sequence[:, None]
    lean = Inputs(ids, adv=column)
    weighted = lean._replace(mask=ids, old=token, count=sequence)
    full = weighted._replace(ref=token, adv=None, rewards=sequence, is_weight=column, temperature=column,
                             loss_scale=one, tokens=one)  # fmt: skip
    tokens = torch.zeros(1, B * T)
    row, flat_ids = logits.reshape(1, B * T, V), ids.reshape(1, B * T)
    cu, segments = torch.zeros(B + 1, dtype=torch.int32), torch.zeros(B * T, dtype=torch.int32)
    packed = Inputs(flat_ids, flat_ids, tokens, tokens, tokens, column, None, None, column, count=sequence, cu=cu,
                    segments=segments)  # fmt: skip
    own = {name: bool(term.statistic) for name, term in TERMS.items()}
    launches: list[Launch] = []

    def run(label, inputs, plan, entropy=False, gradient=True):
        coefs = Coefs(term=(1.0,) * len(TERMS[plan.term].kind._fields))
        x = logits if inputs.cu is None else row
        with recording(launches, f"{plan.term} {label} {dtype}", wave):
            if plan.one_launch:
                launch.loss(x, x, inputs, coefs, plan, entropy)
            launch.logprobs(x, inputs, coefs, plan, entropy)
            logps = torch.zeros(inputs.ids.shape)
            entropies = logps if entropy else None
            launch.objective(logps, entropies, inputs, coefs, plan, gradient)
            launch.slope(x, x, inputs, torch.zeros(logps.numel(), 3), logps, entropies, one, coefs)

    for name in TERMS:
        run("lean", lean, Plan(term=name))
        run("old", weighted, Plan(term=name))
        level = "token" if own[name] or "dppo" in name else "sequence"
        run("sequence", weighted, Plan(term=name, level=level, off_policy=True, clip_once=True))
    for name in KL_ESTIMATORS:
        run(f"KL {name}", full, Plan(term="clipped", kl=name, bias=True, scale_rewards="batch"))
    full_plan = Plan(term="clipped", kl="k3", bias=True, scale_rewards="batch", bonus=True)
    run("full", full, full_plan, entropy=True)
    run("full sequence", full._replace(sampling=token, threshold=one, gate=token),
        full_plan._replace(level="sequence", quantile=True, off_policy=True), entropy=True)  # fmt: skip
    run("skip", full._replace(ref=None), Plan(term="clipped", scale_rewards="group", skip=True))
    run("packed", packed, full_plan._replace(scale_rewards="none"), entropy=True)
    run("packed sequence", packed, Plan(term="clipped", level="sequence"))
    run("weights once", full._replace(ref=None), Plan(term="vespo", scale_rewards="group", weight_once=True))
    with recording(launches, dtype, wave):
        launch.scale(logits, logits, one)
        for up, bounds in ((None, None), (token, None), (None, cu)):
            launch.join(*(tokens if bounds is not None else token for _ in range(3)), up, bounds)
        for correction in CORRECTIONS.values():
            launch.correct(token, full._replace(sampling=token), Coefs(), correction)
        launch.segments(flat_ids, cu, B * T)
        launch.threshold(segments.float(), segments.float(), 0.5)
    seen = {}
    for each in launches:
        seen.setdefault((each.kernel, str(_signature(each))), each)
    return list(seen.values())


def _signature(each: Launch) -> tuple[dict, dict, dict]:
    """(types, constants, alignment hints) as Triton's own launcher would derive them."""
    types, constants, hints = {}, {}, {}
    parameters = inspect.signature(each.kernel.fn).parameters
    free = {p.name: p.do_not_specialize for p in each.kernel.params}
    for place, (name, parameter) in enumerate(parameters.items()):
        value = each.arguments[name]
        annotation = getattr(parameter.annotation, "name", "")
        if value is None or each.kernel.params[place].is_constexpr:
            types[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = _POINTERS[value.dtype]
        elif isinstance(value, tuple):
            types[name] = type(value)(*("fp32",) * len(value))
        elif isinstance(value, float) or annotation == "fp32":
            types[name] = "fp32"
        else:
            types[name] = "i64" if annotation == "int64" else "i32"
            if not free[name] and value % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
    return types, constants, hints


def compile_launch(each: Launch, target_name: str) -> dict:
    """Compile one launch for one target; a flat dict of what was found."""
    target = TARGETS[target_name]
    options = dict(each.options)
    compiled = triton.compile(ASTSource(each.kernel, *_signature(each)), target=target, options=options)
    row = {"kernel": each.label, "target": target_name, **each.options}
    row.update(_amd(compiled.asm["amdgcn"]) if target.backend == "hip" else _nvidia(compiled.asm["cubin"]))
    per_tile = each.arguments.get("K", 0) * each.arguments.get("L", 0)
    row["lines"] = each.arguments.get("K", 0)
    row["elements_per_thread"] = per_tile // (options["num_warps"] * target.warp_size) if per_tile else 0
    return row


def _nvidia(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
    return {
        "registers": int(found[1]), "stack": int(found[2]), "shared": int(found[3]),
        "spills": count(r"\b(?:LDL|STL)\b"), "wide_loads": count(r"\bLDG\S*\.128"), "loads": count(r"\bLDG\b"),
        "wide_stores": count(r"\bSTG\S*\.128"), "stores": count(r"\bSTG\b"), "ex2": count(r"\bMUFU\.EX2\b"),
        "instructions": count(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S"),
    }  # fmt: skip


def _amd(assembly: str) -> dict:
    field = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])  # noqa: E731
    count = lambda pattern: len(re.findall(pattern, assembly))  # noqa: E731
    return {
        "registers": field("vgpr_count"), "stack": field("private_segment_fixed_size"),
        "shared": field("group_segment_fixed_size"), "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "wide_loads": count("global_load_dwordx4|buffer_load_dwordx4"), "loads": count("(?:global|buffer)_load"),
        "wide_stores": count("global_store_dwordx4|buffer_store_dwordx4"), "stores": count("(?:global|buffer)_store"),
        "ex2": count("v_exp_f32"), "instructions": count(r"(?m)^\t[vs]_|^\tglobal_|^\tds_|^\tbuffer_"),
    }  # fmt: skip


def _tool(name: str, *args: str) -> str:
    return subprocess.run([os.path.join(_TOOLS, name), *args], capture_output=True, text=True, check=True).stdout


def report(vocabularies: list[int], dtypes: list[str], targets: list[str]) -> list[dict]:
    """One row per launch form × target × dtype × vocabulary."""
    jobs = {}  # the [B, T] kernels are the same for every dtype of the logits
    for target, V, dtype in itertools.product(targets, vocabularies, dtypes):
        for each in record_launches(V, dtype, TARGETS[target].warp_size):
            jobs.setdefault((target, V, each.kernel, str(_signature(each))), each)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: {"V": job[0][1], **compile_launch(job[1], job[0][0])}, jobs.items()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON too")
    parser.add_argument("--vocab", type=int, nargs="+", default=[151936], help="vocabulary sizes (default: 151936)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"], help="dtypes of the logits")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPUs to compile for")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("compile_report compiles: unset TRITON_INTERPRET.")
    rows = report(args.vocab, args.dtype, args.target)
    print(f"Triton {triton.__version__}; a spill, or a narrow row access where V % 16 == 0, is a defect.\n")
    print(f"{'target':7} {'V':>6} {'kernel':38} {'reg':>3} {'stk':>3} {'spl':>3} {'wide ld':>7} {'wide st':>7}")
    for row in rows:
        print(
            f"{row['target']:7} {row['V']:6} {row['kernel']:38} {row['registers']:3} {row['stack']:3} "
            f"{row['spills']:3} {row['wide_loads']:7} {row['wide_stores']:7}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"triton": triton.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
