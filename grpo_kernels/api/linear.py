"""`fused_linear_grpo_loss` and `linear_token_logprobs`: from hidden states and the head, without [N, V] logits."""

import math
from collections.abc import Sequence

import torch

from grpo_kernels.api.logprobs import TokenLogprobs
from grpo_kernels.call import checks, ops
from grpo_kernels.call.output import LossOutput, output
from grpo_kernels.call.prepare import prepare, prepare_logprobs
from grpo_kernels.call.supports import check_support
from grpo_kernels.call.targets import split_targets
from grpo_kernels.linear import head_autograd
from grpo_kernels.linear.head import chunk_rows, logit_bytes
from grpo_kernels.linear.head_autograd import ChunkOptions
from grpo_kernels.linear.head_checks import (
    check_count,
    check_hidden,
    check_logits_dtype,
    check_number,
    head_tensors,
)
from grpo_kernels.linear.targets import LinearTargetsFunction
from grpo_kernels.objective.config import LossConfig, resolve_config
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.supports import Support
from grpo_kernels.objective.targets import Targets


def fused_linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor | torch.nn.Module,
    completion_ids: torch.Tensor,
    advantages: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    rewards: torch.Tensor | None = None,
    num_generations: int | Sequence[int] | torch.Tensor | None = None,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    completion_mask: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    sampling_logps: torch.Tensor | None = None,
    temperature: torch.Tensor | float = 1.0,
    support: Support | torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
    loss_scale: torch.Tensor | float = 1.0,
    cu_seqlens: torch.Tensor | None = None,
    skip_zero_advantage: bool = False,
    return_entropy: bool = False,
    reduction: str = "mean",
    data_group: torch.distributed.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
    num_rows: int | None = None,
    accumulate_in_fp32: bool = True,
    gather_head: bool = False,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
    config: LossConfig | None = None,
    **overrides,
) -> LossOutput:
    """`fused_grpo_loss` of ``logits = softcap·tanh(logit_scale·(hidden·weightᵀ + bias)/softcap)``, never held whole.

    The logits are made a chunk of rows at a time, in one buffer. The kernel writes their gradient into it, and two
    products make the gradients of hidden states and weight from that: three matrix products in all, as many as the
    plain head has. A fourth is needed where the gradient has to wait: ``reduction="none"``, fp16,
    ``top_entropy_quantile``, and for a sequence longer than a chunk if the objective depends on whole sequences. Rows
    that do not count (masked; of advantage 0 with ``skip_zero_advantage``) are left out of the products.

    Args:
        hidden: (B, T, H), or (B, T+1, H) whose last position is not read and gets gradient 0, or packed
            (N, H); fp32, bf16 or fp16: what the head is applied to, and the dtype of the products, under
            autocast too. ``hidden[b, t]`` predicts ``completion_ids[b, t]``.
        weight: (V, H) in the dtype of ``hidden``, or the head itself (a ``torch.nn.Linear``). A DTensor (FSDP2)
            is gathered once, and its gradient given back sharded, the mean over the ranks. With DDP the head
            may stay inside the wrapped module, but not with ``find_unused_parameters=True``: DDP then takes the
            head for unused, and raises in the backward.
        completion_ids: (B, T) or (N,), integers; at masked positions anything.
        bias: (V,), or None.
        logit_scale: factor of the logits (Cohere), or the inverse of their divisor (Granite); above 0.
        softcap: bound of the logits (Gemma); None: none.
        chunk_bytes: bytes of logits at a time. None: GRPO_KERNELS_CHUNK_BYTES, or else what the shapes and dtypes say:
            the bytes of ``weight``, or 400 MiB where that is more, and at least 1024 rows; but at most 4096, and 1 GiB.
            On a CPU 32 MiB, and at least 256 rows. The result does not depend on it beyond rounding.
        num_rows: how many rows are read, if known; it must be right, which is checked on the CPU alone. With
            a mask, ``skip_zero_advantage`` or ``cu_seqlens`` the host otherwise waits for the device once, to
            count them; objectives that depend on whole sequences then wait a second time, for their lengths,
            whatever is given here.
        accumulate_in_fp32: add up the gradients of weight and bias in fp32; False: in the weight's own dtype,
            which takes half the memory in half precision, and rounds once per chunk.
        gather_head: a row makes only the logits of its own token and of the tokens in its ``support``: K + 1 in place
            of V, K being the most ids that a row has. It is for small supports; each row that is read needs an id in
            a `Support`. ``chunk_bytes`` then counts gathered rows of the head. The host waits for the device once
            more, to learn K, and a second time in a backward that computes the logits again.
        logits_dtype: None: the dtype of ``hidden``, to which each logit is rounded. ``torch.float32`` with bf16 or
            fp16: the products add up in fp32 and stay so, without a head in fp32; the gradient of the logits is made
            in fp32 and rounded once to the dtype of ``hidden``, for its own two products. A logit of a chunk then
            takes 4 bytes, and 2 more for its gradient.
        advantages, rewards, num_generations, old_logps, ref_logps, completion_mask, importance_weights,
            sampling_logps, temperature, support, num_items_in_batch, loss_scale, cu_seqlens, skip_zero_advantage,
            return_entropy, reduction, data_group, backend, config, **overrides: as in `fused_grpo_loss`.

    Returns:
        `LossOutput`; the loss is differentiable, once, in ``hidden``, ``weight`` and ``bias``, as far as they
        require grad: a frozen head, or frozen hidden states, save their product.

    Raises:
        ValueError: wrong shape, device, value or combination; another tensor that requires grad; a head with
            an adapter on it, or a weight that DeepSpeed ZeRO-3 has partitioned; ``gather_head`` without a `Support`,
            with a row that is read and has no id, or without ``accumulate_in_fp32``.
        TypeError: wrong dtype or type, an unknown keyword.
        IndexError, RuntimeError: as `fused_grpo_loss`.
    """
    config = resolve_config(config, overrides)
    checks.check_switches(
        return_entropy=return_entropy, accumulate_in_fp32=accumulate_in_fp32, gather_head=gather_head
    )
    weight, bias = head_tensors(weight, bias)
    layout = check_hidden(hidden, weight, bias, completion_ids, cu_seqlens)
    fp32_logits = check_logits_dtype(logits_dtype, hidden)
    temperature, softcap, logit_scale = _scaling(temperature, logit_scale, softcap, hidden, layout)
    backend = ops.choose_backend(backend, hidden)
    of_support = check_support(support, layout, weight.shape[0], hidden)
    batch, plan = prepare(
        config, layout, completion_ids, backend, advantages=advantages, rewards=rewards,
        num_generations=num_generations, old_logps=old_logps, ref_logps=ref_logps, completion_mask=completion_mask,
        importance_weights=importance_weights, sampling_logps=sampling_logps, num_items_in_batch=num_items_in_batch,
        loss_scale=loss_scale, cu_seqlens=cu_seqlens, reduction=reduction, data_group=data_group,
        skip_zero_advantage=skip_zero_advantage, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
    )  # fmt: skip
    loss, logps, entropy, sums, metrics = head_autograd.run_linear_loss(
        layout.tokens(hidden), weight, bias, batch._replace(**of_support), plan,
        entropy=return_entropy or plan.needs_entropy, data_group=data_group,
        options=_options(weight, chunk_bytes, num_rows, accumulate_in_fp32, backend, gather_head, support, fp32_logits),
    )  # fmt: skip
    return output(
        batch, plan, layout, loss=loss, logps=layout.restore(logps), sums=sums, metrics=metrics,
        entropy=layout.restore(entropy) if return_entropy else None, has_entropy=return_entropy,
    )  # fmt: skip


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor | torch.nn.Module,
    completion_ids: torch.Tensor | Targets,
    *,
    bias: torch.Tensor | None = None,
    temperature: torch.Tensor | float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    support: Support | torch.Tensor | None = None,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
    num_rows: int | None = None,
    accumulate_in_fp32: bool = True,
    gather_head: bool = False,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> TokenLogprobs:
    """`token_logprobs` of ``softcap·tanh(logit_scale·(hidden·weightᵀ + bias)/softcap)``, a chunk of rows at a time.

    For old and reference passes, and for objectives of your own. A backward computes the logits again.

    Args:
        hidden, weight, bias, logit_scale, softcap, chunk_bytes, num_rows, accumulate_in_fp32, gather_head,
            logits_dtype: as in `fused_linear_grpo_loss`.
        completion_ids: (B, T) or (N,), integers; or several targets per row, (B, T, K), packed (N, K), or `Targets`,
            as in `token_logprobs`. With `Targets` the host waits for the device once more, to learn which of them
            belong to a chunk.
        temperature: divides the logits; a number, a 0-d tensor, or one (B,), (B, T) or (N,).
        mask: of zeros and ones, (B, T) or (N,); masked rows are left out, and have log-probability 0.
        support: what a truncating sampler drew each token from, as in `fused_grpo_loss`. Not with several targets.
        return_entropy: compute the entropies as well.
        backend: None (by device), ``"triton"`` or ``"torch"``.

    Returns:
        ``TokenLogprobs(logps, entropy)`` as `token_logprobs`.

    Raises:
        ValueError, TypeError, IndexError: as `fused_linear_grpo_loss`.
    """
    checks.check_switches(
        return_entropy=return_entropy, accumulate_in_fp32=accumulate_in_fp32, gather_head=gather_head
    )
    weight, bias = head_tensors(weight, bias)
    completion_ids, targets = split_targets(completion_ids, hidden, support)
    layout = check_hidden(hidden, weight, bias, completion_ids, None)
    fp32_logits = check_logits_dtype(logits_dtype, hidden)
    checks.check_mask("mask", mask, hidden, layout)
    temperature, softcap, logit_scale = _scaling(temperature, logit_scale, softcap, hidden, layout)
    backend = ops.choose_backend(backend, hidden)
    batch = prepare_logprobs(layout, completion_ids, mask, temperature, softcap=softcap, logit_scale=logit_scale)
    batch = batch._replace(**check_support(support, layout, weight.shape[0], hidden))
    given = (layout.tokens(hidden), weight, bias, *batch.pack(), Plan().key())
    options = _options(weight, chunk_bytes, num_rows, accumulate_in_fp32, backend, gather_head, support, fp32_logits)
    if targets is None:
        logps, entropy = head_autograd.LinearLogprobsFunction.apply(*given, return_entropy, options)
        logps = layout.restore(logps)
    else:
        logps, entropy = LinearTargetsFunction.apply(*given, targets.ids, targets.offsets, return_entropy, options)
        logps = logps.view(targets.shape)
    return TokenLogprobs(logps, layout.restore(entropy) if return_entropy else None)


def _scaling(temperature, logit_scale, softcap, hidden, layout) -> tuple[torch.Tensor | float, float, float]:
    """(temperature, softcap, logit_scale): a scale without a cap is a temperature."""
    temperature = checks.check_temperature(temperature, hidden, layout)
    logit_scale = check_number("logit_scale", logit_scale)
    if softcap is not None:
        return temperature, check_number("softcap", softcap), logit_scale
    return (temperature if logit_scale == 1.0 else temperature / logit_scale), math.inf, logit_scale


def _options(
    weight: torch.Tensor, chunk_bytes, num_rows, in_fp32: bool, backend: str, gather: bool, support: object,
    fp32_logits: bool,
) -> ChunkOptions:  # fmt: skip
    if gather and not isinstance(support, Support):
        raise ValueError(
            f"gather_head needs support as a Support, got {type(support).__name__}. A mask becomes one by "
            "Support.from_mask(mask)."
        )
    if gather and not in_fp32:
        raise ValueError(
            "gather_head adds up row by row, and accumulate_in_fp32=False would round as often. Leave one of them out."
        )
    itemsize = logit_bytes(weight, fp32_logits and not gather)  # what is gathered are rows of the head
    height = chunk_rows(chunk_bytes, weight, itemsize)
    return ChunkOptions(height, check_count(num_rows), in_fp32, backend, gather, fp32_logits)
