"""The verl plugin as far as it goes without verl: against a stand-in that has verl's hooks and nothing behind them.

`make test-verl` compares it with verl itself.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo_kernels.integrations import verl_linear
from linear_tolerance import linear_logprob_bounds
from tolerance import U, assert_within, near, steps

PLUGIN = "grpo_kernels.integrations.verl"


class FusedLinearForPPO:
    def forward(self, *args):
        raise AssertionError("verl's own")


def linear_cross_entropy(*args):
    raise AssertionError("verl's own")


VERLS = ("vanilla", "gspo", "sapo", "cispo", "geo_mean", "dppo_tv", "dppo_kl", "gpg", "dro", "bypass_mode", "kl_cov")


class Losses(dict):
    """verl's registry: of the fused losses alone, as far as the tests read it."""

    def fused(self):
        return {name.removeprefix("fused_") for name in self if name.startswith("fused_")}


def gspo_by(mode):
    """A gspo for ratios of 1, which averages as ``mode`` says; None: as loss_agg_mode does."""

    def gspo(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config):
        assert config.clip_ratio_low == config.clip_ratio_high == 0.2 and config.global_batch_info == {}
        losses = -advantages * response_mask
        sums, counts = losses.sum(-1), response_mask.sum(-1)
        answers = {"token-sum": sums.sum(), "seq-mean-token-mean": (sums / counts).mean(), "other": sums[0]}
        return answers[mode or loss_agg_mode], {}

    return gspo


@pytest.fixture
def verl(monkeypatch):
    """verl's modules, as far as the plugin imports them."""
    losses = Losses(dict.fromkeys(VERLS))
    contents = {
        "verl": {"__version__": "0.9.7"},
        "verl.trainer": {},
        "verl.trainer.ppo": {},
        "verl.trainer.ppo.core_algos": {
            "POLICY_LOSS_REGISTRY": losses,
            "register_policy_loss": lambda name: lambda f: losses.setdefault(name, f),
        },
        "verl.workers": {},
        "verl.workers.config": {"ActorConfig": SimpleNamespace},
        "verl.utils": {},
        "verl.utils.experimental": {},
        "verl.utils.experimental.torch_functional": {"FusedLinearForPPO": FusedLinearForPPO},
        "verl.utils.kernel": {},
        "verl.utils.kernel.linear_cross_entropy": {"linear_cross_entropy": linear_cross_entropy},
        "verl.models.mcore": {"linear_cross_entropy": linear_cross_entropy},
    }
    for name, names in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent in contents:
            setattr(sys.modules[parent], child, module)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    yield SimpleNamespace(losses=losses, modules=contents.keys())
    sys.modules.pop(PLUGIN, None)


def config(**settings):
    given = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "global_batch_info": {}, **settings}
    made = SimpleNamespace(**given)
    made.get = lambda name, default=None: getattr(made, name, default)
    return made


def batch(**changes):
    """Two tokens of ratio 2 and advantages ±1, and one that is masked."""
    lp = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    old = lp.detach() - torch.tensor([[2.0, 2.0, 9.0]]).log()
    advantages, mask = torch.tensor([[1.0, -1.0, 5.0]]), torch.tensor([[True, True, False]])
    return {"old_log_prob": old, "log_prob": lp, "advantages": advantages, "response_mask": mask, **changes}


def test_registers(verl):
    importlib.import_module(PLUGIN)
    assert verl.losses.fused() == {*VERLS} - {"kl_cov"}
    importlib.reload(sys.modules[PLUGIN])
    assert len(verl.losses) == 2 * len(VERLS) - 1


@pytest.mark.parametrize("changed", ("up", "dro", "bypass_mode"))
def test_registers_what_verl_has(verl, changed):
    """`up` comes with a later verl; others went, or were not there yet."""
    if verl.losses.pop(changed, "new") == "new":
        verl.losses[changed] = None
    importlib.import_module(PLUGIN)
    assert verl.losses.fused() == ({*VERLS} - {"kl_cov"}) ^ {changed}


@pytest.mark.parametrize(
    ("mode", "info", "scale"),
    [
        ("token-mean", {}, 1 / 2),
        ("token-mean", {"dp_size": 2, "batch_num_tokens": 8}, 2 / 8),
        ("token-sum", {"dp_size": 2}, 2),
        ("seq-mean-token-sum", {"dp_size": 2, "global_batch_size": 4}, 2 / 4),
        ("seq-mean-token-mean", {}, 1 / 2),
        ("seq-mean-token-sum-norm", {"loss_scale_factor": 10}, 1 / 10),
        ("seq-mean-token-sum-norm", {"loss_scale_factor": None}, 1 / 3),
    ],
)
def test_by_hand(verl, mode, info, scale):
    """A = 1: ρ = 2 is clipped to 1.2, ℓ = −1.2; A = −1: ℓ = 2, below the dual clip's 3."""
    importlib.import_module(PLUGIN)
    args = batch()
    loss, metrics = verl.losses["fused_vanilla"](**args, loss_agg_mode=mode, config=config(global_batch_info=info))
    loss.backward()
    assert loss.item() == near(0.8 * scale, 2 * 4)  # 2 − 1.2, and a ratio of exp(log 2)
    assert args["log_prob"].grad.tolist() == [[0.0, near(2.0 * scale), 0.0]]
    drift = -torch.tensor(2.0).log().item()
    wanted = {"actor/pg_clipfrac": 0.5, "actor/ppo_kl": drift, "actor/pg_clipfrac_lower": 0.0}
    assert list(metrics) == list(wanted) and metrics == {name: near(value, 2) for name, value in wanted.items()}


@pytest.mark.parametrize(
    ("mode", "loss", "grad"),
    [
        (None, -3.0, [[-1.0, 0.0], [-1.0, -1.0]]),  # token-sum, as is asked for
        ("seq-mean-token-mean", -1.0, [[-0.5, 0.0], [-0.25, -0.25]]),
    ],
)
def test_gspo_averages_as_verls_does(verl, mode, loss, grad):
    """Three tokens of ratio 1 and A = 1, in two sequences."""
    verl.losses["gspo"] = gspo_by(mode)
    importlib.import_module(PLUGIN)
    lp, mask = torch.zeros(2, 2, requires_grad=True), torch.tensor([[True, False], [True, True]])
    args = {"old_log_prob": lp.detach(), "log_prob": lp, "advantages": torch.ones(2, 2), "response_mask": mask}
    for _ in range(2):
        lp.grad = None
        got, _ = verl.losses["fused_gspo"](**args, loss_agg_mode="token-sum", config=config())
        got.backward()
        assert got.item() == loss and lp.grad.tolist() == grad
        verl.losses["gspo"] = None  # asked once


def test_gspo_that_averages_in_a_third_way(verl):
    verl.losses["gspo"] = gspo_by("other")
    importlib.import_module(PLUGIN)
    with pytest.raises(RuntimeError, match=r"verl 0\.9\.7 averages neither .* it makes -3\.0, .* loss_mode=gspo"):
        verl.losses["fused_gspo"](**batch(), config=config())


def test_up_by_hand(verl):
    """A = 1, ρ = 2: ℓ = −1, gradient −1. A = −1: ρ = 2 gives 2; ρ = 1/2 is held at 0.8; ρ = 4 at c = 3.

    Clipped: one of the three that can be; capped: one of all four.
    """
    verl.losses["up"] = None
    importlib.import_module(PLUGIN)
    lp = torch.full((1, 5), -3.0, requires_grad=True)
    old = lp.detach() - torch.tensor([[2.0, 2.0, 0.5, 4.0, 9.0]]).log()
    args = {"old_log_prob": old, "log_prob": lp, "advantages": torch.tensor([[1.0, -1.0, -1.0, -1.0, 5.0]]),
            "response_mask": torch.tensor([[True, True, True, True, False]])}  # fmt: skip
    loss, metrics = verl.losses["fused_up"](**args, loss_agg_mode="token-sum", config=config())
    loss.backward()
    assert loss.item() == near(-1.0 + 2.0 + 0.8 + 3.0, 16)
    assert lp.grad.tolist() == [[-1.0, near(2.0, 4), 0.0, 0.0, 0.0]]
    drift = -torch.tensor(8.0).log().item() / 4  # 2 · 2 · ½ · 4
    wanted = {"actor/pg_clipfrac": 1 / 3, "actor/ppo_kl": drift, "actor/pg_clipfrac_lower": 1 / 4}
    assert list(metrics) == list(wanted) and metrics == {name: near(value, 4) for name, value in wanted.items()}


def test_loss_may_be_changed_in_place(verl):
    """verl adds the entropy bonus and the KL with `-=` and `+=`."""
    importlib.import_module(PLUGIN)
    args = batch()
    loss, _ = verl.losses["fused_gpg"](**args, config=config())
    loss -= 0.5 * args["log_prob"].sum()
    loss.backward()
    assert args["log_prob"].grad.tolist() == [[-1.0, 0.0, -0.5]]


def test_counts_of_the_global_batch_are_asked_for(verl):
    importlib.import_module(PLUGIN)
    for mode, count in (("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")):
        with pytest.raises(ValueError, match=f"{count} for loss_agg_mode='{mode}'"):
            verl.losses["fused_vanilla"](**batch(), loss_agg_mode=mode, config=config(global_batch_info={"dp_size": 2}))


def test_without_verl(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    for attempt in (lambda: importlib.import_module(PLUGIN), verl_linear.patch):
        with pytest.raises(ImportError, match=r'pip install "verl==0\.9\.\*"'):
            attempt()
    lacking = ModuleNotFoundError("No module named 'ray'", name="ray")
    assert verl_linear.without_verl(lacking) is lacking  # verl is there


def test_another_verl(verl):
    sys.modules["verl"].__version__ = "0.10.0"
    with pytest.warns(UserWarning, match=r"verl 0\.9, and this is 0\.10\.0"):
        importlib.import_module(PLUGIN)


def test_entry_point():
    """What verl looks for in installed packages."""
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'[project.entry-points."verl.plugins"]\ngrpo_kernels = "{PLUGIN}"\n' in text


# --- The fused linear op ---------------------------------------------------------------------------------


def head(*shape):
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, 6, generator=g), torch.randn(11, 6, generator=g), torch.randint(11, shape, generator=g)


def plain(hidden, weight, ids, temperature):
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    return logp.gather(-1, ids[..., None])[..., 0].float(), -(logp.exp() * logp).sum(-1).float()


def test_linear_shapes():
    """verl's two ops differ in what they make of (B, T, H)."""
    hidden, weight, ids = head(2, 3)
    logps, entropy = plain(hidden, weight, ids, 0.5)
    head_of, every = {"hidden": hidden, "weight": weight}, torch.ones_like(ids, dtype=torch.bool)
    allowed, _ = linear_logprob_bounds(head_of, ids, every, 0.5, lambda lp, H: lp.sum())
    for actual, want, most in zip(verl_linear.fused_linear_for_ppo(hidden, weight, ids, 0.5), (logps, entropy),
                                  (allowed.logps, allowed.entropy)):  # fmt: skip
        assert_within(actual, want, most, factor=2)  # `plain` is rounded, too
    total = allowed.logps.sum() + steps(6) * U * logps.abs().sum()
    for reduction, want, most in (("none", logps.flatten(), allowed.logps.flatten()), ("sum", logps.sum(), total),
                                  ("mean", logps.mean(), total / 6)):  # fmt: skip
        actual, of_entropy = verl_linear.linear_cross_entropy(hidden, weight, ids, 0.5, reduction)
        assert_within(actual, want, most, reduction, factor=2)
        assert_within(of_entropy, entropy.flatten(), allowed.entropy.flatten(), "entropy", factor=2)


def test_linear_errors(monkeypatch):
    hidden, weight, ids = head(2, 3)
    with pytest.raises(ValueError, match="'none', 'sum' or 'mean'"):
        verl_linear.linear_cross_entropy(hidden, weight, ids, reduction="max")
    with pytest.raises(ValueError, match=r"input_ids must be \(2, 3\)"):
        verl_linear.fused_linear_for_ppo(hidden, weight, ids[:, :2])
    monkeypatch.setattr(verl_linear.dist, "get_world_size", lambda group: 2)
    with pytest.raises(ValueError, match=r"dist_process_group has 2 ranks.*tensor_model_parallel_size=1"):
        verl_linear.linear_cross_entropy(hidden, weight, ids, dist_process_group=object())
    monkeypatch.setattr(verl_linear.dist, "get_world_size", lambda group: 1)
    verl_linear.linear_cross_entropy(hidden, weight, ids, dist_process_group=object())


def test_patch(verl):
    homes = [sys.modules[name] for name in ("verl.utils.kernel.linear_cross_entropy", "verl.models.mcore")]
    undo = verl_linear.patch()
    verl_linear.patch()
    hidden, weight, ids = head(2, 3)
    want = verl_linear.fused_linear_for_ppo(hidden, weight, ids, 0.5)
    assert all(map(torch.equal, FusedLinearForPPO().forward(hidden, weight, ids, 0.5), want))
    assert all(home.linear_cross_entropy is verl_linear.linear_cross_entropy for home in homes)
    undo()
    assert all(home.linear_cross_entropy is linear_cross_entropy for home in homes)
    with pytest.raises(AssertionError, match="verl's own"):
        FusedLinearForPPO().forward()


def test_patch_by_import(verl, monkeypatch):
    monkeypatch.delitem(sys.modules, f"{PLUGIN}_patch", raising=False)
    module = importlib.import_module(f"{PLUGIN}_patch")
    assert FusedLinearForPPO.forward is verl_linear._forward
    module.undo()
    assert FusedLinearForPPO.forward is not verl_linear._forward
