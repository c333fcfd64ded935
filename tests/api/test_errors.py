"""Bad input: an error of the stated type that names the argument and the remedy, and nothing is changed."""

import math

import pytest
import torch

from cases import BACKENDS, make_case
from grpo_kernels import LossConfig, fused_grpo_loss, group_advantages, policy_loss, token_logprobs


def call(case, **changes):
    kwargs = dict(logits=case.logits, completion_ids=case.completion_ids, completion_mask=case.completion_mask,
                  advantages=case.advantages, old_logps=case.old_logps) | changes  # fmt: skip
    return fused_grpo_loss(**kwargs)


def packed(case, **changes):
    """The same batch in one row of 20 tokens, two sequences."""
    flat = {name: value.flatten(0, 1) for name, value in case.inputs("logits", "completion_ids", "completion_mask",
                                                                     "old_logps").items()}  # fmt: skip
    return {**flat, "cu_seqlens": torch.tensor([0, 7, 20]), "advantages": case.advantages[:2]} | changes


def grad(x):
    return x.clone().requires_grad_()


BAD = [
    ("float64 logits", lambda c: dict(logits=c.logits.double()), TypeError, "logits.*float32"),
    ("logits no tensor", lambda c: dict(logits=[1.0]), TypeError, "logits must be a torch.Tensor"),
    ("float ids", lambda c: dict(completion_ids=c.completion_ids.float()), TypeError, "completion_ids.*integers"),
    ("bool ids", lambda c: dict(completion_ids=c.completion_mask), TypeError, "completion_ids.*integers"),
    ("ids 1-D", lambda c: dict(completion_ids=c.completion_ids[0]), ValueError, r"packed logits must be \(N, V\)"),
    ("ids 3-D", lambda c: dict(completion_ids=c.completion_ids[None]), ValueError, r"completion_ids must be \(B, T\)"),
    ("logits too long", lambda c: dict(logits=torch.cat([c.logits, c.logits], 1)), ValueError, r"\(B, T\+1, V\)"),
    ("logits 2-D", lambda c: dict(logits=c.logits[0]), ValueError, "logits must be"),
    ("logits batch", lambda c: dict(logits=c.logits[:2]), ValueError, "logits must be"),
    ("vocabulary strided", lambda c: dict(logits=torch.stack([c.logits] * 2, -1)[..., 0]), ValueError, "contiguous"),
    ("no vocabulary", lambda c: dict(logits=c.logits[..., :0]), ValueError, "without a vocabulary"),
    ("advantages shape", lambda c: dict(advantages=c.advantages[:3]), ValueError, r"advantages must be .*\(4, 5\)"),
    ("integer advantages", lambda c: dict(advantages=c.advantages.long()), TypeError, "advantages must be floating"),
    ("no advantages", lambda c: dict(advantages=None), ValueError, "either advantages or rewards"),
    ("both", lambda c: dict(rewards=c.rewards, num_generations=2), ValueError, "either advantages or rewards"),
    ("rewards alone", lambda c: dict(advantages=None, rewards=c.rewards), ValueError, "num_generations"),
    ("groups uneven", lambda c: dict(advantages=None, rewards=c.rewards, num_generations=3), ValueError, "multiple"),
    ("groups of one", lambda c: dict(advantages=None, rewards=c.rewards, num_generations=1), ValueError, "at least 2"),
    ("G a float", lambda c: dict(advantages=None, rewards=c.rewards, num_generations=2.0), TypeError, "int"),
    ("G without rewards", lambda c: dict(num_generations=2), ValueError, "num_generations goes with rewards"),
    ("old shape", lambda c: dict(old_logps=c.old_logps[:, :3]), ValueError, "old_logps must be"),
    ("old dtype", lambda c: dict(old_logps=c.old_logps.long()), TypeError, "old_logps must be floating"),
    ("old grad", lambda c: dict(old_logps=grad(c.old_logps)), ValueError, r"old_logps requires grad.*detach"),
    ("advantages grad", lambda c: dict(advantages=grad(c.advantages)), ValueError, "advantages requires grad"),
    ("scale grad", lambda c: dict(loss_scale=torch.ones((), requires_grad=True)), ValueError, "loss_scale requires"),
    ("mask shape", lambda c: dict(completion_mask=c.completion_mask[:, :2]), ValueError, "completion_mask must be"),
    ("mask complex", lambda c: dict(completion_mask=c.completion_mask.to(torch.complex64)), TypeError, "bool, int"),
    ("mask of 2", lambda c: dict(completion_mask=c.completion_mask.int() * 2), ValueError, "only 0 and 1"),
    ("mask of nan", lambda c: dict(completion_mask=c.old_logps * math.nan), ValueError, "only 0 and 1"),
    ("no reference", lambda c: dict(beta=0.1), ValueError, "beta=0.1 needs ref_logps"),
    ("weights shape", lambda c: dict(importance_weights=c.old_logps[:1]), ValueError, "importance_weights must be"),
    ("temperature 0", lambda c: dict(temperature=0.0), ValueError, "temperature"),
    ("temperature nan", lambda c: dict(temperature=math.nan), ValueError, "temperature"),
    ("temperatures", lambda c: dict(temperature=-c.old_logps.abs()), ValueError, "temperature must be above 0"),
    ("temperature shape", lambda c: dict(temperature=torch.ones(3)), ValueError, "temperature must be"),
    ("bounds of padded", lambda c: dict(cu_seqlens=torch.tensor([0, 4])), ValueError, "cu_seqlens goes with packed"),
    ("packed alone", lambda c: packed(c, cu_seqlens=None), ValueError, "packed input needs cu_seqlens"),
    ("packed bounds", lambda c: packed(c, cu_seqlens=torch.tensor([0, 3, 19])), ValueError, "rise from 0 to N = 20"),
    ("bounds not from 0", lambda c: packed(c, cu_seqlens=torch.tensor([5, 9, 20])), ValueError, "rise from 0 to N"),
    ("float bounds", lambda c: packed(c, cu_seqlens=torch.tensor([0.0, 20.0])), TypeError, "cu_seqlens must be int32"),
    ("packed dr_grpo", lambda c: packed(c, loss_type="dr_grpo"), ValueError, "needs max_completion_length"),
    ("packed rewards", lambda c: packed(c, advantages=None, rewards=c.rewards[:3], num_generations=3), ValueError,
     r"rewards must be \(S,\) = \(2,\)"),
    ("no sampler", lambda c: dict(sampling_correction="token_mask"), ValueError, "needs sampling_logps"),
    ("two weights", lambda c: dict(sampling_correction="token_mask", sampling_logps=c.old_logps,
                                   importance_weights=c.importance_weights), ValueError, "one of the two"),
    ("correction", lambda c: dict(sampling_correction="tis"), ValueError, "'tis'.*'seq_mask_tis'"),
    ("level of gmpo", lambda c: dict(loss_type="gmpo", importance_sampling_level="sequence"), ValueError,
     "'gmpo'.*token"),
    ("level of fipo", lambda c: dict(loss_type="fipo", importance_sampling_level="sequence_token"), ValueError,
     "'fipo'.*token"),
    ("gamma of fipo", lambda c: dict(fipo_gamma=0.9), ValueError, "fipo_gamma is read by fipo, not by 'clipped'"),
    ("level of dppo", lambda c: dict(loss_type="dppo_tv", importance_sampling_level="sequence_sum"), ValueError,
     "no meaning.*'token', 'sequence_token'"),
    ("gmpo weights", lambda c: dict(loss_type="gmpo", loss_agg_mode="token-mean"), ValueError, "'sequence-mean' alone"),
    ("cispo's trap", lambda c: dict(loss_type="cispo", epsilon_high=0.28), ValueError, "cispo_max=epsilon_high"),
    ("delta of sapo", lambda c: dict(loss_type="sapo", delta=2.0), ValueError, "delta is read by clipped"),
    ("dual clip below 1", lambda c: dict(dual_clip=0.5), ValueError, "dual_clip must be above 1"),
    ("clamped vespo", lambda c: dict(loss_type="vespo", log_ratio_clamp=20.0), ValueError, "limits its log ratio"),
    ("clamp of 0", lambda c: dict(log_ratio_clamp=0.0), ValueError, "log_ratio_clamp=0.0"),
    ("quantile", lambda c: dict(top_entropy_quantile=-0.1), ValueError, "top_entropy_quantile must be at least 0"),
    ("skip with dro", lambda c: dict(loss_type="dro", skip_zero_advantage=True), ValueError, "skip_zero_advantage"),
    ("skip with quantile", lambda c: dict(top_entropy_quantile=0.5, skip_zero_advantage=True), ValueError, "entropy"),
    ("aggregation", lambda c: dict(loss_agg_mode="mean"), ValueError, "'mean'.*'token-mean'"),
    ("reduction", lambda c: dict(reduction="sum"), ValueError, "reduction must be 'mean' or 'none'"),
    ("backend", lambda c: dict(backend="cuda"), ValueError, "backend must be"),
    ("scale shape", lambda c: dict(loss_scale=torch.ones(1)), ValueError, "loss_scale must be"),
    ("scale type", lambda c: dict(loss_scale="1"), TypeError, "loss_scale must be"),
    ("items shape", lambda c: dict(num_items_in_batch=torch.ones(4)), ValueError, "num_items_in_batch must be"),
    ("other device", lambda c: dict(old_logps=c.old_logps.to("meta")), ValueError, "old_logps is on meta"),
    ("unknown keyword", lambda c: dict(epsilom=0.2), TypeError, "'epsilom'.*epsilon_high"),
    ("config type", lambda c: dict(config={"beta": 0.1}), TypeError, "config must be a LossConfig"),
    ("loss type", lambda c: dict(loss_type="ppo2"), ValueError, "'ppo2'.*'grpo'"),
    ("level", lambda c: dict(importance_sampling_level="word"), ValueError, "'word'.*'token'"),
    ("estimator", lambda c: dict(kl_estimator="k9"), ValueError, "'k9'.*'k3'"),
    ("beta", lambda c: dict(beta=-0.1), ValueError, "beta must be"),
    ("epsilon", lambda c: dict(epsilon=math.nan), ValueError, "epsilon must be"),
    ("delta", lambda c: dict(delta=0.0), ValueError, "delta must be"),
    ("length", lambda c: dict(max_completion_length=-1), ValueError, "max_completion_length must be at least 0"),
    ("skip with bonus", lambda c: dict(skip_zero_advantage=True, entropy_coef=0.1), ValueError, "skip_zero_advantage"),
    ("flag", lambda c: dict(skip_zero_advantage="no"), TypeError, "skip_zero_advantage must be True or False, got str"),
    ("flag of 1", lambda c: dict(return_entropy=1), TypeError, "return_entropy must be True or False, got int"),
    ("group", lambda c: dict(data_group="data"), TypeError, "data_group must be a torch.distributed.ProcessGroup"),
    ("sparse", lambda c: dict(old_logps=c.old_logps.to_sparse()), TypeError, "old_logps must be a dense tensor"),
    ("id", lambda c: dict(completion_ids=c.completion_ids.masked_fill(c.completion_mask, 131)), IndexError, "131"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
@pytest.mark.parametrize("inplace", (False, True))
def test_bad_input(change, error, message, inplace):
    case = make_case()
    leaf = case.logits.clone().requires_grad_()
    changes = change(case)
    if "logits" not in changes:
        changes["logits"] = leaf * 1
    before = changes["logits"].clone() if isinstance(changes["logits"], torch.Tensor) else None
    with pytest.raises(error, match=f"(?s){message}"):
        call(case, inplace=inplace, **changes)
    assert before is None or torch.equal(changes["logits"], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_on_a_leaf(backend):
    case = make_case()
    leaf = case.logits.requires_grad_()
    for logits in (leaf, leaf[:, :]):
        with pytest.raises(ValueError, match="leaf"):
            call(case, logits=logits, inplace=True, backend=backend)
    with pytest.raises(ValueError, match="share memory"):
        base = torch.randn(4, 1, 131, requires_grad=True) * 1
        call(case, logits=base.expand(4, 5, 131), inplace=True, backend=backend)


def test_logprobs_errors():
    case = make_case()
    for kwargs, error in (
        (dict(temperature=-1.0), ValueError),
        (dict(mask=case.completion_mask[0]), ValueError),
        (dict(backend="numpy"), ValueError),
    ):
        with pytest.raises(error):
            token_logprobs(case.logits, case.completion_ids, **{"mask": case.completion_mask} | kwargs)
    with pytest.raises(IndexError):
        token_logprobs(case.logits, case.completion_ids)  # −100 where nothing masks it
    with pytest.raises(TypeError):
        token_logprobs(case.logits, case.completion_ids, maks=case.completion_mask)


def test_group_advantages_errors():
    rewards = torch.randn(6)
    for args, error in (
        ((rewards, 4), ValueError),
        ((rewards, 1), ValueError),
        ((rewards, None), ValueError),
        ((rewards, True), TypeError),
        ((rewards.long(), 2), TypeError),
        ((rewards[None], 2), ValueError),
    ):
        with pytest.raises(error):
            group_advantages(*args)
    with pytest.raises(ValueError, match="scale_rewards"):
        group_advantages(rewards, 2, scale_rewards="token")


def test_config_is_frozen_and_checked():
    config = LossConfig(beta=0.1)
    with pytest.raises(AttributeError):
        config.beta = 0.2
    with pytest.raises(TypeError):
        LossConfig(gamma=1.0)


def test_validate_variable(monkeypatch):
    case = make_case()
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "yes")
    with pytest.raises(ValueError, match="GRPO_KERNELS_VALIDATE must be 0 or 1"):
        call(case)


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    from grpo_kernels.triton_backend import launch

    case = make_case()
    monkeypatch.setattr(launch, "is_interpreted", lambda kernel: False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        call(case, backend="triton")
    monkeypatch.setattr(launch, "triton", None)
    with pytest.raises(ValueError, match="pip install triton"):
        call(case, backend="triton")


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (dict(entropy_coef=0.1), ValueError, "entropy_coef=0.1 needs entropy"),
        (dict(top_entropy_quantile=0.5), ValueError, "top_entropy_quantile=0.5 needs entropy"),
        (dict(entropy=torch.ones(4, 3)), ValueError, "entropy must be as logps"),
        (dict(logps=torch.ones(4, 5, dtype=torch.long)), TypeError, "logps must be floating point"),
        (dict(logps=torch.ones(4, 5, 1)), ValueError, "logps must be"),
        (dict(completion_mask=torch.full((4, 5), 2)), ValueError, "only 0 and 1"),
        (dict(temperature=1.0), TypeError, "unknown keyword 'temperature'"),
    ],
)
def test_bad_input_of_policy_loss(changes, error, says):
    kwargs = dict(logps=-torch.ones(4, 5), advantages=torch.ones(4)) | changes
    with pytest.raises(error, match=says):
        policy_loss(**kwargs)
