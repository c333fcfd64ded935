"""Packed input against the same sequences padded, and policy_loss against grpo_loss."""

import dataclasses

import pytest
import torch
from torch import Tensor

from reference import LOSS_TYPES, Knobs, grpo_loss, policy_loss
from reference.knobs import TERM_LEVELS
from reference.weights import WEIGHTS
from reference_cases import F64, NAN, TIGHT, f64, grad, noise, random_batch, random_logps

LENGTHS = torch.tensor([7, 3, 5, 0, 1, 6])  # of the B = 6 sequences of random_logps, T = 7; one has no row
USED = torch.arange(7) < LENGTHS[:, None]
CU = torch.cat([torch.zeros(1).long(), LENGTHS.cumsum(0)]).int()


def padded_batch(**more: Tensor) -> dict:
    """What lies beyond a sequence's length is masked, and NaN where a float may be."""
    batch = {**random_logps(), **more}
    batch["completion_mask"] = batch["completion_mask"] & USED
    for name, x in batch.items():
        if isinstance(x, Tensor) and x.shape == USED.shape and x.is_floating_point():
            batch[name] = torch.where(USED, x.detach(), NAN)
    batch["logps"].requires_grad_()
    return batch


def packed(batch: dict) -> dict:
    batch = {name: x[USED] if x.shape[:2] == USED.shape else x for name, x in batch.items()}
    batch["logps"] = batch["logps"].detach().requires_grad_()
    return {**batch, "cu_seqlens": CU}


def assert_same(padded: dict, knobs: dict) -> None:
    flat = packed(padded)
    a, b = policy_loss(**padded, **knobs), policy_loss(**flat, **knobs)
    if knobs.get("reduction") == "none":
        torch.testing.assert_close(b.loss, a.loss[USED], **TIGHT)
        a, b = (dataclasses.replace(out, loss=out.loss.square().sum()) for out in (a, b))
    torch.testing.assert_close(b.loss, a.loss, **TIGHT)
    slope = grad(a.loss, padded["logps"])
    torch.testing.assert_close(grad(b.loss, flat["logps"]), slope[USED], **TIGHT)
    for field in ("logps", "entropy", "per_token_loss", "kl", "advantages", "weights", "importance_weights"):
        x, y = getattr(a, field), getattr(b, field)
        assert x is y is None or torch.equal(x[USED], y), field
    assert a.metrics.keys() == b.metrics.keys()
    for name, value in a.metrics.items():
        torch.testing.assert_close(b.metrics[name], value, **TIGHT, equal_nan=True)


KNOBS = {"beta": 0.1, "use_bias_correction_kl": True, "entropy_coef": 0.02, "max_completion_length": 9}


@pytest.mark.parametrize(("term", "level"), [(t, level) for t, levels in TERM_LEVELS.items() for level in levels])
@pytest.mark.parametrize("per_token", [False, True])
def test_packed_is_padded(term: str, level: str, per_token: bool):
    batch = padded_batch(importance_weights=noise(6, 7, seed=5).exp())
    if per_token:
        batch["advantages"] = torch.where(USED, noise(6, 7, seed=6), NAN)
    knobs = {"policy_term": term, "importance_sampling_level": level, "loss_agg_mode": "sequence-mean"}
    assert_same(batch, KNOBS | knobs)


@pytest.mark.parametrize("agg", WEIGHTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_packed_is_padded_at_every_weighting(agg: str, reduction: str):
    batch = padded_batch(importance_weights=f64([2, 0.5, 1, 3, 0, 1.5]))
    assert_same(batch, KNOBS | {"loss_agg_mode": agg, "reduction": reduction})


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "seq_mask_tis"])
@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "vespo"])
def test_packed_is_padded_with_every_correction(mode: str, loss_type: str):
    batch = padded_batch(sampling_logps=random_logps()["old_logps"] + 0.3 * noise(6, 7, seed=5))
    knobs = {"sampling_correction": mode, "loss_type": loss_type, "off_policy_mask_threshold": 0.1}
    assert_same(batch, KNOBS | knobs | {"top_entropy_quantile": 0.7})


def test_packed_rewards_and_missing_old_logps():
    batch = padded_batch(rewards=f64([1, 0, NAN, 1, 0.5, 0]))
    del batch["advantages"], batch["old_logps"]
    flat = packed(batch)
    more = {"num_generations": 3, "loss_type": "gspo"}
    a, b = policy_loss(**batch, **more), policy_loss(**flat, **more)
    torch.testing.assert_close(b.loss, a.loss, **TIGHT)
    assert torch.equal(b.advantages, a.advantages[USED])
    assert b.metrics["reward_std"] == a.metrics["reward_std"]


@pytest.mark.parametrize("temperature", ["number", "(S,)", "(N,)"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_packed_logits(loss_type: str, temperature: str):
    """grpo_loss; every token in use, and no mask given."""
    batch = random_batch(B=4)
    del batch["completion_mask"]
    used = torch.arange(5) < torch.tensor([2, 5, 4, 1])[:, None]
    flat = {name: x.detach()[used] if x.shape[:2] == used.shape else x for name, x in batch.items()}
    flat["logits"].requires_grad_()
    tau = {"number": torch.tensor(0.7), "(S,)": f64([0.7, 1.1, 0.9, 0.8]), "(N,)": noise(4, 5).exp()}[temperature]
    knobs = {"loss_type": loss_type, "max_completion_length": 9, "entropy_coef": 0.1, "beta": 0.1}
    a = grpo_loss(**batch, completion_mask=used, temperature=tau, **knobs)
    flat_tau = tau[used] if temperature == "(N,)" else tau
    cu = torch.tensor([0, 2, 7, 11, 12])
    b = grpo_loss(**flat, cu_seqlens=cu, temperature=flat_tau, **knobs)
    torch.testing.assert_close(b.loss, a.loss, **TIGHT)
    torch.testing.assert_close(grad(b.loss, flat["logits"]), grad(a.loss, batch["logits"])[used], **TIGHT)
    torch.testing.assert_close(b.logps, a.logps[used], **TIGHT)


def test_nothing_packed():
    out = policy_loss(torch.zeros(0, dtype=F64).requires_grad_(), torch.ones(2), cu_seqlens=torch.tensor([0, 0, 0]))
    assert out.loss == 0 and out.logps.shape == (0,)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_loss_is_grpo_loss_of_the_log_probs(loss_type: str):
    batch = random_batch()
    kwargs = {"loss_type": loss_type, "beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.7}
    a = grpo_loss(**batch, **kwargs)
    rest = {name: x for name, x in batch.items() if name not in ("logits", "completion_ids")}
    lp = torch.where(batch["completion_mask"], a.logps, NAN)
    entropy = torch.where(batch["completion_mask"], a.entropy, NAN)
    b = policy_loss(lp, entropy=entropy, **rest, **kwargs)
    assert torch.equal(a.loss, b.loss)
    assert {name: x.item() for name, x in a.metrics.items()} == {name: x.item() for name, x in b.metrics.items()}


@pytest.mark.parametrize(("loss_type", "parts"), LOSS_TYPES.items())
def test_a_loss_type_is_its_parts(loss_type: str, parts: tuple):
    """Any loss type can be put together on top of any other."""
    term, level, agg = parts
    batch = random_logps()
    a = policy_loss(**batch, loss_type=loss_type)
    b = policy_loss(**batch, loss_type="bnpo", policy_term=term, importance_sampling_level=level, loss_agg_mode=agg)
    assert torch.equal(a.loss, b.loss)
    assert (Knobs(loss_type=loss_type).term, Knobs(loss_type=loss_type).level) == (term, level)
