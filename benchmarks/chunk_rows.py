"""What a loss from hidden states takes by the rows of its chunks: `python -m benchmarks.chunk_rows`.

Of the three products of a head, z = h·Wᵀ, dh = dz·W and dW += dzᵀ·h in fp32, the time of all chunks together; then the
whole loss with its backward, and the peak of memory above its inputs. docs/linear.md says what follows for the default.
Without a GPU the sizes are tiny.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import environment, report
from benchmarks.measure import Failed, Timed, free_memory, peak_extra_bytes, time_all
from grpo_kernels import fused_linear_grpo_loss
from grpo_kernels.linear.head import accumulate

GPU = ((151936, 896), (151936, 1536), (152064, 3584), (128256, 4096), (32000, 4096))  # V, H
CPU = ((512, 32),)
HEIGHTS = {"cuda": (256, 512, 768, 1024, 1280, 1536, 2048, 3456, 4096, 8192), "cpu": (16, 64)}
TOKENS = {"cuda": 8192, "cpu": 64}
MOST_BYTES = 3 << 30


@dataclass
class Row:
    """Milliseconds are medians of all chunks together."""

    vocab: int
    hidden: int
    tokens: int
    rows: int  # of a chunk
    chunk_bytes: int
    logits_ms: float  # z
    hidden_ms: float  # dh
    weight_ms: float  # dW
    loss_ms: float  # the whole loss, backward included
    peak_bytes: int | None


def measure(V: int, H: int, height: int, device: torch.device, seconds: float) -> Row:
    """
    Raises:
        RuntimeError: something could not be timed.
    """
    tokens, generator = TOKENS[device.type], torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    hidden, weight = normal(8, tokens // 8, H).requires_grad_(), normal(V, H).mul_(0.02).requires_grad_()
    ids = torch.randint(V, (8, tokens // 8), device=device, generator=generator)
    advantages = torch.randn(8, device=device, generator=generator)
    chunk_bytes = height * V * weight.element_size()

    def loss() -> None:
        out = fused_linear_grpo_loss(hidden, weight, ids, advantages, chunk_bytes=chunk_bytes)
        torch.autograd.grad(out.loss, (hidden, weight))

    loss()  # what is kept for good is there now
    peak = peak_extra_bytes(loss, device)
    h, W = hidden.detach().view(-1, H), weight.detach()
    z, dh, dW = normal(height, V), torch.empty_like(h), torch.empty(V, H, device=device)

    def chunks(product: Callable[[Tensor, Tensor, slice], object]) -> Timed:
        cuts = [slice(at, min(at + height, tokens)) for at in range(0, tokens, height)]
        return Timed(lambda: [product(z[: cut.stop - cut.start], h[cut], cut) for cut in cuts] and None)

    subjects = {
        "logits_ms": chunks(lambda z, h, cut: torch.mm(h, W.T, out=z)),
        "hidden_ms": chunks(lambda z, h, cut: torch.mm(z, W, out=dh[cut])),
        "weight_ms": chunks(lambda z, h, cut: accumulate(dW, z, h, cut.start == 0)),
        "loss_ms": Timed(loss),
    }
    times = time_all(subjects, device, seconds, min_rounds=3)
    for name, found in times.items():
        if isinstance(found, Failed):
            raise RuntimeError(f"{name}: {found.reason}")
    medians = {name: each.median for name, each in times.items()}
    return Row(V, H, tokens, height, chunk_bytes, **medians, peak_bytes=peak)


def measured(
    shapes: Sequence[tuple[int, int]], heights: Sequence[int], device: torch.device, seconds: float
) -> Iterator[Row]:
    for V, H in shapes:
        for height in heights:
            if 2 * V * height <= MOST_BYTES:
                yield measure(V, H, height, device, seconds)
                free_memory(device)


def line(row: Row) -> str:
    peak = "n/a" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"
    times = "".join(f"{ms:9.2f}" for ms in (row.logits_ms, row.hidden_ms, row.weight_ms, row.loss_ms))
    return f"{row.vocab:>8}{row.hidden:>6}{row.rows:>7}{row.chunk_bytes / 2**20:>8.0f}{times}{peak:>10}"


def main(argv: Sequence[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chunk_rows", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="VxH", help="of heads (default: five models')")
    parser.add_argument("--rows", nargs="+", type=int, default=HEIGHTS[device.type], help="of a chunk")
    parser.add_argument("--seconds", type=float, default=0.4, help="for a line, at least (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write chunk_rows.csv there")
    given = parser.parse_args(argv)
    where = environment.describe(device)
    print(report.header(where), f"\n{TOKENS[device.type]} rows, bf16; ms of all chunks together, peak in GiB\n")
    print(f"{'V':>8}{'H':>6}{'rows':>7}{'MiB':>8}{'z':>9}{'dh':>9}{'dW':>9}{'loss':>9}{'peak':>10}")
    shapes = given.shapes or (GPU if device.type == "cuda" else CPU)
    rows = []
    for row in measured(shapes, given.rows, device, given.seconds):
        rows.append(row)
        print(line(row), flush=True)
    if given.out:
        report.write_rows(given.out / "chunk_rows.csv", rows, where)
    return 0


def shape(text: str) -> tuple[int, int]:
    V, H = (int(part) for part in text.split("x"))
    return V, H


if __name__ == "__main__":
    sys.exit(main())
