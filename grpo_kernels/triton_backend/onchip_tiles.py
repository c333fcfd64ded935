"""Tiles of a row in registers and shared memory: what `onchip` does with the words of one.

A word is two bf16 entries. A tile is [K, N, 4]: K lines, in each of which N threads hold four words.
"""

from grpo_kernels.objective.language import constant
from grpo_kernels.objective.softmax import LOWEST
from grpo_kernels.triton_backend.gluon_names import commit_group, copy_to_shared, gl, gluon, pack_bf16, wait_group
from grpo_kernels.triton_backend.row import DEEP

BANNED = constant(-8323200)  # 0xff80ff80: two entries of −inf


@gluon.jit
def words_at(first, K: gl.constexpr, N: gl.constexpr, L: gl.constexpr):
    """[K, N, 4]: places of K lines, in each of which N threads hold four words."""
    k = gl.arange(0, K, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    n = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    i = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    return first + k * (N * 4) + n * 4 + i


@gluon.jit
def as_words(row):
    return gl.multiple_of(gl.cast(row, gl.pointer_type(gl.int32)), 16)


@gluon.jit
def entries(word):
    """The two entries of a word, as fp32."""
    return gl.cast(word << 16, gl.float32, bitcast=True), gl.cast(word & -65536, gl.float32, bitcast=True)


@gluon.jit
def load_words(row, at, end):
    return gl.load(row + at, mask=at < end, other=BANNED, eviction_policy="evict_first")


@gluon.jit
def per_thread_sum(x):
    return gl.sum(gl.sum(x, axis=2), axis=0)  # [N]


@gluon.jit
def absorb(total, moment, word, scale, off, ENTROPY: gl.constexpr):
    """Adds words to the threads' Σ 2^d and, with ENTROPY, Σ 2^d·d, both [N]; d = x·scale − off."""
    low, high = entries(word)
    low = gl.fma(low, scale, -off)
    high = gl.fma(high, scale, -off)
    total = total + per_thread_sum(gl.exp2(low) + gl.exp2(high))
    if ENTROPY:
        low = gl.exp2(low) * gl.maximum(low, DEEP)
        moment = moment + per_thread_sum(low + gl.exp2(high) * gl.maximum(high, DEEP))
    return total, moment


@gluon.jit
def write(dst, at, end, word, scale, off, slope, pull, MASKED: gl.constexpr, BONUS: gl.constexpr):
    """The gradient of entries that are not the token's: 2^d·(slope + pull·d), d = x·scale − off."""
    low, high = entries(word)
    low = gl.fma(low, scale, -off)
    high = gl.fma(high, scale, -off)
    if BONUS:
        low = gl.exp2(low) * (slope + pull * gl.maximum(low, DEEP))
        high = gl.exp2(high) * (slope + pull * gl.maximum(high, DEEP))
    else:
        low = gl.exp2(low) * slope
        high = gl.exp2(high) * slope
    if MASKED:
        gl.store(dst + at, pack_bf16(low, high), mask=at < end)
    else:
        gl.store(dst + at, pack_bf16(low, high))


@gluon.jit
def write_folded(dst, at, end, word, scale, off, signs, MASKED: gl.constexpr):
    """The same with the slope's size in the exponent and its sign as a mask, which spares a multiplication."""
    low, high = entries(word)
    low = gl.exp2(gl.fma(low, scale, -off))
    high = gl.exp2(gl.fma(high, scale, -off))
    if MASKED:
        gl.store(dst + at, pack_bf16(low, high) ^ signs, mask=at < end)
    else:
        gl.store(dst + at, pack_bf16(low, high) ^ signs)


@gluon.jit
def write_either(dst, at, end, word, scale, off, slope, pull, folded, signs, MASKED: gl.constexpr, BONUS: gl.constexpr):
    if BONUS:
        write(dst, at, end, word, scale, off, slope, pull, MASKED, True)
    else:
        write_folded(dst, at, end, word, scale, folded, signs, MASKED)


@gluon.jit
def fetch(slots, slot, row, at, live):
    """Starts to copy a tile into its slot; each thread fetches what it will read itself. One group per tile."""
    copy_to_shared(slots.index(slot), row + at, mask=(at >= 0) & live, eviction_policy="evict_first")
    commit_group()


@gluon.jit
def sum_slots(slots, total, moment, scale, off, S: gl.constexpr, L: gl.constexpr, ENTROPY: gl.constexpr):
    """The first pass over a row whose tiles have all been asked for."""
    for s in range(S):
        wait_group(S - 1)
        total, moment = absorb(total, moment, slots.index(s).load(L), scale, off, ENTROPY)
        commit_group()
    return total, moment


@gluon.jit
def sum_at_maximum(row, at, end, tile, scale, L: gl.constexpr, ENTROPY: gl.constexpr, N: gl.constexpr):
    """(maximum, Σ 2^d, Σ 2^d·d) of a row in memory, d counted from its maximum."""
    ACC: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, L))
    top = gl.full([N], LOWEST, gl.float32, ACC)
    for first in range(0, end, tile):
        low, high = entries(load_words(row, at + first, end))
        top = gl.maximum(top, gl.max(gl.max(gl.maximum(low, high), axis=2), axis=0))
    highest = gl.max(top, axis=0)
    total = gl.zeros([N], gl.float32, ACC)
    moment = gl.zeros([N], gl.float32, ACC)
    for first in range(0, end, tile):
        word = load_words(row, at + first, end)
        total, moment = absorb(total, moment, word, scale, highest * scale, ENTROPY)
    return highest, gl.sum(total, axis=0), gl.sum(moment, axis=0)
