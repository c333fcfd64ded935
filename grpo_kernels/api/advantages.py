"""`group_advantages`: the group-relative baseline alone."""

from collections.abc import Sequence

import torch

from grpo_kernels.call.checks import (
    check_flags,
    check_group,
    check_group_sizes,
    check_not_negative,
    check_rewards,
    validates,
)
from grpo_kernels.objective.advantages import (
    batch_spread,
    divisor_name,
    group_rows,
    group_sizes,
    normalised_sum,
    relative_advantages,
    weighted_sum,
)
from grpo_kernels.objective.scalars import is_number


def group_advantages(
    rewards: torch.Tensor,
    num_generations: int | Sequence[int] | torch.Tensor | None,
    *,
    advantage_estimator: str = "group",
    reward_weights: Sequence[float] | torch.Tensor | None = None,
    scale_rewards: str = "group",
    unbiased: bool = True,
    eps: float = 1e-4,
    data_group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Group-relative advantages of rewards: ``num_generations`` completions per prompt, or groups of any sizes.

    ==============  ============================================  ==========================
    group, group    (R − mean_group)/(std_group + eps)            GRPO, arXiv:2402.03300
    group, batch    (R − mean_group)/(std_batch + eps)            TRL
    group, none     R − mean_group                                Dr. GRPO, arXiv:2503.20783
    rloo            R − mean of the others, n/(n−1)·(R − mean)    RLOO, arXiv:2402.14740
    maxrl           (R − mean_group)/(mean_group + 1e-6)          MaxRL, arXiv:2602.02710
    gdpo            y/(std_batch of y + eps), of mean 0,          GDPO; TRL's
                    y = Σ w_k·(R_k − mean_group)/(std_group+eps)  normalize_then_sum
    ==============  ============================================  ==========================

    The first column is ``advantage_estimator``; with ``"group"``, ``scale_rewards`` follows.

    A reward that is not finite (NaN, ±inf) is left out of mean and std and gets advantage 0. A group whose rewards
    are all the same, or with one finite reward, gets exactly 0. In gdpo this holds for each of the K rewards: one
    that is left out adds nothing, and a completion without any gets 0.

    Args:
        rewards: (B,), float; the completions of a prompt lie side by side. Or (B, K), K rewards each, of which gdpo
            makes y and the others take the weighted sum of those that are finite. For maxrl that must be at least 0.
        num_generations: G, the completions per prompt; B must be a multiple of it. Or the sizes of the groups, in
            their order, which add up to B: a list, or a 1-D tensor of integers on the rewards' device, which is
            not read back. On a GPU without GRPO_KERNELS_VALIDATE=1 a group that does not lie within the B rows,
            and rows of no group, get NaN.
        advantage_estimator: ``"group"``, ``"rloo"``, ``"maxrl"`` or ``"gdpo"``, as in the table.
        reward_weights: (K,), a list, tuple or tensor; None: 1 each.
        scale_rewards: ``"group"``, ``"batch"`` or ``"none"``, as in the table; not read by other estimators.
        unbiased: divide the variance by n − 1 (TRL), not n.
        eps: added to the standard deviation (TRL: 1e-4, verl: 1e-6).
        data_group: process group of data-parallel ranks, whose rewards all count for the batch's mean and std.

    Returns:
        (B,) advantages, fp32 (fp64 for fp64 rewards), detached.

    Raises:
        ValueError: wrong shape, B not a multiple of G, G < 2 with ``"group"`` by the group's std, unknown
            ``scale_rewards`` or ``advantage_estimator``, weights that are not K; sizes that are not positive or do not
            add up to B; a list while a CUDA graph is captured; on a CPU a negative reward with ``"maxrl"``.
        TypeError: rewards that are not floating point, sizes that are not integers; another argument of a wrong type.
    """
    check_group("data_group", data_group, "dp")
    check_flags(unbiased=unbiased)
    if not is_number(eps):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}.")
    if reward_weights is not None and not hasattr(reward_weights, "__len__"):
        raise TypeError(f"reward_weights must be K numbers, got {type(reward_weights).__name__}.")
    check_rewards(rewards, num_generations, scale_rewards, advantage_estimator, reward_weights)
    sizes = group_sizes(num_generations, rewards)
    groups = None
    if sizes is not None:
        if validates(sizes.device):
            check_group_sizes(sizes.tolist(), rewards.shape[0])
        groups = group_rows(sizes, rewards.shape[0])
    rewards = rewards.detach()
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    size = 1 if sizes is not None else int(num_generations)
    if advantage_estimator == "gdpo":
        return normalised_sum(rewards, reward_weights, size, groups, unbiased, eps, data_group)
    rewards, divisor = weighted_sum(rewards, reward_weights), divisor_name(advantage_estimator, scale_rewards)
    if advantage_estimator == "maxrl":
        check_not_negative(rewards)
    batch_std = batch_spread(rewards, unbiased, data_group) if divisor == "batch" else None
    return relative_advantages(rewards, size, groups, divisor, unbiased, eps, batch_std)
