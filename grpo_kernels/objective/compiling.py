"""What torch.compile asks for: values that stay values, and no caches."""

import functools
import math

import torch


def traced(value: float) -> torch.Tensor | float:
    """A number to compute with; under torch.compile a 0-d CPU tensor.

    Of a sum or product of numbers torch 2.11 would make a constant, and compile anew for every value.
    """
    return torch.ones((), dtype=torch.float32, device="cpu") * value if torch.compiler.is_compiling() else value


def log2(value: float) -> torch.Tensor | float:
    """log₂ of a number, as `traced`."""
    return traced(value).log2() if torch.compiler.is_compiling() else math.log2(value)


def cached(function):
    """`functools.cache` in eager mode alone: torch.compile warns of a cache in every graph, and needs none."""
    kept = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs) if torch.compiler.is_compiling() else kept(*args, **kwargs)

    return call
