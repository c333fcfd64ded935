"""`fused_grpo_loss`: a GRPO-family loss from logits, and its gradient, in one pass over the logits.

`policy_loss` is the same from log-probabilities.
"""

from collections.abc import Sequence

import torch

from grpo_kernels.call import autograd, checks, ops
from grpo_kernels.call.output import LossOutput, output
from grpo_kernels.call.prepare import prepare
from grpo_kernels.call.supports import check_support
from grpo_kernels.objective.config import LossConfig, resolve_config
from grpo_kernels.objective.supports import Support


def fused_grpo_loss(
    logits: torch.Tensor,
    completion_ids: torch.Tensor,
    advantages: torch.Tensor | None = None,
    *,
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
    inplace: bool = False,
    skip_zero_advantage: bool = False,
    return_entropy: bool = False,
    reduction: str = "mean",
    data_group: torch.distributed.ProcessGroup | None = None,
    vocab_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
    config: LossConfig | None = None,
    **overrides,
) -> LossOutput:
    """GRPO-family loss (DeepSeekMath, arXiv:2402.03300) of sampled completions, from the policy's logits.

        lp   = log softmax(logits / temperature)[completion_ids],   ρ = exp(lp − old_logps)
        ℓ    = −min(min(ρ, δ)·A, clip(ρ, 1−ε_low, 1+ε_high)·A)·importance_weights + β·KL(lp, ref_logps)
        loss = Σ w·ℓ − loss_scale · entropy_coef · mean H,          w set by loss_type

    for ``loss_type="grpo"``; `grpo_kernels.objective.catalogue.LOSS_TYPES` lists the others, `LossConfig` every
    setting.

    If the logits require grad, the pass that reads a row also writes its gradient, and the backward has nothing left
    to do. Objectives whose ratio is the sequence's read the logits a second time in the backward. With on-policy data
    (``old_logps=None``) the *value* of the loss is near 0 for group-relative advantages, and tells you nothing; its
    gradient is the policy gradient.

    Args:
        logits: (B, T, V), or (B, T+1, V), as causal models return them, whose last position is not read
            and gets gradient 0; or packed (N, V); fp32, bf16 or fp16; contiguous in V, other strides free.
            ``logits[b, t]`` scores ``completion_ids[b, t]``.
        completion_ids: (B, T) or (N,), integers; at masked positions anything. With packed input (B, T) below means
            (N,), and (B,) means (S,).
        advantages: (B,) or (B, T), float. Either these or ``rewards``.
        rewards: (B,) float, or (B, K) with ``reward_weights``: the loss computes the advantage by
            ``advantage_estimator``, inside the launch if it needs its group alone, see `group_advantages`. Rewards
            that are not finite get advantage 0.
        num_generations: with rewards: G, rows [k·G, (k+1)·G) share a prompt; or the sizes of the groups, which add
            up to B, as a list or an integer tensor (groups,) on the device, see `group_advantages`.
        old_logps: (B, T), log-probabilities under the policy that sampled; None: on-policy, ρ = 1 with
            its gradient.
        ref_logps: (B, T), log-probabilities under the reference policy; needed if ``beta`` is not 0. With
            ``beta`` 0 they give the metric ``kl`` and no gradient.
        completion_mask: (B, T) of zeros and ones in any pattern; None: all ones. Masked rows are not read.
        importance_weights: (B, T), (B, 1) or (B,): factor of the policy term, not of the KL.
        sampling_logps: (B, T), the sampler's own log-probabilities, NaN where it has none: for
            ``sampling_correction`` and ``off_policy_mask_threshold``, and always for the metrics ``sampling/*``.
        temperature: divides the logits; the one that the completions were sampled at; a number, a 0-d
            tensor, or one (B,) or (B, T).
        support: what a truncating sampler (top-k, top-p, min-p) drew each token from: a `Support`, or a bool tensor
            (B, T, V). Log-probabilities and entropies are then over it and the token itself, and the gradient
            elsewhere is 0; a row without an id is not restricted. ``old_logps`` and ``ref_logps`` must be over the
            same, see `token_logprobs`. With ``vocab_group`` the ids of a `Support` are those of the whole
            vocabulary, and a bool tensor is this rank's columns.
        num_items_in_batch: the tokens of the whole batch, which ``dapo`` divides by, at least 1; a number or
            0-d tensor.
        loss_scale: factor of the loss, e.g. 1/gradient_accumulation_steps; a number or 0-d tensor.
        cu_seqlens: (S+1,) int, with packed input: sequence i is rows [cu_seqlens[i], cu_seqlens[i+1]).
        inplace: write the gradient over the logits' own memory. The logits are gone afterwards. A graph built on them
            before this call raises in its backward, if it needs them. One built afterwards (an auxiliary loss)
            silently computes with the gradient's numbers; GRPO_KERNELS_VALIDATE=1 makes it raise (and takes memory
            for the gradient). Has no effect when no gradient is needed. If this call is inside of
            ``torch.utils.checkpoint``, make the logits inside, too: it runs twice, and they are gone the second time.
        skip_zero_advantage: do not even read rows whose gradient is known to be 0 (β = 0, and A = 0: of the
            token, or of its whole sequence where tokens of a sequence depend on each other). Their
            log-probabilities are NaN, and metrics are over the rows that were read.
        return_entropy: also return the entropies of the distributions.
        reduction: ``"mean"``: the loss type's own; ``"none"``: ℓ per token, (B, T), unweighted
            (neither ``loss_scale`` nor ``num_items_in_batch`` nor the entropy bonus is in it), 0 where masked.
        data_group: process group of data-parallel ranks, for what spans them: the std of ``scale_rewards="batch"``
            and of ``advantage_estimator="gdpo"``, and ``top_entropy_quantile``. With the last the host waits for the
            device once.
        vocab_group: process group over which the vocabulary is sharded (tensor parallelism): ``logits`` are this
            rank's part of it, (B, T, V_rank), parts of any size in the order of the ranks; everything else is whole,
            and the same on every rank, ids included. Every rank returns the same loss, and has the gradient of its
            own part. The logits are then read twice.
        backend: None (by device), ``"triton"`` or ``"torch"``.
        config: a `LossConfig`; its fields can also be given as keywords: ``loss_type="dapo", beta=0.04``.

    Returns:
        `LossOutput`: ``loss`` (differentiable in the logits, once), ``logps``, ``entropy``, ``metrics``
        under TRL's names and the ``sums`` behind them.

    Raises:
        ValueError: wrong shape, stride, device, value or combination; a tensor other than the logits that
            requires grad; ``inplace`` on a leaf.
        TypeError: wrong dtype or type, an unknown keyword.
        IndexError: on the CPU, an unmasked id, or one of a support, outside the vocabulary (on a GPU the row's loss
            and gradient become NaN; GRPO_KERNELS_VALIDATE=1 makes it raise).
        RuntimeError: double backward.
    """
    config = resolve_config(config, overrides)
    checks.check_flags(inplace=inplace, skip_zero_advantage=skip_zero_advantage, return_entropy=return_entropy)
    vocab_group = checks.check_vocab_group(vocab_group)
    layout = checks.check_logits(logits, completion_ids, cu_seqlens, part=vocab_group is not None)
    temperature = checks.check_temperature(temperature, logits, layout)
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        checks.check_inplace(logits)
    backend = ops.choose_backend(backend, logits)
    of_support = check_support(support, layout, logits.shape[-1], logits)
    batch, plan = prepare(
        config, layout, completion_ids, backend, advantages=advantages, rewards=rewards,
        num_generations=num_generations, old_logps=old_logps, ref_logps=ref_logps, completion_mask=completion_mask,
        importance_weights=importance_weights, sampling_logps=sampling_logps, num_items_in_batch=num_items_in_batch,
        loss_scale=loss_scale, cu_seqlens=cu_seqlens, reduction=reduction, data_group=data_group,
        skip_zero_advantage=skip_zero_advantage, temperature=temperature,
    )  # fmt: skip
    loss, logps, entropy, sums, metrics = autograd.run_loss(
        layout.tokens(logits), batch._replace(**of_support), plan, entropy=return_entropy or plan.needs_entropy,
        backend=backend, inplace=inplace, data_group=data_group, vocab_group=vocab_group,
    )  # fmt: skip
    return output(
        batch, plan, layout, loss=loss, logps=layout.restore(logps), sums=sums, metrics=metrics,
        entropy=layout.restore(entropy) if return_entropy else None, has_entropy=return_entropy,
    )  # fmt: skip


def policy_loss(
    logps: torch.Tensor,
    advantages: torch.Tensor | None = None,
    *,
    entropy: torch.Tensor | None = None,
    rewards: torch.Tensor | None = None,
    num_generations: int | Sequence[int] | torch.Tensor | None = None,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    completion_mask: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    sampling_logps: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
    loss_scale: torch.Tensor | float = 1.0,
    cu_seqlens: torch.Tensor | None = None,
    reduction: str = "mean",
    data_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
    config: LossConfig | None = None,
    **overrides,
) -> LossOutput:
    """`fused_grpo_loss` from log-probabilities, for trainers that pass only those.

    Args:
        logps: (B, T), or packed (N,), log-probabilities of the sampled tokens under the current policy, e.g. from
            `token_logprobs`; any float dtype; the computation is in fp32.
        entropy: of the same shape, the entropies: needed for ``entropy_coef`` and ``top_entropy_quantile``.

    All other arguments, the output and the errors are those of `fused_grpo_loss`. The loss is
    differentiable in ``logps`` and, through the entropy bonus, in ``entropy``.
    """
    config = resolve_config(config, overrides)
    layout = checks.check_logprobs(logps, entropy, cu_seqlens)
    needs = {"entropy_coef": config.entropy_coef is not None, "top_entropy_quantile": config.top_entropy_quantile < 1.0}
    for name, needed in needs.items():
        if needed and entropy is None:
            raise ValueError(f"{name}={getattr(config, name)} needs entropy, shaped as logps (see token_logprobs).")
    backend = ops.choose_backend(backend, logps)
    batch, plan = prepare(
        config, layout, logps.detach(), backend, advantages=advantages, rewards=rewards,
        num_generations=num_generations, old_logps=old_logps, ref_logps=ref_logps, completion_mask=completion_mask,
        importance_weights=importance_weights, sampling_logps=sampling_logps, num_items_in_batch=num_items_in_batch,
        loss_scale=loss_scale, cu_seqlens=cu_seqlens, reduction=reduction, data_group=data_group,
    )  # fmt: skip
    if checks.validates(logps.device):
        checks.check_mask_values(completion_mask)
    loss, sums, metrics = autograd.run_policy_loss(
        layout.tokens(logps), layout.tokens(entropy), batch, plan, backend=backend, data_group=data_group
    )
    return output(
        batch, plan, layout, loss=loss, logps=_unmasked(logps, completion_mask), sums=sums, metrics=metrics,
        entropy=_unmasked(entropy, completion_mask), has_entropy=entropy is not None,
    )  # fmt: skip


def _unmasked(x: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Detached, fp32, 0 where masked."""
    if x is None:
        return None
    x = x.detach().float()
    return x if mask is None else x.masked_fill(mask == 0, 0.0)
