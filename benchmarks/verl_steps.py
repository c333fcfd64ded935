"""Steps of verl's engine in this process, without Ray, on the policy and completions of `benchmarks.training_steps`.

A step is what verl's workers do for one batch: `infer_batch` for the old log-probabilities and entropies, then
`train_batch` with `ppo_loss`: forward, loss, backward, clipping, optimiser. The engine is verl's FSDP engine, alone in
its process group, so the model is not wrapped; its inputs are padded, as verl has them without flash-attn. Both sides
have use_fused_kernels on: without it and without flash-attn verl takes log-probabilities token by token, in a loop.
Ray is no more than a name in verl's annotations there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace

import torch
from torch import distributed as dist
from transformers import Qwen2ForCausalLM

from benchmarks.training_steps import VERL, VERL_FUSED, Run, Setting, Watch, policy, random_rewards, random_rollouts
from grpo_kernels import group_advantages

LOSS_MODES = {VERL: "vanilla", VERL_FUSED: "fused_vanilla"}


@contextlib.contextmanager
def _without_ray() -> Iterator[None]:
    """verl imports Ray at once. Where there is none, an empty module stands in its place meanwhile."""
    if importlib.util.find_spec("ray") is not None:
        yield
        return
    sys.modules["ray"] = ModuleType("ray")
    sys.modules["ray"].ObjectRef = object
    try:
        yield
    finally:
        del sys.modules["ray"]  # nobody else shall take it for Ray


def _cpu_platform() -> None:
    """verl knows GPUs and NPUs alone: before its engine is imported, it is told of this CPU."""
    from verl.plugin.platform import set_platform
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    class CPU(PlatformCUDA):
        device_name, device_module = "cpu", torch.cpu

        def is_available(self) -> bool:
            return True

        def current_device(self) -> str:
            return "cpu"

    set_platform(CPU())


def _verl(device: torch.device) -> SimpleNamespace:
    """What is used of verl, imported."""
    with _without_ray():
        if device.type == "cpu" and "verl.workers.engine" not in sys.modules:
            _cpu_platform()
        from verl.models.transformers.monkey_patch import patch_forward_with_backends
        from verl.utils import tensordict_utils
        from verl.workers import config
        from verl.workers.config.actor import PolicyLossConfig
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
        from verl.workers.utils.losses import ppo_loss
        from verl.workers.utils.padding import no_padding_2_padding

        from grpo_kernels.integrations.verl import patch
    return SimpleNamespace(
        patch_forward=patch_forward_with_backends, tensordict=tensordict_utils.get_tensordict, config=config,
        PolicyLossConfig=PolicyLossConfig, Engine=FSDPEngineWithLMHead, ppo_loss=ppo_loss,
        padded=no_padding_2_padding, patch=patch,
    )  # fmt: skip


def _engine(verl: SimpleNamespace, setting: Setting, device: torch.device, watch: Watch):
    class Engine(verl.Engine):
        def _build_module(self) -> torch.nn.Module:
            module = policy(setting.shape, device)
            verl.patch_forward(module, use_fused_kernels=True, fused_kernels_backend="torch")
            if setting.checkpointing:
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return module

        def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
            self._autocast_dtype = module.dtype
            return module

        def forward_backward_batch(self, *args, **kwargs):
            return watch.pass_(lambda: super(Engine, self).forward_backward_batch(*args, **kwargs))

    model = SimpleNamespace(use_remove_padding=False, use_fused_kernels=True, lora_rank=0)
    own = verl.config.FSDPEngineConfig(
        use_dynamic_bsz=False, micro_batch_size_per_gpu=setting.batch, use_remove_padding=False,
        use_fused_kernels=True,
    )  # fmt: skip
    optimiser = verl.config.FSDPOptimizerConfig(lr=setting.learning_rate, total_training_steps=setting.steps)
    engine = Engine(model, own, optimiser, None)
    engine._build_model_optimizer()  # `initialize` without what writes checkpoints
    return engine


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, L) as verl's ragged rows."""
    return torch.nested.as_nested_tensor(list(x), layout=torch.jagged)


def _batch(verl: SimpleNamespace, setting: Setting, rollout, reward):
    """A batch as verl's trainer hands it to its workers, but for the old log-probabilities."""
    made = rollout(["0"] * setting.batch, None)
    prompts, responses = (torch.tensor(made[name]) for name in ("prompt_ids", "completion_ids"))
    ids = torch.cat([prompts, responses], 1)
    rewards = torch.tensor(reward(made["completion_ids"]))
    advantages = group_advantages(rewards, setting.batch)[:, None].expand_as(responses)
    ones = torch.ones(responses.shape)
    tensors = {
        "input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids), "prompts": prompts,
        "responses": responses, "response_mask": ones, "loss_mask": ones, "advantages": advantages,
    }  # fmt: skip
    rest = {
        "use_remove_padding": False, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": setting.batch,
        "use_fused_kernels": True, "temperature": 1.0, "global_batch_size": setting.batch, "pad_token_id": 0,
    }  # fmt: skip
    return lambda **more: verl.tensordict(
        {**{name: _rows(x.contiguous()) for name, x in tensors.items()}, **more.pop("tensors", {})}, {**rest, **more}
    )


def run(setting: Setting, trainer: str, device: torch.device) -> Run:
    """The steps of one of `LOSS_MODES`. Weights, completions and rewards are those of TRL's trainers.

    Raises:
        ValueError: β is not 0: there is no reference model.
    """
    if setting.beta != 0:
        raise ValueError(f"verl's steps have no reference model: beta must be 0, got {setting.beta}.")
    verl = _verl(device)
    forward = Qwen2ForCausalLM.forward  # verl replaces it in the class
    undo = verl.patch() if trainer == VERL_FUSED else lambda: None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return _steps(verl, setting, LOSS_MODES[trainer], device)
    finally:
        dist.destroy_process_group()
        undo()
        Qwen2ForCausalLM.forward = forward


def _steps(verl: SimpleNamespace, setting: Setting, loss_mode: str, device: torch.device) -> Run:
    watch = Watch(device)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        engine = _engine(verl, setting, device, watch)
    actor = verl.config.ActorConfig(
        strategy="fsdp", rollout_n=setting.batch, ppo_micro_batch_size_per_gpu=setting.batch,
        policy_loss=verl.PolicyLossConfig(loss_mode=loss_mode),
    )  # fmt: skip
    rollout, reward = random_rollouts(setting), random_rewards()
    losses, norms, entropies = [], [], []
    for _ in range(setting.steps):
        made = watch.now()
        batch = _batch(verl, setting, rollout, reward)
        watch.rollout_ms += watch.now() - made
        watch.start()
        with engine.eval_mode():
            data = batch(calculate_entropy=True)
            out = engine.infer_batch(data)["model_output"]
            old, entropy = (verl.padded(out[name], data) for name in ("log_probs", "entropy"))
            entropies.append(entropy.mean().item())
        with engine.train_mode():
            data = batch(tensors={"old_log_probs": _rows(old)}, calculate_entropy=False)
            out = engine.train_batch(data, partial(verl.ppo_loss, actor))
        losses.append(sum(out["loss"]))
        norms.append(out["metrics"]["grad_norm"])
        watch.stop()
    return Run(watch.step_ms, watch.rollout_ms, *watch.bytes(), losses, norms, entropies)
