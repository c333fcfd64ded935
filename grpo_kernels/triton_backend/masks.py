"""Rows of logits that are restricted by a mask: ``only`` is (mask of the row, where it ends, token), or None.

The token's own entry always counts. A mask without an entry does not restrict its row: it then ends at 0.
"""

from grpo_kernels.objective.language import jit, tl


@jit
def restriction(keep, known, at, token, V, N: tl.constexpr):
    """``only`` of a row; ``keep`` [V] is not 0 for entries that count.

    Whether there are any stands ``at`` in ``known``; None: ``keep`` is read up to the first of them.
    """
    if known is not None:
        found = (tl.load(known + at) != 0).to(tl.int32)
    else:
        found = any_of(keep, V, N)
    return keep, tl.where(found != 0, V, 0), token


@jit
def any_of(keep, V, N: tl.constexpr):
    BLOCK: tl.constexpr = 16 * N
    start = 0
    found = 0
    while (start < V) & (found == 0):
        at = start + tl.arange(0, BLOCK)
        found = tl.max(tl.load(keep + at, mask=at < V, other=0).to(tl.int32), axis=0)
        start += BLOCK
    return found


@jit
def moved(only, by):
    """``only`` of what starts ``by`` entries after the row does."""
    return only[0] + by, only[1] - by, only[2] - by


@jit
def within(x, at, only):
    """Entries x that lie ``at``; −inf in place of those that do not count."""
    if only is not None:
        kept = tl.load(only[0] + at, mask=at < only[1], other=1)
        return tl.where((kept != 0) | (at == only[2]), x, float("-inf"))
    else:
        return x
