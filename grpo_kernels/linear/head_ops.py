"""Custom ops of the losses from hidden states; see `grpo_kernels.call.ops` for what they take.

``wanted`` says which gradients are: letters of "h", "w", "b". ``height`` is how many rows of logits there
are at a time, ``count`` how many rows are read, -1 where the host has to ask. ``gather``: of the head each row takes
the rows that its support names, see `grpo_kernels.linear.gathered`. ``fp32_logits``: whatever the head is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_kernels.call.library import fake, operator
from grpo_kernels.call.ops import backend_of, check_values, fake_rows, fake_totals, stats_shape
from grpo_kernels.linear import chunks
from grpo_kernels.linear.chunks import Rows
from grpo_kernels.linear.gathered import GatheredHead, GatheredRows
from grpo_kernels.linear.head import ChunkedHead, Gradients
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.corrections import CORRECTIONS
from grpo_kernels.objective.plan import Plan


def _head(
    hidden, weight, bias, batch: Batch, plan: Plan, count: int, height: int, gather: bool, fp32_logits: bool
) -> tuple[ChunkedHead, Rows, Batch]:
    """The head, the rows that go through it, and the batch with ids as their logits have them."""
    T = batch.ids.shape[1]
    if gather:
        rows = GatheredRows(batch, plan, count, weight.shape[0])
        head = GatheredHead(hidden, weight, bias, rows, T, height, fp32_logits)
        return head, rows, batch._replace(ids=torch.zeros_like(batch.ids))
    rows = Rows(batch, plan, count)
    return ChunkedHead(hidden, weight, bias, rows.index, T, height, fp32_logits), rows, batch


@operator()
def linear_loss_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor | None], numbers: Tensor, plan: str,
    entropy: bool, wanted: str, in_fp32: bool, height: int, count: int, gather: bool, fp32_logits: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps, entropies, loss [], sums [S], metrics [M], gradients of hidden states, weight and bias)"""
    batch, plan, run = Batch.unpack(tensors, numbers), Plan.from_key(plan), backend_of(backend)
    check_values(batch, weight.shape[0])
    head, rows, batch = _head(hidden, weight, bias, batch, plan, count, height, gather, fp32_logits)
    into = Gradients.like(hidden, weight, bias, wanted, in_fp32)
    through = chunks.row_chunks if plan.one_launch else chunks.sequence_chunks
    logps, entropies = through(run, head, rows, batch, plan, entropy, into)
    if plan.late_correction:
        batch = batch._replace(is_weight=run.correct(logps, batch, CORRECTIONS[plan.correction]))
    totals = run.totals(logps, entropies if entropy else None, batch, plan)
    return logps, entropies, *totals, into.hidden, into.weight, into.bias


def _fake_gradients(hidden, weight, bias, wanted: str, in_fp32: bool) -> tuple[Tensor, Tensor, Tensor]:
    into = Gradients.like(hidden, weight, bias, wanted, in_fp32)
    return into.hidden, into.weight, into.bias


@fake(linear_loss_op)
def _(hidden, weight, bias, tensors, numbers, plan, entropy, wanted, in_fp32, height, count, gather, fp32_logits,
      backend):  # fmt: skip
    rows = fake_rows(hidden, tensors[0], entropy)
    return *rows, *fake_totals(hidden), *_fake_gradients(hidden, weight, bias, wanted, in_fp32)


@operator()
def linear_logprobs_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor | None], numbers: Tensor, plan: str,
    entropy: bool, height: int, count: int, gather: bool, fp32_logits: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps, entropies; for `linear_slope_op`: what it needs of the rows that are read, how many, on the host)"""
    batch, plan = Batch.unpack(tensors, numbers), Plan.from_key(plan)
    check_values(batch, weight.shape[0])
    head, rows, batch = _head(hidden, weight, bias, batch, plan, count, height, gather, fp32_logits)
    stats = hidden.new_empty(stats_shape(batch.ids.numel(), backend), dtype=torch.float32)
    values = chunks.score(backend_of(backend), head, rows, batch, plan, entropy, stats)
    return *values, stats, torch.tensor(head.count, device="cpu")


@fake(linear_logprobs_op)
def _(hidden, weight, bias, tensors, numbers, plan, entropy, height, count, gather, fp32_logits, backend):
    ids = tensors[0]
    stats = hidden.new_empty(stats_shape(ids.numel(), backend), dtype=torch.float32)
    return *fake_rows(hidden, ids, entropy), stats, torch.empty((), dtype=torch.int64, device="cpu")


@operator()
def linear_slope_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor | None], numbers: Tensor,
    stats: Tensor, g: Tensor, h: Tensor | None, up: Tensor | None, plan: str, wanted: str, in_fp32: bool, height: int,
    count: Tensor, gather: bool, fp32_logits: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden states, weight and bias from ∂L/∂lp and ∂L/∂H, both times ``up``."""
    batch = Batch.unpack(tensors, numbers)
    count = int(count)  # of a CPU tensor: no device is waited for
    head, rows, batch = _head(hidden, weight, bias, batch, Plan.from_key(plan), count, height, gather, fp32_logits)
    into = Gradients.like(hidden, weight, bias, wanted, in_fp32)
    up = None if up is None else up.expand(batch.ids.shape)
    chunks.pull_back(backend_of(backend), head, rows, batch, stats, g, h, up, into)
    return into.hidden, into.weight, into.bias


@fake(linear_slope_op)
def _(hidden, weight, bias, tensors, numbers, stats, g, h, up, plan, wanted, in_fp32, height, count, gather,
      fp32_logits, backend):  # fmt: skip
    return _fake_gradients(hidden, weight, bias, wanted, in_fp32)
