"""TRL's own `GRPOTrainer.train()` against `FusedGRPOTrainer.train()`: the same logs at every step, the same weights.

Both start from the same saved model and seed, generate for themselves, and differ in nothing but the loss.
"""

import functools
import gc
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="the drop-in needs TRL 1.16, which needs Python 3.11")

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

import trl_runs
from grpo_kernels.integrations import trl as fused
from grpo_kernels.integrations.trl import FusedGRPOTrainer, patch
from trl_runs import ITERATED, MICRO, RANKS, Mismatch, MismatchPerSequence, OneToken, same, save, train, vowels


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run as fast on one thread, and do not wait for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # a run collects garbage as it ends, and most of its time would be spent on other tests' objects
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> folder of a tiny model, saved."""
    return functools.cache(lambda name: save(name, tmp_path_factory.mktemp(name)))


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
CASES = {
    "defaults": {},
    **{f"{t} iterated": {"loss_type": t, **ITERATED} for t in LOSS_TYPES},
    **{f"{t} sequence": {"loss_type": t, "importance_sampling_level": "sequence", **ITERATED}
       for t in ("grpo", "dapo", "luspo")},
    **{f"{t} accumulated": {"loss_type": t, **MICRO, "entropy_coef": 0.02} for t in LOSS_TYPES},
    "clipping": {**ITERATED, "epsilon": 0.1, "epsilon_high": 0.5, "delta": 1.3, "use_bias_correction_kl": False},
    "cispo's bound": {**ITERATED, "loss_type": "cispo", "epsilon_high": 1.1},
    "temperature": {**ITERATED, "temperature": 0.7, "top_k": 10},
    "off-policy mask": {**ITERATED, "off_policy_mask_threshold": 0.01},
    "stale": {**MICRO, "steps_per_generation": 4, "beta": 0.1, "max_steps": 4},
    "last window is short": {**MICRO, "gradient_accumulation_steps": 3, "steps_per_generation": 2, "max_steps": -1,
                             "num_train_epochs": 0.5, "entropy_coef": 0.01},
    "truncated": {"mask_truncated_completions": True, **ITERATED},
    "truncated, sequence": {"mask_truncated_completions": True, **ITERATED, "loss_type": "grpo",
                            "importance_sampling_level": "sequence"},
    "truncated, one by one": {"mask_truncated_completions": True, **MICRO, "per_device_train_batch_size": 1,
                              "gradient_accumulation_steps": 4, "loss_type": "grpo"},
    "batch std": {"scale_rewards": "batch", "per_device_train_batch_size": 8},
    "no std": {"scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum"},
    "entropy quantile": {**ITERATED, **MICRO, "top_entropy_quantile": 0.4, "entropy_coef": 0.05},
    "adaptive entropy": {**MICRO, "use_adaptive_entropy": True, "entropy_target": 2.9, "entropy_coef_delta": 0.02,
                         "max_steps": 4},
    "adaptive entropy, quantile": {**MICRO, "use_adaptive_entropy": True, "entropy_target": 3.3, "max_steps": 4,
                                   "entropy_coef_delta": 0.02, "top_entropy_quantile": 0.5},
    "checkpointing": {"gradient_checkpointing": True, **ITERATED},
    "two steps a row": {"logging_steps": 2, "max_steps": 4, "beta": 0.1},
    "the reference follows": {**ITERATED, "sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 4},
    "fp32 head": {"cast_lm_head_to_fp32": True, **ITERATED},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_runs_are_the_same(case, saved, tmp_path):
    args = CASES[case]
    theirs = train(GRPOTrainer, saved("llama"), tmp_path, **args)
    for loss_path in ("linear",) if "accumulated" in case else ("linear", "logits"):
        ours = train(FusedGRPOTrainer, saved("llama"), tmp_path, trainer={"loss_path": loss_path}, **args)
        same(ours, theirs)
    assert max(row["grad_norm"] for row in theirs[0] if "grad_norm" in row) > 0


@pytest.mark.parametrize("model", ["tied", "gemma2", "moe"])
def test_other_models(model, saved, tmp_path):
    args = {**ITERATED, **MICRO}
    theirs = train(GRPOTrainer, saved(model), tmp_path, **args)
    for loss_path in ("linear", "logits"):
        same(train(FusedGRPOTrainer, saved(model), tmp_path, trainer={"loss_path": loss_path}, **args), theirs)
    assert ("aux_loss" in theirs[0][0]) == (model == "moe")


def test_a_reference_with_another_config(saved, tmp_path):
    """A model that is handed over may differ from what is saved, which the reference is made of."""
    args = {**ITERATED, "max_steps": 2}
    runs = []
    for cls, trainer in ((GRPOTrainer, {}), (FusedGRPOTrainer, {"loss_path": "linear"})):
        model = AutoModelForCausalLM.from_pretrained(saved("gemma2"))
        model.config.final_logit_softcapping = None
        runs.append(train(cls, model, tmp_path, trainer=trainer, **args))
    theirs, ours = runs
    same(ours, theirs)
    assert theirs[0][0]["kl"] > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("loss_type", "front"),
    [("dapo", Mismatch), ("dapo", MismatchPerSequence), ("grpo", Mismatch), ("grpo", MismatchPerSequence),
     ("cispo", Mismatch), ("vespo", Mismatch)],
)  # fmt: skip
def test_weights_masks_and_tools(loss_type, front, level, saved, tmp_path):
    args = {**ITERATED, "loss_type": loss_type, "importance_sampling_level": level, "off_policy_mask_threshold": 0.05}
    theirs = train(GRPOTrainer, saved("llama"), tmp_path, front=front, **args)
    same(train(FusedGRPOTrainer, saved("llama"), tmp_path, front=front, **args), theirs)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_adapters(kind, saved, tmp_path):
    """The reference is the model without its adapter."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = {"lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
              "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")}[kind]  # fmt: skip
    args = {**ITERATED, **MICRO}
    theirs = train(GRPOTrainer, saved("llama"), tmp_path, trainer={"peft_config": config()}, **args)
    for loss_path in ("linear", "logits"):
        trainer = {"peft_config": config(), "loss_path": loss_path}
        same(train(FusedGRPOTrainer, saved("llama"), tmp_path, trainer=trainer, **args), theirs)
    assert theirs[0][0]["grad_norm"] > 0


def test_nothing_is_said_of_the_temperature_that_the_trainer_passes(saved, tmp_path, recwarn):
    train(FusedGRPOTrainer, saved("llama"), tmp_path, temperature=0.7, max_steps=1)
    assert not [str(each.message) for each in recwarn if "temperature" in str(each.message)]


def test_an_adapter_on_the_head(saved, tmp_path):
    """TRL refuses it. A head that PEFT keeps beside the model's own is served, through logits."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    for loss_path in ("auto", "logits", "linear"):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
        with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
            make(saved, tmp_path, loss_path=loss_path, peft_config=config)
    args, whole = {**ITERATED, **MICRO}, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    theirs = train(GRPOTrainer, saved("llama"), tmp_path, trainer={"peft_config": peft.LoraConfig(**whole)}, **args)
    with pytest.warns(UserWarning, match="through logits, since .* the output embedding is a ModulesToSaveWrapper"):
        ours = train(
            FusedGRPOTrainer, saved("llama"), tmp_path, trainer={"peft_config": peft.LoraConfig(**whole)}, **args
        )
    same(ours, theirs)
    (name,) = [name for name in ours[1] if "lm_head" in name and "original" not in name]
    assert not torch.equal(ours[1][name], ours[1][name.replace("modules_to_save.default", "original_module")])


@pytest.mark.parametrize("bonus", [{}, {"entropy_coef": 0.05}], ids=["plain", "bonus"])
def test_fewer_tokens_than_batches(bonus, saved, tmp_path):
    theirs = train(GRPOTrainer, saved("llama"), tmp_path, front=OneToken, **MICRO, **bonus)
    same(train(FusedGRPOTrainer, saved("llama"), tmp_path, front=OneToken, **MICRO, **bonus), theirs)
    assert theirs[0][0]["grad_norm"] > 0


def test_advantages_per_token_where_no_token_counts(saved, tmp_path):
    """A subclass may make them. A micro-batch that is one truncated completion then has no clipping at any level."""
    args = {**CASES["truncated, one by one"], "importance_sampling_level": "sequence"}
    theirs = train(GRPOTrainer, saved("llama"), tmp_path, front=trl_runs.PerToken, **args)
    same(train(FusedGRPOTrainer, saved("llama"), tmp_path, front=trl_runs.PerToken, **args), theirs)


@pytest.mark.parametrize("args", [{}, {"loss_type": "grpo", "entropy_coef": 0.02, **MICRO}], ids=["dapo", "grpo"])
def test_evaluation(args, saved, tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "beta": 0.1, **args}
    theirs = train(GRPOTrainer, saved("llama"), tmp_path, evaluate=True, **args)
    same(train(FusedGRPOTrainer, saved("llama"), tmp_path, evaluate=True, **args), theirs)
    assert any("eval_kl" in row for row in theirs[0])


@pytest.mark.parametrize("loss_path", ["linear", "logits"])
def test_bf16(loss_path, saved, tmp_path):
    """Autocast; rounding in another order, on weights that are as coarse as here, moves the logs by about 1%."""
    args = {**ITERATED, "bf16": True, "learning_rate": 0.05}
    theirs = train(GRPOTrainer, saved("llama"), tmp_path, **args)
    ours = train(FusedGRPOTrainer, saved("llama"), tmp_path, trainer={"loss_path": loss_path}, **args)
    same(ours, theirs, unit=2**-8, only="lm_head")  # whose products alone are rounded elsewhere


def test_adamw(saved, tmp_path):
    """Which divides by the gradient's own size, and makes something of the rounding of gradients near 0."""
    args = {**ITERATED, "optim": "adamw_torch", "learning_rate": 1e-3}
    theirs = train(GRPOTrainer, saved("llama"), tmp_path, **args)
    same(train(FusedGRPOTrainer, saved("llama"), tmp_path, **args), theirs)


# --- two ranks --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ranks(saved, tmp_path_factory):
    """What two data-parallel ranks printed; all checks run in one pair of processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2",
           "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    command = [sys.executable, "-m", "trl_runs", saved("llama"), str(tmp_path_factory.mktemp("ranks"))]
    processes = [subprocess.Popen(command, env={**env, "RANK": r, "LOCAL_RANK": r}, **pipes) for r in "01"]
    try:
        return [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("case", RANKS)
def test_two_ranks(case, ranks):
    assert all(f"passed: {case}\n" in text for text in ranks), "\n".join(text[-5000:] for text in ranks)


# --- patch() ---------------------------------------------------------------------------------------


@pytest.fixture
def patched():
    undo = patch()
    yield
    undo()


def test_patch(saved, tmp_path, monkeypatch):
    called = []
    real = fused.fused_linear_grpo_loss
    monkeypatch.setattr(fused, "fused_linear_grpo_loss", lambda *a, **k: (called.append(1), real(*a, **k))[1])
    stock = {name: getattr(GRPOTrainer, name) for name in fused._STOCK}
    theirs = train(GRPOTrainer, saved("llama"), tmp_path, **ITERATED)
    assert not called
    undo = patch()
    try:
        ours = train(GRPOTrainer, saved("llama"), tmp_path, **ITERATED)
        steps = len(called)
        train(FusedGRPOTrainer, saved("llama"), tmp_path, trainer={"loss_path": "logits"}, max_steps=1)
    finally:
        undo()
    assert steps == len(called) == 3
    same(ours, theirs)
    assert {name: getattr(GRPOTrainer, name) for name in stock} == stock
    train(GRPOTrainer, saved("llama"), tmp_path, max_steps=1)
    assert steps == len(called)


def test_a_trainer_from_before_keeps_its_own(saved, tmp_path):
    made = make(saved, tmp_path, cls=GRPOTrainer)
    undo = patch()
    try:
        made.train()
    finally:
        undo()
    assert "entropy" in made.state.log_history[0]


def test_a_subclass_with_its_own_loss_keeps_it(patched, saved, tmp_path):
    class Own(GRPOTrainer):
        get_off_policy_mask = None  # its own business

        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            logps, entropies, _ = self._get_per_token_logps_and_entropies(
                model, ids, mask, inputs["completion_ids"].shape[1], compute_entropy=True
            )
            return -(logps * inputs["advantages"][:, None]).mean() - 0.01 * entropies.mean()

    rows, _, _ = train(Own, saved("llama"), tmp_path)
    assert rows[0]["grad_norm"] > 0 and "entropy" not in rows[0]


# --- what is chosen and refused --------------------------------------------------------------------


def make(saved, tmp_path, cls=FusedGRPOTrainer, **trainer):
    own = {name: trainer.pop(name) for name in ("loss_type", "epsilon", "epsilon_high") if name in trainer}
    args = GRPOConfig(**own, output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none",
                      num_generations=4, per_device_train_batch_size=4, max_completion_length=4, max_steps=1,
                      save_strategy="no", logging_steps=1)  # fmt: skip
    data = Dataset.from_dict({"prompt": ["ab"] * 4})
    return cls(saved("llama"), vowels, args, train_dataset=data, **trainer)


def heads_of(monkeypatch):
    """The heads that trainers made from now on join their models with."""
    heads, join = [], fused.Seam.join
    monkeypatch.setattr(fused.Seam, "join", lambda seam, model, head: (heads.append(head), join(seam, model, head))[1])
    return heads


def test_path(saved, tmp_path, monkeypatch):
    heads = heads_of(monkeypatch)
    make(saved, tmp_path)
    make(saved, tmp_path, loss_path="logits")
    assert heads == [fused.ModelHead(), None]
    monkeypatch.undo()
    for name, value in (("is_deepspeed_zero3_enabled", lambda: True), ("find_head", not_understood)):
        heads = heads_of(monkeypatch)
        monkeypatch.setattr(fused, name, value)
        with pytest.warns(UserWarning, match="The loss goes through logits, since"):
            make(saved, tmp_path)
        assert heads == [None]
        with pytest.raises(ValueError, match=r"loss_path='linear': (DeepSpeed|the head).*Use loss_path='logits'"):
            make(saved, tmp_path, loss_path="linear")
        monkeypatch.undo()


def not_understood(model):
    raise fused.HeadError("the head is strange.")


def test_refused(saved, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="loss_path must be one of 'auto', 'linear', 'logits', got 'fast'"):
        make(saved, tmp_path, loss_path="fast")

    for name in ("get_off_policy_mask", "_get_per_token_logps_and_entropies"):
        own = type("Own", (FusedGRPOTrainer,), {name: lambda *args, **kwargs: None})
        with pytest.raises(ValueError, match=rf"Own overrides {name}.*Remove the override"):
            make(saved, tmp_path, cls=own)
    for name in ("epsilon", "epsilon_high"):
        with pytest.raises(ValueError, match=r"epsilon_high \(epsilon where .* must be above 0, got 0"):
            make(saved, tmp_path, loss_type="cispo", **{name: 0.0})
    monkeypatch.setattr(fused.trl, "__version__", "1.15.2")
    with pytest.raises(ValueError, match=r"needs TRL 1.16, and this is 1.15.2"):
        make(saved, tmp_path)
    monkeypatch.setattr(fused.trl, "__version__", "1.17.0")
    with pytest.warns(UserWarning, match=r"tested with TRL 1.16, and this is 1.17.0"):
        make(saved, tmp_path)


def test_metrics_wait_on_the_device(saved, tmp_path):
    """Until TRL logs nobody asks for a number."""
    seen = []

    class Watched(FusedGRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            seen.append({name: values[-1] for name, values in self._metrics["train"].items()})
            return loss

    train(Watched, saved("llama"), tmp_path, beta=0.1, entropy_coef=0.1, max_steps=1)
    of_the_loss = seen[0].keys() & {*fused.LOGGED, "policy_loss"}
    assert len(of_the_loss) == 8 and all(isinstance(seen[0][name], torch.Tensor) for name in of_the_loss)



def test_the_number_of_tokens_is_asked_for_before_the_model_runs(saved, tmp_path, monkeypatch):
    """Whoever asks after it waits for all of it."""
    log = []

    class Count(fused.TokenCount):
        def __init__(self, mask):
            log.append(("asked", int(mask.sum())))
            super().__init__(mask)

    def loss(*args, num_rows, **kwargs):
        log.append(("read", num_rows))
        return fused_linear_grpo_loss(*args, num_rows=num_rows, **kwargs)

    class Watched(FusedGRPOTrainer):
        def _compute_loss(self, model, inputs):
            handle = model.register_forward_pre_hook(lambda *_: log.append(("model", None)))
            try:
                return super()._compute_loss(model, inputs)
            finally:
                handle.remove()

    fused_linear_grpo_loss = fused.fused_linear_grpo_loss
    monkeypatch.setattr(fused, "TokenCount", Count)
    monkeypatch.setattr(fused, "fused_linear_grpo_loss", loss)
    train(Watched, saved("llama"), tmp_path, trainer={"loss_path": "linear"}, max_steps=1)
    assert [what for what, _ in log] == ["asked", "model", "read"] * (len(log) // 3)
    assert all(asked[1] == read[1] > 0 for asked, read in zip(log[::3], log[2::3]))


def test_a_count_that_a_device_makes(monkeypatch):
    """With a stand-in for the GPU: its copy is queued at once, and waited for when it is read."""
    log = []
    event = SimpleNamespace(record=lambda: log.append("record"), synchronize=lambda: log.append("synchronize"))
    host = torch.zeros((), dtype=torch.int64)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, pin_memory: log.append(f"pinned {pin_memory}") or host)
    mask = torch.tensor([1, 0, 2])
    counted = fused.TokenCount(SimpleNamespace(is_cuda=True, count_nonzero=mask.count_nonzero))
    assert log == ["pinned True", "record"]
    assert counted.read() == 2 and log[2:] == ["synchronize"]
