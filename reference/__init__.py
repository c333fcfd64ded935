"""GRPO and its relatives in plain PyTorch: the mathematics, slowly and legibly. Read `grpo.py`."""

from reference.grpo import (
    Knobs,
    LossOutput,
    TokenLogprobs,
    group_advantages,
    grpo_loss,
    token_logprobs,
)

__all__ = ["Knobs", "LossOutput", "TokenLogprobs", "group_advantages", "grpo_loss", "token_logprobs"]
