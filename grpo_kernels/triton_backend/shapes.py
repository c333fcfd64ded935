"""How each kernel cuts a row of logits into tiles, and the options it is launched with.

A tile is K lines of N threads, each of which moves W neighbouring entries at once, 16 bytes where rows
allow it. The measurements are in docs/performance.md.
"""

import functools

import torch

from grpo_kernels.objective.batch import Batch

WAVE = 64 if torch.version.hip else 32
# Triton fuses multiplications and additions by default up to 3.9, and no longer from 3.10 on.
OPTIONS = {"enable_fp_fusion": True}
SCALING_WARPS = 2**15  # of programs that scale rows, where they mostly return at once: 8192 of 32 take 22 us on an H100
_KEPT = 2**18  # bytes of rows in flight on a multiprocessor: what L2 should still hold when the second pass comes


def gradient_shape(V: int, itemsize: int, vector: int, crowding: int = 1, wave: int = WAVE) -> dict[str, int]:
    """K, N, W and options of the kernels that write a gradient; a thread moves ``vector`` entries at once.

    1024 threads fill a multiprocessor, with as many programs as leave its rows in L2: one program for
    rows of 256 KB, more for shorter ones. What runs once per row costs less on fewer threads, and
    while the threads of one program meet, the others go on. Left to itself ptxas squeezes 1024
    threads into 32 registers, to fit twice as many, and spills; ``maxnreg`` grants them 64. A soft cap or a
    mask takes more of them per entry, and leaves them for ``crowding`` times fewer lines.
    """
    programs = 1 << max(1, _KEPT // (V * itemsize)).bit_length() - 1  # a power of two
    return _shape(4, max(4, 1024 // wave // programs), vector, crowding, wave)


def logprob_shape(V: int, itemsize: int, vector: int, crowding: int = 1, wave: int = WAVE) -> dict[str, int]:
    """K, N, W and options of the kernels that read a row once and write no gradient.

    No row is needed a second time, so L2 sets no limit: many small programs, which finish and start at
    different times, keep more reads in flight than one large program whose threads wait for each other.
    Measured on an H200 with 12 shapes at 8 vocabularies, see benchmarks/results/h200/shapes.csv: half a
    copy takes 0.50; this takes 0.48 to 0.49 from V = 32000 on, and 0.51 at V = 8192. Where it was not
    measured (AMD), the shape is that of the gradient.
    """
    if wave != 32:
        return gradient_shape(V, itemsize, vector, crowding, wave)
    warps = 8 if itemsize == 4 else 4 if V > 40000 else 2
    return _shape(4, warps, vector, crowding, wave)


def crowded(batch: Batch, entropy: bool) -> int:
    """1 if a call has entropies, or more numbers per row than most; 2 if it has both."""
    more = (batch.ref, batch.is_weight, batch.temperature, batch.segments)
    return int(entropy) + (sum(x is not None for x in more) > 2)


def _shape(lines: int, warps: int, vector: int, crowding: int, wave: int) -> dict[str, int]:
    lines = max(1, lines * 32 // wave // crowding)
    limit = {"maxnreg": 64} if wave == 32 else {}
    return {"K": lines if vector > 1 else 16, "N": wave * warps, "W": vector, "num_warps": warps, **limit, **OPTIONS}


def line_bytes(x: torch.Tensor) -> int:
    """Where the body of a row that starts anywhere starts: at a line of a GPU's memory.

    Measured on an H200 at V = 50257 in bf16, × copy: lines of 128 bytes take 1.213 where 16 bytes take 1.238, in place
    1.230 and 1.259, the gradient alone 1.095 and 1.133. For the interpreter it is what torch's CPU tensors are
    aligned to, so that the same call gives the same bits wherever its tensors lie.
    """
    return 64 if x.is_cpu else 128


def sequence_parts(B: int, T: int, whole: bool) -> int:
    """How many programs share a sequence; one where it is needed ``whole``. T: packed, the tokens of all sequences.

    A sequence of T tokens gives each eight blocks or more to go through. More than 512 programs hardly run at once, and
    what they have found is added up by a single one, part after part: hence 16 at most.
    """
    return 1 if whole or B == 0 else max(1, min(16, 512 // B, T // 2048))


@functools.cache
def block_shape(wave: int = WAVE, tokens: int = 256) -> dict[str, int]:
    """Options of the [B, T] kernels, which hold a token per thread and what is added up of it.

    Left to itself ptxas aims at an occupancy they do not need, and spills.
    """
    return {"num_warps": tokens // wave, **({"maxnreg": 128} if wave == 32 else {}), **OPTIONS}
