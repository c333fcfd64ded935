"""Operators of torch: how one is defined.

`torch.library.custom_op` would do the same. On every call it runs wrappers in Python, for gradients, which these
operators do not have: `call.autograd` gives the losses theirs. A definition with a single implementation runs none.
"""

from collections.abc import Callable

import torch

_NAMESPACE = "grpo_kernels"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
BODIES: dict[Callable, Callable] = {}  # operator -> the function that it runs


def operator(writes_over: str | None = None) -> Callable:
    """Makes an operator of a function whose annotations are its schema; the name is the function's, less ``_op``.

    ``writes_over``: the first argument, if the function changes it in place. Autograd then knows that what it saved of
    it is gone.
    """
    mutated = () if writes_over is None else (writes_over,)

    def define(function: Callable) -> Callable:
        name = function.__name__.replace("_op", "")
        _LIBRARY.define(
            name + torch.library.infer_schema(function, mutates_args=mutated), tags=(torch.Tag.pt2_compliant_tag,)
        )
        _LIBRARY.impl(name, function if writes_over is None else _counted(function), "CompositeExplicitAutograd")
        made = getattr(getattr(torch.ops, _NAMESPACE), name).default
        BODIES[made] = function
        return made

    return define


def fake(operator: Callable) -> Callable:
    """Registers what the operator returns of tensors without data, for compilers."""
    return torch.library.register_fake(operator)


def _counted(function: Callable) -> Callable:
    """The function, which writes over its first argument; autograd is told so, by the tensor's version."""

    def run(x: torch.Tensor, *arguments):
        torch.autograd.graph.increment_version(x)
        return function(x, *arguments)

    return run
