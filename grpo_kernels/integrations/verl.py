"""verl: its policy losses on `policy_loss`, registered as ``fused_`` + verl's own name when this module is imported.

    actor_rollout_ref.actor.policy_loss.loss_mode=fused_vanilla

Loss, gradient and logged metrics are those of verl's function without ``fused_``, which read the same settings. The
installed verl decides: a loss that it does not have is not registered. verl loads this module by itself (entry point
``verl.plugins``), or by ``VERL_USE_EXTERNAL_MODULES=grpo_kernels.integrations.verl``. Its fused linear op has
`patch()`.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.api.loss import LossOutput, policy_loss
from grpo_kernels.integrations.verl_linear import (
    TESTED,
    fused_linear_for_ppo,
    linear_cross_entropy,
    patch,
    without_verl,
)

try:
    import verl
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss
    from verl.workers.config import ActorConfig
except ImportError as error:
    raise without_verl(error) from error

__all__ = ["LOSSES", "NOT_SERVED", "fused_linear_for_ppo", "linear_cross_entropy", "patch"]

PREFIX = "fused_"
CLIPFRAC, PPO_KL, CLIPFRAC_LOWER = "actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"
SAFE = 20.0  # verl's bound of |log ratio| where it has one
# Registered by verl, and not here.
NOT_SERVED = {
    "clip_cov": "the tokens that it leaves out are drawn at random, by their covariance",
    "kl_cov": "the tokens that its KL is for are those of the largest covariance",
}

# --- The losses in the words of `LossConfig` -------------------------------------------------------------


def _bounds(config: ActorConfig) -> tuple[float, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return config.clip_ratio if low is None else low, config.clip_ratio if high is None else high


def _clip(config: ActorConfig) -> dict:
    low, high = _bounds(config)
    return {"epsilon": low, "epsilon_high": high}


def _cap(config: ActorConfig, default: float) -> float:
    cap = config.get("clip_ratio_c", default)
    if not cap > 1.0:
        raise ValueError(f"clip_ratio_c must be above 1, got {cap}. verl's default is 3.0.")
    return cap


def _vanilla(config: ActorConfig) -> dict:
    return {"policy_term": "clipped", "dual_clip": _cap(config, 3.0), "log_ratio_clamp": SAFE, **_clip(config)}


def _up(config: ActorConfig) -> dict:
    return {**_vanilla(config), "policy_term": "up"}


def _gspo(config: ActorConfig) -> dict:
    return {
        "policy_term": "clipped",
        "importance_sampling_level": "sequence_token",
        "log_ratio_clamp": (-math.inf, 10.0),
        **_clip(config),
    }


def _sapo(config: ActorConfig) -> dict:
    taus = {"sapo_temperature_pos": config.tau_pos, "sapo_temperature_neg": config.tau_neg}
    return {"policy_term": "sapo", "log_ratio_clamp": SAFE, **taus}


def _cispo(config: ActorConfig) -> dict:
    low, high = _bounds(config)  # a lower bound of 0 or less bounds nothing
    bounds = {"cispo_min": 1.0 - low if low < 1.0 else None, "cispo_max": 1.0 + high}
    return {"policy_term": "cispo", "log_ratio_clamp": SAFE, **bounds}


def _geo_mean(config: ActorConfig) -> dict:
    return {"loss_type": "gmpo", **_clip(config)}


def _dppo_tv(config: ActorConfig) -> dict:
    return {"policy_term": "dppo_tv", "dual_clip": _cap(config, 20.0), "log_ratio_clamp": SAFE, **_clip(config)}


def _dppo_kl(config: ActorConfig) -> dict:
    return {**_dppo_tv(config), "policy_term": "dppo_kl"}


def _reinforce(config: ActorConfig) -> dict:
    return {"policy_term": "reinforce"}


def _dro(config: ActorConfig) -> dict:
    beta = config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise ValueError(f"policy_loss.dro_beta must be above 0 for fused_dro, got {beta}. Set it.")
    return {"policy_term": "dro", "dro_beta": beta}


# --- What verl logs of them ------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What the metrics of a call are made of."""

    log_ratio: Tensor  # (B, T) fp32, log_prob − old_log_prob
    advantages: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool
    bounds: Callable[[], tuple[float, float]]
    ours: dict[str, Tensor]

    def mean(self, x: Tensor) -> Tensor:
        """Over unmasked tokens; verl's masked_mean."""
        return torch.where(self.mask, x.float(), 0.0).sum() / (self.mask.sum() + 1e-8)


def _kl(seen: Seen) -> Tensor:
    return seen.mean(-seen.log_ratio)


def _safe_kl(seen: Seen) -> Tensor:
    return seen.mean(-seen.log_ratio.clamp(-SAFE, SAFE))


def _clipped(seen: Seen) -> Tensor:
    return seen.ours["clip_ratio/region_mean"]


def _clipped_where_not_good(seen: Seen) -> Tensor:
    """Of the tokens that can be clipped; ours is of all."""
    clipped = seen.ours["clip_ratio/region_mean"] * seen.mask.sum()
    return clipped / ((seen.mask & (seen.advantages <= 0)).sum() + 1e-8)


def _capped(seen: Seen) -> Tensor:
    return seen.ours["clip_ratio/dual_mean"]


def _out_of_bounds(seen: Seen) -> Tensor:
    """Whichever way the advantage pushes."""
    low, high = seen.bounds()
    ratio = seen.log_ratio.clamp(-SAFE, SAFE).exp()
    return seen.mean((ratio < 1.0 - low) | (ratio > 1.0 + high))


def _log_out_of_bounds(seen: Seen, which: Tensor) -> Tensor:
    low, high = seen.bounds()
    return seen.mean(((seen.log_ratio < -low) | (seen.log_ratio > high)) & which)


def _for_good(seen: Seen) -> Tensor:
    return _log_out_of_bounds(seen, seen.advantages > 0)


def _for_bad(seen: Seen) -> Tensor:
    return _log_out_of_bounds(seen, seen.advantages < 0)


def _zero(seen: Seen) -> float:
    return 0.0


Metrics = dict[str, Callable[[Seen], Tensor | float]]
_BOTH: Metrics = {CLIPFRAC: _clipped, PPO_KL: _safe_kl, CLIPFRAC_LOWER: _capped}

# --- How verl averages them ------------------------------------------------------------------------------

SEQUENCES = "seq-mean-token-mean"


def _asked(mode: str) -> str:
    return mode


def _by_sequences(mode: str) -> str:
    return SEQUENCES


def _as_verls_gspo(mode: str) -> str:
    return mode if _gspo_obeys() else SEQUENCES


class _AnyActor(ActorConfig):
    """What verl's gspo reads of its config; what the whole must hold differs between versions."""

    def __init__(self):
        self.clip_ratio = self.clip_ratio_low = self.clip_ratio_high = 0.2
        self.global_batch_info = {}


@functools.cache
def _gspo_obeys() -> bool:
    """Whether the installed verl's gspo averages as loss_agg_mode says. 0.9.1's does; 0.9.0's and the main branch's
    take seq-mean-token-mean. So no version says it, but its answer for two sequences does: asked once, on the CPU."""
    logps, mask = torch.zeros(2, 2, device="cpu"), torch.tensor([[1.0, 0.0], [1.0, 1.0]], device="cpu")
    advantages = torch.tensor([[3.0, 0.0], [1.0, 1.0]], device="cpu")  # and all ratios are 1
    with torch.no_grad():
        loss = POLICY_LOSS_REGISTRY["gspo"](
            old_log_prob=logps, log_prob=logps, advantages=advantages, response_mask=mask,
            loss_agg_mode="token-sum", config=_AnyActor(),
        )[0].item()  # fmt: skip
    for obeys, answer in ((True, -5.0), (False, -2.0)):
        if math.isclose(loss, answer, rel_tol=1e-5):
            return obeys
    raise RuntimeError(
        f"The gspo of verl {verl.__version__} averages neither by loss_agg_mode nor by {SEQUENCES}: of two sequences "
        f"it makes {loss}, not -5 or -2. Use verl's own, loss_mode=gspo."
    )


class Loss(NamedTuple):
    """A policy loss of verl's."""

    keywords: Callable[[ActorConfig], dict]  # of `policy_loss`
    metrics: Metrics
    default_mode: str = "token-mean"  # loss_agg_mode, where the caller does not say
    mode: Callable[[str], str] = _asked  # what verl makes of it
    aggregates: bool = True  # False: always the mean over the call's sequences


LOSSES = {
    "vanilla": Loss(_vanilla, _BOTH),
    "up": Loss(_up, {CLIPFRAC: _clipped_where_not_good, PPO_KL: _safe_kl, CLIPFRAC_LOWER: _capped}),
    "gspo": Loss(_gspo, {CLIPFRAC: _clipped, PPO_KL: _kl, CLIPFRAC_LOWER: _zero}, SEQUENCES, _as_verls_gspo),
    "sapo": Loss(_sapo, {CLIPFRAC: _zero, PPO_KL: _safe_kl, CLIPFRAC_LOWER: _zero}, SEQUENCES, _by_sequences),
    "cispo": Loss(_cispo, {CLIPFRAC: _out_of_bounds, PPO_KL: _safe_kl, CLIPFRAC_LOWER: _zero}),
    "geo_mean": Loss(_geo_mean, {CLIPFRAC: _for_good, PPO_KL: _kl, CLIPFRAC_LOWER: _for_bad}, aggregates=False),
    "dppo_tv": Loss(_dppo_tv, _BOTH),
    "dppo_kl": Loss(_dppo_kl, _BOTH),
    "gpg": Loss(_reinforce, {}),
    "dro": Loss(_dro, {PPO_KL: _kl}),
}
REINFORCE = Loss(_reinforce, {PPO_KL: _kl}, "seq-mean-token-sum")  # of bypass_mode

# --- From verl's call to ours ----------------------------------------------------------------------------

# loss_agg_mode -> the count of the global batch that it divides by
_COUNTS = {
    "token-mean": "batch_num_tokens",
    "token-sum": None,
    "seq-mean-token-sum": "global_batch_size",
    "seq-mean-token-mean": "global_batch_size",
    "seq-mean-token-sum-norm": "global_batch_size",
}


def _aggregation(mode: str, info: dict) -> dict:
    """verl's agg_loss in our keywords; ``info``: config.global_batch_info."""
    if mode not in _COUNTS:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(map(repr, _COUNTS))}, got {mode!r}.")
    dp_size, count = info.get("dp_size", 1), _COUNTS[mode]
    if count is not None and dp_size > 1 and info.get(count) is None:
        raise ValueError(
            f"global_batch_info needs {count} for loss_agg_mode={mode!r} over dp_size={dp_size} ranks: set it."
        )
    keywords = {"loss_agg_mode": mode, "loss_scale": dp_size}
    if count == "batch_num_tokens":
        keywords["num_items_in_batch"] = info.get(count)
    elif count is not None:
        keywords[count] = info.get(count)
    if mode == "seq-mean-token-sum-norm":
        keywords["max_completion_length"] = info.get("loss_scale_factor")
    return keywords


def _compute(
    loss: Loss, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, mask: Tensor, mode: str,
    config: ActorConfig, weights: Tensor | None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    if not hasattr(config, "global_batch_info"):
        raise TypeError(f"config must be verl's ActorConfig (it has global_batch_info), got {type(config).__name__}.")
    keywords = loss.keywords(config)
    if loss.aggregates:
        keywords |= _aggregation(loss.mode(mode), config.global_batch_info)
    elif weights is not None:
        weights = weights + 1e-10  # verl's: the logarithm of a weight of 0 is finite
    out = policy_loss(
        log_prob, advantages, old_logps=old_log_prob, completion_mask=mask, importance_weights=weights, **keywords
    )
    return out.loss, _logged(loss, out, old_log_prob, log_prob, advantages, mask, config)


@torch.no_grad()
def _logged(
    loss: Loss, out: LossOutput, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, mask: Tensor,
    config: ActorConfig,
) -> dict[str, float]:  # fmt: skip
    """verl's metrics, as numbers, which is how it takes them: all in one transfer."""
    log_ratio = log_prob.float() - old_log_prob.float()
    seen = Seen(log_ratio, advantages, mask != 0, lambda: _bounds(config), out.metrics)
    values = {name: metric(seen) for name, metric in loss.metrics.items()}
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return {name: next(numbers) if isinstance(value, Tensor) else value for name, value in values.items()}


def _register(name: str, loss: Loss) -> None:
    def compute(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = loss.default_mode,
        config: ActorConfig | None = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        return _compute(
            loss, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
        )

    compute.__name__ = compute.__qualname__ = f"compute_policy_loss_{PREFIX}{name}"
    compute.__doc__ = f"verl's ``{name}``, of its arguments (all (B, T)), results and metrics, on `policy_loss`."
    register_policy_loss(PREFIX + name)(compute)


def _bypass_mode(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's ``bypass_mode``: old_log_prob is the sampler's, and verl's own correction makes weights and mask."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    policy = getattr(config, "policy_loss", None)
    correction = None if policy is None else policy.get("rollout_correction")
    if correction is None:
        raise ValueError("fused_bypass_mode needs policy_loss.rollout_correction, and the config has none. Set it.")
    kind = correction.get("loss_type", "ppo_clip")
    if kind not in ("ppo_clip", "reinforce"):
        raise ValueError(f"rollout_correction.loss_type must be 'ppo_clip' or 'reinforce', got {kind!r}.")
    with torch.no_grad():
        made, mask, metrics = compute_rollout_correction_and_rejection_mask(
            old_log_prob=log_prob,
            rollout_log_prob=old_log_prob,
            response_mask=response_mask,
            rollout_is=correction.get("rollout_is"),
            rollout_is_threshold=correction.get("rollout_is_threshold", 2.0),
            rollout_is_batch_normalize=correction.get("rollout_is_batch_normalize", False),
            rollout_rs=correction.get("rollout_rs"),
            rollout_rs_threshold=correction.get("rollout_rs_threshold"),
        )
    clips = kind == "ppo_clip"  # then the ratio has the correction in it
    weights = None if clips or made is None else made.batch["rollout_is_weights"]
    loss, logged = _compute(LOSSES["vanilla"] if clips else REINFORCE, old_log_prob, log_prob, advantages, mask,
                            loss_agg_mode, config, weights)  # fmt: skip
    return loss, {**logged, **metrics}


if verl.__version__.split(".")[:2] != TESTED.split("."):
    warnings.warn(
        f"grpo_kernels is tested with verl {TESTED}, and this is {verl.__version__}. Compare a few steps with verl's "
        "own loss before you rely on it.",
        stacklevel=2,
    )
for _name, _loss in LOSSES.items():
    if _name in POLICY_LOSS_REGISTRY:
        _register(_name, _loss)
if "bypass_mode" in POLICY_LOSS_REGISTRY:
    register_policy_loss(PREFIX + "bypass_mode")(_bypass_mode)
