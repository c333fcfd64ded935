"""pass@k: the probability that of k completions of a problem at least one is correct (arXiv:2107.03374)."""

import torch

from grpo_kernels.trainer.records import Rows
from grpo_kernels.trainer.rollout import Row

PREFIX = "eval/pass@"


def pass_at_k(correct: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The unbiased estimate 1 − C(n − c, k)/C(n, k), as the product of c factors, which does not overflow.

    Args:
        correct: (P,) integers, c: how many of a problem's n completions are correct.
        n: completions of each problem.
        k: from 1 to n.

    Returns:
        (P,) float64, on the CPU; their mean is the estimate for the problems together.

    Raises:
        ValueError: k is not from 1 to n, or a count not from 0 to n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to n = {n}, got {k}. Sample at least k completions of each problem.")
    correct = correct.cpu().long()
    if ((correct < 0) | (correct > n)).any():
        raise ValueError(f"correct must be from 0 to n = {n}, got {correct.tolist()}.")
    # C(n − c, k)/C(n, k), the probability that all k are wrong, is the product of (n − k − j)/(n − j) over j < c.
    j = torch.arange(n, dtype=torch.float64)
    all_wrong = ((n - k - j).clamp(min=0.0) / (n - j)).cumprod(0)  # of c = 1 to n
    return 1.0 - torch.cat([all_wrong.new_ones(1), all_wrong])[correct]


def ks_of(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself."""
    return sorted({1 << i for i in range(n.bit_length())} | {n})


def rates_in(rows: Rows) -> list[str]:
    """The names of what `pass_rates` has made, smallest k first; a run that goes on may have changed n."""
    return sorted(rows.names(PREFIX), key=lambda name: int(name.removeprefix(PREFIX)))


def pass_rates(rewards: torch.Tensor) -> Row:
    """``eval/pass@k`` for each of `ks_of` (n): means over the problems.

    Args:
        rewards: (P, n) of n completions of each problem. One is correct at 1 or more. NaN, a completion that nobody
            has rewarded, is not correct; a problem of NaN alone is left out.
    """
    n = rewards.shape[1]
    correct = (rewards >= 1.0).sum(1)[~rewards.isnan().all(1)]
    return {f"{PREFIX}{k}": pass_at_k(correct, n, k).mean().item() for k in ks_of(n)}
