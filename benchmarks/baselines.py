"""Who is measured. All get the same logits and give the same loss, gradient or log-probs.

To add one, write its functions and append an `Implementation` to `IMPLEMENTATIONS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import BETA, EPSILON, Inputs
from grpo_kernels import fused_grpo_loss, token_logprobs


class Outcome(NamedTuple):
    """What a call computed: loss and gradient, or log-probs."""

    loss: Tensor | None = None  # 0-d
    grad: Tensor | None = None  # (B, T+1, V), in the logits' dtype
    logps: Tensor | None = None  # (B, T)


Call = Callable[[Inputs, Tensor], Outcome]  # (inputs, the logits to work on) → outcome


@dataclass(frozen=True)
class Implementation:
    """A way to compute the loss.

    Attributes:
        calls: mode → function. The logits it is given are `inputs.logits`, or in mode "inplace" a
            copy of them that it may overwrite. A mode that is not there has no row.
        missing: device → why it cannot run there, or None.
    """

    name: str
    calls: Mapping[str, Call]
    missing: Callable[[torch.device], str | None] = lambda device: None


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
        inputs.advantages,
        old_logps=inputs.old_logps,
        ref_logps=inputs.ref_logps,
        completion_mask=inputs.mask,
        inplace=inplace,
        loss_type="grpo",
        beta=BETA,
        epsilon=EPSILON,
    ).loss


def our_logprobs(inputs: Inputs, logits: Tensor) -> Outcome:
    with torch.no_grad():
        return Outcome(logps=token_logprobs(logits, inputs.completion_ids, mask=inputs.mask).logps)


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
    lp = _eager_logps(inputs, x)
    mask = inputs.mask
    A = inputs.advantages[:, None]
    ratio = torch.exp(lp - inputs.old_logps)
    per_token = -torch.min(ratio * A, ratio.clamp(1 - EPSILON, 1 + EPSILON) * A)
    u = inputs.ref_logps - lp
    per_token = per_token + BETA * (u.exp() - u - 1)
    loss = ((per_token * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    return Outcome(loss.detach(), torch.autograd.grad(loss, x)[0])


def eager_logprobs(inputs: Inputs, logits: Tensor) -> Outcome:
    with torch.no_grad():
        return Outcome(logps=_eager_logps(inputs, logits))


def _eager_logps(inputs: Inputs, x: Tensor) -> Tensor:
    """Over all T+1 positions: slicing the last one off first would cost the backward one more copy."""
    ids = torch.nn.functional.pad(inputs.completion_ids, (0, 1))
    return torch.log_softmax(x.float(), dim=-1).gather(-1, ids[..., None])[:, :-1, 0]


# --- Liger-Kernel ---------------------------------------------------------------------------------------


def liger(inputs: Inputs, logits: Tensor) -> Outcome:
    return _liger(inputs, logits, inplace=False)


def liger_inplace(inputs: Inputs, logits: Tensor) -> Outcome:
    return _liger(inputs, logits, inplace=True)


def _liger(inputs: Inputs, logits: Tensor, inplace: bool) -> Outcome:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    x = logits.detach().requires_grad_()
    loss, _ = triton_grpo_loss(
        x,
        inputs.old_logps,
        inputs.ref_logps,
        inputs.completion_ids,
        inputs.advantages,
        inputs.mask,
        temperature=1.0,
        beta=BETA,
        eps_low=EPSILON,
        eps_high=EPSILON,
        inplace=inplace,
        loss_type="grpo",
        reduce=True,
    )
    return Outcome(loss.detach(), torch.autograd.grad(loss, x)[0])


def liger_logprobs(inputs: Inputs, logits: Tensor) -> Outcome:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    ids, mask = inputs.completion_ids, inputs.mask
    return Outcome(logps=fused_selective_log_softmax(logits, ids, temperature=1.0, mask=mask))


def liger_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    try:
        importlib.import_module("liger_kernel.transformers.grpo_loss")
    except ImportError as error:
        return f"not importable ({error}); pip install liger-kernel"
    return None


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("grpo_kernels", {"loss": ours, "inplace": ours_inplace, "logprobs": our_logprobs}),
    Implementation("eager PyTorch", {"loss": eager, "logprobs": eager_logprobs}),
    Implementation(
        "Liger-Kernel",
        {"loss": liger, "inplace": liger_inplace, "logprobs": liger_logprobs},
        missing=liger_missing,
    ),
)
