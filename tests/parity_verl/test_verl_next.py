"""What verl's main branch (1dda039, 0.10.0.dev) and its pull request 7022 (018f23b) change, beside the installed verl.

Their losses are written here from their formulas and registered in verl's own registry, over what is installed; all
the rest is the installed verl's.
"""

import contextlib
import functools
import importlib
import importlib.metadata

import pytest
import torch

from cases import BACKENDS

try:
    importlib.metadata.version("verl")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("verl is not installed; it gets an environment of its own: make test-verl", allow_module_level=True)
from verl_oracle import POLICY_LOSS_REGISTRY, agg_loss, verl_loss

from grpo_kernels import policy_loss
from grpo_kernels.integrations import verl as plugin
from tolerance import assert_within, bounds_of
from verl_calls import GLOBAL, MODES, SETTINGS, call, check, is_weights, make_batch

INSTALLED = dict(POLICY_LOSS_REGISTRY)
PLAIN = {name: loss for name, loss in INSTALLED.items() if not name.startswith("fused_")}
losses = pytest.mark.parametrize("name", ("up", "gspo"))


def gspo(*args, loss_agg_mode="seq-mean-token-mean", **kwargs):
    """The installed one with the aggregation of the main branch, which is all that they differ by."""
    return INSTALLED["gspo"](*args, loss_agg_mode="seq-mean-token-mean", **kwargs)


def up(
    old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
):
    """A > 0: −A·π/sg[π]. A ≤ 0: |A|·ρ, ρ held between 1 − ε and c, which is what clip and dual clip leave of it."""
    log_ratio = (log_prob - old_log_prob).clamp(-20.0, 20.0)
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    cap = config.get("clip_ratio_c", 3.0)
    ratio, good, bad = log_ratio.exp(), advantages > 0, advantages < 0
    reinforce = -advantages * (log_prob - log_prob.detach()).exp()
    losses = torch.where(good, reinforce, advantages.abs() * ratio.clamp(1.0 - low, cap))
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights

    def share(which, of):
        return ((which & of).sum() / (of.sum() + 1e-8)).item()

    mask = response_mask != 0
    metrics = {
        "actor/pg_clipfrac": share(bad & (ratio < 1.0 - low), mask & ~good),
        "actor/ppo_kl": ((-log_ratio * mask).sum() / (mask.sum() + 1e-8)).item(),
        "actor/pg_clipfrac_lower": share(bad & (ratio > cap), mask),
    }
    return agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info), metrics


@contextlib.contextmanager
def registered(losses: dict):
    """verl's registry with these alone, and the plugin imported beside it."""

    def put(losses):
        POLICY_LOSS_REGISTRY.clear()
        POLICY_LOSS_REGISTRY.update(losses)
        importlib.reload(plugin)

    put(losses)
    yield
    put(INSTALLED)


@pytest.fixture
def next_verl():
    with registered({**PLAIN, "up": up, "gspo": gspo}):
        yield


# --- Which losses there are ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", ([*PLAIN, "up"], [name for name in PLAIN if name not in ("up", "dro")], ["vanilla"]),
    ids=("newer", "older", "one alone"),
)  # fmt: skip
def test_those_of_verl_and_no_others(names):
    with registered({name: PLAIN.get(name, up) for name in names}):
        assert POLICY_LOSS_REGISTRY.keys() == {*names, *(f"fused_{x}" for x in names if x not in plugin.NOT_SERVED)}


# --- As verl's actor calls them --------------------------------------------------------------------------


@pytest.mark.usefixtures("next_verl")
class TestNext:
    @losses
    @pytest.mark.parametrize("batch", ({}, GLOBAL), ids=("alone", "part of a global batch"))
    @pytest.mark.parametrize("mode", MODES)
    def test_aggregation(self, mode, batch, name):
        check(name, make_batch(seed=3), mode=mode, **batch)

    @pytest.mark.parametrize("batch", ({}, GLOBAL), ids=("alone", "part of a global batch"))
    def test_gspo_takes_no_other_aggregation(self, batch):
        """The same bits whatever is asked for, which the installed verl's plugin does not give."""
        answers = {call("fused_gspo", make_batch(seed=3), torch.float32, mode=mode, **batch)[0].item()
                   for mode in (*MODES, "anything")}  # fmt: skip
        assert len(answers) == 1

    @losses
    def test_weights_of_the_rollout(self, name):
        batch = make_batch(seed=4)
        check(name, batch, weights=is_weights(batch))

    @losses
    def test_log_ratios_beyond_the_clamps(self, name):
        check(name, make_batch(seed=5, far=True), clip_ratio_c=3.0)

    @losses
    def test_one_bound_for_both(self, name):
        check(name, make_batch(seed=7), clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=None)

    @losses
    def test_on_policy(self, name):
        batch = make_batch(seed=9)
        check(name, {**batch, "old_log_prob": batch["log_prob"].clone()})

    @pytest.mark.parametrize("sign", (1.0, -1.0, 0.0))
    def test_up_with_one_kind_of_advantage(self, sign):
        batch = make_batch(seed=10)
        check("up", {**batch, "advantages": sign * batch["advantages"].abs()})

    @losses
    def test_nothing_unmasked_in_a_part(self, name):
        batch = make_batch(seed=14)
        batch["response_mask"] = torch.zeros_like(batch["response_mask"])
        check(name, batch, **GLOBAL)

    @pytest.mark.parametrize("backend", BACKENDS)
    @losses
    def test_backends(self, name, backend, monkeypatch):
        monkeypatch.setattr(plugin, "policy_loss", functools.partial(policy_loss, backend=backend))
        check(name, make_batch(seed=15), **GLOBAL)

    @losses
    def test_in_ppo_loss(self, name):
        g = torch.Generator().manual_seed(2)
        batch = make_batch(seed=2)
        mask = batch["response_mask"]
        logits, ids = torch.randn(*mask.shape, 31, generator=g), torch.randint(31, mask.shape, generator=g)
        lp = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        old = lp + batch["old_log_prob"] - batch["log_prob"]

        def run(loss_mode, x):
            loss, logged = verl_loss(x, ids, batch["advantages"].double(), completion_mask=mask, old_logps=old,
                                     loss_mode=loss_mode, **SETTINGS[name], **GLOBAL)  # fmt: skip
            (grad,) = torch.autograd.grad(loss, x)
            return {" loss": loss.detach().double(), " grad": grad,
                    **{key: torch.tensor(value).double() for key, value in logged.items()}}  # fmt: skip

        got, want = (run(loss_mode, logits.double().requires_grad_()) for loss_mode in (f"fused_{name}", name))
        allowed = bounds_of(lambda x: run(name, x), {"x": logits})
        assert got.keys() == want.keys() >= {"actor/pg_loss"}
        for key in want:
            assert_within(got[key], want[key], allowed[key], key)
