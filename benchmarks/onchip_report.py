"""What the compiler makes of the on-chip kernel, for GPUs that need not be there: `python -m benchmarks.onchip_report`.

Registers, stack, spills, shared memory and barriers of its machine code, and instructions and exponentials per entry of
its main loop, which writes a row's gradient and sums the next one. Run without TRITON_INTERPRET. Exit status 1 where
anything spills.
"""

import argparse
import itertools
import os
import re
import sys

import torch
import triton
from triton.experimental.gluon._runtime import GluonASTSource

from benchmarks import machine_code
from benchmarks.compile_launches import Launch, Recorder, signature
from benchmarks.compile_report import TARGETS
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.catalogue import TERMS
from grpo_kernels.objective.plan import Plan
from grpo_kernels.triton_backend import launch, onchip_launch, shapes, ways

VOCABULARIES, CHIPS = (32000, 128256, 151936, 262144), ("sm_90", "sm_100")
TITLES = {"reg": 4, "stk": 4, "spl": 4, "smem": 8, "bar": 4, "ins": 6, "ex2": 6}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def record_launches(V: int, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """The kernel in a usual form, its fullest, packed, and with every term, as the package launches it."""
    B, T = 2, 2
    logits = torch.zeros(B, T, V, dtype=dtype)
    ids, token, sequence, one = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T), torch.zeros(B), torch.ones(())
    column = sequence[:, None]
    usual = Batch(ids, ids, token, adv=column, count=sequence)
    full = usual._replace(ref=token, is_weight=column, temperature=column, loss_scale=one, tokens=one)
    packed = full._replace(
        ids=ids.view(1, -1), mask=ids.view(1, -1), old=token.view(1, -1), ref=token.view(1, -1), tokens=None,
        cu=torch.zeros(B + 1, dtype=torch.int32), segments=torch.zeros(B * T, dtype=torch.int32),
    )  # fmt: skip
    launches: list[Launch] = []

    class Chip:
        with_advantages = staticmethod(onchip_launch.with_advantages)
        label = ""

        @classmethod
        def launcher(cls, logits, batch, entropy):
            shape = onchip_launch.onchip_shape(V, shapes.crowded(batch, entropy), logits.element_size())
            del shape["programs"]
            shape["tickets"] = torch.zeros(1, dtype=torch.int32) if shape["tickets"] else None
            return Recorder(onchip_launch.onchip_kernel, launches, cls.label)[(1,)], shape

    def run(label: str, batch: Batch, plan: Plan, entropy: bool = False) -> None:
        Chip.label = f"{plan.term} {label}"
        x = logits if batch.cu is None else logits.view(1, B * T, V)
        batch = batch._replace(term=(1.0,) * len(TERMS[plan.term].kind._fields))
        launch.gradient(x, x, batch, plan, entropy)

    saved, ways.on_chip = ways.on_chip, lambda *given: Chip
    try:
        for name in TERMS:
            if Plan(term=name).one_launch:
                run("", usual, Plan(term=name))
        most = Plan(term="clipped", kl="k3", bias=True)
        run("KL", usual._replace(ref=token), most)
        run("full", full, most)
        run("full, bonus", full, most._replace(bonus=True), entropy=True)
        run("entropies", usual, Plan(term="clipped"), entropy=True)
        run("packed", packed, most)
    finally:
        ways.on_chip = saved
    return launches


def machine_code_of(each: Launch, target: str) -> dict:
    source = GluonASTSource(each.kernel, *signature(each))
    compiled = triton.compile(source, target=TARGETS[target], options=dict(each.options))
    row = {"kernel": each.label.strip(), "target": target, "V": each.arguments["V"], "shared": compiled.metadata.shared}
    row |= machine_code.nvidia(compiled.asm["cubin"])
    row["barriers"] = len(re.findall(r"\bbar\.sync|\bbarrier\.sync", compiled.asm["ptx"]))
    # Of every entry the gradient is written, 16 bytes by a store, and one of the next row is summed.
    entries = 16 // each.arguments["logits"].element_size()
    main = max((loop for loop in row["loops"] if loop["wide_stores"]), key=lambda loop: loop["ex2"], default=None)
    for name in ("instructions", "ex2"):
        row[f"{name}_per_entry"] = main[name] / (entries * main["wide_stores"]) if main else float("nan")
    row["dtype"] = next(name for name, dtype in DTYPES.items() if dtype == each.arguments["logits"].dtype)
    return row


def line(row: dict) -> str:
    numbers = f"{row['registers']:4}{row['stack']:4}{row['spills']:4}{row['shared']:8}{row['barriers']:4}"
    per_entry = f"{row['instructions_per_entry']:6.1f}{row['ex2_per_entry']:6.2f}"
    return (
        f"{row['target']:7}{row['V']:7} {row['dtype']:5}{row['kernel'].replace('_kernel', ''):31}{numbers}{per_entry}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onchip_report", description=__doc__.split(":")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--target", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--only", metavar="REGEX", default="", help="forms that match")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("onchip_report compiles: unset TRITON_INTERPRET.")
    print(f"Triton {triton.__version__}. reg: registers; stk: bytes of stack; spl: spills; smem: bytes of shared")
    print("memory; bar: barriers in the code; ins, ex2: instructions and exponentials per entry in the main loop")
    titles = "".join(f"{name:>{width}}" for name, width in TITLES.items())
    print(f"{'target':7}{'V':>7} {'dtype':5}{'kernel':31}{titles}")
    bad = 0
    for V, dtype in itertools.product(args.vocab, args.dtype):
        for each in record_launches(V, DTYPES[dtype]):
            if not re.search(args.only, each.label):
                continue
            for target in args.target:
                row = machine_code_of(each, target)
                bad += bool(row["spills"] or row["stack"])
                print(line(row), flush=True)
    print(f"{bad} of them spill")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
