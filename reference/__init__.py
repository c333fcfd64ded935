"""GRPO and its relatives in plain PyTorch: the mathematics, slowly and legibly. Read `grpo.py`."""

from reference.advantages import group_advantages
from reference.distillation import TopK, distillation_loss
from reference.grpo import LossOutput, TokenLogprobs, grpo_loss, policy_loss, token_logprobs
from reference.knobs import LOSS_TYPES, Knobs
from reference.targets import target_logprobs

__all__ = [
    "LOSS_TYPES",
    "Knobs",
    "LossOutput",
    "TokenLogprobs",
    "TopK",
    "distillation_loss",
    "group_advantages",
    "grpo_loss",
    "policy_loss",
    "target_logprobs",
    "token_logprobs",
]
