"""The matrix products of a language-model head, in chunks of rows: logits of a chunk, and what its gradient gives.

    z = h·Wᵀ + b,    ∂L/∂h = dz·W,    ∂L/∂W = Σ dzᵀ·h,    ∂L/∂b = Σ dz

One buffer holds the logits of a chunk, and then their gradient. ∂L/∂W adds up in fp32 over the chunks.

With fp32 logits of a head in half precision the products h·Wᵀ add up in fp32 and are not rounded. Their gradient goes
to a second buffer, rounded once to the head's dtype, in which dh and dW are multiplied.
"""

import dataclasses
import functools
import os

import torch
from torch import Tensor

from grpo_kernels.objective.scalars import is_whole, plain

# A chunk reads and writes all of the weight's gradient as it adds up in fp32: with few rows that is most of its time.
# But until the last chunk is gone, the gradient's copy in the weight's dtype is not there yet: a chunk of its size adds
# nothing to the peak. Measured on an H100, see docs/linear.md.
CHUNK_BYTES = range(400 << 20, 1 << 30)
CHUNK_ROWS = range(1024, 4096)
# On a CPU fewer rows suffice, and leave the logits nearer to the cache: but each chunk reads the weight twice, and
# reads and writes its gradient, which shows where a chunk has fewer rows than these.
CPU_BYTES = 1 << 25
CPU_ROWS = 256
# And fp32 logits are made so many columns at a time: a sixth faster at 256 rows (measured with MKL, H = 2048).
_COLUMNS = 2048
_SLAB = 1 << 22  # elements that are converted to fp32 at a time


def bytes_setting() -> int | None:
    """GRPO_KERNELS_CHUNK_BYTES, None where it is not set."""
    setting = os.environ.get("GRPO_KERNELS_CHUNK_BYTES", "")
    if setting and not setting.isdigit():
        raise ValueError(f"GRPO_KERNELS_CHUNK_BYTES must be a whole number of bytes, got {setting!r}.")
    return int(setting) if setting else None


def chunk_rows(chunk_bytes: int | None, weight: Tensor, itemsize: int) -> int:
    """Rows of logits at a time: what fits ``chunk_bytes``, else GRPO_KERNELS_CHUNK_BYTES; a row takes V·``itemsize``.

    Without either as many as fit the bytes of the weight (V, H), or 400 MiB where that is more, and at least 1024; but
    at most 4096, and what fits 1 GiB. On a CPU what fits 32 MiB, and at least 256 of them.
    """
    row = weight.shape[0] * itemsize
    chunk_bytes = bytes_setting() if chunk_bytes is None else chunk_bytes
    if chunk_bytes is None:
        of_weight = weight.numel() * weight.element_size()  # nbytes does not compile with dynamic shapes
        rows = max(CHUNK_ROWS.start, max(of_weight, CHUNK_BYTES.start) // row)
        rows = min(rows, CHUNK_ROWS.stop, CHUNK_BYTES.stop // row)
        if weight.device.type == "cpu":
            rows = min(rows, max(CPU_ROWS, CPU_BYTES // row))
        return max(1, rows // 128 * 128 or rows)
    if not is_whole(chunk_bytes):
        raise TypeError(f"chunk_bytes must be an int, got {type(chunk_bytes).__name__}.")
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be above 0, got {chunk_bytes}.")
    return max(1, plain(chunk_bytes) // row)


def logit_bytes(weight: Tensor, fp32_logits: bool, gradient: bool = True) -> int:
    """Bytes of a chunk for each of its logits: fp32 logits of half precision stand beside their ``gradient``."""
    size = weight.element_size()
    if not fp32_logits or weight.dtype == torch.float32:
        return size
    return 4 + size if gradient else 4


@dataclasses.dataclass
class Gradients:
    """∂L/∂ of hidden states, weight and bias, as far as they are wanted; empty where they are not."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def like(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: str, in_fp32: bool) -> "Gradients":
        """``wanted``: letters of "h", "w", "b". Weight and bias add up in fp32, or in the weight's dtype."""
        dtype = torch.float32 if in_fp32 else weight.dtype
        nothing = hidden.new_empty(0)
        return cls(
            hidden.new_zeros(hidden.shape) if "h" in wanted else nothing,
            weight.new_empty(weight.shape, dtype=dtype) if "w" in wanted else weight.new_empty(0, dtype=dtype),
            bias.new_zeros(bias.shape, dtype=dtype) if "b" in wanted else weight.new_empty(0, dtype=dtype),
        )


class ChunkedHead:
    """A head, and the rows of hidden states that go through it.

    Args:
        hidden: (B, rows, H), rows ≥ T.
        weight: (V, H).
        bias: (V,) or None.
        tokens: (n,) which of the B·T tokens are read, in order; None: all.
        T: tokens of a sequence.
        height: rows of logits at a time.
        fp32_logits: make logits in fp32, whatever the dtype of the weight.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor | None, T: int, height: int,
                 fp32_logits: bool = False):  # fmt: skip
        self.weight, self.bias = weight, bias
        B, rows, H = hidden.shape
        self.count = B * T if tokens is None else tokens.numel()
        if tokens is None and (rows != T and B > 1):
            tokens = torch.arange(B * T, device=hidden.device)
        self.place = tokens if tokens is None or rows == T or B == 1 else tokens // T * rows + tokens % T
        self.flat = hidden.reshape(-1, H)  # a copy where the rows are not evenly spaced, as in a slice of the positions
        dtype = torch.float32 if fp32_logits else weight.dtype
        self.buffer = weight.new_empty((min(height, max(self.count, 1)), weight.shape[0]), dtype=dtype)

    def rows(self, start: int, end: int) -> Tensor:
        """Hidden states (n, H) of some of the rows that are read."""
        return self.flat[start:end] if self.place is None else self.flat.index_select(0, self.place[start:end])

    def product(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Hidden states of some of the rows that are read, and their logits."""
        h = self.rows(start, end)
        return h, self.logits(h)

    def logits(self, h: Tensor) -> Tensor:
        """(n, V), in the buffer."""
        z = self.buffer[: h.shape[0]]
        if z.dtype != h.dtype:
            return self._wide_logits(h, z)
        V = self.weight.shape[0]
        step = _COLUMNS if z.device.type == "cpu" and z.dtype == torch.float32 else V
        for start in range(0, V, step):
            part, weight = z[:, start : start + step], self.weight[start : start + step]
            if self.bias is None:
                torch.mm(h, weight.T, out=part)
            else:
                torch.addmm(self.bias[start : start + step], h, weight.T, out=part)
        return z

    def _wide_logits(self, h: Tensor, z: Tensor) -> Tensor:
        V, H = self.weight.shape
        step = max(1, _SLAB // H) if z.device.type == "cpu" else V
        for start in range(0, V, step):
            multiply(h, self.weight[start : start + step].T, z[:, start : start + step])
        return z if self.bias is None else z.add_(self.bias)

    @functools.cached_property
    def _narrow(self) -> Tensor:
        return self.weight.new_empty(self.buffer.shape)

    def gradient_of(self, z: Tensor) -> Tensor:
        """Where the gradient of these logits (n, V) goes, in the dtype of its products: over them, if it is theirs."""
        return z if z.dtype == self.weight.dtype else self._narrow[: z.shape[0]]

    def add(self, into: Gradients, start: int, end: int, h: Tensor, dz: Tensor, first: bool) -> None:
        """What the gradient of a chunk's logits (n, V) adds; the ``first`` chunk writes the weight's."""
        if into.hidden.numel():
            flat = into.hidden.view(-1, h.shape[1])
            if self.place is None:
                torch.mm(dz, self.weight, out=flat[start:end])
            else:
                dh = torch.mm(dz, self.weight, out=torch.empty_like(h))  # autocast leaves what has an out= alone
                flat.index_copy_(0, self.place[start:end], dh)
        if into.weight.numel():
            accumulate(into.weight, dz, h, first)
        if into.bias.numel():
            into.bias += dz.sum(0, dtype=torch.float32).to(into.bias.dtype)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a·b of matrices, or of as many pairs of them; ``out`` fp32, of half precision: no product is rounded."""
    product = torch.mm if a.dim() == 2 else torch.bmm
    if out.dtype == a.dtype:
        product(a, b, out=out)
    elif out.device.type != "cpu":
        product(a, b, out_dtype=out.dtype, out=out)
    else:  # torch has no such product for it; half precision is exact in fp32
        product(a.to(out.dtype), b.to(out.dtype), out=out)


def accumulate(total: Tensor, dz: Tensor, h: Tensor, first: bool) -> None:
    """total (V, H) = dzᵀ·h, or += where it is not the first; products of half precision add up in fp32."""
    if total.dtype == dz.dtype:
        torch.addmm(total, dz.T, h, beta=0 if first else 1, out=total)  # β = 0: what stood there is not read
    elif dz.device.type != "cpu":
        if first:
            torch.mm(dz.T, h, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, dz.T, h, out_dtype=total.dtype, out=total)
    else:
        h = h.to(total.dtype)
        step = max(1, _SLAB // dz.shape[0])
        for start in range(0, dz.shape[1], step):
            part = total[start : start + step]
            torch.addmm(part, dz[:, start : start + step].to(total.dtype).T, h, beta=0 if first else 1, out=part)
