"""What is measured: shapes, modes and the data that every implementation gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reference import token_logprobs

MODES: dict[str, str] = {
    "loss": "forward + backward",
    "inplace": "forward + backward in place",
    "logprobs": "log-probs only",
}
BETA, EPSILON = 0.04, 0.2  # everyone computes loss_type="grpo" with these
ROWS_PER_CHUNK_ELEMENTS = 1 << 24  # float64 work on the logits is done on this many at a time
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """B sequences of T tokens over V words: logits (B, T+1, V) as a causal model returns them."""

    batch: int
    length: int
    vocab: int
    dtype: torch.dtype
    masked: float = 0.0  # share of the tokens that is padding, at most 0.5
    model: str = ""  # whose vocabulary it is

    @property
    def name(self) -> str:
        masked = f" {self.masked:.0%} masked" if self.masked else ""
        return f"{self.batch}x{self.length}x{self.vocab} {DTYPE_NAMES[self.dtype]}{masked}"

    @property
    def logits_bytes(self) -> int:
        """Of the logits that a copy moves twice; the last position, never scored, included."""
        return self.batch * (self.length + 1) * self.vocab * self.dtype.itemsize

    @property
    def lengths(self) -> list[int]:
        """Tokens per sequence, from (1 − 2·masked)·T to T, evenly spaced."""
        shortest = (1 - 2 * self.masked) * self.length
        steps = max(self.batch - 1, 1)
        return [round(shortest + (self.length - shortest) * b / steps) for b in range(self.batch)]

    def minimum_bytes(self, mode: str) -> int:
        """Bytes that any implementation must move: unmasked logits once, and the whole gradient once."""
        read = sum(self.lengths) * self.vocab * self.dtype.itemsize
        return read if mode == "logprobs" else read + self.logits_bytes


@dataclass(frozen=True)
class Inputs:
    """What every implementation is given. Nobody may write to it."""

    case: Case
    logits: Tensor  # (B, T+1, V)
    completion_ids: Tensor  # (B, T) int64
    advantages: Tensor  # (B,) fp32
    old_logps: Tensor  # (B, T) fp32
    ref_logps: Tensor  # (B, T) fp32
    mask: Tensor  # (B, T) int64


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Logits of a sharp model, targets with 5% to 88% probability, ratios near 1.

    One token in 32 has the ratio e^0.5, so that the clip is checked; those with A > 0 have no gradient.
    No other token is clipped: an implementation that skips rows without a gradient gains at most 2%.
    """
    B, T, V = case.batch, case.length, case.vocab
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return torch.empty(shape, device=device).uniform_(low, high, generator=generator)

    logits = torch.randn(B, T + 1, V, device=device, dtype=case.dtype, generator=generator).mul_(2)
    ids = torch.randint(V, (B, T), device=device, generator=generator)
    # log Σ exp of V normal logits with σ = 2 is about log V + σ²/2.
    target = math.log(V) + 2 + uniform(B, T, low=-3.0, high=2.0)
    logits[:, :T].scatter_(-1, ids[..., None], target[..., None].to(case.dtype))

    lp = torch.empty(B, T, device=device)
    for b, start, stop in row_chunks(case):
        chunk = logits[b : b + 1, start:stop].double()
        lp[b, start:stop] = token_logprobs(chunk, ids[b : b + 1, start:stop]).logps[0]
    old = lp + uniform(B, T, low=-0.1, high=0.1)
    every_32nd = torch.arange(B * T, device=device).reshape(B, T) % 32 == 0
    sign = 1.0 - 2.0 * (torch.arange(B, device=device) % 2)
    lengths = torch.tensor(case.lengths, device=device)
    return Inputs(
        case=case,
        logits=logits,
        completion_ids=ids,
        advantages=sign * uniform(B, low=0.5, high=1.5),
        old_logps=torch.where(every_32nd, lp - 0.5, old),
        ref_logps=lp + uniform(B, T, low=-0.3, high=0.3),
        mask=(torch.arange(T, device=device) < lengths[:, None]).long(),
    )


def row_chunks(case: Case) -> list[tuple[int, int, int]]:
    """(b, start, stop): all rows, none across sequences, in chunks of bounded size."""
    step = max(1, min(case.length, ROWS_PER_CHUNK_ELEMENTS // case.vocab))
    return [
        (b, start, min(start + step, case.length)) for b in range(case.batch) for start in range(0, case.length, step)
    ]


def parse_shape(text: str) -> tuple[int, int, int]:
    """(B, T, V) of "BxTxV".

    Raises:
        ValueError: the text is not three positive integers with x between them.
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ValueError(f"{text!r} is not a shape; wanted BxTxV, e.g. 4x128x32000")
    return tuple(int(p) for p in parts)


QWEN, LLAMA, GEMMA, GPT2 = 151936, 128256, 262144, 50257  # vocabularies
FP32, BF16 = torch.float32, torch.bfloat16

SUITES: dict[str, tuple[Case, ...]] = {
    "smoke": (Case(2, 8, 512, FP32), Case(2, 8, 512, BF16, masked=0.25)),
    "cpu": tuple(
        Case(batch, 128, vocab, dtype, model=model)
        for batch, vocab, model in [(4, 32000, "Llama-2"), (2, QWEN, "Qwen2.5")]
        for dtype in (FP32, BF16)
    ),
    "gpu": (
        Case(8, 1024, QWEN, BF16, model="Qwen2.5"),
        Case(8, 1024, QWEN, BF16, masked=0.5, model="Qwen2.5"),
        Case(4, 1024, QWEN, FP32, model="Qwen2.5"),
        Case(1, 512, QWEN, BF16, model="Qwen2.5"),
        Case(8, 1024, LLAMA, BF16, model="Llama-3"),
        Case(4, 1024, GEMMA, BF16, model="Gemma-3"),
        Case(8, 1024, GPT2, BF16, model="gpt2"),
    ),
}
