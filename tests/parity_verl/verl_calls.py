"""Calls of verl's registered losses, `fused_x` and `x`, with the same batch, and how far apart they may be.

verl's side is in float64, so that what is left is the plugin's own rounding.
"""

import torch
from verl_oracle import POLICY_LOSS_REGISTRY, actor_config

from tolerance import assert_within, bounds_of, written

CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5}
PROBABILITY_CLIP = {"clip_ratio_low": 0.03, "clip_ratio_high": 0.1, "clip_ratio_c": 1.5}
SETTINGS = {
    "vanilla": CLIP,
    "up": CLIP,
    "gspo": CLIP,
    "sapo": {"tau_pos": 1.2, "tau_neg": 1.6},
    "cispo": CLIP,
    "geo_mean": CLIP,
    "dppo_tv": PROBABILITY_CLIP,
    "dppo_kl": PROBABILITY_CLIP,
    "gpg": {},
    "dro": {"dro_beta": 0.3},
}
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
GLOBAL = {"dp_size": 2, "batch_num_tokens": 150, "global_batch_size": 16, "loss_scale_factor": 20}


def make_batch(B=5, T=12, *, seed=0, far=False) -> dict[str, torch.Tensor]:
    """verl's arguments in fp32: probabilities of all sizes, ratios on both sides of every bound, a sequence and some
    tokens masked, advantages of 0; with ``far`` log ratios beyond every clamp."""
    g = torch.Generator().manual_seed(seed)
    odds = 1.5 * torch.randn(B, T, generator=g)
    drift = 0.5 * torch.randn(B, T, generator=g) + torch.linspace(-1.2, 1.2, B)[:, None]
    lp, old = (torch.nn.functional.logsigmoid(x) for x in (odds, odds + drift))
    if far:
        lp[0] -= 11 + 18 * torch.rand(T, generator=g)
        old[1] -= 11 + 18 * torch.rand(T, generator=g)
        old[2, ::3] -= 25
    mask = torch.rand(B, T, generator=g) < 0.8
    mask[B - 2] = False
    advantages = torch.randn(B, T, generator=g)
    advantages[torch.rand(B, T, generator=g) < 0.1] = 0.0
    return {"old_log_prob": old, "log_prob": lp, "advantages": advantages * mask, "response_mask": mask}


def is_weights(batch: dict, seed=1) -> torch.Tensor:
    """Truncated at 2, and 0 at some tokens, as verl's masking modes leave them."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(batch["log_prob"].shape, generator=g).exp().clamp(max=2.0)
    weights[torch.rand(weights.shape, generator=g) < 0.1] = 0.0
    return weights * batch["response_mask"]


def call(name: str, batch: dict, dtype=torch.float64, *, mode="token-mean", weights=None, **settings):
    """(loss, gradient of log_prob, metrics) of a registered loss, its tensors in ``dtype``."""
    info = {key: settings.pop(key) for key in GLOBAL if key in settings}
    args = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    lp = args.pop("log_prob").detach().clone().requires_grad_()
    weights = None if weights is None else weights.to(dtype)
    config = actor_config(name, **settings)
    config.global_batch_info.update(info)
    loss, metrics = POLICY_LOSS_REGISTRY[name](
        log_prob=lp, **args, loss_agg_mode=mode, config=config, rollout_is_weights=weights
    )
    loss.backward()
    return loss.detach(), lp.grad, metrics


def allowed_to(name, batch, **settings) -> dict[str, torch.Tensor]:
    """Of an fp32 computation of verl's loss: what verl's own says where the inputs are off by their rounding."""
    floats = {key: x for key, x in batch.items() if x.is_floating_point() and key != "response_mask"}

    def evaluate(**moved):
        loss, grad, metrics = call(name, {**batch, **{key: x.detach() for key, x in moved.items()}}, **settings)
        return {" loss": loss, " grad": grad, **{key: torch.tensor(x).double() for key, x in metrics.items()}}

    return bounds_of(evaluate, floats)


def assert_same(ours, verls, allowed, dtype=torch.float32) -> None:
    loss, grad, metrics = ours
    want_loss, want_grad, want_metrics = verls
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert_within(loss, want_loss, allowed[" loss"], "loss")
    assert_within(grad, want_grad, allowed[" grad"] + written(want_grad.double(), dtype), "gradient")
    assert list(metrics) == list(want_metrics)
    for key, value in want_metrics.items():
        assert type(metrics[key]) is float
        assert_within(torch.tensor(metrics[key]), torch.tensor(value).double(), allowed[key], key)


def check(name: str, batch: dict, **settings) -> None:
    settings = {**SETTINGS.get(name, {}), **settings}
    assert_same(call(f"fused_{name}", batch, torch.float32, **settings), call(name, batch, **settings),
                allowed_to(name, batch, **settings))  # fmt: skip
