"""The Gluon names of the on-chip kernel, under one name each for Triton 3.6 to 3.9.

Gluon is young: 3.7 renames ``thread_barrier``, 3.8 the asynchronous copies, and 3.9 drops their old names. Importing
this module needs Triton 3.6 or newer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy as _copies

__all__ = ["barrier", "commit_group", "copy_to_shared", "gl", "gluon", "pack_bf16", "wait_group"]

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_to_shared = _copies.async_load if hasattr(_copies, "async_load") else _copies.async_copy_global_to_shared
commit_group, wait_group = _copies.commit_group, _copies.wait_group


@gluon.jit
def pack_bf16(low, high):
    """Two fp32, rounded to bf16, as one int32 word. PTX: as two conversions it would be three instructions."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )
