"""Metrics, and the sums behind them.

Every metric is a quotient of sums, a minimum or a maximum. `combine` puts together the sums of
micro-batches or ranks: the metrics of the whole batch, exactly.
"""

from collections.abc import Iterable, Mapping

import torch

from grpo_kernels.jit import jit, on_torch, tl

# name in ``out.sums`` -> how two of them combine; the order is the kernels' column order.
SUM_NAMES = {
    "loss": "sum",  # Σ w·ℓ − Σ w_H·H, the loss itself
    "policy_loss": "sum",  # Σ w·ℓ
    "tokens": "sum",  # rows read
    "kl": "sum",
    "entropy": "sum",
    "clip_ratio/low": "sum",
    "clip_ratio/high": "sum",
    "ratio": "sum",
    "approx_kl": "sum",
    "reward": "sum",
    "reward_squared": "sum",
    "rewards": "sum",  # rewards that are not NaN
    "zero_std": "sum",  # sequences in a group without spread
    "sequences": "sum",
    "ratio/min": "min",
    "clip_ratio/low_min": "min",
    "ratio/max": "max",
    "clip_ratio/high_max": "max",
}

METRIC_NAMES = (
    "policy_loss",
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
    "ratio/mean",
    "ratio/min",
    "ratio/max",
    "approx_kl",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
)


@jit
def mean_of(total, count):
    return total / tl.where(count < 1.0, 1.0, count)


@jit
def std_of(total, square, count):
    """Unbiased standard deviation from Σx, Σx² and n (fp64)."""
    mean = total / tl.where(count < 1.0, 1.0, count)
    variance = (square - mean * total) / tl.where(count < 2.0, 1.0, count - 1.0)
    return tl.sqrt(tl.where(variance > 0.0, variance, 0.0))


@jit
def summarise(policy, tokens, kl, entropy, low, high, ratio, drift, reward, reward_square, scored, flat, sequences,
              ratio_min, low_min, ratio_max, high_max):  # fmt: skip
    """The metrics in the order of METRIC_NAMES; 0 where no token counts."""
    some = tokens > 0.0
    return (
        policy,
        mean_of(kl, tokens),
        mean_of(entropy, tokens),
        mean_of(low, tokens),
        tl.where(some, low_min, 0.0),
        mean_of(high, tokens),
        tl.where(some, high_max, 0.0),
        mean_of(low + high, tokens),
        mean_of(ratio, tokens),
        tl.where(some, ratio_min, 0.0),
        tl.where(some, ratio_max, 0.0),
        mean_of(drift, tokens),
        mean_of(reward, scored),
        std_of(reward, reward_square, scored),
        mean_of(flat, sequences),
    )


def metrics_of(sums: torch.Tensor) -> torch.Tensor:
    """The metrics [M] fp32 of the sums [S] fp64, both in the order of their names."""
    return torch.stack(on_torch(summarise)(*sums[1:].unbind())).float()


def applicable(*, beta: bool, entropy: bool, rewards: bool) -> set[str]:
    """Names of the metrics that a call has the inputs for."""
    left_out = set()
    if not beta:
        left_out |= {"kl"}
    if not entropy:
        left_out |= {"entropy"}
    if not rewards:
        left_out |= {"reward", "reward_std", "frac_reward_zero_std"}
    return set(METRIC_NAMES) - left_out


# The metric that tells whether a sum has inputs; sums that are not named here always have.
_SUM_NEEDS = {
    "kl": "kl",
    "entropy": "entropy",
    "reward": "reward",
    "reward_squared": "reward",
    "rewards": "reward",
    "zero_std": "reward",
}


def named_sums(sums: torch.Tensor, metric_names: set[str]) -> dict[str, torch.Tensor]:
    """The sums [S] by name, those without inputs left out."""
    return {
        name: value
        for name, value in zip(SUM_NAMES, sums.unbind())
        if name not in _SUM_NEEDS or _SUM_NEEDS[name] in metric_names
    }


def combine(sums: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Metrics of a whole batch from the ``out.sums`` of its micro-batches (or ranks).

    Args:
        sums: the ``sums`` of each call; all calls must have had the same configuration.

    Returns:
        The metrics, by name, as ``out.metrics`` of one call over all of them would hold; except that
        ``policy_loss`` is the sum over the parts, as the loss is.

    Raises:
        ValueError: no sums at all, or sums of calls that do not belong together.
    """
    parts = list(sums)
    if not parts:
        raise ValueError("combine() needs the sums of at least one call.")
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError("combine() got the sums of calls with different configurations: their names differ.")
    how = {"sum": lambda x: x.sum(0), "min": lambda x: x.amin(0), "max": lambda x: x.amax(0)}
    joined = {
        name: how[SUM_NAMES[name]](torch.stack([part[name] for part in parts])) for name in parts[0]
    }
    nothing = torch.zeros_like(joined["loss"])
    values = metrics_of(torch.stack([joined.get(name, nothing) for name in SUM_NAMES]))
    names = applicable(beta="kl" in joined, entropy="entropy" in joined, rewards="reward" in joined)
    return {name: value for name, value in zip(METRIC_NAMES, values.unbind()) if name in names}
