"""Several targets per row: from the argument to ops, and their gradient."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.call import checks, ops
from grpo_kernels.call.autograd import given_slopes, refuse_double_backward
from grpo_kernels.call.library import fake, operator
from grpo_kernels.objective import targets as maths
from grpo_kernels.objective.batch import Batch, exchange
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.targets import Entries, Targets


class Flat(NamedTuple):
    """Targets one behind the other, and the shape that their log-probabilities take."""

    ids: Tensor  # (M,)
    offsets: Tensor | None  # (N+1,); None: as many in each row
    shape: torch.Size


def split_targets(
    completion_ids: Tensor | Targets, scored: Tensor, support: object, vocab_group: object = None,
    of_tokens: Sequence[object] = (),
) -> tuple[Tensor, Flat | None]:  # fmt: skip
    """(ids (B, T) or (N,), None); or of several targets per row something of that shape, and the targets.

    ``scored``: the logits, or the hidden states that they are made of, whose dimensions tell (B, T) from (N, K).
    ``of_tokens``: what may be (B, T), which tells T of lists where there is no sequence.

    Raises:
        ValueError: several targets, with ``support`` or ``vocab_group``; `Targets` of a wrong number of rows.
    """
    dim = scored.dim() if isinstance(scored, Tensor) else 0
    if isinstance(completion_ids, Targets):
        shape = (len(completion_ids),)
        if dim == 3:
            shape = _padded_shape(len(completion_ids), scored, of_tokens)
        ids, offsets = completion_ids.token_ids, completion_ids.offsets
        tokens, flat = offsets[1:].reshape(shape), Flat(ids, offsets, ids.shape)
    elif _is_several(completion_ids, scored):
        ids = completion_ids
        tokens = ids[..., 0] if ids.shape[-1] else ids.new_zeros(ids.shape[:-1])
        flat = Flat(ids.reshape(-1), None, ids.shape)
    else:
        return completion_ids, None
    if support is not None:
        raise ValueError(
            "support is not supported with several targets per row. Set the logits outside of the support to -inf and "
            "call token_logprobs without it, or call once per target, with ids (B, T)."
        )
    if vocab_group is not None:
        raise ValueError(
            "several targets per row are not supported with vocab_group. Call once per target, with ids (B, T): each "
            "call reads the logits once."
        )
    return tokens, flat


def _is_several(ids: object, scored: object) -> bool:
    """Whether ids are (B, T, K), or (N, K). Shapes that fit nothing go to the checks of ids (B, T) and (N,)."""
    if not (isinstance(ids, Tensor) and isinstance(scored, Tensor)) or ids.dim() not in (2, 3):
        return False
    checks.check_tensor("completion_ids", ids)
    if ids.dim() == 2:
        return scored.dim() == 2 and ids.shape[0] == scored.shape[0]
    B, T = ids.shape[:2]
    if scored.dim() != 3 or tuple(scored.shape[:2]) not in ((B, T), (B, T + 1)):
        raise ValueError(
            "completion_ids must be (B, T), or packed (N,), or of several targets per row (B, T, K), packed (N, K); "
            f"got {tuple(ids.shape)} for {tuple(scored.shape)}. [b, t, k] is scored by what stands in [b, t]."
        )
    return True


def _padded_shape(N: int, scored: Tensor, of_tokens: Sequence[object]) -> tuple[int, int]:
    B, rows = scored.shape[:2]
    told = [x.shape[1] for x in of_tokens if isinstance(x, Tensor) and tuple(x.shape) in ((B, rows), (B, rows - 1))]
    T = N // B if B else [*told, rows][0]
    if B * T != N or T not in (rows, rows - 1):
        raise ValueError(
            f"Targets must have a row per token, B·T = {B * rows}, or {B * (rows - 1)} without the last position of "
            f"each sequence, got {N}. Tokens without a target, padding too, have empty rows."
        )
    return B, T


def check_values(entries: Entries, V: int) -> None:
    """Ids inside the vocabulary, in all rows that count."""
    wrong = entries.there & (entries.ids >= V)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise IndexError(
            f"row {int(entries.rows[at])} of completion_ids has the target {int(entries.ids[at])}, which is outside "
            f"the vocabulary of {V}. A negative id is absent; mask the position, or check that the tokenizer belongs "
            "to the model."
        )


def checked_entries(ids: Tensor, offsets: Tensor | None, batch: Batch, V: int) -> Entries:
    """The targets of a batch; with values checked, where they are."""
    validates = checks.validates(ids.device)
    if validates:
        checks.check_mask_values(batch.mask)
    entries = Entries.of(ids, offsets, batch.mask, batch.ids.numel())
    if validates:
        check_values(entries, V)
    return entries


def score(
    run: ModuleType, logits: Tensor, batch: Batch, plan: Plan, entropy: bool, entries: Entries
) -> tuple[Tensor, ...]:
    """(log-probabilities (M,); entropies; what the slope needs of each row; the anchors and their logps (B, T))"""
    n, T = batch.ids.shape
    x = maths.gathered(logits, T, entries, batch.cap)
    ids, top = maths.anchors(x, entries, n * T, logits.shape[2])
    batch = batch._replace(ids=ids.view(n, T))
    anchor_logps, entropies, stats = run.logprobs(logits, batch, plan, entropy)
    logps = maths.logprobs_from(x, top, anchor_logps.view(-1), maths.temperatures(batch), entries)
    return logps, entropies, stats, batch.ids, anchor_logps


@operator()
def targets_op(
    logits: Tensor, tensors: Sequence[Tensor | None], numbers: Tensor, ids: Tensor, offsets: Tensor | None, plan: str,
    entropy: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`score` of ids (M,); those of the batch say the shape alone."""
    batch, plan, run = Batch.unpack(tensors, numbers), Plan.from_key(plan), ops.backend_of(backend)
    if batch.ids.numel() == 0:
        logps, entropies, stats = run.logprobs(logits, batch, plan, entropy)
        return logps.new_zeros(ids.shape), entropies, stats, batch.ids.long().clone(), logps
    return score(run, logits, batch, plan, entropy, checked_entries(ids, offsets, batch, logits.shape[-1]))


@fake(targets_op)
def _(logits, tensors, numbers, ids, offsets, plan, entropy, backend):
    tokens = tensors[0]
    logps, entropies = ops.fake_rows(logits, tokens, entropy)
    stats = logps.new_empty(ops.stats_shape(tokens.numel(), backend))
    anchors = tokens.new_empty(tokens.shape, dtype=torch.int64)
    return logits.new_empty(ids.shape, dtype=torch.float32), entropies, stats, anchors, logps


@operator()
def targets_slope_op(
    logits: Tensor, tensors: Sequence[Tensor | None], numbers: Tensor, stats: Tensor, ids: Tensor,
    offsets: Tensor | None, logps: Tensor, anchor_logps: Tensor, entropies: Tensor, g: Tensor, h: Tensor | None,
    backend: str,
) -> Tensor:  # fmt: skip
    """Gradient of the logits from ∂L/∂lp (M,) and ∂L/∂H (B, T); ids of the batch: the anchors."""
    out = logits.new_empty(logits.shape)
    if out.numel() == 0:
        return out
    batch = Batch.unpack(tensors, numbers)
    T, V = batch.ids.shape[1], logits.shape[2]
    if batch.ids.numel() == 0:
        return out.zero_()
    entries = Entries.of(ids, offsets, batch.mask, batch.ids.numel())
    h_rows, H_rows = (None, None) if h is None else (h.view(-1), entropies.view(-1))
    of_rows, written = maths.gradient(
        entries, g, logps, batch.ids.view(-1), anchor_logps.view(-1), h_rows, H_rows, maths.temperatures(batch), V
    )
    ops.backend_of(backend).slope(logits, out, batch, stats, of_rows.view(batch.ids.shape), h, None)
    written.over(out, (entries.rows // T, entries.rows % T))
    return out


@fake(targets_slope_op)
def _(logits, *args):
    return logits.new_empty(logits.shape)


class TargetLogprobsFunction(torch.autograd.Function):
    """Log-probabilities (M,) and entropies, both differentiable."""

    @staticmethod
    def forward(ctx, logits, tensors, numbers, plan, ids, offsets, entropy, backend):
        logps, entropies, stats, anchors, anchor_logps = targets_op(
            logits, tensors, numbers, ids, offsets, plan, entropy, backend
        )
        ctx.backend, ctx.entropy = backend, entropy
        tensors = exchange(tensors, ids=anchors)
        ctx.save_for_backward(logits, numbers, stats, ids, offsets, logps, anchor_logps, entropies, *tensors)
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, g, h):
        refuse_double_backward()
        logits, numbers, stats, ids, offsets, logps, anchor_logps, entropies, *tensors = ctx.saved_tensors
        g, h = given_slopes(g, h if ctx.entropy else None, ids)
        grad = targets_slope_op(
            logits, tensors, numbers, stats, ids, offsets, logps, anchor_logps, entropies, g, h, ctx.backend
        )
        return grad, *(None,) * 7
