"""Distillation: a student's distribution p is pulled towards a teacher's, q, at every token (arXiv:2306.13649).

    β = 0      KL(q ‖ p) = Σ q·(log q − log p)                      forward: covers all that the teacher says
    β = 1      KL(p ‖ q) = Σ p·(log p − log q)                      reverse: stays where the teacher is
    between    β·KL(q ‖ m) + (1−β)·KL(p ‖ m), m = (1−β)·p + β·q     generalised Jensen-Shannon divergence

The reverse one is MiniLLM's (arXiv:2306.08543).

Sums are over *outcomes*. Of a whole teacher the outcomes are the vocabulary. Of one that tells its K likeliest
tokens they are those K, and perhaps the rest as one more: see `outcomes_of`.

0·(anything) is 0: an outcome without probability on the weighing side adds nothing. With β = 1 an outcome that
only the student has makes the divergence infinite, and its gradient NaN. Autograd makes the other gradients. It sees
no value that is not a number: those of masked tokens and of absent outcomes are replaced before any arithmetic.
Computed in float32, or in float64 if the student's logits are float64.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from reference.packed import layout_of
from reference.tensors import as_mask, choose, clip, compute_dtype, masked_mean, per_token
from reference.weights import NEED_LENGTH, WEIGHTS, Sizes

TAIL_CLAMP = -1e-7  # log of the largest share that K tokens may have together, where the rest is an outcome


class TopK(NamedTuple):
    """A teacher's likeliest tokens: ids (B, T, K) and their log-probabilities, at the student's temperature.

    An id below 0, or a log-probability of −∞, is no token. Packed: (N, K).
    """

    token_ids: Tensor
    logps: Tensor


@dataclasses.dataclass(frozen=True)
class DistillationOutput:
    """All but `loss` is detached; (B, T) tensors are 0 where masked, (N,) if packed."""

    loss: Tensor  # 0-d; (B, T) with reduction="none"
    divergence: Tensor  # (B, T), in nats
    entropy: Tensor  # (B, T) of the student; where only K tokens are looked at, among these
    teacher_entropy: Tensor  # (B, T) of the teacher's outcomes
    weights: Tensor  # (B, T) w, loss_scale included
    metrics: dict[str, Tensor]  # 0-d each


def distillation_loss(
    logits: Tensor,
    teacher: Tensor | TopK,
    *,
    beta: float = 1.0,
    temperature: float | Tensor = 1.0,
    tail: bool | None = True,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss_agg_mode: str = "global-tokens",
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: float | None = None,
    global_batch_size: float | None = None,
    loss_scale: float | Tensor = 1.0,
    reduction: str = "mean",
) -> DistillationOutput:
    """loss = Σ w·D(teacher, student), the gradient to the student alone, without a factor temperature².

    Args:
        logits: (B, T, V), the student's, or (B, T+1, V) whose last position is ignored; (N, V) if packed.
        teacher: logits likewise, or `TopK`.
        beta: from 0 to 1, see above.
        temperature: divides the logits of both; a number, (B,) or (B, T).
        tail: of a `TopK`: True: all other tokens are one more outcome; False: both models' distributions are
            renormalised over the K; None: the K as they are.
        completion_mask, cu_seqlens, num_items_in_batch, max_completion_length, global_batch_size, loss_scale,
            reduction: as in `reference.grpo`. The sum behind loss_agg_mode is one of `reference.weights`.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose 'mean' or 'none'")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must lie between 0 and 1")
    layout = None if cu_seqlens is None else layout_of(cu_seqlens, logits.shape[0])
    if layout is not None:
        if loss_agg_mode in NEED_LENGTH and max_completion_length is None:
            raise ValueError(f"loss_agg_mode={loss_agg_mode!r} on packed input needs max_completion_length")
        completion_mask = layout.used & layout.pad(as_mask(completion_mask, logits[:, 0]))
        logits = layout.pad(logits)
        teacher = TopK(*map(layout.pad, teacher)) if isinstance(teacher, TopK) else layout.pad(teacher)
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = layout.pad_either(temperature)
    told = teacher.token_ids if isinstance(teacher, TopK) else teacher
    mask = as_mask(completion_mask, logits[:, : told.shape[1], 0])
    dtype = compute_dtype(logits)
    T = mask.shape[1]
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = per_token(temperature, mask, dtype, fill=1.0)[..., None]

    x = torch.where(mask[..., None], logits[:, :T].to(dtype), 0) / temperature
    outcomes = outcomes_of(x, teacher, temperature, tail, mask)
    D = divergence(outcomes.log_p, outcomes.log_q, beta)
    D = torch.where(outcomes.some & mask, D, 0)

    m = mask.to(dtype)
    sizes = Sizes(
        tokens=m.sum() if num_items_in_batch is None else m.new_tensor(float(num_items_in_batch)),
        sequences=m.new_tensor(float(mask.any(1).sum() if global_batch_size is None else global_batch_size)),
        length=max(float(T if max_completion_length is None else max_completion_length), 1.0),
    )
    weights = loss_scale * choose(WEIGHTS, loss_agg_mode, "loss_agg_mode")(m, sizes)
    loss = torch.where(weights == 0, 0, weights * D).sum() if reduction == "mean" else D

    with torch.no_grad():
        over_all = torch.log_softmax(x, -1) if outcomes.whole_student else outcomes.log_p
        H = torch.where(mask & outcomes.some | mask & outcomes.whole_student, entropy(over_all), 0)
        H_teacher = torch.where(mask & outcomes.some, entropy(outcomes.log_q), 0)
        values = {"divergence": D.detach(), "entropy": H, "teacher_entropy": H_teacher}
        metrics = {name: masked_mean(value, mask) for name, value in values.items()}
        if layout is not None:
            values, weights = {name: layout.unpad(value) for name, value in values.items()}, layout.unpad(weights)
    if layout is not None and reduction == "none":
        loss = layout.unpad(loss)
    return DistillationOutput(loss=loss, weights=weights, metrics=metrics, **values)


class Outcomes(NamedTuple):
    log_p: Tensor  # (B, T, O), with the student's gradient; −∞ where both are: no outcome
    log_q: Tensor  # (B, T, O)
    some: Tensor  # (B, T) or (): there is one
    whole_student: bool  # the student's whole vocabulary enters


def outcomes_of(x: Tensor, teacher: Tensor | TopK, temperature: float | Tensor, tail: bool | None, mask: Tensor):
    """What both models are compared on; x (B, T, V) is the student's logits, tempered."""
    T = mask.shape[1]
    if not isinstance(teacher, TopK):
        z = torch.where(mask[..., None], teacher[:, :T].detach().to(x.dtype), 0) / temperature
        log_q = torch.log_softmax(z, -1)
        return Outcomes(torch.log_softmax(x, -1), log_q, torch.ones_like(mask), True)

    ids, log_q = (y[:, :T] for y in teacher)
    present = mask[..., None] & (ids >= 0) & (log_q != -torch.inf)  # (B, T, K)
    some = present.any(-1)
    log_q = torch.where(present, log_q.detach().to(x.dtype), -torch.inf)
    ids = torch.where(present, ids, 0).long()
    if tail is False:  # rows without a token are NaN here; neither their value nor their gradient goes on
        at = torch.where(present, x.gather(-1, ids), -torch.inf)
        return Outcomes(torch.log_softmax(at, -1), torch.log_softmax(log_q, -1), some, False)
    log_p = torch.where(present, torch.log_softmax(x, -1).gather(-1, ids), -torch.inf)
    if tail:
        log_p, log_q = (torch.cat([y, rest(y)], -1) for y in (log_p, log_q))
    return Outcomes(log_p, log_q, some, True)


def rest(logps: Tensor) -> Tensor:
    """(B, T, 1): log of what the K tokens leave to all others."""
    together = logps.logsumexp(-1, keepdim=True)
    return torch.log(-torch.expm1(clip(together, -torch.inf, TAIL_CLAMP)))


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """(B, T) of (B, T, O): the three formulas above."""
    if beta == 0:
        return weighed(log_q, log_q, log_p).sum(-1)
    if beta == 1:
        D = weighed(log_p, log_p, log_q).sum(-1)
        return torch.where(D == torch.inf, InfinitelyFar.apply(log_p), D)
    nobody = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_m = torch.logaddexp(
        log_p.masked_fill(nobody, 0.0) + math.log1p(-beta), log_q.masked_fill(nobody, 0.0) + math.log(beta)
    )
    return (beta * weighed(log_q, log_q, log_m) + (1 - beta) * weighed(log_p, log_p, log_m)).sum(-1)


def weighed(log_weight: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """weight·(log a − log b), 0 where the weight is."""
    zero = log_weight.exp() == 0
    log_weight, log_a, log_b = (y.masked_fill(zero, 0.0) for y in (log_weight, log_a, log_b))
    return torch.where(zero, 0, log_weight.exp() * (log_a - log_b))


def entropy(logps: Tensor) -> Tensor:
    """−Σ p·log p over the last dimension."""
    return -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0.0)).sum(-1)


class InfinitelyFar(torch.autograd.Function):
    """+∞ for each row, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, log_p):
        ctx.shape = log_p.shape
        return log_p.new_full(log_p.shape[:-1], torch.inf)

    @staticmethod
    def backward(ctx, up):
        return torch.where(up[..., None] == 0, 0.0, torch.nan).expand(ctx.shape)
