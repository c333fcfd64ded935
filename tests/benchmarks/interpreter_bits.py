"""Bits of what kernels compute, for test_interpreter.py: ``python -m interpreter_bits [--plain]``.

``--plain``: in Triton's own interpreter, without `benchmarks.interpreter.hasten`. One line a case: its name, and a
digest of its results, or the error's text.
"""

import hashlib
import itertools
import sys

import torch
import triton
import triton.language as tl

from benchmarks.interpreter import hasten
from cases import make_case, on_device, ours

SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def halved(x):
    return x // 2 + x % 3


@triton.jit
def integer_kernel(x, y, out, N: tl.constexpr):
    """Blocks with blocks, with numbers, with loaded scalars, and scalars alone; sums, products, bits, comparisons."""
    at = tl.arange(0, N)
    a, b, s = tl.load(x + at), tl.load(y + at), tl.load(y)
    results = (a + b, a - b, a * b, a + 1, 1 - a, 2 * a, a + s, s - a, s * s + tl.zeros([N], s.dtype), halved(a),
               a & b, a | 3, a ^ b, a >> 1, a << 1, tl.minimum(a, b), tl.maximum(a, 2), -a, tl.abs(a),
               a + at, at * s, s - at, (s - tl.program_id(0)) * at, (tl.program_id(0) + s) - a)  # fmt: skip
    for k in tl.static_range(len(results)):
        tl.store(out + k * N + at, results[k].to(tl.int64))
    flags = (a < b, a <= 2, a == s, (a > b) & (a != 0), ~(a >= b), tl.sum(a) == tl.max(b))
    for k in tl.static_range(len(flags)):
        tl.store(out + (len(results) + k) * N + at, tl.where(flags[k], 1, 0))


@triton.jit
def float_kernel(x, y, out, scale, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b, s = tl.load(x + at), tl.load(y + at, mask=at < 11, other=0.5), tl.load(y + 1)
    wide = a.to(tl.float32)
    results = (a + b, a - 1.5, 2 * a, a * b, a / 3, s / (a + 4), a * s, -a, wide * 0.0, wide * -0.0, wide + at,
               tl.where(a > b, a, 0.0), tl.where(at < 5, wide, b), tl.maximum(a, 0), tl.exp(wide), tl.log(tl.abs(wide)),
               wide * scale, (a > 0).to(tl.float32), tl.sum(wide) + wide, tl.max(wide) - b, wide.to(tl.int32) * 1.0,
               wide.to(x.dtype.element_ty), tl.sum(wide[:, None] * b[None, :], 1), float("inf") * wide,
               tl.full([N], float("nan"), tl.float32) + wide, tl.full([N], 3, x.dtype.element_ty),
               wide.to(tl.bfloat16), a + at, s * at, at - s, wide + s, s * wide)  # fmt: skip
    for k in tl.static_range(len(results)):
        tl.store(out + k * N + at, results[k].to(tl.float32))


def integers(dtype):
    """Small enough that nothing overflows."""
    x = torch.arange(16).remainder(7).to(dtype) - 2
    y, out = x.flip(0).clone().clamp(min=1), torch.zeros(30, 16, dtype=torch.int64)
    integer_kernel[(1,)](x, y, out, 16)
    return [out]


def floats(dtype):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, generator=g).to(dtype), torch.randn(16, generator=g).to(dtype)
    x[3], x[4] = 0.0, -0.0
    out = torch.zeros(32, 16)
    float_kernel[(1,)](x, y, out, 0.7, 16)
    return [out]


def loss(dtype, **kwargs):
    case = make_case(B=3, V=131, dtype=dtype)
    names = ("completion_ids", "completion_mask", "old_logps", "ref_logps", "advantages")
    out, grad = ours(case.logits, "triton", **on_device(case.inputs(*names)), **kwargs)
    return [out.loss, out.logps, grad, *(x for x in out.metrics.values())]


@triton.jit
def overflow_kernel(x, y, out, which: tl.constexpr, N: tl.constexpr):
    if N == 1:
        a, b = tl.load(x), tl.load(y)
    else:
        a, b = tl.load(x + tl.arange(0, N)), tl.load(y + tl.arange(0, N))
    if which == "add":
        c = a + b
    elif which == "sub":
        c = a - b
    else:
        c = a * b
    tl.store(out + tl.arange(0, N), c)


def overflows(dtype, which, N, by=0):
    """The largest (add, mul) or smallest (sub) integer, and one that goes `by` further."""
    limits = torch.iinfo(dtype)
    x = torch.zeros(N, dtype=dtype)
    x[-1] = limits.min if which == "sub" else limits.max
    y = torch.full((N,), 1 + by if which == "mul" else by, dtype=dtype)
    out = torch.zeros_like(x)
    overflow_kernel[(1,)](x, y, out, which, N)
    return [out]


CASES = {
    **{f"integers {d}": (integers, (d,), {}) for d in SIGNED},
    **{f"floats {d}": (floats, (d,), {}) for d in (torch.float16, torch.float32)},
    **{f"loss {d}": (loss, (d,), {"beta": 0.1, "return_entropy": True}) for d in FLOATS},
    "loss, sequences": (loss, (torch.float32,), {"loss_type": "gspo", "temperature": 0.7}),
    "loss, quantile": (loss, (torch.bfloat16,), {"top_entropy_quantile": 0.5, "entropy_coef": 0.1}),
    **{f"largest {d} {which} {N}": (overflows, (d, which, N), {})
       for d, which, N in itertools.product((*SIGNED, torch.uint8), ("add", "sub", "mul"), (1, 16))},
}  # fmt: skip
TOO_LARGE = {
    f"{d} {which} {N}": (overflows, (d, which, N, 1), {})
    for d, which, N in itertools.product((*SIGNED[:3], torch.uint8), ("add", "sub", "mul"),
                                         (1, 16))
}  # fmt: skip


def digest(case) -> str:
    run, args, kwargs = case
    tensors = run(*args, **kwargs)
    data = b"".join(torch.as_tensor(x).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                    for x in tensors)  # fmt: skip
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    if "--plain" not in sys.argv:
        hasten()
    for name, case in CASES.items():
        print(f"{name}: {digest(case)}")
