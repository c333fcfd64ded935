"""The distillation recipes of docs/distillation.md, as test_hosts.py: verl, NeMo-RL, and slime's teacher.

What stands at a masked token is NaN or no token at all in every test: it must not be read.
"""

import enum
import math
from types import SimpleNamespace

import pytest
import torch

import host_maths
from host_calls import V, compare, load, noisy
from test_hosts import SLIME, SLIME_CASES, slime_batch, slime_call, slime_recipe

K = 5


def nested(x, offsets):
    return torch.nested.nested_tensor_from_jagged(x, offsets=offsets)


def listed(logits, g):
    """The K likeliest tokens of a teacher near the student: (log-probabilities, ids), (..., K)."""
    return noisy(logits, g, 2.0).log_softmax(-1).topk(K)


# --- verl ------------------------------------------------------------------------------------------

VERL_CASES = {
    "free": {"log_prob_min_clamp": None, "loss_max_clamp": None},
    "floor": {"log_prob_min_clamp": -3.0, "loss_max_clamp": None},
    "clamped": {"log_prob_min_clamp": -3.0, "loss_max_clamp": 0.4},
    "default": {"log_prob_min_clamp": -10.0, "loss_max_clamp": 10.0},
}


def verl_recipe(monkeypatch):
    host = SimpleNamespace(compute_topk_loss=None)
    recipe = load(monkeypatch, "verl_distillation", verl__trainer__distillation={"losses": host})
    assert host.compute_topk_loss is recipe.fused_topk_loss
    return recipe


def verl_batch(padded=False):
    """Three sequences one after the other; the teacher's words for prompts are nothing that may be read."""
    g = torch.Generator().manual_seed(0)
    prompts, responses = torch.tensor([4, 2, 3]), torch.tensor([5, 3, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), (prompts + responses).cumsum(0)])
    N = int(offsets[-1])
    logits = 2 * torch.randn(1, N, V, generator=g)
    told, ids = listed(logits, g)
    told[0, 1, 2] = told[0, 5, 0] = -30.0
    rows = torch.cat([torch.arange(end - n - 1, end - 1) for end, n in zip(offsets[1:].tolist(), responses.tolist())])
    outside = torch.ones(N, dtype=torch.bool).index_fill(0, rows, False)
    ids[0, outside], told[0, outside] = -7, math.nan
    data = {"input_ids": nested(torch.randint(V, (N,), generator=g), offsets),
            "teacher_ids": nested(ids[0].int(), offsets), "teacher_logprobs": nested(told[0], offsets)}  # fmt: skip
    if padded:
        right = torch.arange(5) < responses[:, None]
        left = torch.arange(4) >= 4 - prompts[:, None]
        data |= {"prompts": torch.zeros(3, 4), "responses": torch.zeros(3, 5),
                 "attention_mask": torch.cat([left, right], 1).long()}  # fmt: skip
    else:
        ends = torch.cat([torch.zeros(1, dtype=torch.long), responses.cumsum(0)])
        data["responses"] = nested(torch.zeros(int(ends[-1])), ends)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    return data, mask, responses, offsets, logits.requires_grad_()


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("case", VERL_CASES)
def test_verl(case, padded, monkeypatch):
    recipe, (data, mask, lengths, offsets, logits) = verl_recipe(monkeypatch), verl_batch(padded)
    settings = SimpleNamespace(**VERL_CASES[case])
    config = SimpleNamespace(strategy="fsdp")

    def whole(outputs):
        """What verl makes of the rows: the responses, padded; clamps; the mean over the tokens of all ranks."""
        wide = {}
        for name, value in outputs.items():
            rows = [value[0, end - n - 1 : end - 1] for end, n in zip(offsets[1:].tolist(), lengths.tolist())]
            wide[name] = torch.stack([torch.nn.functional.pad(row, (0, 5 - len(row))) for row in rows])
        losses = wide["distillation_losses"].clamp_min(0.0)
        if settings.loss_max_clamp is not None:
            losses = losses.clamp(-settings.loss_max_clamp, settings.loss_max_clamp)
        masses = {name: wide[name][mask > 0].mean() for name in ("student_mass", "teacher_mass")}
        return (losses * mask).sum() / 19 * 2, masses

    def run(x):
        return whole(recipe.fused_topk_loss(config, SimpleNamespace(distillation_loss=settings), data, x, "thd"))

    compare(run, lambda x: whole(host_maths.verl_topk(settings, data, x)), logits)


@pytest.mark.parametrize("strategy", ("fsdp2", "veomni"))
def test_verl_of_each_strategy(strategy, monkeypatch):
    """verl 0.9.1 computes one loss for the three of them."""
    recipe, (data, _, _, _, logits) = verl_recipe(monkeypatch), verl_batch()
    settings = SimpleNamespace(distillation_loss=SimpleNamespace(**VERL_CASES["default"]))
    want, got = (
        recipe.fused_topk_loss(SimpleNamespace(strategy=name), settings, data, logits, "thd")["distillation_losses"]
        for name in ("fsdp", strategy)
    )
    assert torch.equal(got, want)


def test_verl_refuses(monkeypatch):
    recipe, (data, _, _, _, logits) = verl_recipe(monkeypatch), verl_batch()
    settings = SimpleNamespace(distillation_loss=SimpleNamespace(**VERL_CASES["default"]))
    for strategy, rows in (("megatron", logits), ("fsdp", logits[:, :8])):  # Megatron's shards, Ulysses' slices
        with pytest.raises(NotImplementedError, match="sequence parallelism"):
            recipe.fused_topk_loss(SimpleNamespace(strategy=strategy), settings, data, rows, "thd")


# --- NeMo-RL ---------------------------------------------------------------------------------------

NEMO_CASES = {
    (kind, zero): {"kl_type": kind, "mixed_kl_weight": 0.3, "zero_outside_topk": zero}
    for kind in ("forward", "reverse", "mixed")
    for zero in (False, True)
}


def nemo_recipe(monkeypatch, **more):
    kinds = {"LossInputType": enum.Enum("LossInputType", "LOGIT"), "LossType": enum.Enum("LossType", "TOKEN_LEVEL")}
    return load(monkeypatch, "nemo_rl_distillation", nemo_rl__algorithms__loss__interfaces=kinds, **more)


def nemo_batch(B=3, S=7):
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(B, S + 2, V, generator=g)  # rows behind the last token: padding of the forward
    data = {"input_ids": torch.randint(V, (B, S), generator=g), "sample_mask": torch.tensor([1.0, 0.0, 1.0]),
            "token_mask": (torch.rand(B, S, generator=g) < 0.7).float()}  # fmt: skip
    values, ids = listed(logits[:, :S], g)
    counted = torch.zeros(B, S, dtype=torch.bool)
    counted[:, :-1] = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]) > 0
    values[~counted], ids[~counted] = math.nan, -7
    data |= {"teacher_topk_logits": values + 3.0, "teacher_topk_indices": ids}
    return data, logits.requires_grad_(), torch.tensor(5.0), torch.tensor(23.0)


@pytest.mark.parametrize("case", NEMO_CASES)
def test_nemo_rl(case, monkeypatch):
    cfg, (data, logits, seqs, toks) = SimpleNamespace(**NEMO_CASES[case]), nemo_batch()
    recipe = nemo_recipe(monkeypatch)
    loss_fn = recipe.FusedDistillationLoss(cfg)
    assert loss_fn.input_type is recipe.LossInputType.LOGIT and loss_fn.loss_type is recipe.LossType.TOKEN_LEVEL

    def run(x):
        loss, log = loss_fn(data=data, global_valid_seqs=seqs, global_valid_toks=toks, logits=x)
        assert type(log["loss"]) is float
        return loss, log

    compare(run, lambda x: host_maths.nemo_rl_distillation(cfg, x, data, toks.double()), logits)


def test_nemo_rl_refuses(monkeypatch):
    group = object()
    state = {"get_tensor_model_parallel_group": lambda: group}
    recipe = nemo_recipe(monkeypatch, megatron__core__parallel_state=state)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    data, logits, seqs, toks = nemo_batch()
    cfg = SimpleNamespace(**NEMO_CASES["mixed", False])
    with pytest.raises(NotImplementedError, match="tensor_parallel_size"):
        recipe.FusedDistillationLoss(cfg, megatron=True)(logits, data, seqs, toks)
    with pytest.raises(NotImplementedError, match="context_parallel_size"):
        recipe.FusedDistillationLoss(cfg)(logits[:, :3], data, seqs, toks)


# --- slime -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ("grpo", "per token", "gspo", "kl"))
def test_slime_with_a_teacher(case, monkeypatch):
    """slime's teacher tells the sampled tokens' log-probabilities, which go into the advantages before the loss."""
    args = SimpleNamespace(**{**SLIME, **SLIME_CASES[case]}, opd_kl_coef=0.5)
    recipe, (batch, logits) = slime_recipe(monkeypatch), slime_batch()
    g = torch.Generator().manual_seed(1)
    batch["teacher_log_probs"] = [noisy(x, g) for x in batch["log_probs"]]

    def fused(args, batch, x, reduce):
        """As slime does before any loss; what it finds at a masked token is no number."""
        batch = {**batch, "opd_reverse_kl": [], "advantages": list(batch["advantages"])}
        for i, (own, told, kept) in enumerate(zip(batch["log_probs"], batch["teacher_log_probs"], batch["loss_masks"])):
            drift = torch.where(kept > 0, own - told, math.nan)
            batch["opd_reverse_kl"].append(drift)
            batch["advantages"][i] = batch["advantages"][i] - args.opd_kl_coef * drift
        return recipe.fused_policy_loss(args, batch, x, reduce)

    compare(lambda x: slime_call(args, batch, x, fused),
            lambda x: slime_call(args, batch, x, host_maths.slime_distillation), logits)  # fmt: skip
