"""The sums of a call, over the sequences and over the programs that shared them; and the metrics they make."""

from grpo_kernels.objective.language import jit, tl
from grpo_kernels.objective.metrics import SUM_NAMES, summarise
from grpo_kernels.triton_backend.row_kernels import kernel

INF = tl.constexpr(float("inf"))
_NAMES = list(SUM_NAMES)
SUMS = tl.constexpr(len(_NAMES))
COLUMNS = tl.constexpr(64)  # the next power of two
SEQUENCES = tl.constexpr(16)  # whose sums are loaded at a time
# Columns of the table of sums; of those that are a minimum or a maximum, a bit each.
LOW, HIGH, CLIPS = (tl.constexpr(_NAMES.index(f"clip_ratio/{name}")) for name in ("low", "high", "count"))
LOW_MIN, HIGH_MAX = (tl.constexpr(_NAMES.index(f"clip_ratio/{name}")) for name in ("low_min", "high_max"))
MINIMA, MAXIMA = (
    tl.constexpr(sum(1 << k for k, name in enumerate(_NAMES) if SUM_NAMES[name] == how)) for how in ("min", "max")
)


@jit
def entry(values, column, k: tl.constexpr):
    return tl.sum(tl.where(column == k, values, 0.0), axis=0)


@kernel
def total_kernel(partial, sums, loss, metrics, B, parts):
    """One program: the sums over sequences [SUMS] fp64, the loss [] and the metrics, fp32.

    ``partial`` [B·parts, SUMS] is added up by rows; of the sequences' clipped shares there is a minimum and a maximum.
    """
    column = tl.arange(0, COLUMNS).to(tl.int64)  # by which bits are shifted
    is_min = ((MINIMA >> column) & 1) != 0
    is_max = ((MAXIMA >> column) & 1) != 0
    nothing = tl.where(is_min, INF, tl.where(is_max, -INF, 0.0)).to(tl.float64)
    table = tl.zeros([SEQUENCES, COLUMNS], tl.float64) + nothing[None, :]
    low_min = tl.full([SEQUENCES], INF, tl.float64)
    high_max = tl.full([SEQUENCES], -INF, tl.float64)
    for start in range(0, B, SEQUENCES):
        seq = start + tl.arange(0, SEQUENCES).to(tl.int64)
        here = seq < B
        low = tl.zeros([SEQUENCES], tl.float64)
        high = tl.zeros([SEQUENCES], tl.float64)
        clips = tl.zeros([SEQUENCES], tl.float64)
        for part in range(0, parts):
            row = partial + (seq * parts + part) * SUMS
            x = tl.load(row[:, None] + column[None, :], mask=here[:, None] & (column < SUMS)[None, :], other=0.0)
            x = tl.where(here[:, None], x, nothing[None, :])
            best = tl.where(is_min[None, :], tl.minimum(table, x), tl.maximum(table, x))
            table = tl.where((is_min | is_max)[None, :], best, table + x)
            low += tl.load(row + LOW, mask=here, other=0.0)
            high += tl.load(row + HIGH, mask=here, other=0.0)
            clips += tl.load(row + CLIPS, mask=here, other=0.0)
        some = clips > 0.0
        clips = tl.where(some, clips, 1.0)
        low_min = tl.minimum(low_min, tl.where(some, low / clips, INF))
        high_max = tl.maximum(high_max, tl.where(some, high / clips, -INF))
    total = tl.sum(tl.where((is_min | is_max)[None, :], 0.0, table), axis=0)
    values = tl.where(is_min, tl.min(table, axis=0), tl.where(is_max, tl.max(table, axis=0), total))
    values = tl.where(column == LOW_MIN, tl.min(low_min, axis=0), values)
    values = tl.where(column == HIGH_MAX, tl.max(high_max, axis=0), values)
    tl.store(sums + column, values, mask=column < SUMS)
    tl.store(loss, entry(values, column, 0).to(tl.float32))
    every = ()
    for k in tl.static_range(1, SUMS):
        every = every + (entry(values, column, k),)  # noqa: RUF005  Triton knows no (*every, x)
    found = summarise(*every)
    for k in tl.static_range(len(found)):
        tl.store(metrics + k, found[k].to(tl.float32))
