"""Candidate 2: a row split over several programs, which meet in global memory.

    take a ticket: a row and a part of it
    read the part, and keep it in registers
    publish (maximum, sum), wait until all parts of the row are published
    the row's log-probability and slope, the same in each program; write the part's gradient

Each logit is read once even by the letter. What a part publishes is one 64-bit word, written at once and never 0: so
the word is its own flag, nothing has to be ordered before or after it, and who waits looks at all words of the row
together. One more word holds the token's logit, read by the program of the first part.

Nobody waits forever (deadlock):

1. A counter hands out the tickets in order, row by row, to programs that run, and a program that runs keeps its place
   on the GPU until it ends. So at most one row has tickets that are taken and others that are not: the newest.
2. A program publishes before it waits, and until then depends on no other. So a row whose tickets are all taken is
   published in finite time; its programs stop waiting, and end.
3. At most PARTS − 1 programs wait for tickets of the newest row that are not taken. If the GPU holds PARTS programs
   at a time, then by 2 a place becomes free, a new program starts, and takes the next ticket, which is one of those.

`unavailable` asks for 3: no more parts than multiprocessors. What else runs on the GPU may take places, and gives them
back when it ends, unless it waits for this kernel. A bug would hang the GPU: so the wait is bounded, and whoever gives
up writes NaN and spoils the counter, so that those who come later leave at once.

Two runs give the same bits: each program adds up the parts' sums in the same order, whoever came first.

What a program holds while it waits is 2^(x − its maximum) in fp32, which then only needs a factor: one exponential per
element. To hold the bf16 in pairs instead, twice as much of the row in as many registers, was tried and spills: the
compiler converts all pairs before it adds any.

Programs that run one after another would wait in vain: Triton's interpreter gets two launches, in which all publish
(PUBLISH), and then all go on (CONSUME).
"""

import torch

from benchmarks.experiments.common import (
    WAVE,
    Job,
    arguments,
    is_live,
    join,
    on,
    row_numbers,
    slope_of,
    tile,
)
from grpo_kernels.jit import jit, tl, triton
from grpo_kernels.kernels.row import load_tile, tile_at
from grpo_kernels.kernels.rows import kernel, row_at
from grpo_kernels.softmax import LOG2E, LOWEST, logp_of, token_slope

MOST_LOOKS = 1 << 17  # at the words, about 0.1 s, before giving up
SPOILT = tl.constexpr(1 << 30)  # a ticket that no launch reaches


@jit
def word_of(high, low):
    """Two fp32 in one word, which is 0 only for (0, 0): a maximum of 0 comes with a sum of at least 1."""
    high = high.to(tl.int32, bitcast=True).to(tl.int64)
    low = low.to(tl.int32, bitcast=True).to(tl.int64)
    return (high << 32) | (low & 0xFFFFFFFF)


@jit
def halves_of(word):
    return (word >> 32).to(tl.int32).to(tl.float32, bitcast=True), word.to(tl.int32).to(tl.float32, bitcast=True)


@jit
def wait_for(words, PARTS: tl.constexpr, SLOTS: tl.constexpr, tickets, looks):
    """(the parts' words [SLOTS], the token's, whether all were published in the end)."""
    which = tl.arange(0, SLOTS)
    found = tl.load(words + which, mask=which <= PARTS, other=1, volatile=True)  # [SLOTS]
    left = looks
    while (tl.min((found != 0).to(tl.int32), axis=0) == 0) & (left > 0):
        found = tl.load(words + which, mask=which <= PARTS, other=1, volatile=True)  # [SLOTS]
        left -= 1
    complete = tl.min((found != 0).to(tl.int32), axis=0) == 1
    if not complete:
        tl.atomic_max(tickets, SPOILT, sem="relaxed")
    return found, tl.sum(tl.where(which == PARTS, found, 0), axis=0), complete


@kernel
def counter_kernel(
    logits, out, ids, mask, old, adv, count, logps,  # [B, rows, V] ×2, [B, T] ×3, [B] ×2, out: [B, T]
    logits_b, logits_t, out_b, out_t,
    all_rows, T, rows, V, inv_temperature: tl.float32, w_factor: tl.float32, limits, c,
    tickets, words, looks,  # [1] and [all_rows, PARTS + 1] int64, both 0 before a launch; []
    TERM: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
    PUBLISH: tl.constexpr, CONSUME: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    ticket = tl.atomic_add(tickets, 1, sem="relaxed").to(tl.int32)
    if ticket >= all_rows * PARTS:
        return
    n = ticket // PARTS
    part = ticket % PARTS
    seq = (n // rows).to(tl.int64)
    tok = (n % rows).to(tl.int64)
    start = part * K * N * W
    dst = row_at(out, seq, tok, out_b, out_t, ALIGNED)
    at = tile_at(start, K, N, W)  # [K, N·W]
    if not is_live(mask, seq, tok, T):
        if CONSUME:
            tl.store(logps + seq * T + tok, 0.0, mask=(part == 0) & (tok < T))
            tl.store(dst + at, tl.zeros([K, N * W], dst.dtype.element_ty), mask=at < V)
        return

    token = tl.load(ids + seq * T + tok)
    lp_old, A, w = row_numbers(old, adv, count, seq, tok, T, w_factor)
    scale = inv_temperature * LOG2E
    row = row_at(logits, seq, tok, logits_b, logits_t, ALIGNED)
    # In place: the token's logit is read before the word that lets the others write over it.
    known = (part == 0) & (token >= 0) & (token < V)
    x_token = tl.load(row + token, mask=known, other=float("nan")).to(tl.float32)
    x = load_tile(row, at, V, True, "evict_first")
    top = tl.maximum(tl.max(tl.max(x, axis=0), axis=0), LOWEST)
    kept = tl.exp2((x - top) * scale)
    total = tl.sum(tl.sum(kept, axis=0), axis=0)
    words += n.to(tl.int64) * (PARTS + 1)
    if PUBLISH:
        tl.atomic_xchg(words + PARTS, word_of(x_token, tl.full([], 1.0, tl.float32)), mask=part == 0, sem="relaxed")
        tl.atomic_xchg(words + part, word_of(top, total), sem="relaxed")
    if CONSUME:
        found, token_word, complete = wait_for(words, PARTS, SLOTS, tickets, looks)
        tops, totals = halves_of(found)
        there = tl.arange(0, SLOTS) < PARTS
        row_top, row_total = join(tl.where(there, tops, LOWEST), tl.where(there, totals, 0.0), scale)
        x_token, _ = halves_of(token_word)
        lp = tl.where(complete, logp_of((x_token - row_top) * scale, row_total), float("nan"))
        tl.store(logps + seq * T + tok, lp, mask=part == 0)
        g = slope_of(lp, lp_old, A, w, limits, c, TERM) * inv_temperature
        if g == 0.0:
            tl.store(dst + at, tl.zeros([K, N * W], dst.dtype.element_ty), mask=at < V)
        else:
            d = kept * (-g / row_total * tl.exp2((top - row_top) * scale))
            tl.store(dst + at, d.to(dst.dtype.element_ty), mask=at < V)
            tl.debug_barrier()  # the token's entry is stored by another thread than the tile's
            d_token = token_slope((x_token - row_top) * scale, row_total, g)
            mine = (token >= start) & (token < start + K * N * W) & (token < V)
            tl.store(dst + token, d_token.to(dst.dtype.element_ty), mask=mine)


def unavailable(
    device: torch.device, V: int, dtype: torch.dtype, *, K: int = 4, warps: int = 16, **_: int
) -> str | None:
    """Why a launch could deadlock, or None."""
    parts = triton.cdiv(V, K * 16 // dtype.itemsize * 32 * warps)
    places = torch.cuda.get_device_properties(device).multi_processor_count
    return f"{parts} parts, {places} multiprocessors" if parts > places else None


def launch(
    job: Job, out: torch.Tensor, *, K: int = 4, warps: int = 16, registers: int = 64,
    wave: int = WAVE, looks: int = MOST_LOOKS, together: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """The gradient goes to ``out``, which may be the logits; returns the log-probabilities (B, T).

    ``together``: programs run at the same time, so that one launch does; by default on a GPU.
    """
    logps = job.old.new_empty(job.old.shape)
    values, constants = arguments(job, out, logps)
    shape = tile(job, out, K, warps, registers, wave)
    parts = triton.cdiv(job.V, shape["K"] * shape["N"] * shape["W"])
    # Zeroed by one small kernel, which a graph captures like any other.
    work = torch.zeros(1 + job.rows * (parts + 1), dtype=torch.int64, device=out.device)
    together = job.logits.is_cuda if together is None else together
    with on(job.logits):
        for publish, consume in [(True, True)] if together else [(True, False), (False, True)]:
            if not publish:
                work[:1].zero_()
            counter_kernel[(job.rows * parts,)](
                *values, work, work[1:], looks, **constants, PARTS=parts, SLOTS=triton.next_power_of_2(parts + 1),
                PUBLISH=publish, CONSUME=consume, **shape,
            )  # fmt: skip
    return logps
