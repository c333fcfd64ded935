"""OpenRLHF: its policy loss, from the log-probabilities that its actor hands over.

    self.actor_loss_fn = FusedPolicyLoss(...)      # was PolicyLoss(...)

OpenRLHF has no setting for the loss: edit this line in openrlhf/trainer/ray/ppo_actor.py. See docs/hosts.md.

Written against 0.11.2, as on PyPI. Earlier releases return four values from forward, not five.
"""

import torch
from torch import nn

from grpo_kernels import policy_loss

CORRECTIONS = {("token", "mask"): "token_mask", ("token", "clip"): "token_truncate", ("seq", "mask"): "seq_mask_tis"}


class FusedPolicyLoss(nn.Module):
    """OpenRLHF's ``PolicyLoss``, with its arguments."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        if is_correction_level != "off" and is_correction_gating != "ratio":
            raise NotImplementedError(
                f"is_correction_gating={is_correction_gating!r}: not in FusedPolicyLoss. Use 'ratio', or PolicyLoss."
            )
        if is_correction_level != "off" and (is_correction_level, is_correction_mode) not in CORRECTIONS:
            raise ValueError(
                f"is_correction_mode={is_correction_mode!r} with is_correction_level={is_correction_level!r}: OpenRLHF "
                "masks tokens or sequences, and clips tokens alone."
            )
        if policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"policy_loss_type must be 'ppo' or 'gspo', got {policy_loss_type!r}.")
        self.gspo, self.level, self.mode = policy_loss_type == "gspo", is_correction_level, is_correction_mode
        self.threshold = is_correction_threshold
        self.token_level = token_level_loss and not self.gspo
        self.low, self.high = 1 - clip_eps_low, 1 + clip_eps_high
        self.config = {"epsilon": clip_eps_low, "epsilon_high": clip_eps_high, "dual_clip": dual_clip,
                       "importance_sampling_level": "sequence" if self.gspo else "token",
                       "log_ratio_clamp": None if self.gspo else 20.0}  # fmt: skip
        if is_correction_level != "off" and not self.gspo:
            low, high = is_correction_threshold
            self.config |= {"sampling_correction": CORRECTIONS[is_correction_level, is_correction_mode],
                            "sampling_correction_min": low, "sampling_correction_max": high}  # fmt: skip

    def forward(
        self,
        log_probs: torch.Tensor,  # (B, T)
        old_log_probs: torch.Tensor,  # (B, T)
        advantages: torch.Tensor,  # (B, T)
        action_mask: torch.Tensor | None = None,  # (B, T)
        rollout_log_probs: torch.Tensor | None = None,  # (B, T)
        dp_size: int = 1,
        batch_num_tokens: torch.Tensor | float | None = None,
        global_batch_size: torch.Tensor | float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio)"""
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        kept = mask != 0  # selects: what stands at a masked token is never read, NaN included
        corrected = "sampling_correction" in self.config
        old = rollout_log_probs if self.gspo and self.level != "off" else old_log_probs
        if self.token_level:
            reduction = {"loss_agg_mode": "token-mean", "num_items_in_batch": batch_num_tokens,
                         "loss_scale": 1 if batch_num_tokens is None else dp_size}  # fmt: skip
        elif global_batch_size is None:
            reduction = {"loss_agg_mode": "seq-mean-token-mean"}
        else:
            scale = dp_size * mask.shape[0] / _at_least_1(global_batch_size)
            reduction = {"loss_agg_mode": "sequence-mean", "loss_scale": scale}
        out = policy_loss(log_probs, advantages, old_logps=old, completion_mask=mask, **reduction, **self.config,
                          sampling_logps=rollout_log_probs if corrected else None)  # fmt: skip

        def mean(x: torch.Tensor) -> torch.Tensor:
            return torch.where(kept, x, 0.0).sum() / kept.sum().clamp_min(1)

        def per_sequence(x: torch.Tensor) -> torch.Tensor:
            return torch.where(kept, x, 0.0).sum(1) / kept.sum(1).clamp_min(1)

        logps = log_probs.detach()
        r = (logps - old).clamp(-20.0, 20.0)
        if self.gspo:
            r = per_sequence(logps - old)[:, None].expand_as(logps)
        ratio = r.exp()
        clipped = ratio.clamp(self.low, self.high) * advantages < ratio * advantages
        drift = old_log_probs - logps
        if not corrected:
            return out.loss, mean(clipped.float()), mean(drift), None, None
        mismatch = old_log_probs - rollout_log_probs
        if self.level == "seq":
            unit = per_sequence(mismatch).exp()
            outside = (unit < self.threshold[0]) | (unit > self.threshold[1])
            filtered = (outside & kept.any(1)).float().mean()
        else:
            unit = mismatch.exp()
            filtered = mean(((unit < self.threshold[0]) | (unit > self.threshold[1])).float())
        return out.loss, mean(clipped.float()), mean(drift), -mean(mismatch), filtered


def _at_least_1(count: torch.Tensor | float) -> torch.Tensor | float:
    """A divisor; a batch without a token has a count of 0."""
    return count.clamp_min(1) if isinstance(count, torch.Tensor) else max(count, 1)
