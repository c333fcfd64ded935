"""`group_advantages`: the group-relative baseline alone."""

from collections.abc import Sequence

import torch

from grpo_kernels.call.checks import check_group_sizes, check_rewards, validates
from grpo_kernels.objective.advantages import batch_spread, group_rows, group_sizes, relative_advantages


def group_advantages(
    rewards: torch.Tensor,
    num_generations: int | Sequence[int] | torch.Tensor | None,
    *,
    scale_rewards: str = "group",
    unbiased: bool = True,
    eps: float = 1e-4,
    data_group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Group-relative advantages of rewards: ``num_generations`` completions per prompt, or groups of any sizes.

    ==========  ============================================  ==========================
    group       (R − mean_group)/(std_group + eps)            GRPO, arXiv:2402.03300
    batch       (R − mean_group)/(std_batch + eps)            TRL
    none        R − mean_group                                Dr. GRPO, arXiv:2503.20783
    ==========  ============================================  ==========================

    A reward that is not finite (NaN, ±inf) is left out of mean and std and gets advantage 0. A group whose
    rewards are all the same, or with one finite reward, gets exactly 0.

    Args:
        rewards: (B,), float; the completions of a prompt lie side by side.
        num_generations: G, the completions per prompt; B must be a multiple of it. Or the sizes of the groups, in
            their order, which add up to B: a list, or a 1-D tensor of integers on the rewards' device, which is
            not read back. On a GPU without GRPO_KERNELS_VALIDATE=1 a group that does not lie within the B rows,
            and rows of no group, get NaN.
        scale_rewards: ``"group"``, ``"batch"`` or ``"none"``, as in the table.
        unbiased: divide the variance by n − 1 (TRL), not n.
        eps: added to the standard deviation (TRL: 1e-4, verl: 1e-6).
        data_group: process group of data-parallel ranks, whose rewards all count for the batch's std.

    Returns:
        (B,) advantages, fp32 (fp64 for fp64 rewards), detached.

    Raises:
        ValueError: wrong shape, B not a multiple of G, G < 2 with ``"group"``, unknown ``scale_rewards``; sizes
            that are not positive or do not add up to B; a list while a CUDA graph is captured.
        TypeError: rewards that are not floating point, sizes that are not integers.
    """
    check_rewards(rewards, num_generations, scale_rewards)
    sizes = group_sizes(num_generations, rewards)
    groups = None
    if sizes is not None:
        if not torch.compiler.is_compiling() and validates(sizes.device):
            check_group_sizes(sizes.tolist(), rewards.shape[0])
        groups = group_rows(sizes, rewards.shape[0])
    rewards = rewards.detach()
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    batch_std = batch_spread(rewards, unbiased, data_group) if scale_rewards == "batch" else None
    size = 1 if sizes is not None else int(num_generations)
    return relative_advantages(rewards, size, groups, scale_rewards, unbiased, eps, batch_std)
