"""`token_logprobs`: differentiable log-probabilities and entropies of given tokens."""

from typing import NamedTuple

import torch

from grpo_kernels import checks, ops
from grpo_kernels.inputs import pack
from grpo_kernels.variants import Plan

_PLAN = Plan(term="", kl="", scale_rewards="none", unbiased=True, skip=False, bonus=False).key()


class TokenLogprobs(NamedTuple):
    """What `token_logprobs` returns."""

    logps: torch.Tensor  # (B, T) fp32, in nats, 0 where masked
    entropy: torch.Tensor | None  # (B, T) fp32, in nats, 0 where masked


def token_logprobs(
    logits: torch.Tensor,
    completion_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    return_entropy: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-probabilities ``log softmax(logits / temperature)[id]``, and the entropies of the distributions.

    Both are differentiable in the logits, so that any objective can be built on them; no [B, T, V]
    tensor is made besides the gradient. The forward reads each logit once.

    Args:
        logits: (B, T, V), or (B, T+1, V) whose last position is not read; fp32, bf16 or fp16, contiguous
            in V, other strides free. ``logits[b, t]`` scores ``completion_ids[b, t]``.
        completion_ids: (B, T) integers.
        temperature: divides the logits.
        mask: (B, T) of zeros and ones; masked rows are not read, their ids may be anything.
        return_entropy: compute the entropy as well.
        backend: None (by device), ``"triton"`` or ``"torch"``.

    Returns:
        ``TokenLogprobs(logps, entropy)``, (B, T) fp32 each, in nats, 0 where masked; entropy is None
        unless asked for.

    Raises:
        ValueError: wrong shape, stride, device or value. TypeError: wrong dtype.
        IndexError: on the CPU, an unmasked id outside the vocabulary (on a GPU its row is NaN).
    """
    B, T = checks.check_logits(logits, completion_ids)
    checks.check_mask("mask", mask, logits, B, T)
    checks.check_temperature(temperature)
    backend = ops.choose_backend(backend, logits)
    coefs = pack(float(temperature), 0.0, 1.0, 0.0, 0.0)
    logps, entropy = ops.TokenLogprobsFunction.apply(
        logits, completion_ids, mask, coefs, _PLAN, return_entropy, backend
    )
    return TokenLogprobs(logps, entropy if return_entropy else None)
