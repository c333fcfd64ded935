"""Times over supports and of several targets per row, beside a copy of the logits: `python -m benchmarks.supports`.

Random ids, K of each row. From logits: log-probabilities, with entropies, and the loss with its backward. From hidden
states: the loss with its backward from chunks of whole rows, and with `gather_head=True`. Without a GPU sizes are tiny.
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
from grpo_kernels import Support, fused_grpo_loss, fused_linear_grpo_loss, token_logprobs

KEPT = {"cuda": (8, 64, 512, 4096), "cpu": (2, 8)}
TARGETS = {"cuda": (2, 8, 64), "cpu": (2,)}
GATHERED = {"cuda": (16, 64, 512), "cpu": (2,)}
SIZES = {"cuda": (8192, 151936, 4096, 896), "cpu": (32, 512, 16, 8)}  # rows, V; of the head: rows, H


@dataclass
class Row:
    what: str
    kept: int  # K
    tokens: int
    vocab: int
    hidden: int  # 0: from logits
    ms: float  # median
    copy_multiple: float | None  # of a copy of the logits in the same rounds
    peak_bytes: int | None = None  # from hidden states: above what is held before


class Problem:
    """Random data of so many rows in eight sequences."""

    def __init__(self, tokens: int, V: int, device: torch.device) -> None:
        self.tokens, self.V, self.device = tokens, V, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.ids = self.random_ids(8, tokens // 8)
        self.advantages = torch.randn(8, device=device, generator=self.generator)

    def random_ids(self, *shape: int) -> Tensor:
        return torch.randint(self.V, shape, device=self.device, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16, generator=self.generator)

    def support(self, K: int) -> Support:
        offsets = torch.arange(self.tokens + 1, device=self.device) * K
        return Support(self.random_ids(self.tokens * K), offsets)


def timed(subjects: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Medians in ms.

    Raises:
        RuntimeError: something could not be timed.
    """
    found = time_all({name: Timed(call) for name, call in subjects.items()}, device, seconds, min_rounds=3)
    for name, each in found.items():
        if isinstance(each, Failed):
            raise RuntimeError(f"{name}: {each.reason}")
    return {name: each.median for name, each in found.items()}


def from_logits(device: torch.device, seconds: float) -> Iterator[Row]:
    tokens, V, *_ = SIZES[device.type]
    problem = Problem(tokens, V, device)
    logits = problem.normal(8, tokens // 8, V)
    leaf, out = logits.detach().requires_grad_(), torch.empty_like(logits)

    def scored(ids: Tensor, **given) -> None:
        with torch.no_grad():
            token_logprobs(logits, ids, **given)

    def loss(support: Support) -> None:
        torch.autograd.grad(fused_grpo_loss(leaf, problem.ids, problem.advantages, support=support).loss, leaf)

    def pulled_back(ids: Tensor) -> None:
        torch.autograd.grad(token_logprobs(leaf, ids).logps.sum(), leaf)

    def rows(K: int, subjects: dict[str, Callable[[], object]]) -> Iterator[Row]:
        times = timed({"copy": lambda: out.copy_(logits), **subjects}, device, seconds)
        copy = times.pop("copy")
        yield from (Row(what, K, tokens, V, 0, ms, ms / copy) for what, ms in times.items())

    for K in KEPT[device.type]:
        support = problem.support(K)
        yield from rows(K, {
            "support: log-probs": lambda s=support: scored(problem.ids, support=s),
            "support: and entropies": lambda s=support: scored(problem.ids, support=s, return_entropy=True),
            "support: loss, backward": lambda s=support: loss(s),
        })  # fmt: skip
    for K in TARGETS[device.type]:
        ids = problem.random_ids(8, tokens // 8, K)
        yield from rows(K, {
            "targets: log-probs": lambda ids=ids: scored(ids),
            "targets: and backward": lambda ids=ids: pulled_back(ids),
        })  # fmt: skip


def from_hidden(device: torch.device, seconds: float) -> Iterator[Row]:
    _, V, tokens, H = SIZES[device.type]
    problem = Problem(tokens, V, device)
    hidden = problem.normal(8, tokens // 8, H).requires_grad_()
    weight = problem.normal(V, H).mul_(0.05).requires_grad_()

    def loss(support: Support, gather: bool) -> None:
        out = fused_linear_grpo_loss(hidden, weight, problem.ids, problem.advantages, support=support,
                                     gather_head=gather)  # fmt: skip
        torch.autograd.grad(out.loss, (hidden, weight))

    for K in GATHERED[device.type]:
        support = problem.support(K)
        subjects = {"head: chunks": lambda s=support: loss(s, False), "head: gathered": lambda s=support: loss(s, True)}
        times = timed(subjects, device, seconds)
        for what, call in subjects.items():
            yield Row(what, K, tokens, V, H, times[what], None, peak_extra_bytes(call, device))


def line(row: Row) -> str:
    beside = "" if row.copy_multiple is None else f"{row.copy_multiple:10.3f}"
    if row.peak_bytes is not None:
        beside = f"{row.peak_bytes / 2**30:10.2f} GiB"
    return f"{row.what:<26}{row.kept:>6}{row.ms:>10.3f}{beside}"


def main(argv: Sequence[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.supports", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each K, at least (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write supports.csv there")
    given = parser.parse_args(argv)
    where = environment.describe(device)
    tokens, V, head_tokens, H = SIZES[device.type]
    print(f"{report.header(where)}\n\n{tokens} rows, V = {V}, bf16; of the head {head_tokens} rows, H = {H}\n")
    print(f"{'':<26}{'K':>6}{'ms':>10}{'x copy':>10}")
    rows = []
    for part in (from_logits, from_hidden):
        for row in part(device, given.seconds):
            rows.append(row)
            print(line(row), flush=True)
        free_memory(device)
    if given.out:
        report.write_rows(given.out / "supports.csv", rows, where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
