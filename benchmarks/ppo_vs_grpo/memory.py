"""What a training step holds at most: weights, optimizer, gradients, activations."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.measure import peak_extra_bytes
from benchmarks.ppo_vs_grpo.arms import Arm, Settings
from grpo_kernels.trainer.loop import sample
from grpo_kernels.trainer.task import Task

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6}
WIDE_PROMPTS = 1


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one arm's step."""

    model: str
    parameters: int  # of the policy
    completions: int  # per step
    arm: str
    held: int  # between steps: weights, the reference's among them, and optimizer state
    peak: int  # in the step, what is held included


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Every storage once, however many tensors share it."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def peak_allocated(call: Callable[[], object], device: torch.device) -> int:
    """How far tensor memory rises during the call above its level before, in bytes.

    On CUDA by the allocator's own counter. On the CPU by PyTorch's profiler, which sees every allocation of the CPU
    allocator and its end: resident memory would be blurred by what malloc keeps and by the interpreter.
    """
    if device.type == "cuda":
        return peak_extra_bytes(call, device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it says on stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
        gc.collect()  # what the call leaves is freed while the profiler still sees it
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def measure_step(arm: Arm, tokenizer: PreTrainedTokenizerBase, task: Task) -> tuple[int, int]:
    """(held, peak) of a step, sampling included; the one before it has made the optimizer's state."""

    def step() -> None:
        arm.policy.eval()
        problems = task.train[: arm.prompts]
        rollout = sample(arm.policy, tokenizer, task, problems, arm.generations, arm.settings.temperature)
        arm.policy.train()
        arm.update(rollout)

    step()
    gc.collect()
    held = storage_bytes(list(arm.held()))
    return held, held + peak_allocated(step, arm.policy.device)


def wider(policy: PreTrainedModel) -> PreTrainedModel:
    """A random model of the same kind, of millions of parameters, as whose weights outweigh a small batch."""
    config = copy.deepcopy(policy.config)
    for name, value in WIDE.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * config.num_hidden_layers
    model = type(policy)(config).to(policy.device)
    model.generation_config.max_new_tokens = policy.generation_config.max_new_tokens
    return model


def measure_arms(
    arms: Sequence[type[Arm]],
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: Settings,
) -> list[MemoryRow]:
    """Every arm, with the run's model and batch, and with a wide model and a small batch."""
    small = replace(settings, prompts=WIDE_PROMPTS, ppo_generations=settings.num_generations)
    rows = []
    for name, model, chosen in (("run's", policy, settings), ("wide", wider(policy), small)):
        for kind in arms:
            held, peak = measure_step(kind(copy.deepcopy(model), chosen), tokenizer, task)
            rows.append(MemoryRow(name, model.num_parameters(), chosen.completions, kind.name, held, peak))
    return rows
