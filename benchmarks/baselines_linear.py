"""Who is measured from hidden states and a head: loss, and gradients of both."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from benchmarks.baselines import Outcome, logps_of_ids, loss_of_logps, missing_module
from benchmarks.cases import EPSILON, Case, Inputs
from grpo_kernels import fused_linear_grpo_loss


def leaves(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()


def outcome(loss: Tensor, *given: Tensor) -> Outcome:
    return Outcome(loss.detach(), grads=torch.autograd.grad(loss, given))


def ours_linear(inputs: Inputs, _: Tensor) -> Outcome:
    hidden, weight = leaves(inputs)
    loss = fused_linear_grpo_loss(hidden, weight, inputs.completion_ids, **inputs.objective()).loss
    return outcome(loss, hidden, weight)


def eager_linear(inputs: Inputs, _: Tensor) -> Outcome:
    hidden, weight = leaves(inputs)
    # Nobody keeps the logits: what is held is what autograd holds.
    lp = logps_of_ids(torch.nn.functional.linear(hidden, weight), inputs.completion_ids)
    return outcome(loss_of_logps(inputs, lp), hidden, weight)


def trl_linear(inputs: Inputs, _: Tensor) -> Outcome:
    """Its chunked head gives log-probs, of the rows that count; the objective is the one of eager PyTorch."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    hidden, weight = leaves(inputs)
    mask = inputs.mask.bool()
    ids = inputs.completion_ids[mask]
    rest = (None, ids, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    lp = ChunkedLogProbFunction.apply(hidden[mask], weight, *rest)[0]
    lp = lp.new_zeros(mask.shape).masked_scatter(mask, lp)
    return outcome(loss_of_logps(inputs, lp), hidden, weight)


def liger_linear(inputs: Inputs, _: Tensor) -> Outcome:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight = leaves(inputs)
    loss = LigerFusedLinearGRPOLoss(
        beta=inputs.case.beta,
        compiled=hidden.is_cuda,  # as is its default; on a CPU it would ask for a C++ compiler
        use_ref_model=inputs.ref_logps is not None,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        loss_type="grpo",
        importance_sampling_level=inputs.case.objective,
        temperature=1.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value, _metrics = loss(
            hidden,
            weight,
            inputs.completion_ids,
            inputs.mask,
            inputs.advantages,
            ref_per_token_logps=inputs.ref_logps,
            old_per_token_logps=inputs.old_logps,
        )
    return outcome(value, hidden, weight)


def trl_linear_missing(case: Case, device: torch.device) -> str | None:
    return missing_module("trl.kernels.chunked_logprob", "'trl>=1.16'")


def liger_linear_missing(case: Case, device: torch.device) -> str | None:
    return missing_module("liger_kernel.chunked_loss", "'liger-kernel>=0.8'")
