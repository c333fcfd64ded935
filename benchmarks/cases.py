"""What is measured: shapes, objectives, modes and the data that every implementation gets."""

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
    "entropies": "log-probs and entropies",
    "linear": "hidden states + head, forward + backward",
}
OBJECTIVES: dict[str, str] = {
    "token": "grpo: a ratio per token",
    "sequence": "gspo: a ratio per sequence",
    "cross-entropy": "another loss, for the kernels of others: -log p of every token, summed",
    "distillation": "another loss: reverse KL from a teacher",
}
OTHER_LOSSES = ("cross-entropy", "distillation")
EPSILON = 0.2
ROWS_PER_CHUNK_ELEMENTS = 1 << 24  # float64 work on the logits is done on this many at a time
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """B sequences of T tokens over V words: logits (B, T+1, V) as a causal model returns them.

    With ``hidden``: hidden states (B, T, H), and a head (V, H) that makes the logits of them.
    """

    batch: int
    length: int
    vocab: int
    dtype: torch.dtype
    masked: float = 0.0  # share of the tokens that is padding, at most 0.5
    zero_advantage: float = 0.0  # share of the sequences whose advantage is 0
    objective: str = "token"  # whose ratio is clipped: one of OBJECTIVES
    compiled: bool = False  # torch.compile takes part: it compiles anew for every shape, which takes long
    second_timer: bool = False  # triton.testing.do_bench too times its forward + backward
    model: str = ""  # whose vocabulary it is
    hidden: int = 0  # H

    @property
    def name(self) -> str:
        sizes = (self.batch, self.length, *[self.hidden] * (self.hidden > 0), self.vocab)
        return f"{'x'.join(map(str, sizes))} {self._what}"

    @property
    def label(self) -> str:
        """Short, with the model in place of V, and N = B·T."""
        head = f" H={self.hidden}" if self.hidden else ""
        return f"{self.model or f'V={self.vocab}'} {self.batch * self.length}{head} {self._what}"

    @property
    def _what(self) -> str:
        parts = [DTYPE_NAMES[self.dtype]]
        parts += [f"{self.masked:.0%} masked"] * (self.masked > 0)
        parts += [f"{self.zero_advantage:.0%} A=0"] * (self.zero_advantage > 0)
        parts += [self.objective] * (self.objective != "token")
        return " ".join(parts)

    @property
    def beta(self) -> float:
        """Of the KL, for everyone. A row whose advantage is 0 has no gradient only without it."""
        return 0.0 if self.zero_advantage or self.objective in OTHER_LOSSES else 0.04

    @property
    def modes(self) -> tuple[str, ...]:
        """Log-probs know neither advantages nor objectives; entropies are measured where every row counts."""
        if self.hidden:
            return ("linear",)
        if self.zero_advantage or self.objective != "token":
            return ("loss", "inplace")
        return ("loss", "inplace", "logprobs", *["entropies"] * (not self.masked))

    @property
    def logits_bytes(self) -> int:
        """Of the logits that a copy moves twice; the last position, never scored, included.

        With ``hidden``: of those that a head would make.
        """
        rows = self.length + (not self.hidden)
        return self.batch * rows * self.vocab * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients of hidden states and head, which every implementation hands back."""
        return (self.batch * self.length + self.vocab) * self.hidden * self.dtype.itemsize

    @property
    def lengths(self) -> list[int]:
        """Tokens per sequence, from (1 − 2·masked)·T to T, evenly spaced."""
        shortest = (1 - 2 * self.masked) * self.length
        steps = max(self.batch - 1, 1)
        return [round(shortest + (self.length - shortest) * b / steps) for b in range(self.batch)]

    @property
    def has_advantage(self) -> list[bool]:
        """Per sequence; those without are evenly spread."""
        share = self.zero_advantage
        return [int((b + 1) * share) == int(b * share) for b in range(self.batch)]

    def minimum_bytes(self, mode: str) -> int:
        """Bytes that must be moved: the logits of rows that count, and the whole gradient once.

        Rows that are masked or, where β = 0, have no advantage need not be read. The logits are read
        once, for a loss whose ratio is the sequence's twice: no row's gradient is known before the last
        row of its sequence has been read, and a sequence is too large to be kept on the chip. A
        distillation reads the teacher's too.
        """
        if mode == "linear":  # its time is that of the head's products
            return 0
        no_loss = mode in ("logprobs", "entropies")
        lengths = self.lengths if no_loss else [n for n, a in zip(self.lengths, self.has_advantage) if a]
        read = sum(lengths) * self.vocab * self.dtype.itemsize
        if no_loss:
            return read
        return read * (2 if self.objective in ("sequence", "distillation") else 1) + self.logits_bytes


@dataclass(frozen=True)
class Inputs:
    """What every implementation is given. Nobody may write to it."""

    case: Case
    logits: Tensor | None  # (B, T+1, V); None with hidden states
    completion_ids: Tensor  # (B, T) int64
    advantages: Tensor  # (B,) fp32
    old_logps: Tensor  # (B, T) fp32
    ref_logps: Tensor | None  # (B, T) fp32; None where β = 0
    mask: Tensor  # (B, T) int64
    hidden: Tensor | None = None  # (B, T, H)
    weight: Tensor | None = None  # (V, H)
    teacher: Tensor | None = None  # of a distillation: the teacher's logits, as the student's; or these two
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None

    def objective(self) -> dict:
        """The case's objective, as keywords of this package's losses and of the reference's."""
        return {
            "advantages": self.advantages, "old_logps": self.old_logps, "ref_logps": self.ref_logps,
            "completion_mask": self.mask, "loss_type": "grpo", "importance_sampling_level": self.case.objective,
            "beta": self.case.beta, "epsilon": EPSILON,
        }  # fmt: skip


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Logits of a sharp model, targets with 5% to 88% probability, ratios as `around` has them."""
    B, T, V = case.batch, case.length, case.vocab
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(B, T + 1, V, device=device, dtype=case.dtype, generator=generator).mul_(2)
    ids = torch.randint(V, (B, T), device=device, generator=generator)
    # log Σ exp of V normal logits with σ = 2 is about log V + σ²/2.
    target = math.log(V) + 2 + torch.zeros(B, T, device=device).uniform_(-3.0, 2.0, generator=generator)
    logits[:, :T].scatter_(-1, ids[..., None], target[..., None].to(case.dtype))

    lp = torch.zeros(B, T, device=device)
    for b, start, stop in row_chunks(case):
        chunk = logits[b : b + 1, start:stop].double()
        lp[b, start:stop] = token_logprobs(chunk, ids[b : b + 1, start:stop]).logps[0]
    return around(case, ids, lp, generator, logits=logits)


def around(case: Case, ids: Tensor, lp: Tensor, generator: torch.Generator, logits=None, **head: Tensor) -> Inputs:
    """Inputs of log-probs ``lp``.

    One token in 32 has the ratio e^0.5, so that the clip is checked; those with A > 0 have no policy
    gradient. No other token is clipped: an implementation that skips rows without a gradient gains at
    most 2%. Where the ratio is the sequence's, the third of every four sequences has the ratio e^0.5.
    """
    B, T, device = case.batch, case.length, ids.device

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return torch.zeros(shape, device=device).uniform_(low, high, generator=generator)

    near = lp + uniform(B, T, low=-0.1, high=0.1)
    if case.objective == "sequence":
        far = (torch.arange(B, device=device) % 4 == 2)[:, None]
    else:
        far = torch.arange(B * T, device=device).reshape(B, T) % 32 == 0
    lengths = torch.tensor(case.lengths, device=device)
    return Inputs(
        case=case,
        logits=logits,
        completion_ids=ids,
        advantages=_signs(case, device) * uniform(B, low=0.5, high=1.5),
        old_logps=torch.where(far, lp - 0.5, near),
        ref_logps=lp + uniform(B, T, low=-0.3, high=0.3) if case.beta else None,
        mask=(torch.arange(T, device=device) < lengths[:, None]).long(),
        **head,
    )


def _signs(case: Case, device: torch.device) -> Tensor:
    """(B,): +1 and −1 in turns, and 0 where there is no advantage."""
    signs, sign = [], 1.0
    for has_advantage in case.has_advantage:
        signs.append(sign if has_advantage else 0.0)
        sign = -sign if has_advantage else sign
    return torch.tensor(signs, device=device)


def row_chunks(case: Case) -> list[tuple[int, int, int]]:
    """(b, start, stop): all rows, none across sequences, in chunks of bounded size."""
    step = max(1, min(case.length, ROWS_PER_CHUNK_ELEMENTS // case.vocab))
    return [
        (b, start, min(start + step, case.length)) for b in range(case.batch) for start in range(0, case.length, step)
    ]


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """(B, T, V, H) of "BxTxV", with H = 0, or "BxTxHxV".

    Raises:
        ValueError: the text is not three or four positive integers with x between them.
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (3, 4) or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ValueError(f"{text!r} is not a shape; wanted BxTxV, e.g. 4x128x32000, or with a head BxTxHxV")
    batch, length, *hidden, vocab = map(int, parts)
    return batch, length, vocab, hidden[0] if hidden else 0


QWEN, LLAMA, GEMMA, GPT2, LLAMA2 = 151936, 128256, 262144, 50257, 32000  # vocabularies
MODELS = {QWEN: "Qwen2.5", LLAMA: "Llama-3", GEMMA: "Gemma-3", GPT2: "gpt2", LLAMA2: "Llama-2"}
FP32, BF16 = torch.float32, torch.bfloat16
HALF_MASKED, HALF_ZERO, SEQUENCE = {"masked": 0.5}, {"zero_advantage": 0.5}, {"objective": "sequence"}
DISTILLATION = {"objective": "distillation"}


def _case(batch: int, length: int, vocab: int, dtype: torch.dtype, **what: object) -> Case:
    return Case(batch, length, vocab, dtype, model=MODELS[vocab], **what)


SUITES: dict[str, tuple[Case, ...]] = {
    "smoke": (
        Case(2, 8, 512, FP32),
        Case(2, 8, 512, BF16, masked=0.25),
        Case(4, 8, 512, FP32, **HALF_ZERO),
        Case(4, 8, 512, BF16, **SEQUENCE),
        Case(4, 8, 512, FP32, hidden=16),
        Case(2, 8, 512, BF16, **DISTILLATION),
        Case(4, 8, 512, FP32, hidden=16, **DISTILLATION),
    ),
    "quick-cpu": (
        *(_case(4, 128, 32000, dtype) for dtype in (FP32, BF16)),
        *(_case(2, 128, vocab, BF16) for vocab in (32000, GPT2)),
        *(_case(4, 128, 32000, BF16, **what) for what in (HALF_MASKED, HALF_ZERO, SEQUENCE)),
        _case(2, 64, 32000, FP32, hidden=512),
    ),
    "cpu": (
        *(
            _case(batch, 128, vocab, dtype)
            for batch, vocab in [(4, 32000), (2, 32000), (2, QWEN)]
            for dtype in (FP32, BF16)
        ),
        *(_case(4, 128, 32000, BF16, **what) for what in (HALF_MASKED, HALF_ZERO, SEQUENCE)),
        *(_case(4, 128, 32000, FP32, hidden=2048, **what) for what in ({}, SEQUENCE, DISTILLATION)),
        _case(4, 128, 32000, BF16, **DISTILLATION),
    ),
    "quick-gpu": (
        _case(8, 1024, QWEN, BF16),
        _case(8, 1024, GPT2, BF16),
        _case(2, 1024, QWEN, BF16),
        *(_case(8, 1024, QWEN, BF16, **what) for what in (HALF_MASKED, HALF_ZERO, SEQUENCE)),
        _case(8, 1024, QWEN, BF16, hidden=4096),
        *(_case(8, 1024, QWEN, BF16, hidden=hidden, **DISTILLATION) for hidden in (0, 4096)),
    ),
    # What the README quotes comes first: what the time budget no longer reaches is left out.
    "gpu": (
        _case(8, 1024, QWEN, BF16, compiled=True, second_timer=True),
        _case(8, 1024, LLAMA, BF16),
        _case(8, 1024, GPT2, BF16),
        _case(8, 1024, GEMMA, BF16),
        _case(8, 1024, QWEN, FP32, compiled=True),
        _case(8, 1024, QWEN, BF16, **SEQUENCE, compiled=True),
        _case(8, 1024, QWEN, BF16, **HALF_MASKED),
        _case(8, 1024, QWEN, BF16, hidden=4096, compiled=True),
        *(_case(8, 1024, QWEN, BF16, hidden=hidden, **DISTILLATION) for hidden in (0, 4096)),
        _case(8, 1024, QWEN, BF16, objective="cross-entropy"),
        _case(8, 1024, QWEN, BF16, **HALF_ZERO),
        _case(8, 1024, LLAMA2, BF16),
        _case(16, 1024, QWEN, BF16, hidden=4096),
        _case(1, 512, QWEN, BF16),
        _case(2, 1024, QWEN, BF16),
        _case(8, 1024, LLAMA, FP32),
        _case(8, 1024, GPT2, FP32),
        _case(4, 1024, GEMMA, FP32),
        _case(8, 1024, LLAMA, BF16, **HALF_MASKED),
        _case(8, 1024, LLAMA, BF16, **HALF_ZERO),
        _case(8, 1024, LLAMA, BF16, **SEQUENCE),
        _case(16, 2048, QWEN, BF16),
    ),
}


def suite(name: str, device: torch.device) -> tuple[str, tuple[Case, ...]]:
    """The suite of that name, or the one in its place on this device, with its real name.

    "gpu" without a GPU is "cpu"; "quick" is the quick one of the device.
    """
    on_gpu = device.type == "cuda"
    if name == "quick":
        name = "quick-gpu" if on_gpu else "quick-cpu"
    elif name == "gpu" and not on_gpu:
        name = "cpu"
    return name, SUITES[name]
