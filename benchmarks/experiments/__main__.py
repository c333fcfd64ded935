"""`python -m benchmarks.experiments`: the candidates for the one-launch loss kernel, compiled or measured."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

from benchmarks.compile_report import TARGETS
from benchmarks.experiments import cluster, compiled, measured

NAMES = ("present", "counter", "cluster", "interleaved", "hints")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1: a result was wrong or raised, or a kernel did not compile; 2: there is nothing to run on."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments",
        description="Other ways to write the one-launch loss kernel: checked against float64, then timed as multiples "
        "of a copy of the logits. With --compile: what the compiler makes of them, which takes no GPU.",
    )
    parser.add_argument("--compile", action="store_true", help="compile only, for --target, --vocab and --dtype")
    parser.add_argument("--vocab", type=int, nargs="+", default=[151936], help="with --compile (default: 151936)")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="with --compile")
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"], help="only these")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="only these candidates")
    parser.add_argument("--cubins", type=Path, metavar="DIR", help="cluster kernels for sm_90: with --compile written "
                        "there, else run from there if this Triton is too old to compile them")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json and results.csv there")
    parser.add_argument("--minutes", type=float, default=5.5, help="for all that is measured (default: 5.5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data (default: 0)")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: this compiles kernels")
    if arguments.compile:
        return compile_all(arguments)
    if not torch.cuda.is_available():
        parser.error(f"needs a GPU, and torch {torch.__version__} sees none; --compile does without")
    cluster.cubins = arguments.cubins
    return measured.main(arguments)


def compile_all(arguments: argparse.Namespace) -> int:
    print(textwrap.fill(f"Triton {triton.__version__}. {compiled.LEGEND}", 80))
    rows = []
    wanted = compiled.report(arguments.vocab, arguments.dtype, arguments.target, arguments.only, arguments.cubins)
    for (target, V, dtype), block in itertools.groupby(wanted, lambda row: (row["target"], row["V"], row["dtype"])):
        print(f"\n{target}, V = {V}, {dtype}\n{compiled.TITLES}", flush=True)
        for row in block:
            rows.append(row)
            print(compiled.line(row), flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"triton": triton.__version__, "rows": rows}, indent=1)
        (arguments.out / "compiled.json").write_text(text + "\n")
    return int(any(row["failed"].startswith(("Compil", "Runtime")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
