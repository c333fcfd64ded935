"""A GPU that is pretended (``pytest --pretend-gpu``): which device each tensor would be on, without one.

Every tensor stays in the host's memory. Its storage carries a tag, "cpu" or "cuda", that follows it through
torch's operations. What fails on a GPU fails here: an operation or a comparison across the two, a CPU tensor that
is given to a compiled kernel, a "cuda" tensor that NumPy is to read. ``x.device`` answers by the tag. In place of the
kernels the torch backend computes, under their conditions: pretended_backend.py. A tensor that torch makes inside of
an operation has no tag, and goes with either device.
"""

import contextlib

import pytest
import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_pretended = False
_CPU, _CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Operations that CUDA allows on tensors of two devices: copies, and indices on the CPU.
_CROSSING = {"copy_", "_to_copy", "copy", "set_", "index", "index_put_", "index_put", "_index_put_impl_"}
# Operations that do not take even a single number from another device.
_STRICT = {"equal", "stack", "cat"}
_within = False  # an operation of the package: what it makes has no tag
_OF_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor}
_GRADIENTS = {  # where each takes the gradients of its first argument
    torch.autograd.backward: (1, "grad_tensors"),
    torch.autograd.grad: (2, "grad_outputs"),
    torch.Tensor.backward: (1, "gradient"),
}
_DEVICE = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__


class DeviceMismatch(AssertionError):
    """What would raise on a GPU."""


def pretend() -> None:
    """To be called before the tests are imported."""
    global _pretended
    _pretended = True


def pretended() -> bool:
    return _pretended


def tag_of(x: torch.Tensor) -> str | None:
    """ "cpu" or "cuda"; None where torch made it on its way. What was made before pretending began is on the CPU."""
    if x.layout != torch.strided:
        return None
    if x.device.type != "cpu":
        return x.device.type
    return getattr(x.untyped_storage(), "pretended", None if _within else "cpu")


def _put(x: torch.Tensor, tag: str | None) -> torch.Tensor:
    if x.device.type == "cpu" and x.layout == torch.strided:
        x.untyped_storage().pretended = tag
    return x


def _is_cuda(value) -> bool:
    if isinstance(value, str):
        return value.split(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class _Storages(TorchDispatchMode):
    """Tags what operations return, and refuses those that mix devices."""

    want: str | None = None  # the device of tensors that come from no tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "grpo_kernels":
            return self._own(func, args, kwargs)
        given = _tensors((args, kwargs))
        known = {id(x): tag_of(x) for x in given}
        tag = self.want if not given else _common(name, [(known[id(x)], x.dim()) for x in given])
        before = {x.untyped_storage()._cdata for x in given if x.layout == torch.strided}
        result = func(*args, **kwargs)
        for x in _tensors(result):
            if x.layout == torch.strided and x.untyped_storage()._cdata not in before:
                _put(x, tag)
        return result

    def _own(self, func, args, kwargs):
        """An operation of the package. Coefficients are numbers, and stay on the CPU."""
        named = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        given = _tensors([value for name, value in named.items() if name != "numbers"])
        if named.get("backend") == "triton":
            for x in given:
                _check_argument(func.name(), x)
        tag = _common(func.name(), [(tag_of(x), x.dim()) for x in given])
        global _within
        outer, _within = _within, True
        try:
            result = func(*args, **kwargs)
        finally:
            _within = outer
        before = {x.untyped_storage()._cdata for x in given}
        for x in _tensors(result):
            if x.untyped_storage()._cdata not in before:
                _put(x, tag)
        return result


def _check_argument(name: str, x: torch.Tensor) -> None:
    if tag_of(x) == "cpu":
        raise DeviceMismatch(
            f"{name}: a CPU tensor of shape {tuple(x.shape)} is given to a compiled kernel; put the inputs where "
            "cases.DEVICE says"
        )


def _common(name: str, given: list[tuple[str | None, int]]) -> str | None:
    """The device of an operation's result; raises where CUDA would. A number (0-d) on the CPU goes with any."""
    if name in _CROSSING:
        if name.startswith("index") and given[0][0] == "cpu" and any(tag == "cuda" for tag, _ in given):
            raise DeviceMismatch(f"{name}: a tensor on the CPU is indexed by one on the GPU")
        return given[0][0]
    strict = name in _STRICT
    tags = {tag for tag, dim in given if tag in ("cpu", "cuda") and (strict or dim > 0 or tag == "cuda")}
    if len(tags) == 2:
        raise DeviceMismatch(f"{name}: tensors on the CPU and on the GPU; put them where cases.DEVICE says")
    if tags:
        return tags.pop()
    return "cpu" if any(tag == "cpu" for tag, _ in given) else None


class _Calls(TorchFunctionMode):
    """Answers about devices, and makes and moves tensors as told."""

    def __init__(self, storages: _Storages) -> None:
        super().__init__()
        self.storages = storages

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _DEVICE:
            x = args[0]
            if x.device.type != "cpu":
                return func(x)
            on_gpu = tag_of(x) == "cuda"
            return {0: _CUDA if on_gpu else _CPU, 1: on_gpu, 2: not on_gpu}[_DEVICE.index(func)]
        if func is torch.Tensor.get_device:
            return 0 if tag_of(args[0]) == "cuda" else func(*args)
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return _move(func, args, kwargs)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and tag_of(args[0]) == "cuda":
            raise DeviceMismatch("a tensor on the GPU is read by NumPy: call .cpu() first")
        if func in _GRADIENTS:
            place, name = _GRADIENTS[func]
            if name in kwargs:
                kwargs[name] = _gradients_like(args[0], kwargs[name])
            elif len(args) > place:
                args = (*args[:place], _gradients_like(args[0], args[place]), *args[place + 1 :])
        return self._call(func, args, kwargs)

    def _call(self, func, args, kwargs):
        device = kwargs.get("device")
        given = _tensors((args, kwargs))
        if device is not None:
            want = "cuda" if _is_cuda(device) else "cpu" if torch.device(device).type == "cpu" else None
        elif given:
            want = tag_of(given[0]) if func in _OF_NUMBERS else None
        else:
            want = "cpu"
        if want == "cuda":
            if kwargs.get("generator") is not None:
                raise DeviceMismatch(f"{func.__name__}: a CPU generator for a tensor on the GPU")
            kwargs["device"] = "cpu"
        outer, self.storages.want = self.storages.want, want
        try:
            result = func(*args, **kwargs)
        finally:
            self.storages.want = outer
        if device is not None or func in _OF_NUMBERS:  # zeros_like(x, device=...), tensor(3.0)
            if isinstance(result, torch.Tensor) and want is not None and not _shares(result, given):
                _put(result, want)
        return result


def _shares(x: torch.Tensor, given: list[torch.Tensor]) -> bool:
    return any(x.untyped_storage()._cdata == y.untyped_storage()._cdata for y in given)


def _move(func, args, kwargs):
    x, rest = args[0], args[1:]
    if x.device.type != "cpu":
        return func(*args, **kwargs)
    if func is torch.Tensor.cpu:
        target, rest, kwargs = "cpu", (), {}
    elif func is torch.Tensor.cuda:
        target, rest, kwargs = "cuda", (), {}
    else:
        named = kwargs.get("device", next((v for v in rest if isinstance(v, (str, torch.device))), None))
        like = kwargs.get("other", rest[0] if rest and isinstance(rest[0], torch.Tensor) else None)
        if like is not None:
            target = tag_of(like)
        elif named is None:
            target = None
        else:
            target = "cuda" if _is_cuda(named) else torch.device(named).type
        on_host = lambda v: "cpu" if _is_cuda(v) else v  # noqa: E731
        rest, kwargs = tuple(map(on_host, rest)), tree_map(on_host, kwargs)
    result = torch.Tensor.to(x, *rest, **kwargs) if rest or kwargs else x
    if target in ("cpu", "cuda") and result.device.type == "cpu" and tag_of(result) != target:
        if result.requires_grad:
            return _Moved.apply(result, tag_of(x), target)
        result = _put(result.clone() if _shares(result, [x]) else result, target)
    return result


class _Moved(torch.autograd.Function):
    """A copy on the other device, whose gradient comes back."""

    @staticmethod
    def forward(ctx, x, source, target):
        ctx.source = source
        return _put(x.clone(), target)

    @staticmethod
    def backward(ctx, grad):
        return _put(grad.clone(), ctx.source), None, None


def _uncompiled(function, backend="inductor", **_):
    if hasattr(backend, "frame_count"):  # a backend that counts: whatever is called was compiled once
        backend.frame_count = 1
    return function


def _gradients_like(outputs, gradients):
    """Autograd moves a 0-d gradient to its output's device, and refuses another."""

    def one(y, g):
        if not isinstance(g, torch.Tensor) or None in (tag_of(y), tag_of(g)) or tag_of(y) == tag_of(g):
            return g
        if g.dim() > 0:
            raise DeviceMismatch(f"a gradient of shape {tuple(g.shape)} on another device than its output")
        return _put(g.clone(), tag_of(y))

    if gradients is None or isinstance(gradients, torch.Tensor):
        return one(outputs if isinstance(outputs, torch.Tensor) else outputs[0], gradients)
    return [one(y, g) for y, g in zip([outputs] if isinstance(outputs, torch.Tensor) else outputs, gradients)]


@contextlib.contextmanager
def pretended_gpu(monkeypatch):
    """Pretends within the context. torch.cuda stays as it is: a test that needs streams or graphs is skipped."""
    from grpo_kernels.call import distillation_ops, ops
    from grpo_kernels.linear import distillation_head_ops, head_ops
    from grpo_kernels.triton_backend import launch

    sizes = ops.stats_shape
    autocast, enabled, cast = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    on_host = lambda device: "cpu" if _is_cuda(device) else device  # noqa: E731

    monkeypatch.setitem(ops._BACKENDS, "triton", "pretended_backend")
    monkeypatch.setattr(launch, "is_interpreted", lambda kernel: False)
    monkeypatch.setitem(distillation_ops._BACKENDS, "triton", distillation_ops._BACKENDS["torch"])
    for module in (ops, head_ops, distillation_ops, distillation_head_ops):
        monkeypatch.setattr(module, "stats_shape", lambda rows, backend: sizes(rows, "torch"))
    # Neither traces under a mode. What would be compiled runs as it is, on the same devices.
    monkeypatch.setattr(torch, "compile", _uncompiled)
    for module, name in ((torch.library, "opcheck"), (torch.utils.checkpoint, "checkpoint")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.skip(f"{name} sees no pretended GPU"))
    monkeypatch.setattr(torch, "autocast", lambda device, *rest, **named: autocast(on_host(device), *rest, **named))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": enabled(on_host(device)))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: cast(on_host(device)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    ops.backend_of.cache_clear()
    distillation_ops.backend_of.cache_clear()
    storages = _Storages()
    try:
        with storages, _Calls(storages):
            yield
    finally:
        ops.backend_of.cache_clear()
        distillation_ops.backend_of.cache_clear()
