"""Options to task, tokenizer and policy; whatever is wrong with them shows here, before a run writes anything."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.trainer.checkpoint import Checkpoint
from grpo_kernels.trainer.data import fitted, task_of
from grpo_kernels.trainer.head import find_head
from grpo_kernels.trainer.model import (
    CONTEXT,
    HIDDEN_SIZE,
    context_of,
    load_config,
    load_model,
    load_tokenizer,
    tiny_qwen2,
)
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.randomness import seed_all
from grpo_kernels.trainer.task import Task
from grpo_kernels.trainer.teacher import Teacher, load_teacher
from grpo_kernels.trainer.tokenizer import character_tokenizer


class Built(NamedTuple):
    """What a run is made of."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    policy: PreTrainedModel  # on the device
    left_out: int  # problems with too long a prompt
    teacher: Teacher | None


def build(options: Options, device: torch.device, resumed: Checkpoint | None = None) -> Built:
    """A run's task, tokenizer and policy; seeds all random generators.

    Args:
        resumed: where tokenizer and policy come from.

    Raises:
        OptionError: model, data or rewards are not usable.
    """
    seed_all(options.seed)
    tokenizer = config = None
    if resumed is not None:
        tokenizer = resumed.tokenizer()
    elif options.model is not None:
        config = load_config(options)
        tokenizer = load_tokenizer(options)
    task = task_of(options, None if options.model is None else tokenizer)
    if not task.alphabet:
        raise OptionError(f"--dataset {options.dataset} has prompts and answers without any text. Give it some.")
    tokenizer = tokenizer or character_tokenizer(task.alphabet)
    # The tiny model has as much context as it needs; no weight depends on it.
    context = None if config is None else context_of(config)
    task, left_out = fitted(task, tokenizer, context, options)
    if resumed is not None:
        policy = resumed.model()
    elif options.model is not None:
        policy = load_model(options, tokenizer, config)
    else:
        prompt = max(len(each.prompt) for each in (*task.train, *task.held_out))  # a token per character
        policy = tiny_qwen2(tokenizer, task.max_completion_length, max(CONTEXT, prompt + task.max_completion_length),
                            options.hidden_size or HIDDEN_SIZE)  # fmt: skip
    linear = options.takes_hidden_states(task.max_completion_length, len(tokenizer))
    if linear:
        find_head(policy)
    if options.gradient_checkpointing:
        enable = getattr(policy, "activation_checkpointing_enable", None)  # the name in newer transformers
        (enable or policy.gradient_checkpointing_enable)({"use_reentrant": False})
    policy.to(device)
    teacher = None if options.teacher is None else load_teacher(options, tokenizer, policy, linear)
    return Built(task, tokenizer, policy, left_out, teacher)
