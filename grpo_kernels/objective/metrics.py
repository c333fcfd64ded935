"""Metrics, and the sums behind them.

Every metric is a quotient of sums, a minimum or a maximum. `combine` puts together the sums of
micro-batches or ranks: the metrics of the whole batch, exactly.
"""

from collections.abc import Iterable, Mapping

import torch

from grpo_kernels.objective.compiling import cached
from grpo_kernels.objective.language import jit, on_torch, tl

# name in ``out.sums`` -> how two of them combine; the order is the kernels' column order. What few calls have comes
# last, so that `named` makes no tensors of it.
SUM_NAMES = {
    "loss": "sum",  # Σ w·ℓ − Σ w_H·H, the loss itself
    "policy_loss": "sum",  # Σ w·ℓ
    "tokens": "sum",  # rows read
    "kl": "sum",
    "entropy": "sum",
    "clip_ratio/low": "sum",
    "clip_ratio/high": "sum",
    "clip_ratio/dual": "sum",
    "clip_ratio/count": "sum",  # tokens, or sequences where there is one value per sequence
    "ratio": "sum",
    "approx_kl": "sum",
    "sequences": "sum",
    "ratio/min": "min",
    "clip_ratio/low_min": "min",
    "ratio/max": "max",
    "clip_ratio/high_max": "max",
    "reward": "sum",
    "reward_squared": "sum",
    "rewards": "sum",  # rewards that are finite
    "zero_std": "sum",  # sequences in a group without spread
    "reward_not_finite": "sum",
    "sampling/sampling_logp_difference": "sum",  # |log π_old − log π_sampler|, where the sampler's is known
    "sampling/sampling_logp_difference/count": "sum",
    "sampling/importance_sampling_ratio": "sum",
    "sampling/importance_sampling_ratio/count": "sum",  # tokens, or sequences where there is one weight per sequence
    "sampling/corrected": "sum",  # of these, those that were truncated or masked
    "sampling/weight": "sum",  # of tokens
    "sampling/sampling_logp_difference/max": "max",
    "sampling/importance_sampling_ratio/min": "min",
    "sampling/importance_sampling_ratio/max": "max",
    "fipo/future_kl": "sum",  # of tokens, and so are the next two
    "fipo/influence_weight": "sum",
    "fipo/safety_keep": "sum",
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
    "clip_ratio/dual_mean",
    "ratio/mean",
    "ratio/min",
    "ratio/max",
    "approx_kl",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "reward_not_finite",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
    "sampling/corrected_share",
    "sampling/weight_mean",
    "fipo/future_kl",
    "fipo/influence_weight",
    "fipo/safety_keep",
)
SUFFIX = METRIC_NAMES[-3:]

# Of a distillation: as SUM_NAMES, all of them added up, and as METRIC_NAMES, each the mean of the sum of its name.
DISTILLATION_SUMS = ("loss", "tokens", "divergence", "entropy", "teacher_entropy")
DISTILLATION_METRICS = DISTILLATION_SUMS[2:]


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
def summarise(policy, tokens, kl, entropy, low, high, dual, clips, ratio, drift, sequences, ratio_min, low_min,
              ratio_max, high_max, reward, reward_square, scored, flat, not_finite, gap, heard, drawn, draws,
              corrected, trust, gap_max, drawn_min, drawn_max, future, influence, calm):  # fmt: skip
    """The metrics in the order of METRIC_NAMES; 0 where no token counts."""
    some = tokens > 0.0
    any_clip = clips > 0.0
    any_drawn = draws > 0.0
    return (
        policy,
        mean_of(kl, tokens),
        mean_of(entropy, tokens),
        mean_of(low, clips),
        tl.where(any_clip, low_min, 0.0),
        mean_of(high, clips),
        tl.where(any_clip, high_max, 0.0),
        mean_of(low + high, clips),
        mean_of(dual, clips),
        mean_of(ratio, tokens),
        tl.where(some, ratio_min, 0.0),
        tl.where(some, ratio_max, 0.0),
        mean_of(drift, tokens),
        mean_of(reward, scored),
        std_of(reward, reward_square, scored),
        mean_of(flat, sequences),
        not_finite,
        mean_of(gap, heard),
        gap_max,
        tl.where(any_drawn, drawn_min, 0.0),
        mean_of(drawn, draws),
        tl.where(any_drawn, drawn_max, 0.0),
        mean_of(corrected, draws),
        mean_of(trust, tokens),
        mean_of(future, tokens),
        mean_of(influence, tokens),
        mean_of(calm, tokens),
    )


def metrics_of(sums: torch.Tensor) -> torch.Tensor:
    """The metrics [M] fp32 of the sums [S] fp64, both in the order of their names."""
    if sums.device.type == "cpu":  # no device is waited for, and a hundred operations on 0-d tensors take 0.3 ms
        return torch.tensor(on_torch(summarise)(*sums.tolist()[1:]), dtype=torch.float32, device="cpu")
    return torch.stack(on_torch(summarise)(*sums[1:].unbind())).float()


_REWARD = ("reward", "reward_std", "frac_reward_zero_std", "reward_not_finite")
_SAMPLING = "sampling/"
_CORRECTED = ("sampling/corrected_share", "sampling/weight_mean")
_CLIP = "clip_ratio"
_SINGLE = ("clip_ratio/high", "clip_ratio/count")  # the columns of a report of one number


# The metric that tells whether a sum has batch; sums that are not named here always have.
_SUM_NEEDS = {
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/low": "clip_ratio/low_mean",
    "clip_ratio/low_min": "clip_ratio/low_mean",
    "clip_ratio/high_max": "clip_ratio/low_mean",
    "clip_ratio/high": "clip_ratio/high_mean",
    "clip_ratio/count": "clip_ratio/high_mean",
    "clip_ratio/dual": "clip_ratio/dual_mean",
    "reward": "reward",
    "reward_squared": "reward",
    "rewards": "reward",
    "zero_std": "reward",
    "reward_not_finite": "reward",
    **{name: "sampling/importance_sampling_ratio/mean" for name in SUM_NAMES if name.startswith(_SAMPLING)},
    "sampling/corrected": "sampling/corrected_share",
    "sampling/weight": "sampling/weight_mean",
    **{name: name for name in SUFFIX},
}


@cached
def names_of(
    *, beta: bool, entropy: bool, rewards: bool, reports: str, dual: bool, sampling: bool, corrected: bool,
    suffix: bool,
) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """The names that a call gives its metrics, and its sums, as `named` takes them; None: of what it does not have.

    ``reports``: what the term's region is for, see `grpo_kernels.objective.catalogue.Term`.
    """
    names = {name: name for name in METRIC_NAMES if not name.startswith(_CLIP)}
    public = {}
    if reports == _CLIP:
        names |= {name: name for name in METRIC_NAMES if name.startswith(_CLIP)}
        if not dual:
            del names["clip_ratio/dual_mean"]
    elif reports:
        names["clip_ratio/high_mean"] = reports
        public = dict(zip(_SINGLE, (reports, f"{reports}/count")))
    for name in (*(() if beta else ("kl",)), *(() if entropy else ("entropy",)), *(() if rewards else _REWARD)):
        del names[name]
    if not suffix:
        names = {name: public for name, public in names.items() if name not in SUFFIX}
    if not corrected:
        names = {name: public for name, public in names.items() if name not in _CORRECTED}
    if not sampling:
        names = {name: public for name, public in names.items() if not name.startswith(_SAMPLING)}
    sums = {name: public.get(name, name) for name in SUM_NAMES if name not in _SUM_NEEDS or _SUM_NEEDS[name] in names}
    return _in_order(METRIC_NAMES, names), _in_order(SUM_NAMES, sums)


def _in_order(order: Iterable[str], names: Mapping[str, str]) -> tuple[str | None, ...]:
    """The names of the entries of this order, to the last that has one."""
    found = [names.get(name) for name in order]
    return tuple(found[: 1 + max(k for k, name in enumerate(found) if name)])


def named(values: torch.Tensor, names: tuple[str | None, ...]) -> dict[str, torch.Tensor]:
    """The first entries of ``values``, by their names."""
    return {name: value for name, value in zip(names, values[: len(names)].unbind()) if name}


def distillation_metrics(sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Means over the tokens, fp32, of the sums that are named so."""
    return {name: on_torch(mean_of)(sums[name], sums["tokens"]).float() for name in DISTILLATION_METRICS}


def combine(sums: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Metrics of a whole batch from the ``out.sums`` of its micro-batches (or ranks).

    Args:
        sums: the ``sums`` of each call; all calls must have had the same configuration.

    Returns:
        The metrics, by name, as ``out.metrics`` of one call over all of them would hold; except that
        ``policy_loss`` is the sum over the parts, as the loss is.

    Raises:
        ValueError: no sums at all, sums of calls that do not belong together, or metrics in their place.
        TypeError: one dict in place of a list, or sums that are not tensors.
    """
    if isinstance(sums, Mapping):
        raise TypeError("combine() takes the sums of several calls, got one dict. Put it in a list: [out.sums].")
    parts = list(sums)
    if not parts:
        raise ValueError("combine() needs the sums of at least one call.")
    if not all(isinstance(value, torch.Tensor) for part in parts for value in part.values()):
        raise TypeError("combine() takes sums that are tensors: out.sums as the loss returned them, or gathered.")
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError("combine() got the sums of calls with different configurations: their names differ.")
    if "tokens" not in parts[0]:
        raise ValueError("combine() found no sum named tokens. Pass out.sums of each call, not out.metrics.")
    if "divergence" in parts[0]:
        return distillation_metrics({name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]})
    reports = _CLIP if "clip_ratio/low" in parts[0] else ""
    for name in parts[0]:
        if name.endswith("/count") and name not in SUM_NAMES:
            reports = name.removesuffix("/count")
    columns = dict(zip((reports, f"{reports}/count"), _SINGLE)) if reports not in ("", _CLIP) else {}
    how = {"sum": lambda x: x.sum(0), "min": lambda x: x.amin(0), "max": lambda x: x.amax(0)}
    joined = {}
    for name in parts[0]:
        column = columns.get(name, name)
        joined[column] = how[SUM_NAMES[column]](torch.stack([part[name] for part in parts]))
    nothing = torch.zeros_like(joined["loss"])
    values = metrics_of(torch.stack([joined.get(name, nothing) for name in SUM_NAMES]))
    names, _ = names_of(beta="kl" in joined, entropy="entropy" in joined, rewards="reward" in joined,
                        reports=reports, dual="clip_ratio/dual" in joined,
                        sampling="sampling/importance_sampling_ratio" in joined,
                        corrected="sampling/corrected" in joined, suffix=SUFFIX[0] in joined)  # fmt: skip
    return named(values, names)
