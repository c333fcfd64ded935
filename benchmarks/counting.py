"""Counting: the bytes that kernels touch, their launches, and work of torch's own on a device.

Needs Triton's interpreter (TRITON_INTERPRET=1). Tensors on the ``meta`` device stand for a GPU: they
have no data, so whatever would make the host wait for a device cannot work on them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_kernels.call import distillation_ops, ops, targets
from grpo_kernels.call.library import BODIES
from grpo_kernels.linear import distillation_head_ops, head_ops
from grpo_kernels.linear import targets as linear_targets
from grpo_kernels.triton_backend import launch

LINE, WARP = 128, 512  # bytes of a line of a GPU's memory, and of what a warp stores at once, 16 a thread


class Access(NamedTuple):
    """One load or store: its addresses, masked lanes left out, and the bytes at each."""

    addresses: np.ndarray
    width: int


class Launch:
    """One kernel launch, and everything that it loaded or stored."""

    def __init__(self, name: str, grid: tuple[int, ...], arguments: tuple) -> None:
        self.name, self.grid = name, grid
        self.tensors = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]  # alive: no reuse
        self.loaded: list[Access] = []
        self.stored: list[Access] = []
        self.parts: list[np.ndarray] = []  # per store: an address in each line that a warp writes, but not all of

    def reads(self, x: torch.Tensor) -> torch.Tensor:
        """How often each element of ``x`` was loaded, in the shape of ``x``."""
        return _counts(self.loaded, x)

    def writes(self, x: torch.Tensor) -> torch.Tensor:
        """How often each element of ``x`` was stored to."""
        return _counts(self.stored, x)

    def parts_of_lines(self, x: torch.Tensor) -> int:
        """How often a warp's store to ``x`` leaves a line of memory written in part; stores of one entry left out."""
        return sum(int(_inside(each, x).sum()) for each in self.parts)

    def lines_in_part(self, x: torch.Tensor) -> int:
        """The lines of ``x`` that the launch as a whole writes, but not all of."""
        written = np.unique(np.concatenate([_bytes(each) for each in self.stored]))
        _, counts = np.unique(written[_inside(written, x)] // LINE, return_counts=True)
        return int((counts < LINE).sum())

    def touches(self, x: torch.Tensor) -> bool:
        """Whether anything of the storage of ``x`` was loaded or stored to."""
        return any(_inside(each.addresses, x).any() for each in (*self.loaded, *self.stored))

    def admit(self, addresses: np.ndarray, dtype: np.dtype) -> Access:
        """The access; an AssertionError, rather than a crash, where an address lies outside of the arguments."""
        if not np.any([_inside(addresses, x) for x in self.tensors], axis=0).all():
            raise AssertionError(f"{self.name} reaches outside of the tensors that it was given")
        return Access(addresses, np.dtype(dtype).itemsize)


def _bytes(access: Access) -> np.ndarray:
    return (access.addresses[:, None].astype(np.int64) + np.arange(access.width)).ravel()


def in_part(addresses: np.ndarray, mask: np.ndarray, width: int) -> np.ndarray:
    """An address in each line that a warp's store leaves written in part; neighbouring lanes are a warp's."""
    warps = np.arange(addresses.size) // (WARP // width)
    live = mask.ravel()
    places = np.stack([warps[live], addresses.ravel()[live].astype(np.int64) // LINE])
    _, first, counts = np.unique(places, axis=1, return_index=True, return_counts=True)
    return addresses.ravel()[live][first[counts * width < LINE]]


def _inside(addresses: np.ndarray, x: torch.Tensor) -> np.ndarray:
    storage = x.untyped_storage()
    return (addresses >= storage.data_ptr()) & (addresses < storage.data_ptr() + storage.nbytes())


def _counts(accesses: list[Access], x: torch.Tensor) -> torch.Tensor:
    storage, size = x.untyped_storage(), x.element_size()
    elements = storage.nbytes() // size
    counts = np.zeros(elements, np.int64)
    for wide in {width for _, width in accesses}:
        addresses = np.concatenate([each for each, width in accesses if width == wide])
        mine = addresses[_inside(addresses, x)].astype(np.int64) - storage.data_ptr()
        for part in range(0, max(wide, size), size):  # a word may hold several elements
            counts += np.bincount((mine + part) // size, minlength=elements)
    return torch.as_strided(torch.from_numpy(counts), x.shape, x.stride(), x.storage_offset())


@contextlib.contextmanager
def launches(*, run: bool = True, programs: range | None = None) -> Iterator[list[Launch]]:
    """The launches within the context. Without ``run`` they are noted and left out.

    With ``programs`` only those run of a grid that has them, which makes a grid of 65536 affordable.
    """
    from triton._C.libtriton import interpreter as memory
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    seen: list[Launch] = []
    call, load, store = GridExecutor.__call__, memory.load, memory.store
    at_program = interpreter_builder.set_grid_idx

    def noted(executor, *args, **kwargs):
        seen.append(Launch(executor.fn.__name__, executor.grid, (args, kwargs)))
        if not run:
            return None
        if programs is None or executor.grid[0] < programs.stop:
            return call(executor, *args, **kwargs)
        whole = executor.grid
        executor.grid = (1,)
        for program in programs:  # each as a grid of its own, told its place in the whole

            def place(*_, program=program):
                interpreter_builder.set_grid_dim(*whole, 1, 1)
                at_program(program, 0, 0)

            interpreter_builder.set_grid_idx = place
            call(executor, *args, **kwargs)
        del interpreter_builder.set_grid_idx
        executor.grid = whole
        return None

    def counted_load(pointers, mask, other, dtype):
        seen[-1].loaded.append(seen[-1].admit(pointers[mask], dtype))
        return load(pointers, mask, other, dtype)

    def counted_store(pointers, values, mask):
        seen[-1].stored.append(seen[-1].admit(pointers[mask], values.dtype))
        if pointers.size > 1:
            seen[-1].parts.append(in_part(pointers, mask, values.dtype.itemsize))
        return store(pointers, values, mask)

    def refuse(*_):
        raise AssertionError("an atomic: their order varies from run to run, and so do the bits of a float sum")

    with contextlib.ExitStack() as patches:
        patch = lambda owner, name, value: patches.enter_context(_patched(owner, name, value))  # noqa: E731
        patch(GridExecutor, "__call__", noted)
        patch(memory, "load", counted_load)
        patch(memory, "store", counted_store)
        patch(memory, "atomic_rmw", refuse)
        patch(memory, "atomic_cas", refuse)
        try:
            yield seen
        finally:
            vars(interpreter_builder).pop("set_grid_idx", None)


def on_a_line(x: torch.Tensor, spare: int = 0) -> torch.Tensor:
    """Fresh memory for a contiguous tensor like ``x``, which starts ``spare`` entries behind the start of a line."""
    size = x.element_size()
    memory = torch.empty(x.numel() + spare + LINE // size, dtype=x.dtype)
    first = -memory.data_ptr() % LINE // size + spare
    return memory.new_empty(0).set_(memory.untyped_storage(), first, x.shape)


class _Lines(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return on_a_line(x).copy_(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


@contextlib.contextmanager
def lines_as_on_a_gpu() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """What is allocated starts at a line of memory, as a GPU's allocator has it, and kernels know its lines.

    Yields what makes of logits a model's output that does so too.
    """
    new_empty = torch.Tensor.new_empty

    def aligned(self, *args, **kwargs):
        x = new_empty(self, *args, **kwargs)
        return x if x.is_meta or x.numel() < LINE else on_a_line(x)

    with _patched(torch.Tensor, "new_empty", aligned), _patched(launch, "line_bytes", lambda x: LINE):
        yield _Lines.apply


@contextlib.contextmanager
def _patched(owner, name: str, value) -> Iterator[None]:
    saved = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, saved)


@contextlib.contextmanager
def bare_ops() -> Iterator[None]:
    """The custom ops as plain functions: on ``meta`` tensors torch would run their fakes instead."""
    with contextlib.ExitStack() as patches:
        for module in (ops, targets, distillation_ops, head_ops, linear_targets, distillation_head_ops):
            for name, op in list(vars(module).items()):
                if isinstance(op, torch._ops.OpOverload):
                    patches.enter_context(_patched(module, name, BODIES[op]))
        yield


class HostSync(AssertionError):
    """Something on the way to the device makes the host wait, or copies from the host."""


class _NoTensorsFromNumbers(TorchFunctionMode):
    """torch.tensor(number, device=...) copies from the host, and Tensor.tolist to it; no dispatcher sees them."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist and args[0].is_meta:
            return self.answer(func)
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor) and result.is_meta:
            raise HostSync(f"{func.__name__}: a tensor built from host data on the device")
        return result


class Device(TorchDispatchMode):
    """Notes what torch itself launches on ``meta`` tensors, and refuses whatever syncs with the host.

    Args:
        answers: what the host is told, in turn, where it may ask: a list for ``tolist``; for ``nonzero`` None,
            which stands for all of them.
    """

    _FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias")
    _SYNC = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self, answers: Sequence[list | None] = ()) -> None:
        super().__init__()
        self.ops: list[tuple[str, int]] = []  # name, elements of the largest tensor in or out
        self.waits = 0  # times that the host asked
        self._answers = iter(answers)
        self._numbers = _NoTensorsFromNumbers(self._answer)

    def _answer(self, func):
        self.waits += 1
        try:
            return next(self._answers)
        except StopIteration:
            raise HostSync(f"{func}: the host would wait for the device") from None

    def __enter__(self):
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        return self._numbers.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        by_mask = name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
        if any(x.is_meta for x in given) and (name in self._SYNC or by_mask):
            self._answer(func)
            if name != "nonzero":
                raise HostSync(f"{func}: the host would wait for the device")
            return torch.nonzero_static(given[0], size=given[0].numel())
        result = func(*args, **(kwargs or {}))
        tensors = given + [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if len({x.is_meta for x in tensors}) == 2:
            raise HostSync(f"{func}: mixes host and device tensors")
        on_device = any(x.is_meta for x in tensors)
        if on_device and not func.is_view and name not in self._FREE:
            self.ops.append((str(func), max(x.numel() for x in tensors)))
        return result
