"""Logits whose vocabulary is spread over ranks: one row of each rank's statistics, as one."""

from grpo_kernels.objective.language import tl
from grpo_kernels.objective.softmax import LOG2E, LOWEST, entropy_of, fold, logp_of
from grpo_kernels.triton_backend.row_kernels import kernel

BLOCK = 256


@kernel
def unite_kernel(
    parts, temperature, segments,  # [ranks, 4·n]: n times (top, total, mean), n depths; [B, T]; [N]
    logps, entropy, stats,  # out: [n], [n], [n, 3]
    temp_b, temp_t,
    ranks, n, T, inv_temperature: tl.float32,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-probability and entropy of n tokens, and what a gradient needs of their rows.

    A row that was not read has total −1, and what stands for its depth, 0 or NaN, is its log-probability and entropy.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = row < n
    count = n.to(tl.int64)
    unread = tl.load(parts + row * 3 + 1, mask=here, other=-1.0) < 0.0
    left = tl.load(parts + 3 * count + row, mask=here, other=0.0)
    scale = tl.full([BLOCK], inv_temperature, tl.float32)
    if temperature is not None:
        seq, tok = row // T, row % T
        if segments is not None:
            seq, tok = tl.load(segments + row, mask=here, other=0).to(tl.int64), row
        own = tl.load(temperature + seq * temp_b + tok * temp_t, mask=here & (unread == 0), other=1.0)
        scale = 1.0 / own.to(tl.float32)
    scale = scale * LOG2E
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    depth = tl.full([BLOCK], float("nan"), tl.float32)
    for rank in range(0, ranks):
        part = parts + rank * (4 * count)
        at = part + row * 3
        top, total, mean, depth = fold(
            top, total, mean, depth, tl.load(at, mask=here, other=0.0), tl.load(at + 1, mask=here, other=0.0),
            tl.load(at + 2, mask=here, other=0.0), tl.load(part + 3 * count + row, mask=here, other=0.0), scale,
        )  # fmt: skip
    tl.store(logps + row, tl.where(unread, left, logp_of(depth, total)), mask=here)
    if ENTROPY:
        tl.store(entropy + row, tl.where(unread, left, entropy_of(total, mean)), mask=here)
    tl.store(stats + row * 3, top, mask=here)
    tl.store(stats + row * 3 + 1, total, mask=here)
    tl.store(stats + row * 3 + 2, mean, mask=here)
