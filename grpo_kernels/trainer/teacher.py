"""`--teacher`: a model that the policy is pulled towards, token by token, on the policy's own completions."""

from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels import LossOutput, distillation_loss, fused_linear_distillation_loss
from grpo_kernels.integrations.head import HeadError, ModelHead, find_head
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.rollout import Rollout
from grpo_kernels.trainer.scoring import (
    backend_of,
    completion_hidden,
    completion_logits,
    linear_arguments,
    precision,
)


class Teacher(NamedTuple):
    """What is not trained: a model, and its head for a loss without logits."""

    model: PreTrainedModel
    head: ModelHead | None


def load_teacher(
    options: Options, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel, linear: bool
) -> Teacher:
    """--teacher on the policy's device.

    Args:
        linear: the loss takes hidden states.

    Raises:
        OptionError: it cannot be loaded, or its tokens are not the policy's.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32, use_safetensors=True)
        own = AutoTokenizer.from_pretrained(options.teacher)
    except Exception as error:  # of many kinds: files, the network, the hub
        raise OptionError(
            f"--teacher {options.teacher} could not be loaded: {str(error).splitlines()[0]} Name a folder with a "
            "causal LM in safetensors and its tokenizer."
        ) from error
    rows, wanted = (x.get_input_embeddings().weight.shape[0] for x in (model, policy))
    if own.get_vocab() != tokenizer.get_vocab() or rows != wanted:
        raise OptionError(
            f"--teacher {options.teacher} has other tokens than the policy ({len(own)} in {rows} rows; the policy "
            f"{len(tokenizer)} in {wanted}). Take a teacher with the policy's tokenizer and as many rows."
        )
    model = model.to(policy.device).eval().requires_grad_(False)
    try:
        return Teacher(model, find_head(model) if linear else None)
    except HeadError as error:
        raise OptionError(f"--teacher {options.teacher}: {error} Use --loss-path logits.") from None


def divergence(
    policy: PreTrainedModel, head: ModelHead | None, teacher: Teacher, rollout: Rollout, options: Options, **kwargs
) -> LossOutput:
    """The policy's divergence from the teacher over the completions; with ``head`` from both models' hidden states.

    Args:
        **kwargs: as of `distillation_loss`.
    """
    states_of = completion_hidden if head else completion_logits
    with precision(options, policy.device):
        states = states_of(policy, rollout)
        with torch.no_grad():
            told = states_of(teacher.model, rollout)
    kwargs |= {"beta": options.teacher_beta, "temperature": options.temperature, "backend": backend_of(options)}
    if head is None:
        return distillation_loss(states, told, **kwargs)
    of_teacher = {f"teacher_{name}": value for name, value in teacher.head.arguments(teacher.model, told).items()}
    return fused_linear_distillation_loss(
        **linear_arguments(head, policy, states, options), **of_teacher, **kwargs
    )
