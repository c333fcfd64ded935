"""Other data and other addresses for the same tests: ``--seed-offset=N`` and ``--shift=K``.

What a test draws differs with the processor anyway: torch's vector functions, the allocator's alignment and NumPy's
differ. These two options let one machine try what others would meet.

``--seed-offset=N`` adds N to every seed that is set while the tests run, whoever sets it: a ``torch.Generator`` of a
test, ``torch.manual_seed``, the trainer. ``--shift=K`` makes every tensor that an operation returns start K elements
into its storage, so that neither inputs nor gradients lie where the allocator would align them. It works below
autograd, so that a shifted tensor is no view. What operations allocate inside of themselves stays where it is, the
buffers of our own operations among it; so does what `torch.compile` makes, and a tensor of a subclass.

A test marked ``unshifted`` counts operations, bytes or allocations, or compiles, and is left alone by ``--shift``.
"""

import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_empty = torch.empty  # before conftest poisons it

SEED_OFFSET, SHIFT = "GRPO_TESTS_SEED_OFFSET", "GRPO_TESTS_SHIFT"  # for the processes that a test starts


class Generator(torch.Generator):
    def manual_seed(self, seed):
        return super().manual_seed(seed + int(os.environ[SEED_OFFSET]))


def move_seeds(offset: int) -> None:
    """Once per process, before a test runs."""
    os.environ[SEED_OFFSET] = str(offset)
    if not offset:
        return
    manual_seed = torch.manual_seed
    torch.Generator, torch.manual_seed = Generator, lambda seed: manual_seed(int(seed) + offset)


class Shifted(TorchDispatchMode):
    """Results of operations, `shift` elements into their storages."""

    def __init__(self, shift: int):
        super().__init__()
        self.shift = shift

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if isinstance(out, torch.Tensor) and len(returns) == 1:
            return self.placed(func, out, returns[0], (args, kwargs))
        if isinstance(out, tuple) and len(returns) == len(out):
            return tuple(self.placed(func, x, one, (args, kwargs)) for x, one in zip(out, returns))
        return out  # nothing, or a list of views

    def placed(self, func, x, returned, given):
        if type(x) is not torch.Tensor or x.layout != torch.strided or x.device.type == "meta" or not x.numel():
            return x
        if returned.alias_info is not None and func is not torch.ops.aten.lift_fresh.default:
            return x
        storage = x.untyped_storage()._cdata
        of_inputs = (y.untyped_storage()._cdata for y in tree_leaves(given) if type(y) is torch.Tensor)
        if x.storage_offset() or (func is not torch.ops.aten.lift_fresh.default and storage in of_inputs):
            return x
        return shifted(x, self.shift)


def shifted(x: torch.Tensor, shift: int) -> torch.Tensor:
    """The same values and strides, `shift` elements into a storage of its own."""
    room = _empty(x.untyped_storage().nbytes() // x.element_size() + shift, dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, x.stride(), shift).copy_(x)


def from_environment() -> None:
    """In a process that a test has started."""
    move_seeds(int(os.environ.get(SEED_OFFSET, "0")))
    if shift := int(os.environ.get(SHIFT, "0")):
        Shifted(shift).__enter__()


unshifted = _disable_current_modes  # a context, for what compiles in such a process, and for float64 on the side
