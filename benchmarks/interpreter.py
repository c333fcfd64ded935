"""Triton's interpreter, made quicker: what it computes and what it checks stay as they are.

It replaces the functions of triton.language on every call of a device function, although they stay replaced until
the launch ends: more than half of the time of a small launch. Here it does so once per launch and module. Of what is
left, a third went into the check of integer sums and products for overflow, which took seven operations of the
interpreter each; here NumPy does it. (Triton 3.7 makes that check, and asserts what it found in debug mode alone;
here an overflow raises always.) A shape is wrapped once, not for every tensor that has it; which types two operands
must have is found once for each pair, and so is which of them is cast or spread over a block; a number becomes a block
once. NumPy warns of no infinity, as no GPU does.
"""

import functools
import inspect
import math
import operator
import os


@functools.cache
def hasten() -> None:
    """Once per process; does nothing where kernels are not interpreted."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        import numpy as np
        from triton.runtime import interpreter
    except ModuleNotFoundError:  # no Triton or no NumPy, nothing to hasten
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
            with np.errstate(all="ignore"):
                return launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_afresh
    _check_overflow_in_numpy(interpreter)
    _wrap_shapes_once(language.core)
    _unwrap_plain_values_at_once(language.core)
    _find_dtypes_by_name(interpreter)
    _make_handles_at_once(interpreter)
    _wrap_functions_once(interpreter)
    _check_types_once(interpreter)


def _check_overflow_in_numpy(interpreter) -> None:
    from triton.language.semantic import TritonSemantic

    np = interpreter.np
    of_blocks = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    of_numbers = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
    checked = TritonSemantic.binary_op_sanitize_overflow_impl

    def check(self, lhs, rhs, binary_op):
        dtype, x, y = lhs.dtype, lhs.handle.data, rhs.handle.data
        if self is not interpreter.interpreter_semantic:
            return checked(self, lhs, rhs, binary_op)
        if dtype.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return None
        if x.size == y.size == 1:
            least = most = of_numbers[binary_op.__name__](int(x.item()), int(y.item()))
        else:
            exact = of_blocks[binary_op.__name__](x.astype(np.int64), y.astype(np.int64))
            least, most = exact.min(), exact.max()
        inside = most <= dtype.get_int_max_value() and least >= dtype.get_int_min_value()
        assert inside, f"int{dtype.int_bitwidth} overflow detected for operation {binary_op.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _wrap_shapes_once(core) -> None:
    @functools.cache
    def wrapped(shape):
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(n) for n in shape])

    of_a_number = wrapped(())

    def init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.wrapped

    core.tensor.__init__ = init

    block, blocks = core.block_type.__init__, {}

    def init_block(self, element_ty, shape):
        key = (element_ty.name, tuple(shape))
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name, wrapped(tuple(self.shape))
        self.element_ty = element_ty
        self.shape, self.numel, self.name, self.wrapped = blocks[key]

    core.block_type.__init__ = init_block
    core.dtype.wrapped = of_a_number  # of whatever is no block


def _unwrap_plain_values_at_once(core) -> None:
    from triton.language import semantic

    unwrap, constexpr, containers = core._unwrap_if_constexpr, core.constexpr, (list, tuple, core.tuple)
    plain = frozenset((core.tensor, int, float, bool, str, type(None)))

    def unwrap_at_once(o):
        if type(o) in plain:
            return o
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


def _make_handles_at_once(interpreter) -> None:
    """The size of an entry is checked once for each pair of dtypes."""
    validate, check, valid = interpreter._validate_np_data_size, interpreter.TensorHandle.__post_init__, set()

    def validate_once(data, dtype):
        key = data.itemsize, dtype.name
        if key in valid:
            return True
        if not validate(data, dtype):
            return False
        valid.add(key)
        return True

    def init(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if (data.itemsize, dtype.name) not in valid:
            check(self)  # raises, or adds to them

    interpreter._validate_np_data_size = validate_once
    interpreter.TensorHandle.__init__ = init


def _wrap_functions_once(interpreter) -> None:
    """The functions of triton.language, given their `_semantic`: by one wrapper each, not by two of every launch."""
    core, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    asks_for_semantic = core.builtin(lambda: None).__code__

    @functools.cache
    def with_semantic(member):
        if getattr(member, "__code__", None) is asks_for_semantic:
            member = member.__wrapped__

        def new_member(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        return new_member

    def patch(obj, name, member, builder, *scope):
        if scope:
            scope[0].set_attr(obj, name, with_semantic(member))
        else:
            setattr(obj, name, with_semantic(member))

    functions = {}

    def patch_builtin(pkg, builder, *scope):
        if pkg not in functions:  # unchanged yet: this is what changes them
            functions[pkg] = [(name, member) for name, member in inspect.getmembers(pkg)
                              if interpreter.tl.core.is_builtin(member)]  # fmt: skip
        for name, member in functions[pkg]:
            patch(pkg, name, member, builder, *scope)

    interpreter._patch_attr = patch
    interpreter._patch_builtin = patch_builtin


def _check_types_once(interpreter) -> None:
    """Operands that the check leaves as they are, the shape too, are known by their types; numbers by their value."""
    from triton.language.semantic import TritonSemantic

    ours, tensor, plain = interpreter.interpreter_semantic, interpreter.tl.core.tensor, (int, float, bool)
    check_types, broadcast, cast = (
        TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value, TritonSemantic.cast
    )  # fmt: skip
    constant = TritonSemantic.scalar_constant
    handle, full, dtype_of = interpreter.TensorHandle, interpreter.np.full, interpreter._get_np_dtype
    unchanged, constants, changes = set(), {}, {}

    def change(self, x, type):
        """As the check does it: first the dtype, then a scalar once per entry of a block."""
        x = cast_unlike(self, x, type.scalar)
        if type.is_block() and not x.type.is_block():
            x = tensor(handle(full(type.shape, x.handle.data, dtype_of(x.handle.dtype)), x.handle.dtype), type)
        return x

    def note(key, lhs, rhs, x, y) -> None:
        """What the check made of (lhs, rhs): nothing, or another one of either, whose shape stays if it is a block."""
        kept = x.type.name == lhs.type.name, y.type.name == rhs.type.name
        if all(kept):
            unchanged.add(key)
        elif any(kept):
            before, after = (rhs, y) if kept[0] else (lhs, x)
            if not before.type.is_block() or before.shape is after.shape:
                changes[key] = kept[0], after.type

    def remember(key, x):
        if len(constants) > 10_000:
            constants.clear()
        x.handle.data.flags.writeable = False
        constants[key] = x
        return x

    def exactly(value):  # 0.0 and −0.0 are equal
        return value or str(value)

    def check_once(self, lhs, rhs, *args, **kwargs):
        if self is not ours or kwargs:
            return check_types(self, lhs, rhs, *args, **kwargs)
        left, right = type(lhs), type(rhs)
        if left is tensor and right is tensor:
            key = lhs.type.name, rhs.type.name, args
            if key in unchanged:
                return lhs, rhs
            if key in changes:
                of_right, type_of_it = changes[key]
                return (lhs, change(self, rhs, type_of_it)) if of_right else (change(self, lhs, type_of_it), rhs)
            x, y = check_types(self, lhs, rhs, *args)
            note(key, lhs, rhs, x, y)
            return x, y
        if left is tensor and right in plain:
            key = lhs.type.name, right, exactly(rhs), args
            if key in constants:
                return lhs, constants[key]
            x, y = check_types(self, lhs, rhs, *args)
            return x, remember(key, y) if x.type.name == lhs.type.name else y
        if left in plain and right is tensor:
            key = left, exactly(lhs), rhs.type.name, args
            if key in constants:
                return constants[key], rhs
            x, y = check_types(self, lhs, rhs, *args)
            return remember(key, x) if y.type.name == rhs.type.name else x, y
        return check_types(self, lhs, rhs, *args)

    def broadcast_unlike(self, lhs, rhs):
        return (lhs, rhs) if self is ours and lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    def cast_unlike(self, input, dst_ty, *args, **kwargs):
        if self is ours and input.dtype.name == dst_ty.scalar.name:
            return input
        return cast(self, input, dst_ty, *args, **kwargs)

    def constant_once(self, value, dtype):
        if self is not ours or type(value) not in plain or dtype is None:
            return constant(self, value, dtype)
        key = exactly(value), dtype.name
        return constants[key] if key in constants else remember(key, constant(self, value, dtype))

    TritonSemantic.binary_op_type_checking_impl = check_once
    TritonSemantic.broadcast_impl_value = broadcast_unlike
    TritonSemantic.cast = cast_unlike
    TritonSemantic.scalar_constant = constant_once
