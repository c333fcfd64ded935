"""`token_logprobs`: differentiable log-probabilities and entropies of given tokens."""

from typing import NamedTuple

import torch

from grpo_kernels.call import autograd, checks, ops
from grpo_kernels.call.prepare import prepare_logprobs
from grpo_kernels.call.supports import check_support
from grpo_kernels.call.targets import TargetLogprobsFunction, split_targets
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.supports import Support
from grpo_kernels.objective.targets import Targets

_PLAN = Plan().key()


class TokenLogprobs(NamedTuple):
    """What `token_logprobs` and `linear_token_logprobs` return."""

    logps: torch.Tensor  # as the ids, (B, T), (N,), (B, T, K), (N, K) or (M,); fp32, in nats, 0 where masked or absent
    entropy: torch.Tensor | None  # (B, T) or (N,), likewise


def token_logprobs(
    logits: torch.Tensor,
    completion_ids: torch.Tensor | Targets,
    *,
    temperature: torch.Tensor | float = 1.0,
    mask: torch.Tensor | None = None,
    support: Support | torch.Tensor | None = None,
    return_entropy: bool = False,
    vocab_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-probabilities ``log softmax(logits / temperature)[id]``, and the entropies of the distributions.

    Both are differentiable in the logits, so that any objective can be built on them; no [B, T, V]
    tensor is made besides the gradient. The forward reads each logit once.

    Args:
        logits: (B, T, V), or (B, T+1, V) whose last position is not read, or packed (N, V); fp32, bf16
            or fp16, contiguous in V, other strides free. ``logits[b, t]`` scores ``completion_ids[b, t]``.
        completion_ids: (B, T) or (N,), integers. For several targets per row: (B, T, K), packed (N, K), or `Targets`,
            any number for each of the B·T or N rows: ``logits[b, t]`` scores ``completion_ids[b, t, k]``. A negative
            id is then absent, and an id may come several times. Whatever their number, the logits are read once, and
            once more for the gradient.
        temperature: divides the logits; a number, a 0-d tensor, or one (B,), (B, T) or (N,).
        mask: of zeros and ones, (B, T) or (N,); masked rows are not read, their ids may be anything.
        support: what a truncating sampler (top-k, top-p, min-p) drew each token from: a `Support`, or a bool tensor
            (B, T, V); log-probabilities and entropies are then over it and the token itself, as in `fused_grpo_loss`.
            With ``vocab_group`` ids are those of the whole vocabulary, and a bool tensor is this rank's columns. Not
            with several targets per row.
        return_entropy: compute the entropy as well.
        vocab_group: process group over which the vocabulary is sharded, as in `fused_grpo_loss`. Not with several
            targets per row.
        backend: None (by device), ``"triton"`` or ``"torch"``.

    Returns:
        ``TokenLogprobs(logps, entropy)``, fp32, in nats, 0 where masked or absent: ``logps`` shaped as the ids, (M,)
        for `Targets`; ``entropy`` (B, T) or (N,), None unless asked for.

    Raises:
        ValueError: wrong shape, stride, device, value or combination. TypeError: wrong dtype.
        IndexError: on the CPU, an unmasked id, or one of a support, outside the vocabulary (on a GPU its row is NaN).
    """
    vocab_group = checks.check_vocab_group(vocab_group)
    checks.check_switches(return_entropy=return_entropy)
    completion_ids, targets = split_targets(completion_ids, logits, support, vocab_group)
    layout = checks.check_logits(logits, completion_ids, part=vocab_group is not None)
    checks.check_mask("mask", mask, logits, layout)
    temperature = checks.check_temperature(temperature, logits, layout)
    backend = ops.choose_backend(backend, logits)
    of_support = check_support(support, layout, logits.shape[-1], logits)
    batch = prepare_logprobs(layout, completion_ids, mask, temperature)._replace(**of_support)
    given = (layout.tokens(logits), *batch.pack(), _PLAN)
    if targets is None:
        logps, entropy = autograd.TokenLogprobsFunction.apply(*given, return_entropy, backend, vocab_group)
        logps = layout.restore(logps)
    else:
        logps, entropy = TargetLogprobsFunction.apply(*given, targets.ids, targets.offsets, return_entropy, backend)
        logps = logps.view(targets.shape)
    return TokenLogprobs(logps, layout.restore(entropy) if return_entropy else None)
