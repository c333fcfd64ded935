"""The GRPO family of losses as drop-in GPU kernels."""

from grpo_kernels import metrics
from grpo_kernels.api.advantages import group_advantages
from grpo_kernels.api.distillation import distillation_loss
from grpo_kernels.api.linear import fused_linear_grpo_loss, linear_token_logprobs
from grpo_kernels.api.linear_distillation import fused_linear_distillation_loss
from grpo_kernels.api.logprobs import TokenLogprobs, token_logprobs
from grpo_kernels.api.loss import LossOutput, fused_grpo_loss, policy_loss
from grpo_kernels.api.microbatch import microbatch
from grpo_kernels.call.distillation_checks import TopK
from grpo_kernels.objective.config import LossConfig
from grpo_kernels.objective.supports import Support
from grpo_kernels.objective.targets import Targets

__version__ = "0.1.0"

__all__ = [
    "LossConfig",
    "LossOutput",
    "Support",
    "Targets",
    "TokenLogprobs",
    "TopK",
    "distillation_loss",
    "fused_grpo_loss",
    "fused_linear_distillation_loss",
    "fused_linear_grpo_loss",
    "group_advantages",
    "linear_token_logprobs",
    "metrics",
    "microbatch",
    "policy_loss",
    "token_logprobs",
]
