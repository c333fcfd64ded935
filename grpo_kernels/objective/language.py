"""One body, two backends: a ``@jit`` function compiles in a Triton kernel and runs on torch tensors.

Where Triton has no wheel, ``jit`` only keeps the Python function, so that the package imports and
its CPU path works.
"""

import functools
import types

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton = None

    class _Names:
        """Stands for ``triton.language`` in annotations, which are all that is evaluated."""

        def __getattr__(self, name: str) -> "_Names":
            return self

        def __call__(self, *args: object) -> "_Names":
            return self

    tl = _Names()


class _PlainFunction:
    """What ``@jit`` makes of a function where there is no Triton."""

    def __init__(self, fn):
        self.fn = fn
        self.__name__ = fn.__name__

    def __getitem__(self, grid):
        raise RuntimeError("Triton is not installed: use backend='torch', or `pip install triton`.")


def jit(fn=None, **options):
    """``triton.jit``, or a plain wrapper where Triton is missing."""
    if fn is None:
        return functools.partial(jit, **options)
    return triton.jit(fn, **options) if triton is not None else _PlainFunction(fn)


def constant(value: float):
    """A global number that ``@jit`` functions may use."""
    return tl.constexpr(value) if triton is not None else value


def is_interpreted(kernel: object) -> bool:
    """Whether a ``@jit`` function runs in Triton's interpreter (``TRITON_INTERPRET=1`` at import)."""
    return triton is not None and not isinstance(kernel, triton.runtime.JITFunction)


NUMBERS = torch.float32  # what a condition makes of two numbers


def _where(condition, a, b):
    """``torch.where``; a condition on coefficients, which are numbers here, costs no operation."""
    if condition is True or condition is False:
        return a if condition else b
    if type(a) is float and isinstance(b, torch.Tensor) and b.is_floating_point():
        return b.masked_fill(condition, a)  # one operation; torch.where first makes a tensor of the number
    if type(a) is float and type(b) is float:  # torch.where would make them of the default dtype
        return torch.full_like(condition, b, dtype=NUMBERS).masked_fill_(condition, a)
    return torch.where(condition, a, b)


def _max(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The largest along an axis, −∞ where it has no entry."""
    return x.amax(axis) if x.shape[axis] else x.sum(axis) - torch.inf


# The part of triton.language that shared functions may use, on torch tensors. tl.minimum and
# tl.maximum are left out on purpose: on hardware they drop NaN; compare and use where.
_TORCH_LANGUAGE = types.SimpleNamespace(
    exp=torch.exp,
    exp2=torch.exp2,
    log=torch.log,
    log2=torch.log2,
    sqrt=lambda x: x**0.5,  # of a number, too
    abs=torch.abs,
    where=_where,
    sum=lambda x, axis: x.sum(axis),
    max=_max,
    constexpr=None,
)


def on_torch(function) -> types.FunctionType:
    """The Python body of a ``@jit`` function, with torch in place of ``triton.language``."""
    return _in_torch(function.fn)


@functools.cache  # by the body: a ``@jit`` function's own hash is that of its source
def _in_torch(fn: types.FunctionType) -> types.FunctionType:
    names = {**fn.__globals__, "tl": _TORCH_LANGUAGE}
    for name in fn.__code__.co_names:
        if name != "tl" and hasattr(names.get(name), "fn"):
            names[name] = on_torch(names[name])
        elif triton is not None and isinstance(names.get(name), tl.constexpr):
            names[name] = names[name].value
    return types.FunctionType(fn.__code__, names, fn.__name__, fn.__defaults__, fn.__closure__)
