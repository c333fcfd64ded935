"""Device functions that multiply a row of a gradient by a number."""

from grpo_kernels.objective.language import jit, tl
from grpo_kernels.triton_backend.row import edges_at, load_edges, load_tile, split, tile_at


@jit
def scaled(x, factor):
    return tl.where(x == 0.0, 0.0, x * factor)  # a row without a gradient has none, whatever the factor


@jit
def scale_tile(out, row, start, V, factor, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr):
    at = tile_at(start, K, N, W)
    d = scaled(load_tile(row, start, V, None, None, K, N, W, MASKED, ""), factor).to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + at, d, mask=at < V)
    else:
        tl.store(out + at, d)


@jit
def scale_row(out, row, V, factor, ALIGNED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
              EDGE: tl.constexpr):  # fmt: skip
    """out = row · factor."""
    TILE: tl.constexpr = K * N * W
    REST: tl.constexpr = 1 if W > 1 else K
    body, head, length = split(row, V, ALIGNED, W, EDGE)
    dst = split(out, V, ALIGNED, W, EDGE)[0]
    whole = length // TILE * TILE
    for at in range(0, whole, TILE):
        scale_tile(dst, body, at, length, factor, K, N, W, False)
    for at in range(whole, length, REST * N * W):
        scale_tile(dst, body, at, length, factor, REST, N, W, True)
    if not ALIGNED:
        at, mask = edges_at(head, length, V, EDGE)
        tl.store(out + at, scaled(load_edges(row, at, mask, None), factor).to(out.dtype.element_ty), mask=mask)
