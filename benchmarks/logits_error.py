"""What rounding the logits costs: errors against float64 with logits in the dtype of the hidden states, and in fp32.

    python -m benchmarks.logits_error [--rows 256] [--hidden 896] [--vocab 32000] [--dtype bf16]

Hidden states and a head in half precision; tokens drawn from what they predict, logits with a standard deviation of 3.
float64 has the same operands and rounds nothing. Errors of the log-probabilities, and of the gradients of their sum in
hidden states and head, relative to the norm. Gradients are handed over in half precision, which rounds them by itself.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.cases import Case
from benchmarks.linear_data import make_linear_inputs
from grpo_kernels import linear_token_logprobs
from reference import token_logprobs

TIMES = 3  # that a call is timed, after one that warms up
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Error(NamedTuple):
    logits: str
    largest: float  # of the log-probabilities, absolute
    mean: float
    hidden: float  # of a gradient, ‖error‖ / ‖gradient‖
    weight: float
    ms: float


def exact(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """Log-probabilities, and the gradients of their sum, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logps = token_logprobs(leaves[0] @ leaves[1].T, ids).logps
    return logps.detach(), *torch.autograd.grad(logps.sum(), leaves)


def called(hidden: Tensor, weight: Tensor, ids: Tensor, logits_dtype: torch.dtype | None) -> tuple[float, tuple]:
    """(milliseconds of forward and backward, what `exact` gives)"""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    began = time.perf_counter()
    logps = linear_token_logprobs(*leaves, ids, logits_dtype=logits_dtype).logps
    found = logps.detach(), *torch.autograd.grad(logps.sum(), leaves)
    if hidden.is_cuda:
        torch.cuda.synchronize(hidden.device)
    return 1e3 * (time.perf_counter() - began), found


def measure(rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Error]:
    inputs = make_linear_inputs(Case(1, rows, vocab, dtype, hidden=hidden), device)
    want = exact(inputs.hidden, inputs.weight, inputs.completion_ids)
    found = []
    for logits_dtype in (None, torch.float32):
        runs = [called(inputs.hidden, inputs.weight, inputs.completion_ids, logits_dtype) for _ in range(1 + TIMES)]
        ms, got = statistics.median(ms for ms, _ in runs[1:]), runs[0][1]
        off, *others = ((x.double() - y).abs() for x, y in zip(got, want))
        shares = (x.norm().item() / y.norm().item() for x, y in zip(others, want[1:]))
        name = str(logits_dtype or dtype).removeprefix("torch.")
        found.append(Error(name, off.max().item(), off.mean().item(), *shares, ms))
    return found


def table(errors: list[Error]) -> Iterator[str]:
    yield "| logits | log-probs, largest | log-probs, mean | d hidden | d weight | ms |"
    yield "|---|---|---|---|---|---|"
    for each in errors:
        numbers = " | ".join(f"{x:.1e}" for x in each[1:5])
        yield f"| {each.logits} | {numbers} | {each.ms:.0f} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logits_error", description=__doc__.splitlines()[0])
    for name, size in (("rows", 256), ("hidden", 896), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=size, metavar="N", help=f"default: {size}")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of hidden states and head (default: bf16)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = environment.describe(device)
    print(f"{args.rows} rows, H = {args.hidden}, V = {args.vocab}. {where['device']}, torch {where['torch']}, commit "
          f"{str(where['commit'])[:9]}; forward and backward, median of {TIMES}\n")  # fmt: skip
    print("\n".join(table(measure(args.rows, args.hidden, args.vocab, DTYPES[args.dtype], device))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
