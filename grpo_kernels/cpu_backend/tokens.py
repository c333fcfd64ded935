"""The objective of single tokens on torch tensors, with the kernels' own functions (`objective.language.on_torch`).

Padded input is [B, T]; packed input is [1, N] with the bounds of its B sequences. What belongs to a
sequence is (B, 1) either way; `expand` and `per_sequence` are all that tells the two apart.
"""

from typing import NamedTuple

import torch

from grpo_kernels.objective.advantages import relative_advantages
from grpo_kernels.objective.catalogue import TERMS
from grpo_kernels.objective.inputs import Coefs, Inputs
from grpo_kernels.objective.language import on_torch
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.token import limited_ratio, log_ratio, scaled, token_objective, weight


def expand(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Something per token, per sequence (B, 1), or one number, as one per token."""
    shape = inputs.ids.shape
    if shape.numel() == 0:
        return x.new_empty(shape)
    if inputs.cu is not None and x.dim() and x.shape[0] > 1:  # packed: a row per sequence
        x = torch.cat([x, x.new_zeros(1, 1)])[inputs.segments.long(), 0]
    return x.expand(shape)


def per_sequence(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Sums (..., B) in fp64 over the tokens of each sequence, of (..., B, T) or packed (..., 1, N)."""
    if inputs.cu is None:
        return x.sum(-1, dtype=torch.float64)
    if x.shape[-1] == 0:
        return x.new_zeros((*x.shape[:-2], inputs.sequences), dtype=torch.float64)
    flat = x.double().reshape(-1, x.shape[-1])  # [K, N]
    sums = torch.segment_reduce(flat.T.contiguous(), "sum", offsets=inputs.cu.long(), initial=0.0, unsafe=True)
    return sums.T.reshape(*x.shape[:-2], -1)


def advantages(inputs: Inputs, coefs: Coefs, plan: Plan) -> torch.Tensor:
    """As given, or (B, 1) from the rewards; fp32."""
    if inputs.rewards is None:
        return inputs.adv.float()
    return relative_advantages(
        inputs.rewards.float(), int(coefs.num_generations), inputs.groups, plan.scale_rewards, plan.unbiased,
        coefs.adv_eps, inputs.batch_std,
    )[:, None]  # fmt: skip


class Tokens(NamedTuple):
    """What the loss of tokens needs besides their log-probabilities: it broadcasts to them, or is a number or None."""

    adv: torch.Tensor
    old: torch.Tensor | None
    ref: torch.Tensor | None
    trust: torch.Tensor | None
    w: torch.Tensor | float
    bonus: torch.Tensor | float  # w_H

    @classmethod
    def of(cls, inputs: Inputs, coefs: Coefs, plan: Plan) -> "Tokens":
        """Of all tokens, for (B, T) log-probabilities."""
        scale = 1.0 if inputs.loss_scale is None else inputs.loss_scale.float()
        w = on_torch(weight)(1.0 if inputs.count is None else inputs.count.float(), coefs.w_factor, scale)
        if isinstance(w, torch.Tensor) and w.dim():
            w = w[:, None]
        bonus = 0.0
        if plan.bonus:
            factor = coefs.h_factor * (1.0 if inputs.entropy_coef is None else inputs.entropy_coef.float())
            bonus = on_torch(weight)(1.0 if inputs.tokens is None else inputs.tokens.float(), factor, scale)
        tokens = cls(advantages(inputs, coefs, plan), inputs.old, inputs.ref, inputs.is_weight, w, bonus)
        return tokens.each(lambda x: x.float() if inputs.cu is None else expand(x.float(), inputs))

    def each(self, change) -> "Tokens":
        return Tokens(*(change(x) if isinstance(x, torch.Tensor) else x for x in self))

    def masked(self, keep: torch.Tensor) -> "Tokens":
        """With a policy term that is 0 elsewhere."""
        return self._replace(trust=torch.where(keep, 1.0 if self.trust is None else self.trust, 0.0))


class TokenLoss(NamedTuple):
    """ℓ of some tokens, its KL, and its derivatives; those that are numbers are 0. See `token_objective`."""

    loss: torch.Tensor
    kl: torch.Tensor | float
    d_term: torch.Tensor | float
    d_ratio: torch.Tensor | float
    d_lp: torch.Tensor
    r: torch.Tensor  # the level's log ratio
    r_term: torch.Tensor  # the term's own statistic, or else r


def token_loss(
    tokens: Tokens, lp: torch.Tensor, coefs: Coefs, plan: Plan, level: torch.Tensor | None = None,
    own: torch.Tensor | None = None,
) -> TokenLoss:  # fmt: skip
    """The loss of tokens. ``level``: the log ratio they share, ``own``: the term's statistic; None: there is none."""
    term = TERMS[plan.term]
    old = lp if tokens.old is None else tokens.old
    r, passes = on_torch(limited_ratio)(on_torch(log_ratio)(lp, old) if level is None else level, coefs.limits,
                                        plan.limited)  # fmt: skip
    r_term = r if own is None else own
    policy, kl, *slopes = on_torch(token_objective)(
        r, passes, r_term, lp, old, tokens.ref, tokens.adv, tokens.trust, coefs.beta, coefs.limits,
        term.kind(*coefs.term), on_torch(term.function), on_torch(plan.kl_function) if plan.kl else None, plan.bias,
        own is not None, tokens.trust is not None, plan.limited, plan.clamped,
    )  # fmt: skip
    return TokenLoss(policy + on_torch(scaled)(coefs.beta, kl) if plan.kl else policy, kl, *slopes, r, r_term)
