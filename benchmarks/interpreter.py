"""Triton's interpreter, made quicker: what it computes and what it checks stay as they are.

It replaces the functions of triton.language on every call of a device function, although they stay replaced until
the launch ends: more than half of the time of a small launch. Here it does so once per launch and module. Of what is
left, a third went into the check of integer sums and products for overflow, which took seven operations of the
interpreter each; here NumPy does it. And a shape is wrapped once, not for every tensor that has it.
"""

import functools
import inspect
import math
import os


@functools.cache
def hasten() -> None:
    """Once per process; does nothing where kernels are not interpreted."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ModuleNotFoundError:  # no Triton, nothing to hasten
        return

    language = interpreter.tl
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[str] = set()
    nothing = getattr(interpreter, "_LangPatchScope", lambda: None)

    @functools.cache
    def modules(fn) -> frozenset[str]:
        seen = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        return frozenset(module.__name__ for module in seen if module in (language, language.core))

    def replace_once(fn):
        if modules(fn) <= replaced:
            return nothing()
        replaced.update(modules(fn))
        return replace(fn)

    @functools.wraps(launch)
    def launch_afresh(self, *args, **kwargs):
        replaced.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_afresh
    _check_overflow_in_numpy(interpreter)
    _wrap_shapes_once(language.core)
    _unwrap_plain_values_at_once(language.core)
    _find_dtypes_by_name(interpreter)


def _check_overflow_in_numpy(interpreter) -> None:
    import numpy as np
    from triton.language.semantic import TritonSemantic

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    checked = TritonSemantic.binary_op_sanitize_overflow_impl

    def check(self, lhs, rhs, binary_op):
        dtype = lhs.type.scalar
        if self is not interpreter.interpreter_semantic:
            return checked(self, lhs, rhs, binary_op)
        if dtype.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return None
        exact = operations[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        inside = exact.max() <= dtype.get_int_max_value() and exact.min() >= dtype.get_int_min_value()
        assert inside, f"int{dtype.int_bitwidth} overflow detected for operation {binary_op.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _wrap_shapes_once(core) -> None:
    @functools.cache
    def wrapped(shape):
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(n) for n in shape])

    def init(self, handle, type):
        core.base_value.__init__(self)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = wrapped(tuple(type.shape) if type.is_block() else ())

    core.tensor.__init__ = init

    block, blocks = core.block_type.__init__, {}

    def init_block(self, element_ty, shape):
        key = (element_ty.name, tuple(shape))
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    core.block_type.__init__ = init_block


def _unwrap_plain_values_at_once(core) -> None:
    from triton.language import semantic

    unwrap, constexpr, containers = core._unwrap_if_constexpr, core.constexpr, (list, tuple, core.tuple)

    def unwrap_at_once(o):
        if isinstance(o, constexpr):
            return o.value
        return unwrap(o) if isinstance(o, containers) else o

    for module in (core, semantic):
        if hasattr(module, "_unwrap_if_constexpr"):
            module._unwrap_if_constexpr = unwrap_at_once


def _find_dtypes_by_name(interpreter) -> None:
    find, found = interpreter._get_np_dtype, {}

    def find_once(dtype):
        if dtype.name not in found:
            found[dtype.name] = find(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = find_once
