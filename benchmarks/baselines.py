"""Who is measured. All get the same logits and give the same loss, gradient or log-probs.

Here: grpo_kernels, and what anyone could write with PyTorch alone. `baselines_peers` has the others.
To add one, write its functions and an `Implementation` in `baselines_peers.implementations`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import EPSILON, Case, Inputs
from grpo_kernels import fused_grpo_loss, token_logprobs


class Outcome(NamedTuple):
    """What a call computed: loss and gradient (of logits, or of hidden states and head), or log-probs."""

    loss: Tensor | None = None  # 0-d
    grad: Tensor | None = None  # (B, T+1, V), in the logits' dtype
    logps: Tensor | None = None  # (B, T)
    entropies: Tensor | None = None  # (B, T)
    grads: tuple[Tensor, Tensor] | None = None  # (B, T, H) and (V, H), in their dtype


Call = Callable[[Inputs, Tensor], Outcome]  # (inputs, the logits to work on) → outcome


@dataclass(frozen=True)
class Implementation:
    """A way to compute the loss.

    Attributes:
        calls: mode → function. The logits it is given are `inputs.logits`, or in mode "inplace" a
            copy of them that it may overwrite; in "linear" there are none, but hidden states and weight
            in `inputs`. A mode that is not there has no row.
        missing: (case, device) → why it cannot run that there, or None.
        missing_linear: the same of mode "linear".
        objectives: those that it has; cases of others have no row of it.
        compiles: modes that go through torch.compile, which takes longer than measuring.
    """

    name: str
    calls: Mapping[str, Call]
    missing: Callable[[Case, torch.device], str | None] = lambda case, device: None
    missing_linear: Callable[[Case, torch.device], str | None] = lambda case, device: None
    objectives: tuple[str, ...] = ("token", "sequence")
    compiles: tuple[str, ...] = ()


# --- grpo_kernels -------------------------------------------------------------------------------------


def ours(inputs: Inputs, logits: Tensor) -> Outcome:
    x = logits.detach().requires_grad_()
    loss = _our_loss(inputs, x, inplace=False)
    return Outcome(loss.detach(), torch.autograd.grad(loss, x)[0])


def ours_inplace(inputs: Inputs, logits: Tensor) -> Outcome:
    x = ModelOutput.apply(torch.zeros((), requires_grad=True), logits)
    loss = _our_loss(inputs, x, inplace=True)
    return Outcome(loss.detach(), torch.autograd.grad(loss, x)[0])


def _our_loss(inputs: Inputs, x: Tensor, inplace: bool) -> Tensor:
    return fused_grpo_loss(
        x,
        inputs.completion_ids,
        **inputs.objective(),
        inplace=inplace,
        skip_zero_advantage=inputs.case.zero_advantage > 0,
    ).loss


def our_logprobs(inputs: Inputs, logits: Tensor) -> Outcome:
    with torch.no_grad():
        return Outcome(logps=token_logprobs(logits, inputs.completion_ids, mask=inputs.mask).logps)


def our_entropies(inputs: Inputs, logits: Tensor) -> Outcome:
    with torch.no_grad():
        logps, entropies = token_logprobs(logits, inputs.completion_ids, mask=inputs.mask, return_entropy=True)
        return Outcome(logps=logps, entropies=entropies)


class ModelOutput(torch.autograd.Function):
    """Hands out a buffer as a model hands out logits: not a leaf, so that it may be overwritten."""

    @staticmethod
    def forward(ctx, parameter: Tensor, buffer: Tensor) -> Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        raise AssertionError("the gradient is taken at the output")


# --- Eager PyTorch --------------------------------------------------------------------------------------


def eager(inputs: Inputs, logits: Tensor) -> Outcome:
    x = logits.detach().requires_grad_()
    loss = loss_of_logps(inputs, logps_of_logits(x, inputs.completion_ids))
    return Outcome(loss.detach(), torch.autograd.grad(loss, x)[0])


def eager_logprobs(inputs: Inputs, logits: Tensor) -> Outcome:
    with torch.no_grad():
        return Outcome(logps=logps_of_logits(logits, inputs.completion_ids))


def eager_entropies(inputs: Inputs, logits: Tensor) -> Outcome:
    with torch.no_grad():
        log_p = torch.log_softmax(logits.float(), dim=-1)[:, :-1]
        logps = log_p.gather(-1, inputs.completion_ids[..., None])[..., 0]
        return Outcome(logps=logps, entropies=-(log_p.exp() * log_p).sum(-1))


def logps_of_logits(x: Tensor, ids: Tensor) -> Tensor:
    """Over all T+1 positions: slicing the last one off first would cost the backward one more copy."""
    ids = torch.nn.functional.pad(ids, (0, 1))
    return logps_of_ids(x, ids)[:, :-1]


def logps_of_ids(x: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(x.float(), dim=-1).gather(-1, ids[..., None])[..., 0]


def loss_of_logps(inputs: Inputs, lp: Tensor) -> Tensor:
    """The objective, (B, T) → 0-d, differentiable: what a trainer's own code does after the log-probs."""
    mask = inputs.mask != 0
    if inputs.case.objective == "cross-entropy":
        return -torch.where(mask, lp, 0.0).sum()
    tokens = mask.sum(1).clamp(min=1)
    A = inputs.advantages[:, None]
    log_ratio = lp - inputs.old_logps
    if inputs.case.objective == "sequence":
        log_ratio = (torch.where(mask, log_ratio, 0.0).sum(1) / tokens)[:, None]
    ratio = torch.exp(log_ratio)
    per_token = -torch.min(ratio * A, ratio.clamp(1 - EPSILON, 1 + EPSILON) * A)
    if inputs.case.beta:
        u = inputs.ref_logps - lp
        per_token = per_token + inputs.case.beta * (u.exp() - u - 1)
    return (torch.where(mask, per_token, 0.0).sum(1) / tokens).mean()


def missing_module(module: str, package: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer that does not fit the installed torch may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"pip install {package} (not importable: {reason})"
    return None
