"""Runs the body of a Gluon kernel on CPU tensors, one program after the other.

Shared memory is a list of slots. A copy into one takes effect only at the wait that completes its group; until then
the slot must not be read, and lanes that the copy's mask leaves out hold NaN afterwards. Every address is checked, and
how often each entry was read and written is counted. What threads of one program do to each other cannot be seen here.
"""

import math
import types

import torch

from grpo_kernels.objective.language import tl as triton_language

POISON = 0x7FC17FC1  # two bf16 NaN, or one of fp32


class Memory:
    """A tensor from its first entry to the end of its storage, and the counts of its accesses."""

    def __init__(self, x: torch.Tensor) -> None:
        length = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        self.flat = torch.as_strided(x.detach(), (length,), (1,))
        self.reads, self.writes = (torch.zeros(length, dtype=torch.int32) for _ in range(2))


class Pointer:
    def __init__(self, memory: Memory, at=0, words: bool = False) -> None:
        self.memory, self.at, self.words = memory, at, words

    def __add__(self, offset):
        return Pointer(self.memory, self.at + offset, self.words)

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.memory.flat.dtype)

    def as_words(self) -> "Pointer":
        entries = 4 // self.memory.flat.element_size()  # of a word
        assert int(self.at) % (4 * entries) == 0, "not at a multiple of 16 bytes"
        return Pointer(self.memory, self.at // entries, True)

    def resolve(self, mask, counts: torch.Tensor):
        """(flat tensor of the pointer's unit, places, mask), the accesses counted."""
        flat, entries = self.memory.flat, 1
        if self.words:
            entries = 4 // flat.element_size()
            flat = flat[: flat.numel() // entries * entries].view(torch.int32)
        at = torch.as_tensor(self.at)
        mask = torch.ones((), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        at, mask = torch.broadcast_tensors(at, mask)
        assert bool(((at >= 0) & (at < flat.numel()))[mask].all()), "an address outside of the tensor"
        each = at[mask].long()
        for i in range(entries):
            entry = entries * each + i
            counts.index_put_((entry,), torch.ones((), dtype=torch.int32), accumulate=True)
        return flat, at.long(), mask


def load(pointer: Pointer, mask=None, other=0, eviction_policy="") -> torch.Tensor:
    flat, at, mask = pointer.resolve(mask, pointer.memory.reads)
    return torch.where(mask, flat[torch.where(mask, at, 0)], torch.tensor(other, dtype=flat.dtype))


def store(pointer: Pointer, value, mask=None, eviction_policy="") -> None:
    flat, at, mask = pointer.resolve(mask, pointer.memory.writes)
    value = torch.as_tensor(value).to(flat.dtype).expand(at.shape)
    flat[at[mask]] = value[mask]


class Slot:
    def __init__(self, shape) -> None:
        self.x, self.in_flight = torch.full(shape, POISON, dtype=torch.int32), False

    def load(self, layout) -> torch.Tensor:
        assert not self.in_flight, "a slot is read while a copy into it is on its way"
        return self.x.clone()


class Slots:
    def __init__(self, dtype, shape, layout) -> None:
        self.slots = [Slot(shape[1:]) for _ in range(shape[0])]

    def index(self, i) -> Slot:
        return self.slots[int(i)]


class Copies:
    """Copies of one program, in groups."""

    def __init__(self) -> None:
        self.open, self.groups = [], []

    def start(self, slot: Slot, pointer: Pointer, mask=None, eviction_policy="") -> None:
        slot.in_flight = True
        self.open.append((slot, pointer, mask))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, left) -> None:
        while len(self.groups) > int(left):
            for slot, pointer, mask in self.groups.pop(0):
                slot.x = load(pointer, mask, POISON).expand(slot.x.shape).clone()
                slot.in_flight = False


def cast(x, dtype, bitcast=False):
    if isinstance(x, Pointer):
        return x.as_words()
    return x.view(dtype) if bitcast else x.to(dtype)


def where(condition, a, b):
    if isinstance(condition, bool):
        return a if condition else b
    return torch.where(condition, a, b)


def maximum(a, b):  # as on hardware, NaN loses
    return torch.fmax(torch.as_tensor(a), torch.as_tensor(b, dtype=a.dtype))


def minimum(a, b):
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return torch.fmin(torch.as_tensor(a), torch.as_tensor(b, dtype=a.dtype))


def fma(a, b, c):
    return (torch.as_tensor(a).double() * torch.as_tensor(b).double() + torch.as_tensor(c).double()).float()


def of_numbers(function):
    return lambda x: function(torch.as_tensor(x))


class Tickets:
    """Of a 0 in memory that programs count up: which of them draws which number, as chance has it.

    Programs run one after the other here. So it is settled beforehand who draws which.
    """

    def __init__(self, programs: int) -> None:
        self.owners = torch.randint(0, programs, (10_000,), generator=torch.Generator().manual_seed(programs)).tolist()
        self.next = [0] * programs

    def draw(self, program: int) -> torch.Tensor:
        number = self.owners.index(program, self.next[program])
        self.next[program] = number + 1
        return torch.tensor(number, dtype=torch.int32)


def language(program: int, programs: int, tickets: Tickets | None = None) -> types.SimpleNamespace:
    def atomic_add(pointer, value, sem):
        assert pointer.memory.flat[pointer.at] == 0 and value == 1 and sem == "relaxed"
        return tickets.draw(program)

    return types.SimpleNamespace(
        atomic_add=atomic_add,
        float32=torch.float32, int32=torch.int32, int64=torch.int64, bfloat16=torch.bfloat16, constexpr=None,
        pointer_type=lambda dtype: dtype, BlockedLayout=lambda *a: None, SliceLayout=lambda *a: None,
        SwizzledSharedLayout=lambda *a: None, allocate_shared_memory=Slots,
        program_id=lambda axis: torch.tensor(program, dtype=torch.int32), num_programs=lambda axis: programs,
        arange=lambda a, b, layout=None: torch.arange(a, b), multiple_of=lambda x, n: x,
        full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        load=load, store=store, cast=cast, where=where, maximum=maximum, minimum=minimum, fma=fma,
        max=lambda x, axis: torch.where(x.isnan(), -math.inf, x).amax(axis), sum=lambda x, axis: x.sum(axis),
        **{name: of_numbers(getattr(torch, name)) for name in ("exp", "exp2", "log", "log2", "abs", "sqrt")},
    )  # fmt: skip


def pack_bf16(low, high):
    return torch.stack([low.to(torch.bfloat16), high.to(torch.bfloat16)], -1).view(torch.int32)[..., 0]


def bind(function, names: dict, seen: dict):
    """The Python body of a jit function, and of those that it calls, with these names in place of its own."""
    raw = function.fn
    if raw in seen:
        return seen[raw]
    own = dict(raw.__globals__)
    bound = seen[raw] = types.FunctionType(raw.__code__, own, raw.__name__, raw.__defaults__, raw.__closure__)
    for name in raw.__code__.co_names:
        if name in names:
            own[name] = names[name]
        elif hasattr(own.get(name), "fn"):
            own[name] = bind(own[name], names, seen)
        elif isinstance(own.get(name), triton_language.constexpr):
            own[name] = own[name].value
    return bound


class Kernel:
    """A Gluon kernel over so many programs, to be called as Triton's. ``accesses`` are those of the last call.

    ``changes``: names of the kernel's module, and what makes of a program's `Copies` what stands in their place.
    """

    def __init__(self, kernel, programs: int, changes: dict | None = None) -> None:
        self.kernel, self.programs, self.changes = kernel, programs, changes or {}
        self.accesses: dict[tuple, Memory] = {}

    def __call__(self, *args, num_warps=4, maxnreg=None, enable_fp_fusion=True, **constants) -> None:
        self.accesses = {}
        args = [self._argument(x) for x in args]
        constants = {
            k: bind(v, {"tl": language(0, 1)}, {}) if hasattr(v, "fn") else self._argument(v)
            for k, v in constants.items()
        }
        tickets = Tickets(self.programs)
        for program in range(self.programs):
            copies, gl = Copies(), language(program, self.programs, tickets)
            names = {
                "gl": gl, "tl": gl, "barrier": lambda: None, "copy_to_shared": copies.start,
                "commit_group": copies.commit, "wait_group": copies.wait, "pack_bf16": pack_bf16,
            }  # fmt: skip
            names |= {name: change(copies) for name, change in self.changes.items()}
            bind(self.kernel, names, {})(*args, **constants)
            assert not any([copies.open, *copies.groups]), "a program ends with copies on their way"

    def _argument(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        return Pointer(self.accesses.setdefault((x.data_ptr(), x.dtype), Memory(x)))
