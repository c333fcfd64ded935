"""The other recipes of docs/hosts.md, as test_hosts.py: torchforge, prime-rl, OpenRLHF."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import host_maths
from host_calls import V, compare, load, noisy

# --- torchforge ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Metric:
    key: str
    value: torch.Tensor
    reduction: object


@dataclasses.dataclass
class LossResult:  # forge.rl.loss.types.LossOutput, and prime-rl's LossOutputs
    loss: torch.Tensor
    metrics: object


def forge_recipe(monkeypatch):
    return load(monkeypatch, "torchforge", forge__rl__loss__types={"LossOutput": LossResult},
                forge__observability__metrics={"Metric": Metric, "Reduce": SimpleNamespace(MEAN="mean")})  # fmt: skip


def forge_batch(B=3, S=9):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, S, V, generator=g)
    mask = (torch.rand(B, S, generator=g) < 0.7).float()
    mask[:, -1] = 0
    ids = torch.randint(V, (B, S), generator=g)
    near, _ = host_maths.logps_and_entropy(logits, ids)
    targets = {"target_ids": ids.masked_fill(mask == 0, -100), "loss_mask": mask,
               "advantages": torch.tensor([0.7, -1.1, 0.2])[:, None].expand(B, S),  # as torchforge's collate
               "generator_logprobs": noisy(near, g), "ref_logprobs": noisy(near, g)}  # fmt: skip
    return targets, logits.requires_grad_()


@pytest.mark.parametrize("scale", (None, 23.0))
@pytest.mark.parametrize("beta", (0.0, 0.1))
@pytest.mark.parametrize("agg_type", ("fixed_horizon", "token_mean", "sequence_mean"))
def test_torchforge(agg_type, beta, scale, monkeypatch):
    targets, logits = forge_batch()
    targets["loss_scale"] = None if scale is None else torch.tensor(scale)
    if not beta:
        del targets["ref_logprobs"]
    loss_fn = forge_recipe(monkeypatch).FusedGRPOLoss(beta=beta, agg_type=agg_type)

    def run(x):
        out = loss_fn(x, **targets)
        assert all(metric.reduction == "mean" for metric in out.metrics)
        return out.loss, {metric.key: metric.value for metric in out.metrics}

    compare(run, lambda x: host_maths.torchforge(loss_fn, x, **targets), logits)


def test_torchforge_reads_no_position_without_a_target(monkeypatch):
    """torchforge gives the last position the target -100, whatever the mask says of it."""
    loss_fn, (targets, logits) = forge_recipe(monkeypatch).FusedGRPOLoss(), forge_batch()
    want = loss_fn(logits, **targets).loss
    targets["loss_mask"] = torch.ones_like(targets["loss_mask"])
    assert torch.equal(loss_fn(logits, **targets).loss, want)


# --- prime-rl --------------------------------------------------------------------------------------

PRIME = {
    "clipped": ({"epsilon_high": 0.28}, lambda r, lp, A: host_maths.clipped(r.exp(), A, 0.2, 0.28)[0]),
    "cispo": ({"loss_type": "cispo", "cispo_max": 1.1}, lambda r, lp, A: -r.exp().clamp(max=1.1).detach() * A * lp),
}


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("name", PRIME)
def test_prime_rl(name, weighted, monkeypatch):
    types = {"LossInputs": object, "LossOutputs": LossResult}
    recipe = load(monkeypatch, "prime_rl", prime_rl__trainer__rl__loss=types)
    config, term = PRIME[name]
    g, lengths, rl_scale = torch.Generator().manual_seed(0), (6, 9, 4), 41
    packed = torch.log_softmax(torch.randn(sum(lengths), V, generator=g), -1)[:, 0].requires_grad_()
    inputs = {"inference_logprobs": noisy(packed.detach(), g), "advantages": torch.randn(packed.shape, generator=g),
              "loss_mask": torch.rand(packed.shape, generator=g) < 0.7, "ref_logprobs": None,
              "loss_weights": torch.rand(packed.shape, generator=g) if weighted else None}  # fmt: skip

    def compute_loss(x):
        """prime-rl's: a sum over the sequences, divided by the tokens of the batch; metrics side by side."""
        results = []
        for at, n in zip((0, 6, 15), lengths):
            one = {key: value if value is None else value[at : at + n] for key, value in inputs.items()}
            results.append(recipe.fused_policy_loss(SimpleNamespace(trainer_logprobs=x[at : at + n], **one), **config))
        logged = {key: torch.stack([r.metrics[key] for r in results]).mean() for key in results[0].metrics}
        return sum(r.loss for r in results) / rl_scale, {"ratio/mean": logged["ratio/mean"]}

    def maths(x):
        r, mask = x - inputs["inference_logprobs"], inputs["loss_mask"].double()
        per_token = term(r, x, inputs["advantages"].double()) * mask
        ratios = [host_maths.mean(a, m) for a, m in zip(r.exp().split(lengths), mask.split(lengths))]
        weights = inputs["loss_weights"] if weighted else torch.ones_like(mask)
        return (per_token * weights).sum() / rl_scale, {"ratio/mean": torch.stack(ratios).mean()}

    compare(compute_loss, maths, packed)
    if weighted:
        one = SimpleNamespace(trainer_logprobs=packed, **{**inputs, "ref_logprobs": packed.detach()})
        with pytest.raises(ValueError, match="loss_weights"):
            recipe.fused_policy_loss(one, beta=0.1)


# --- OpenRLHF --------------------------------------------------------------------------------------

GLOBAL = {"dp_size": 2, "batch_num_tokens": torch.tensor(37.0), "global_batch_size": torch.tensor(9.0)}
OPENRLHF = {
    "ppo": ({}, GLOBAL),
    "alone": ({"clip_eps_high": 0.28}, {}),
    "dual clip": ({"dual_clip": 1.3}, GLOBAL),
    "per sample": ({"token_level_loss": False}, GLOBAL),
    "per sample, alone": ({"token_level_loss": False}, {}),
    "gspo": ({"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.05}, GLOBAL),
    "gspo, the sampler's": ({"policy_loss_type": "gspo", "clip_eps_low": 0.05, "is_correction_level": "token"}, GLOBAL),
    "token, mask": ({"is_correction_level": "token", "is_correction_threshold": (0.8, 1.2)}, GLOBAL),
    "token, clip": ({"is_correction_level": "token", "is_correction_mode": "clip",
                     "is_correction_threshold": (0.8, 1.2)}, GLOBAL),
    "seq, mask": ({"is_correction_level": "seq", "is_correction_threshold": (0.95, 1.1)}, GLOBAL),
}  # fmt: skip


@pytest.mark.parametrize("case", OPENRLHF)
def test_openrlhf(case, monkeypatch):
    options, counts = OPENRLHF[case]
    loss_fn = load(monkeypatch, "openrlhf").FusedPolicyLoss(**options)
    assert isinstance(loss_fn, nn.Module)
    g, shape = torch.Generator().manual_seed(0), (4, 9)
    logps = torch.log_softmax(torch.randn(*shape, V, generator=g), -1)[..., 0]
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 1])[:, None]
    old, A = noisy(logps, g), torch.randn(shape, generator=g)
    rollout = noisy(old, g, 0.15)
    names = ("loss", "clip_ratio", "ppo_kl", "vllm_kl", "is_filter_ratio")

    def named(values):
        return values[0], {name: value for name, value in zip(names, values) if value is not None}

    compare(
        lambda x: named(loss_fn(x, old, A, action_mask=mask, rollout_log_probs=rollout, **counts)),
        lambda x: named(host_maths.openrlhf(options, x, old.double(), A.double(), mask.double(), rollout.double(),
                                            **counts)),
        logps.requires_grad_(),
    )  # fmt: skip


def test_openrlhf_refuses(monkeypatch):
    recipe = load(monkeypatch, "openrlhf")
    with pytest.raises(NotImplementedError, match="is_correction_gating"):
        recipe.FusedPolicyLoss(is_correction_level="token", is_correction_gating="tv")
    for policy_loss_type in ("ppo", "gspo"):  # as OpenRLHF
        with pytest.raises(ValueError, match="clips tokens alone"):
            recipe.FusedPolicyLoss(
                is_correction_level="seq", is_correction_mode="clip", policy_loss_type=policy_loss_type
            )
