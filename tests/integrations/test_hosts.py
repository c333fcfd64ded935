"""The recipes of docs/hosts.md whose hosts may shard the vocabulary, against small fakes of their hosts' calls.

Each is called with tensors of the host's shapes under the host's keys; loss, gradient and metrics are compared with
the host's maths in float64 (host_maths.py). No host is installed here: nothing of this ran inside one.
"""

import enum
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import host_maths
from host_calls import V, compare, load, noisy, record

# --- slime -----------------------------------------------------------------------------------------

SLIME = {
    "advantage_estimator": "grpo", "eps_clip": 0.2, "eps_clip_high": 0.28, "eps_clip_c": None, "use_kl_loss": False,
    "kl_loss_coef": 0.0, "kl_loss_type": "low_var_kl", "entropy_coef": 0.0, "use_tis": False,
    "rollout_temperature": 1.0, "tis_clip_low": 0.5, "tis_clip": 1.2, "use_rollout_logprobs": False,
    "calculate_per_token_loss": False,
}  # fmt: skip
SLIME_CASES = {
    "grpo": {},
    "cold": {"rollout_temperature": 0.7, "use_kl_loss": True},
    "kl": {"use_kl_loss": True, "kl_loss_coef": 0.1},
    "k1": {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k1", "eps_clip_c": 1.3},
    "k2": {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2", "rollout_temperature": 1.3},
    "entropy": {"entropy_coef": 0.05},
    "per token": {"calculate_per_token_loss": True, "eps_clip_c": 1.3},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.05, "eps_clip_high": 0.05},
    "gspo, kl": {"advantage_estimator": "gspo", "eps_clip": 0.05, "use_kl_loss": True, "kl_loss_coef": 0.1},
    "cispo": {"advantage_estimator": "cispo", "eps_clip": 1.0, "eps_clip_high": 0.1},
    "tis": {"use_tis": True},
    "tis, kl": {"use_tis": True, "use_kl_loss": True, "kl_loss_coef": 0.1},
    "the sampler's": {"use_rollout_logprobs": True},
    "on-policy": {"log_probs": None},
    "on-policy, kl": {"log_probs": None, "use_kl_loss": True, "kl_loss_coef": 0.1},
    "on-policy, tis": {"log_probs": None, "use_tis": True},
    "the sampler's, tis": {"log_probs": None, "use_tis": True, "use_rollout_logprobs": True},
}


def slime_batch(seed=0):
    """Three samples one after the other, tool tokens masked, and padding to a multiple."""
    g = torch.Generator().manual_seed(seed)
    totals, lengths = [9, 6, 12], [5, 3, 7]
    logits = torch.randn(1, 32, V, generator=g)
    tokens = [torch.randint(V, (n,), generator=g) for n in totals]
    masks = [(torch.rand(n, generator=g) < 0.8).int() for n in lengths]
    masks[0][0] = 1
    near, start = [], 0
    for ids, total, n in zip(tokens, totals, lengths):
        rows = logits[0, start + total - n - 1 : start + total - 1]
        near.append(host_maths.logps_and_entropy(rows, ids[-n:])[0])
        start += total
    batch = {"unconcat_tokens": tokens, "total_lengths": totals, "response_lengths": lengths, "loss_masks": masks,
             "advantages": [torch.full((n,), a) for n, a in zip(lengths, (1.0, -0.8, -0.3))]}  # fmt: skip
    for name in ("log_probs", "ref_log_probs", "rollout_log_probs"):
        batch[name] = [noisy(x, g, size) for x, size in zip(near, (0.3, 0.3, 0.05))]  # one inside of every bound
    return batch, logits.requires_grad_()


def slime_call(args, batch, logits, function):
    """The part of slime's `loss_function` that is about one micro-batch without context parallelism."""
    masks, lengths = batch["loss_masks"], batch["response_lengths"]

    def sum_of_sample_mean(x):
        parts = list(zip(x.split(lengths), masks))
        if args.calculate_per_token_loss:
            return sum((a * m).sum() for a, m in parts)
        return sum((a * m).sum() / m.sum().clamp_min(1) for a, m in parts)

    loss, log = function(args, batch, logits, sum_of_sample_mean)
    torch.tensor([value.detach() for value in log.values()])  # as slime puts them together
    return loss, log


def slime_recipe(monkeypatch, tp=1, cp=1, **more):
    mpu = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: tp, get_tensor_model_parallel_group=lambda: "the TP group",
        get_context_parallel_world_size=lambda: cp,
    )  # fmt: skip
    return load(monkeypatch, "slime", megatron__core={"mpu": mpu}, **more)


@pytest.mark.parametrize("case", SLIME_CASES)
def test_slime(case, monkeypatch):
    args, (batch, logits) = SimpleNamespace(**{**SLIME, **SLIME_CASES[case]}), slime_batch()
    if "log_probs" in SLIME_CASES[case]:
        del batch["log_probs"]
    recipe = slime_recipe(monkeypatch)
    calls = record(monkeypatch, recipe)
    compare(lambda x: slime_call(args, batch, x, recipe.fused_policy_loss),
            lambda x: slime_call(args, batch, x, host_maths.slime), logits)  # fmt: skip
    two = args.kl_loss_coef or args.entropy_coef or (args.use_tis and not batch.get("log_probs"))
    assert calls == [("token_logprobs" if two else "fused_grpo_loss", None)]


def test_slime_takes_it_over(monkeypatch):
    """slime's `loss_function` finds `policy_loss_function` among the globals of its module when it is called."""
    recipe = slime_recipe(monkeypatch, slime__backends__megatron_utils={"loss": SimpleNamespace()})
    recipe.install(SimpleNamespace(**SLIME))
    from slime.backends.megatron_utils import loss

    assert loss.policy_loss_function is recipe.fused_policy_loss


@pytest.mark.parametrize("case", ("grpo", "kl"))
def test_slime_shards_the_vocabulary(case, monkeypatch):
    args, (batch, logits) = SimpleNamespace(**{**SLIME, **SLIME_CASES[case]}), slime_batch()
    recipe = slime_recipe(monkeypatch, tp=2)
    calls = record(monkeypatch, recipe)
    slime_call(args, batch, logits, recipe.fused_policy_loss)
    assert [group for _, group in calls] == ["the TP group"]


@pytest.mark.parametrize(
    "refused",
    ({"use_opsm": True}, {"rollout_top_p": 0.9}, {"use_unbiased_kl": True}, {"advantage_estimator": "sapo"},
     {"pg_loss_type": "reinforce"}),
)  # fmt: skip
def test_slime_refuses(refused, monkeypatch):
    args, (batch, logits) = SimpleNamespace(**{**SLIME, **refused}), slime_batch()
    with pytest.raises(NotImplementedError, match=next(iter(refused)).replace("_", "-")):
        slime_call(args, batch, logits, slime_recipe(monkeypatch).fused_policy_loss)
    with pytest.raises(NotImplementedError, match="--context-parallel-size"):
        slime_call(args, batch, logits, slime_recipe(monkeypatch, cp=2).fused_policy_loss)


# --- NeMo-RL ---------------------------------------------------------------------------------------

NEMO = {
    "disable_ppo_ratio": False, "token_level_loss": True, "sequence_level_importance_ratios": False,
    "ratio_clip_min": 0.2, "ratio_clip_max": 0.28, "ratio_clip_c": None, "reference_policy_kl_penalty": 0.01,
    "reference_policy_kl_type": "k3", "kl_input_clamp_value": 20.0, "kl_output_clamp_value": 10.0,
    "use_kl_in_reward": False, "use_importance_sampling_correction": False, "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None, "truncated_importance_sampling_ratio_min": None,
    "use_on_policy_kl_approximation": False, "force_on_policy_ratio": False, "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}  # fmt: skip
NO_KL = {"reference_policy_kl_penalty": 0.0}
PER_SEQUENCE = {"token_level_loss": False}
GSPO = {**PER_SEQUENCE, "sequence_level_importance_ratios": True, "ratio_clip_min": 0.05, "ratio_clip_max": 0.05}


def tis(kind, high, low=None):
    return {"use_importance_sampling_correction": True, "truncated_importance_sampling_type": kind,
            "truncated_importance_sampling_ratio": high, "truncated_importance_sampling_ratio_min": low}  # fmt: skip


NEMO_CASES = {
    "default": {},
    "no kl": NO_KL,
    "clamped kl": {"reference_policy_kl_penalty": 0.3, "kl_input_clamp_value": 0.3, "kl_output_clamp_value": 0.04},
    "k1": {"reference_policy_kl_type": "k1"},
    "k2, per sequence": {**PER_SEQUENCE, "reference_policy_kl_type": "k2", "ratio_clip_c": 1.3},
    "per sequence": {**NO_KL, **PER_SEQUENCE, "ratio_clip_c": 1.3},
    "gspo": {**NO_KL, **GSPO},
    "gspo, kl, tis": {**GSPO, **tis("tis", 1.2)},
    "cispo": {**NO_KL, "use_cispo": True},
    "reinforce": {**NO_KL, "disable_ppo_ratio": True},
    "on-policy": {**NO_KL, "force_on_policy_ratio": True},
    "on-policy, kl, tis": {"force_on_policy_ratio": True, **tis("tis", 1.2)},
    "importance weights": {**NO_KL, "use_importance_sampling_correction": True},
    "tis": {**NO_KL, **tis("tis", 1.2, 0.8)},
    "icepop": {**NO_KL, **tis("icepop", 1.2, 0.8)},
    "seq-mask-tis": {**NO_KL, **tis("seq-mask-tis", 1.1, 0.95)},
}


def nemo_recipe(monkeypatch, **more):
    kinds = {name: enum.Enum(name, members) for name, members in (
        ("LossInputType", "LOGIT LOGPROB"), ("LossType", "TOKEN_LEVEL SEQUENCE_LEVEL"),
        ("MetricNormalizer", "TOKENS SEQUENCES NONE"),
    )}  # fmt: skip
    return load(monkeypatch, "nemo_rl", nemo_rl__algorithms__loss__interfaces=kinds, **more)


def nemo_batch(seed=0, B=4, S=8):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, S + 3, V, generator=g)  # rows behind the last token: padding of the forward
    data = {"input_ids": torch.randint(V, (B, S), generator=g), "advantages": torch.randn(B, S, generator=g),
            "token_mask": (torch.rand(B, S, generator=g) < 0.7).float(),
            "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0])}  # fmt: skip
    near, _ = host_maths.logps_and_entropy(logits[:, : S - 1], data["input_ids"][:, 1:])
    near = torch.cat([torch.zeros(B, 1), near], 1)
    for name in ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs"):
        data[name] = noisy(near, g)
    data["generation_logprobs"] = noisy(data["prev_logprobs"], g, 0.15)
    return data, logits.requires_grad_(), torch.tensor(7.0), torch.tensor(31.0)


@pytest.mark.parametrize("case", NEMO_CASES)
def test_nemo_rl(case, monkeypatch):
    cfg = SimpleNamespace(**{**NEMO, **NEMO_CASES[case]})
    recipe, (data, logits, seqs, toks) = nemo_recipe(monkeypatch), nemo_batch()
    loss_fn = recipe.FusedClippedPGLoss(cfg)
    calls = record(monkeypatch, recipe)

    def run(x):  # `prepare_loss_input` hands a LOGIT loss the logits, and the wrapper calls it by keywords
        assert loss_fn.input_type is recipe.LossInputType.LOGIT
        loss, log = loss_fn(data=data, global_valid_seqs=seqs, global_valid_toks=toks, logits=x)
        assert loss_fn.metric_normalizations.keys() >= log.keys() and all(type(v) is float for v in log.values())
        return loss, log

    compare(run, lambda x: host_maths.nemo_rl(cfg, x, data, seqs.double(), toks.double()), logits)
    assert calls == [("token_logprobs" if cfg.reference_policy_kl_penalty else "fused_grpo_loss", None)]


@pytest.mark.parametrize(("case", "size"), (("no kl", 2), ("default", 2), ("no kl", 1)))
def test_nemo_rl_shards_the_vocabulary(case, size, monkeypatch):
    group = object()
    recipe = nemo_recipe(
        monkeypatch, megatron__core__parallel_state={"get_tensor_model_parallel_group": lambda: group}
    )
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: size)
    calls = record(monkeypatch, recipe)
    data, logits, seqs, toks = nemo_batch()
    recipe.FusedClippedPGLoss(SimpleNamespace(**{**NEMO, **NEMO_CASES[case]}), megatron=True)(logits, data, seqs, toks)
    assert [given for _, given in calls] == [group if size == 2 else None]


@pytest.fixture
def mesh():
    """A device mesh of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_nemo_rl_takes_a_dtensor(monkeypatch, mesh):
    """As its DTensor worker hands over."""
    recipe, (data, logits, seqs, toks) = nemo_recipe(monkeypatch), nemo_batch()
    loss_fn = recipe.FusedClippedPGLoss(SimpleNamespace(**{**NEMO, **NO_KL}))
    want, _ = loss_fn(logits, data, seqs, toks)
    want.backward()
    sharded = distribute_tensor(logits.detach(), mesh, [Shard(2)]).requires_grad_()
    loss, _ = loss_fn(sharded, data, seqs, toks)
    loss.backward()
    assert torch.equal(loss, want) and torch.equal(sharded.grad.full_tensor(), logits.grad)  # one rank: the same call


def test_nemo_rl_refuses(monkeypatch):
    recipe, (data, logits, seqs, toks) = nemo_recipe(monkeypatch), nemo_batch()
    for name in recipe.REFUSED:
        with pytest.raises(NotImplementedError, match=name):
            recipe.FusedClippedPGLoss(SimpleNamespace(**{**NEMO, name: 1}))
    with pytest.raises(NotImplementedError, match="context_parallel_size"):
        recipe.FusedClippedPGLoss(SimpleNamespace(**NEMO))(logits[:, :4], data, seqs, toks)


# --- ROLL ------------------------------------------------------------------------------------------

ROLL = {"use_pg_clip_range": False, "pg_clip": 0.2, "pg_clip_low": 0.1, "pg_clip_high": 0.3, "dual_clip_loss": False,
        "use_kl_loss": False, "kl_loss_coef": 0.1, "entropy_loss_coef": 0.0, "loss_agg_mode": "token-mean",
        "enable_old_logprobs_recompute": True}  # fmt: skip
ROLL_CASES = {
    "default": {},
    "kl": {"use_kl_loss": True},
    "range": {"use_pg_clip_range": True, "loss_agg_mode": "seq-mean-token-sum"},
    "dual": {"dual_clip_loss": True, "pg_clip": 0.1, "loss_agg_mode": "seq-mean-token-mean", "use_kl_loss": True},
    "norm": {"loss_agg_mode": "seq-mean-token-sum-norm"},
}


class Worker:  # roll.pipeline.base_worker.ActorWorker
    def __init__(self, cfg, strategy="deepspeed_train"):
        self.pipeline_config = cfg
        self.worker_config = SimpleNamespace(strategy_args=SimpleNamespace(strategy_name=strategy))


def roll_batch(seed=0, B=4, S=10):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, S, V, generator=g)
    mask = torch.zeros(B, S, dtype=torch.long)
    for i, (start, end) in enumerate(((3, 9), (2, 5), (4, 4), (3, 10))):
        mask[i, start:end] = 1
    batch = {"input_ids": torch.randint(V, (B, S), generator=g), "response_mask": mask}
    near, _ = host_maths.logps_and_entropy(logits[:, :-1], batch["input_ids"][:, 1:])
    for name in ("old_log_probs", "ref_log_probs"):
        batch[name] = noisy(near, g) * mask[:, 1:]
    batch["advantages"] = torch.randn(B, 1, generator=g) * mask[:, 1:]
    meta = {"batch_num_tokens": {"response_mask": torch.tensor(37)},
            "global_valid_samples": {"response_mask": torch.tensor(9)}}  # fmt: skip
    return SimpleNamespace(batch=batch, meta_info=meta), logits.requires_grad_()


@pytest.mark.parametrize("case", ROLL_CASES)
def test_roll(case, monkeypatch):
    cfg, (data, logits) = SimpleNamespace(**{**ROLL, **ROLL_CASES[case]}), roll_batch()
    recipe = load(monkeypatch, "roll", roll__pipeline__base_worker={"ActorWorker": Worker})
    worker = recipe.FusedActorWorker(cfg)
    compare(lambda x: worker.loss_func(data, x), lambda x: host_maths.roll(cfg, data.batch, data.meta_info, x), logits)


def test_roll_shards_the_vocabulary_and_refuses(monkeypatch):
    mpu = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: 2, get_tensor_model_parallel_group=lambda: "TP")
    recipe = load(monkeypatch, "roll", roll__pipeline__base_worker={"ActorWorker": Worker},
                  megatron__core={"mpu": mpu})  # fmt: skip
    calls = record(monkeypatch, recipe)
    data, logits = roll_batch()
    for strategy in ("megatron_train", "fsdp2_train"):
        recipe.FusedActorWorker(SimpleNamespace(**ROLL), strategy).loss_func(data, logits)
    assert [group for _, group in calls] == ["TP", None]
    weighted, plain = (SimpleNamespace(is_weight=SimpleNamespace(enabled=on), filters=[]) for on in (True, False))
    allowed = {"train_infer_correction": plain, "rl_loss_coef": 1.0, "ratio_type": "token", "max_len_mask": False}
    recipe.FusedActorWorker(SimpleNamespace(**ROLL, **allowed)).loss_func(data, logits)
    for refused in (
        {"entropy_loss_coef": 0.1}, {"enable_old_logprobs_recompute": False}, {"train_infer_correction": weighted},
        {"rl_loss_coef": 0.5}, {"ratio_type": "segment"}, {"importance_sampling": "seq"}, {"pg_variant": "cispo"},
        {"max_len_mask": True},
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=next(iter(refused))):
            recipe.FusedActorWorker(SimpleNamespace(**{**ROLL, **refused})).loss_func(data, logits)
    with pytest.raises(NotImplementedError, match="context_parallel_size"):
        recipe.FusedActorWorker(SimpleNamespace(**ROLL)).loss_func(data, logits[:, :5])
