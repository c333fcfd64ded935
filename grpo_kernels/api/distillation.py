"""`distillation_loss`: a student's divergence from a teacher, token by token; its gradient in the same pass."""

import torch

from grpo_kernels.call import checks, distillation_autograd, ops
from grpo_kernels.call.distillation_checks import TopK, check_pair
from grpo_kernels.call.distillation_prepare import output, prepare
from grpo_kernels.call.output import LossOutput


def distillation_loss(
    logits: torch.Tensor,
    teacher: torch.Tensor | TopK,
    *,
    beta: float = 1.0,
    temperature: torch.Tensor | float = 1.0,
    tail: bool | None = True,
    completion_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    loss_agg_mode: str = "global-tokens",
    num_items_in_batch: torch.Tensor | float | None = None,
    max_completion_length: torch.Tensor | float | None = None,
    global_batch_size: torch.Tensor | float | None = None,
    loss_scale: torch.Tensor | float = 1.0,
    inplace: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> LossOutput:
    """Divergence of a student's distributions p from a teacher's, q (GKD, arXiv:2306.13649), and its gradient.

        p, q = softmax(logits / temperature), softmax(teacher / temperature)
        β = 0     D = KL(q ‖ p) = Σ q·(log q − log p)                  forward
        β = 1     D = KL(p ‖ q) = Σ p·(log p − log q)                  reverse (MiniLLM, arXiv:2306.08543)
        between   D = β·KL(q ‖ m) + (1−β)·KL(p ‖ m),  m = (1−β)·p + β·q
        loss = Σ w·D,                                                  w set by loss_agg_mode

    On the student's own samples this is on-policy distillation. There is no factor temperature². The gradient flows
    to the student only. It is written in the pass that compares the rows: each logit of both models is read once, and
    the gradient written once. For β between 0 and 1 the divergence tends to 0, not to a KL, as β tends to 0 or 1.

    A product with a factor 0 counts 0. With β = 0 a token that the teacher may say and the student bans (a logit −∞)
    makes D infinite, and the gradient stays p − q. With β = 1 a token that the student may say and the teacher bans
    makes D infinite and the row's gradient NaN. Between, everything is finite. With ``tail=False`` a student that bans
    all K tokens has no distribution over them: D and the row's gradient are NaN.

    Args:
        logits: the student's: (B, T, V), or (B, T+1, V), as causal models return them, whose last position is not
            read and gets gradient 0; or packed (N, V); fp32, bf16 or fp16; contiguous in V, other strides free.
        teacher: the teacher's logits over the same vocabulary, (B, T, V) or (B, T+1, V), packed (N, V), in any of these
            dtypes; or a `TopK`, (B, T, K) or (N, K): its likeliest tokens with their log-probabilities, at this
            temperature already.
        beta: from 0 to 1. 0 and 1 take other launches than the values between.
        temperature: divides the logits of both; a number, a 0-d tensor, or one (B,) or (B, T); packed (S,) or (N,).
        tail: of a `TopK`: True: all other tokens together are one more outcome, whose share is at least 1e-7; False:
            both distributions are renormalised over the K, and no other logit is read; None: the K as they are.
        completion_mask: (B, T), packed (N,), of zeros and ones; None: all ones. Masked rows are not read.
        cu_seqlens: (S+1,) int, with packed input: sequence i is rows [cu_seqlens[i], cu_seqlens[i+1]).
        loss_agg_mode: an entry of `grpo_kernels.objective.aggregations.AGGREGATIONS`; ``"global-tokens"``:
            w = mask / num_items_in_batch.
        num_items_in_batch: tokens of the whole batch, for the modes that divide by them; None: those of this call. A
            number or 0-d tensor, as the next three.
        max_completion_length: the constant that ``"constant"`` and ``"seq-mean-token-sum-norm"`` divide by; None: T.
        global_batch_size: sequences of the whole batch, for the modes that divide by them; None: those of this call.
        loss_scale: factor of the loss, e.g. 1/gradient_accumulation_steps.
        inplace: write the gradient over the logits' own memory, as in `fused_grpo_loss`. The teacher's logits stay.
        reduction: ``"mean"``: the sum above; ``"none"``: D per token, (B, T), unweighted, 0 where masked.
        backend: None (by device), ``"triton"`` or ``"torch"``.

    Returns:
        `LossOutput`: ``loss`` (differentiable in the logits, once), ``entropy`` of the student (B, T), in nats, at this
        temperature (over the K where ``tail=False``); ``metrics`` and ``sums`` with ``divergence``, ``entropy`` and
        ``teacher_entropy`` (over the teacher's outcomes), means over the unmasked tokens; ``logps`` is None.

    Raises:
        ValueError: wrong shape, stride, device, value or combination; vocabularies of different size; a teacher that
            requires grad; ``inplace`` on a leaf; on the CPU, a token twice in a row of a `TopK` (on a GPU it counts
            twice, and the row's gradient is wrong).
        TypeError: wrong dtype or type.
        IndexError: on the CPU, an unmasked id of a `TopK` outside the vocabulary (on a GPU the row's loss and gradient
            become NaN; GRPO_KERNELS_VALIDATE=1 makes both raise).
        RuntimeError: double backward.
    """
    checks.check_switches(inplace=inplace)
    layout = check_pair(logits, teacher, completion_mask, cu_seqlens)
    few = teacher if isinstance(teacher, TopK) else None
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        checks.check_inplace(logits)
    backend = ops.choose_backend(backend, logits)
    batch, plan = prepare(
        layout, logits, few, backend, beta=beta, temperature=temperature, tail=tail, completion_mask=completion_mask,
        cu_seqlens=cu_seqlens, loss_agg_mode=loss_agg_mode, num_items_in_batch=num_items_in_batch,
        max_completion_length=max_completion_length, global_batch_size=global_batch_size, loss_scale=loss_scale,
        reduction=reduction,
    )  # fmt: skip
    loss, values, sums, metrics = distillation_autograd.run(
        layout.tokens(logits), None if few else layout.tokens(teacher), batch, plan, layout.T, backend, inplace
    )
    return output(layout, loss, values, sums, metrics)
