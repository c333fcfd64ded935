"""Tiles of a row in registers and shared memory: what `onchip` does with the words of one.

A word is 32 bits: two bf16 entries, or, where WIDE, one fp32 entry. A tile is [K, N, 4]: K lines, in each of which N
threads hold four words.
"""

from grpo_kernels.objective.language import constant
from grpo_kernels.objective.softmax import LOWEST
from grpo_kernels.triton_backend.gluon_names import commit_group, copy_to_shared, gl, gluon, pack_bf16, wait_group
from grpo_kernels.triton_backend.row import DEEP

# The words of −inf: 0xff80ff80, two entries, and 0xff800000, one.
BANNED, WIDE_BANNED = constant(-8323200), constant(-8388608)


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
def load_words(row, at, end, WIDE: gl.constexpr, HINT: gl.constexpr):
    OTHER: gl.constexpr = WIDE_BANNED if WIDE else BANNED
    return gl.load(row + at, mask=at < end, other=OTHER, eviction_policy=HINT)


@gluon.jit
def per_thread_sum(x):
    return gl.sum(gl.sum(x, axis=2), axis=0)  # [N]


@gluon.jit
def absorb_entries(total, moment, x, scale, off, ENTROPY: gl.constexpr):
    """Adds entries to the threads' Σ 2^d and, with ENTROPY, Σ 2^d·d, both [N]; d = x·scale − off."""
    depth = gl.fma(x, scale, -off)
    part = gl.exp2(depth)
    total = total + per_thread_sum(part)
    if ENTROPY:
        moment = moment + per_thread_sum(part * gl.maximum(depth, DEEP))
    return total, moment


@gluon.jit
def absorb(total, moment, word, scale, off, ENTROPY: gl.constexpr, WIDE: gl.constexpr):
    """The same with words. With ENTROPY one entry of each after the other, which takes half the registers."""
    if WIDE:
        total, moment = absorb_entries(total, moment, gl.cast(word, gl.float32, bitcast=True), scale, off, ENTROPY)
    else:
        low, high = entries(word)
        if ENTROPY:
            total, moment = absorb_entries(total, moment, low, scale, off, ENTROPY)
            total, moment = absorb_entries(total, moment, high, scale, off, ENTROPY)
        else:
            low = gl.fma(low, scale, -off)
            high = gl.fma(high, scale, -off)
            low2 = gl.exp2(low)
            high2 = gl.exp2(high)
            total = total + per_thread_sum(low2 + high2)
    return total, moment


@gluon.jit
def slope_of(x, scale, off, slope, pull, BONUS: gl.constexpr):
    depth = gl.fma(x, scale, -off)
    if BONUS:
        return gl.exp2(depth) * (slope + pull * gl.maximum(depth, DEEP))
    else:
        return gl.exp2(depth) * slope


@gluon.jit
def store_words(dst, at, end, word, MASKED: gl.constexpr):
    if MASKED:
        gl.store(dst + at, word, mask=at < end)
    else:
        gl.store(dst + at, word)


@gluon.jit
def write(dst, at, end, word, scale, off, slope, pull, MASKED: gl.constexpr, BONUS: gl.constexpr, WIDE: gl.constexpr):
    """The gradient of entries that are not the token's: 2^d·(slope + pull·d), d = x·scale − off."""
    if WIDE:
        x = gl.cast(word, gl.float32, bitcast=True)
        word = gl.cast(slope_of(x, scale, off, slope, pull, BONUS), gl.int32, bitcast=True)
    else:
        low, high = entries(word)
        low = slope_of(low, scale, off, slope, pull, BONUS)
        high = slope_of(high, scale, off, slope, pull, BONUS)
        word = pack_bf16(low, high)
    store_words(dst, at, end, word, MASKED)


@gluon.jit
def write_folded(dst, at, end, word, scale, off, signs, MASKED: gl.constexpr):
    """The same for bf16, the slope's size in the exponent and its sign as a mask, which spares a multiplication."""
    low, high = entries(word)
    low = gl.fma(low, scale, -off)
    high = gl.fma(high, scale, -off)
    store_words(dst, at, end, pack_bf16(gl.exp2(low), gl.exp2(high)) ^ signs, MASKED)


@gluon.jit
def write_either(dst, at, end, word, scale, off, slope, pull, folded, signs, MASKED: gl.constexpr, BONUS: gl.constexpr,
                 WIDE: gl.constexpr):  # fmt: skip
    if BONUS or WIDE:
        write(dst, at, end, word, scale, off, slope, pull, MASKED, BONUS, WIDE)
    else:
        write_folded(dst, at, end, word, scale, folded, signs, MASKED)


@gluon.jit
def fetch(slots, slot, row, at, live):
    """Starts to copy a tile into its slot; each thread fetches what it will read itself. One group per tile."""
    copy_to_shared(slots.index(slot), row + at, mask=(at >= 0) & live, eviction_policy="evict_first")
    commit_group()


@gluon.jit
def sum_slots(slots, total, moment, scale, off, many, S: gl.constexpr, L: gl.constexpr, ENTROPY: gl.constexpr,
              WIDE: gl.constexpr):  # fmt: skip
    """The first pass over a row's kept tiles, which have all been asked for; ``many``: S."""
    for s in range(many):
        wait_group(S - 1)
        total, moment = absorb(total, moment, slots.index(s).load(L), scale, off, ENTROPY, WIDE)
        commit_group()
    return total, moment


@gluon.jit
def load_passing(row, at, end, WIDE: gl.constexpr, TILE: gl.constexpr):
    """A row's first four passing tiles, which L2 should keep."""
    a = load_words(row, at, end, WIDE, "evict_last")
    b = load_words(row, at + TILE, end, WIDE, "evict_last")
    c = load_words(row, at + 2 * TILE, end, WIDE, "evict_last")
    d = load_words(row, at + 3 * TILE, end, WIDE, "evict_last")
    return a, b, c, d


@gluon.jit
def sum_passing(total, moment, a, b, c, d, row, at, end, scale, off, many, TILE: gl.constexpr, ENTROPY: gl.constexpr,
                WIDE: gl.constexpr):  # fmt: skip
    """The first pass over so many passing tiles, of which the first four are there.

    Returns:
        (total, moment, the last four tiles, which stay in registers).
    """
    for t in range(4, many):
        word = a
        a = b
        b = c
        c = d
        d = load_words(row, at + t * TILE, end, WIDE, "evict_last")
        total, moment = absorb(total, moment, word, scale, off, ENTROPY, WIDE)
    total, moment = absorb(total, moment, a, scale, off, ENTROPY, WIDE)
    total, moment = absorb(total, moment, b, scale, off, ENTROPY, WIDE)
    total, moment = absorb(total, moment, c, scale, off, ENTROPY, WIDE)
    total, moment = absorb(total, moment, d, scale, off, ENTROPY, WIDE)
    return total, moment, a, b, c, d


@gluon.jit
def write_passing(dst, at, end, a, b, c, d, row, scale, off, slope, pull, folded, signs, many, TILE: gl.constexpr,
                  BONUS: gl.constexpr, WIDE: gl.constexpr):  # fmt: skip
    """The second pass over so many passing tiles, of which the last four are there, from the last to the first."""
    for t in range(4, many):
        word = d
        d = c
        c = b
        b = a
        a = load_words(row, at + (many - 1 - t) * TILE, end, WIDE, "evict_first")
        write_either(dst, at + (many + 3 - t) * TILE, end, word, scale, off, slope, pull, folded, signs, False, BONUS,
                     WIDE)  # fmt: skip
    write_either(dst, at + 3 * TILE, end, d, scale, off, slope, pull, folded, signs, False, BONUS, WIDE)
    write_either(dst, at + 2 * TILE, end, c, scale, off, slope, pull, folded, signs, False, BONUS, WIDE)
    write_either(dst, at + TILE, end, b, scale, off, slope, pull, folded, signs, False, BONUS, WIDE)
    write_either(dst, at, end, a, scale, off, slope, pull, folded, signs, False, BONUS, WIDE)


@gluon.jit
def sum_at_maximum(row, at, end, tile, scale, L: gl.constexpr, ENTROPY: gl.constexpr, N: gl.constexpr,
                   WIDE: gl.constexpr):  # fmt: skip
    """(maximum, Σ 2^d, Σ 2^d·d) of a row in memory, d counted from its maximum."""
    ACC: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, L))
    top = gl.full([N], LOWEST, gl.float32, ACC)
    for first in range(0, end, tile):
        word = load_words(row, at + first, end, WIDE, "evict_first")
        if WIDE:
            larger = gl.cast(word, gl.float32, bitcast=True)
        else:
            low, high = entries(word)
            larger = gl.maximum(low, high)
        top = gl.maximum(top, gl.max(gl.max(larger, axis=2), axis=0))
    highest = gl.max(top, axis=0)
    total = gl.zeros([N], gl.float32, ACC)
    moment = gl.zeros([N], gl.float32, ACC)
    for first in range(0, end, tile):
        word = load_words(row, at + first, end, WIDE, "evict_first")
        total, moment = absorb(total, moment, word, scale, highest * scale, ENTROPY, WIDE)
    return highest, gl.sum(total, axis=0), gl.sum(moment, axis=0)
