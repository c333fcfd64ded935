"""Several targets per row, from hidden states: chunk by chunk, the ops, and their gradient.

`grpo_kernels.call.targets` says what a chunk does, `grpo_kernels.linear.chunks` how rows are left out.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grpo_kernels.call import ops
from grpo_kernels.call.autograd import given_slopes, refuse_double_backward
from grpo_kernels.call.library import fake, operator
from grpo_kernels.call.targets import checked_entries, score
from grpo_kernels.linear.chunks import Rows, finish
from grpo_kernels.linear.head import ChunkedHead, Gradients
from grpo_kernels.linear.head_autograd import ChunkOptions, given, wanted_by
from grpo_kernels.objective import targets as maths
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.targets import Entries


class _Read:
    """The targets of the rows that are read, of which there is one at least.

    Attributes:
        entries: their rows count among the rows read.
        bounds: where among them those of each chunk begin, and the last end.

    Args:
        bounds: as found before; None: of lists the host asks the device for them.
    """

    def __init__(self, entries: Entries, lists: bool, rows: Rows, head: ChunkedHead, bounds: list[int] | None = None):
        N, count, height = rows.batch.ids.numel(), head.count, head.buffer.shape[0]
        self.K = None if lists else entries.ids.shape[0] // N
        self.N, self.index = N, rows.index
        starts = range(0, count + height, height)
        if self.K is not None:
            self.bounds = [min(start, count) * self.K for start in starts]
            of_rows = torch.arange(self.bounds[-1], device=entries.ids.device) // max(self.K, 1)
            self.entries = Entries(self.pick(entries.ids), of_rows, self.pick(entries.there))
        else:
            of_rows = entries.rows if self.index is None else torch.searchsorted(self.index, entries.rows)
            if bounds is None:
                steps = torch.arange(len(starts), device=of_rows.device) * height
                bounds = torch.searchsorted(of_rows, steps.clamp(max=count)).tolist()
            self.bounds = bounds
            self.entries = entries._replace(rows=of_rows.clamp(max=count - 1))

    def pick(self, x: Tensor) -> Tensor:
        """Of something (M,) what belongs to rows that are read; of lists all, absent in the others."""
        if self.K is None or self.index is None:
            return x
        return x.view(self.N, self.K).index_select(0, self.index).view(-1)

    def spread_out(self, x: Tensor) -> Tensor:
        """Undoes `pick`: (M,), 0 where a row was not read."""
        if self.K is None or self.index is None:
            return x
        full = x.new_zeros(self.N, self.K)
        return full.index_copy_(0, self.index, x.view(self.index.numel(), self.K)).view(-1)


def _batches(head: ChunkedHead, batch: Batch, rows: Rows, anchors: Tensor) -> Iterator[tuple[int, int, Batch]]:
    """Of each chunk the bounds of its rows, and its batch; ids: the chunk's part of ``anchors`` (n,)."""
    temperature, height = rows.per_token(batch.temperature), head.buffer.shape[0]
    for start in range(0, head.count, height):
        end = min(start + height, head.count)
        heat = None if temperature is None else temperature[None, start:end]
        yield start, end, batch.with_only(ids=anchors[None, start:end], temperature=heat)


@operator()
def linear_targets_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor | None], numbers: Tensor,
    ids: Tensor, offsets: Tensor | None, plan: str, entropy: bool, height: int, count: int, fp32_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps (M,), entropies (B, T); for `linear_targets_slope_op` of the rows that are read what it needs, their
    anchors and the anchors' log-probabilities; on the host how many they are, and then `_Read.bounds`)"""
    batch, plan, run = Batch.unpack(tensors, numbers), Plan.from_key(plan), ops.backend_of(backend)
    N = batch.ids.numel()
    logps = hidden.new_zeros(ids.shape, dtype=torch.float32)
    anchors, anchor_logps = logps.new_empty(N, dtype=torch.int64), logps.new_empty(N)
    stats, entropies = logps.new_empty(ops.stats_shape(N, backend)), logps.new_empty(N if entropy else 0)
    entries = checked_entries(ids, offsets, batch, weight.shape[0]) if N else None
    rows = Rows(batch, plan, count)
    head = ChunkedHead(hidden, weight, bias, rows.index, batch.ids.shape[1], height, fp32_logits)
    entropies, known = entropies[: head.count], torch.zeros(N // height + 3, dtype=torch.int64, device="cpu")
    known[0] = head.count
    if head.count:
        read = _Read(entries, offsets is not None, rows, head)
        known[1 : 1 + len(read.bounds)] = torch.tensor(read.bounds, device="cpu")
        found = read.pick(logps)
        for k, (start, end, part) in enumerate(_batches(head, batch, rows, anchors)):
            first, last = read.bounds[k : k + 2]
            z = head.logits(head.rows(start, end))[None]
            lp, H, stat, at, anchor_lp = score(run, z, part, plan, entropy, read.entries.cut(first, last, start))
            found[first:last], stats[start:end] = lp, stat
            anchors[start:end], anchor_logps[start:end] = at[0], anchor_lp[0]
            if entropy:
                entropies[start:end] = H[0]
        logps = read.spread_out(found)
    entropies = rows.spread_out(entropies) if entropy else entropies
    return logps, entropies, stats, anchors, anchor_logps, known


@fake(linear_targets_op)
def _(hidden, weight, bias, tensors, numbers, ids, offsets, plan, entropy, height, count, fp32_logits, backend):
    N = tensors[0].numel()
    logps, entropies = ops.fake_rows(hidden, tensors[0], entropy)
    stats = logps.new_empty(ops.stats_shape(N, backend))
    anchors = logps.new_empty(N, dtype=torch.int64)
    known = torch.empty(N // height + 3, dtype=torch.int64, device="cpu")
    return logps.new_empty(ids.shape), entropies, stats, anchors, logps.new_empty(N), known


@operator()
def linear_targets_slope_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor | None], numbers: Tensor,
    stats: Tensor, ids: Tensor, offsets: Tensor | None, logps: Tensor, entropies: Tensor, anchors: Tensor,
    anchor_logps: Tensor, g: Tensor, h: Tensor | None, plan: str, wanted: str, in_fp32: bool, height: int,
    known: Tensor, fp32_logits: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden states, weight and bias from ∂L/∂lp (M,) and ∂L/∂H (B, T)."""
    n, *bounds = known.tolist()  # of a CPU tensor: no device is waited for
    batch, run, V = Batch.unpack(tensors, numbers), ops.backend_of(backend), weight.shape[0]
    rows = Rows(batch, Plan.from_key(plan), n)
    into = Gradients.like(hidden, weight, bias, wanted, in_fp32)
    head = ChunkedHead(hidden, weight, bias, rows.index, batch.ids.shape[1], height, fp32_logits)
    if n:
        entries = Entries.of(ids, offsets, batch.mask, batch.ids.numel())
        read = _Read(entries, offsets is not None, rows, head, bounds)
        heat = rows.per_token(batch.temperature)
        h, H = rows.per_token(h), None if h is None else rows.per_token(entropies)
        of_rows, written = maths.gradient(
            read.entries, read.pick(g), read.pick(logps), anchors[:n], anchor_logps[:n], h, H,
            batch.one_temperature if heat is None else heat.float(), V,
        )  # fmt: skip
        for k, (start, end, part) in enumerate(_batches(head, batch, rows, anchors)):
            first, last = read.bounds[k : k + 2]
            x = head.rows(start, end)
            z = head.logits(x)
            dz, at = head.gradient_of(z), read.entries.rows[first:last] - start
            if batch.cap is not None:  # before the gradient takes the place of the logits
                written.cap(z, at, batch.cap, first, last)
            slope_h = None if h is None else h[None, start:end]
            run.slope(z[None], dz[None], part, stats[start:end], of_rows[None, start:end], slope_h, None)
            written.over(dz, (at,), first, last)
            head.add(into, start, end, x, dz, start == 0)
    finish(head, into)
    return into.hidden, into.weight, into.bias


@fake(linear_targets_slope_op)
def _(hidden, weight, bias, tensors, numbers, stats, ids, offsets, logps, entropies, anchors, anchor_logps, g, h, plan,
      wanted, in_fp32, height, known, fp32_logits, backend):  # fmt: skip
    into = Gradients.like(hidden, weight, bias, wanted, in_fp32)
    return into.hidden, into.weight, into.bias


class LinearTargetsFunction(torch.autograd.Function):
    """Log-probabilities (M,) and entropies, both differentiable."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, tensors, numbers, plan, ids, offsets, entropy, options: ChunkOptions):
        logps, entropies, *rest = linear_targets_op(
            hidden, weight, bias, tensors, numbers, ids, offsets, plan, entropy, options.height, options.count,
            options.fp32_logits, options.backend,
        )  # fmt: skip
        ctx.wanted, ctx.plan, ctx.options, ctx.entropy = wanted_by(ctx), plan, options, entropy
        ctx.save_for_backward(hidden, weight, bias, numbers, ids, offsets, logps, entropies, *rest, *tensors)
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, g, h):
        refuse_double_backward()
        (hidden, weight, bias, numbers, ids, offsets, logps, entropies, stats, anchors, anchor_logps, known,
         *tensors) = ctx.saved_tensors  # fmt: skip
        g, h = given_slopes(g, h if ctx.entropy else None, ids)
        gradients = linear_targets_slope_op(
            hidden, weight, bias, tensors, numbers, stats, ids, offsets, logps, entropies, anchors, anchor_logps, g, h,
            ctx.plan, ctx.wanted, ctx.options.in_fp32, ctx.options.height, known, ctx.options.fp32_logits,
            ctx.options.backend,
        )  # fmt: skip
        dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        return *given([x.to(dtype) for x, dtype in zip(gradients, dtypes)], ctx.wanted), *(None,) * 7
