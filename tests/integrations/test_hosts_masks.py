"""In the recipes of docs/hosts.md a mask selects: what stands at a masked token is not read, and no token is no loss.

The right numbers of clean input are in test_hosts.py and test_hosts_others.py; here input with NaN and infinities at
the masked places must give the same to the bit.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.baselines import loss_of_logps
from benchmarks.host_report import by_hand
from benchmarks.ppo_vs_grpo import ppo
from host_calls import V, load, noisy
from test_hosts import (
    NEMO,
    NEMO_CASES,
    ROLL,
    ROLL_CASES,
    SLIME,
    SLIME_CASES,
    Worker,
    nemo_batch,
    nemo_recipe,
    roll_batch,
    slime_batch,
    slime_call,
    slime_recipe,
)
from test_hosts_others import OPENRLHF, PRIME, LossResult, forge_batch, forge_recipe

NAN = math.nan
FILLS = (NAN, math.inf, -math.inf)


def fill(x, mask, value):
    """``value`` at the masked places, in a tensor of its own."""
    mask = mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim()))
    return torch.where(mask != 0, x.detach(), value)


def outcome(run, leaf):
    """(loss, gradient, metrics) as tensors."""
    leaf = leaf.detach().requires_grad_()
    loss, log = run(leaf)
    loss.backward()
    return loss.detach(), leaf.grad, {name: torch.as_tensor(value).detach() for name, value in log.items()}


def check(prepare, infinite=()):
    """prepare(value, empty) -> (run, leaf): ``value`` stands at the masked places; ``empty``: all are masked.

    ``infinite``: metrics that are over no token at all, and say so.
    """
    want = outcome(*prepare(None, False))
    assert all(value.isfinite().all() for value in (want[0], want[1], *want[2].values()))
    for value in FILLS:
        loss, grad, log = outcome(*prepare(value, False))
        assert torch.equal(loss, want[0]) and torch.equal(grad, want[1])
        for name, one in log.items():
            assert torch.equal(one, want[2][name]), name
    for value in (None, *FILLS):
        loss, grad, log = outcome(*prepare(value, True))
        assert loss == 0 and (grad == 0).all()
        assert {name for name, one in log.items() if not one.isfinite()} == set(infinite)


@pytest.mark.parametrize("case", SLIME_CASES)
def test_slime(case, monkeypatch):
    args, recipe = SimpleNamespace(**{**SLIME, **SLIME_CASES[case]}), slime_recipe(monkeypatch)

    def prepare(value, empty):
        batch, logits = slime_batch()
        if "log_probs" in SLIME_CASES[case]:
            del batch["log_probs"]
        if empty:
            batch["loss_masks"] = [torch.zeros_like(mask) for mask in batch["loss_masks"]]
        if value is not None:
            for name in {"advantages", "log_probs", "ref_log_probs", "rollout_log_probs"} & batch.keys():
                batch[name] = [fill(x, mask, value) for x, mask in zip(batch[name], batch["loss_masks"])]
            scored, end = torch.zeros(logits.shape[:2]), 0
            for total, mask in zip(batch["total_lengths"], batch["loss_masks"]):
                end += total
                scored[0, end - len(mask) - 1 : end - 1] = mask.float()
            logits = fill(logits, scored, value)
        return lambda x: slime_call(args, batch, x, recipe.fused_policy_loss), logits

    check(prepare)


@pytest.mark.parametrize("case", NEMO_CASES)
def test_nemo_rl(case, monkeypatch):
    loss_fn = nemo_recipe(monkeypatch).FusedClippedPGLoss(SimpleNamespace(**{**NEMO, **NEMO_CASES[case]}))

    def prepare(value, empty):
        data, logits, seqs, toks = nemo_batch()
        if empty:
            data["sample_mask"] = torch.zeros_like(data["sample_mask"])
            seqs, toks = torch.zeros_like(seqs), torch.zeros_like(toks)
        mask = data["token_mask"] * data["sample_mask"][:, None]
        mask[:, 0] = 0
        if value is not None:
            for name in ("advantages", "prev_logprobs", "generation_logprobs", "reference_policy_logprobs"):
                data[name] = fill(data[name], mask, value)
            scored = torch.zeros(logits.shape[:2])
            scored[:, : mask.shape[1] - 1] = mask[:, 1:]
            logits = fill(logits, scored, value)
        return lambda x: loss_fn(x, data, seqs, toks), logits

    # As NeMo-RL's own, over no token.
    check(prepare, {f"probs_ratio{held}_{end}" for held in ("", "_clamped") for end in ("min", "max")})


@pytest.mark.parametrize("case", ROLL_CASES)
def test_roll(case, monkeypatch):
    recipe = load(monkeypatch, "roll", roll__pipeline__base_worker={"ActorWorker": Worker})
    worker = recipe.FusedActorWorker(SimpleNamespace(**{**ROLL, **ROLL_CASES[case]}))

    def prepare(value, empty, count=torch.tensor):
        data, logits = roll_batch()
        batch = data.batch
        if empty:
            batch["response_mask"] = torch.zeros_like(batch["response_mask"])
            data.meta_info = {name: {"response_mask": count(0)} for name in data.meta_info}
        mask = batch["response_mask"][:, 1:]
        if value is not None:
            for name in ("old_log_probs", "ref_log_probs", "advantages"):
                batch[name] = fill(batch[name], mask, value)
            logits = fill(logits, torch.nn.functional.pad(mask, (0, 1)), value)
        return lambda x: worker.loss_func(data, x), logits

    check(prepare)
    assert outcome(*prepare(None, True, int))[0] == 0


@pytest.mark.parametrize("beta", (0.0, 0.1))
@pytest.mark.parametrize("agg_type", ("fixed_horizon", "token_mean", "sequence_mean"))
def test_torchforge(agg_type, beta, monkeypatch):
    loss_fn = forge_recipe(monkeypatch).FusedGRPOLoss(beta=beta, agg_type=agg_type)

    def prepare(value, empty):
        targets, logits = forge_batch()
        targets["loss_scale"] = torch.tensor(0.0 if empty else 23.0)
        if empty:
            targets["loss_mask"] = torch.zeros_like(targets["loss_mask"])
        if not beta:
            del targets["ref_logprobs"]
        if value is not None:
            for name in {"advantages", "generator_logprobs", "ref_logprobs"} & targets.keys():
                targets[name] = fill(targets[name], targets["loss_mask"], value)
            logits = fill(logits, targets["loss_mask"], value)

        def run(x):
            out = loss_fn(x, **targets)
            return out.loss, {metric.key: metric.value for metric in out.metrics}

        return run, logits

    check(prepare)


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("name", PRIME)
def test_prime_rl(name, weighted, monkeypatch):
    types = {"LossInputs": object, "LossOutputs": LossResult}
    recipe, config = load(monkeypatch, "prime_rl", prime_rl__trainer__rl__loss=types), PRIME[name][0]

    def prepare(value, empty):
        g = torch.Generator().manual_seed(0)
        logps = torch.log_softmax(torch.randn(9, V, generator=g), -1)[:, 0]
        mask = torch.arange(9) % 3 != 2 if not empty else torch.zeros(9, dtype=torch.bool)
        inputs = {"inference_logprobs": noisy(logps, g), "advantages": torch.randn(9, generator=g),
                  "ref_logprobs": None, "loss_weights": torch.rand(9, generator=g) if weighted else None}  # fmt: skip
        if value is not None:
            inputs = {key: x if x is None else fill(x, mask, value) for key, x in inputs.items()}
            logps = fill(logps, mask, value)

        def run(x):
            out = recipe.fused_policy_loss(SimpleNamespace(trainer_logprobs=x, loss_mask=mask, **inputs), **config)
            return out.loss, out.metrics

        return run, logps

    check(prepare)


def openrlhf_prepare(recipe, options, counts):
    def prepare(value, empty):
        g, shape = torch.Generator().manual_seed(0), (4, 9)
        logps = torch.log_softmax(torch.randn(*shape, V, generator=g), -1)[..., 0]
        mask = torch.arange(9) < torch.tensor([9, 4, 7, 0])[:, None] * (not empty)
        old, A = noisy(logps, g), torch.randn(shape, generator=g)
        rollout = noisy(old, g, 0.15)
        given = {name: x * (not empty) if name != "dp_size" else x for name, x in counts.items()}
        if value is not None:
            logps, old, A, rollout = (fill(x, mask, value) for x in (logps, old, A, rollout))
        loss_fn, names = recipe.FusedPolicyLoss(**options), ("clip_ratio", "ppo_kl", "vllm_kl", "is_filter_ratio")

        def run(x):
            loss, *log = loss_fn(x, old, A, action_mask=mask, rollout_log_probs=rollout, **given)
            return loss, {name: one for name, one in zip(names, log) if one is not None}

        return run, logps

    return prepare


@pytest.mark.parametrize("case", OPENRLHF)
def test_openrlhf(case, monkeypatch):
    options, counts = OPENRLHF[case]
    recipe = load(monkeypatch, "openrlhf")
    check(openrlhf_prepare(recipe, options, counts))
    numbers = {name: float(x) for name, x in counts.items()}
    assert outcome(*openrlhf_prepare(recipe, options, numbers)(None, True))[0] == 0


def test_openrlhf_of_one_token(monkeypatch):
    """The KL of the policies is 0, and the token behind has no say in it."""
    loss_fn = load(monkeypatch, "openrlhf").FusedPolicyLoss()
    logps, old = torch.zeros(1, 2, requires_grad=True), torch.tensor([[0.0, NAN]])
    loss, clip_ratio, ppo_kl, _, _ = loss_fn(logps, old, torch.ones(1, 2), action_mask=torch.tensor([[1.0, 0.0]]))
    assert (loss, clip_ratio, ppo_kl) == (-1.0, 0.0, 0.0)


# --- benchmarks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ("token", "sequence"))
def test_the_baseline_of_benchmarks(objective):
    def prepare(value, empty):
        g, shape = torch.Generator().manual_seed(0), (3, 5)
        mask = (torch.arange(5) < torch.tensor([5, 2, 3])[:, None]).long() * (not empty)
        lp, old, ref = (torch.randn(shape, generator=g) for _ in range(3))
        if value is not None:
            old, ref = fill(old, mask, value), fill(ref, mask, value)
        inputs = SimpleNamespace(mask=mask, advantages=torch.randn(3, generator=g), old_logps=old, ref_logps=ref,
                                 case=SimpleNamespace(objective=objective, beta=0.1))  # fmt: skip
        return lambda x: (loss_of_logps(inputs, x), {}), lp

    run, leaf = prepare(None, False)
    for value in FILLS:
        assert torch.equal(prepare(value, False)[0](leaf)[0], run(leaf)[0])
        assert prepare(value, True)[0](leaf)[0] == 0


def test_the_eager_losses_of_the_host_report():
    g = torch.Generator().manual_seed(0)
    x, ids = torch.randn(2, 3, V, generator=g), torch.randint(V, (2, 3), generator=g)
    mask, old, A = torch.tensor([[1.0, 1, 0], [1, 0, 0]]), torch.randn(2, 3, generator=g), torch.ones(2)
    want = by_hand(x, ids, A, old, mask)
    for value in FILLS:
        for metrics in (False, True):
            assert torch.equal(by_hand(x, ids, A, fill(old, mask, value), mask, metrics), want)
            assert by_hand(x, ids, A, fill(old, mask, value), 0 * mask, metrics) == 0


def test_the_parts_of_ppo():
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    x, old, returns = (torch.randn(2, 3, generator=g) for _ in range(3))
    for value in FILLS:
        dirty, zeros = fill(x, mask, value), torch.zeros_like(mask)
        assert torch.equal(ppo.whiten(dirty, mask), ppo.whiten(x, mask))
        assert (ppo.whiten(dirty, zeros) == 0).all()

        def loss_of(values, *others):
            return outcome(lambda values: (ppo.value_loss(values, *others, 0.2), {}), values)

        want = loss_of(x, old, returns, mask)
        filled = [fill(one, mask, value) for one in (old, returns)]
        got = loss_of(dirty, *filled, mask)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert loss_of(dirty, *filled, zeros)[0] == 0
    # A completion's reward is on its last token alone, whatever it is.
    rewards = ppo.token_rewards(torch.tensor([NAN, 1.0]), x, old, mask, 0.1)
    assert rewards.isnan().tolist() == [[False, False, True], [False, False, False]]
