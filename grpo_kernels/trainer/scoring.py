"""Log-probabilities and losses of completions: from logits or from hidden states, by any backend."""

import dataclasses
import importlib.util
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from transformers import PreTrainedModel

from grpo_kernels import (
    LossConfig,
    LossOutput,
    Support,
    fused_grpo_loss,
    fused_linear_grpo_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from grpo_kernels.call import ops
from grpo_kernels.integrations.head import ModelHead, body
from grpo_kernels.linear.head import bytes_setting
from grpo_kernels.objective.validation import validates
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.rollout import Rollout, model_inputs


def precision(options: Options, device: torch.device) -> AbstractContextManager:
    """Autocast to bf16 if asked for; the weights stay fp32, or small updates would round to nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16")


def completion_logits(policy: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Logits (B, T+1, V) of the positions that chose ``completion_ids``, and of one more behind them.

    ``logits[:, t]`` scores ``completion_ids[:, t]``: each is the output at the position before.
    """
    keep = rollout.completion_ids.shape[1] + 1
    return policy(**model_inputs(rollout), logits_to_keep=keep, use_cache=False).logits


def completion_hidden(policy: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Hidden states (B, T+1, H), of which the head makes `completion_logits`."""
    hidden = body(policy)(**model_inputs(rollout), use_cache=False).last_hidden_state
    hidden = hidden[:, -rollout.completion_ids.shape[1] - 1 :]
    # As autocast would hand them to the head.
    return hidden.bfloat16() if torch.is_autocast_enabled(hidden.device.type) else hidden


def completion_logps(
    policy: PreTrainedModel, head: ModelHead | None, rollout: Rollout, options: Options, **kwargs
) -> torch.Tensor:
    """Log-probabilities (B, T), over the rollout's support if it has one.

    With ``head`` a chunk of rows at a time, and no logits as a whole.

    Args:
        **kwargs: ``mask`` and ``temperature``, as of `token_logprobs`.
    """
    with precision(options, policy.device):
        states = completion_hidden(policy, rollout) if head else completion_logits(policy, rollout)
    if options.backend == "reference":
        kwargs |= {"support": _lists(rollout.support)}
        return reference_module().token_logprobs(states, rollout.completion_ids, **kwargs).logps.float()
    kwargs |= {"support": rollout.support}
    backend = backend_of(options)
    if head is None:
        return token_logprobs(states, rollout.completion_ids, backend=backend, **kwargs).logps
    states = linear_arguments(head, policy, states, options)
    return linear_token_logprobs(**states, completion_ids=rollout.completion_ids, backend=backend, **kwargs).logps


def completion_loss(
    policy: PreTrainedModel, head: ModelHead | None, rollout: Rollout, options: Options, **kwargs
) -> LossOutput:
    """The loss, with arguments as of `fused_grpo_loss`; ``head`` and support as in `completion_logps`."""
    with precision(options, policy.device):
        states = completion_hidden(policy, rollout) if head else completion_logits(policy, rollout)
    if options.backend == "reference":
        return _reference_loss(states, rollout.completion_ids, support=_lists(rollout.support), **kwargs)
    kwargs |= {"support": rollout.support}
    backend = backend_of(options)
    if head is None:
        return fused_grpo_loss(states, rollout.completion_ids, backend=backend, **kwargs)
    states = linear_arguments(head, policy, states, options)
    return fused_linear_grpo_loss(**states, completion_ids=rollout.completion_ids, backend=backend, **kwargs)


def linear_arguments(head: ModelHead, policy: PreTrainedModel, hidden: torch.Tensor, options: Options) -> dict:
    """Hidden states and head, as the linear functions take them, and the dtype of their logits."""
    wide = options.logits_dtype == "float32"
    return {**head.arguments(policy, hidden), "logits_dtype": torch.float32 if wide else None}


def check_backend(options: Options, device: torch.device) -> None:
    """Raises OptionError where ``--backend`` cannot run on the device, or is not there; or a setting has no meaning."""
    try:
        validates(device)
        bytes_setting()
    except ValueError as error:
        raise OptionError(str(error)) from error
    if options.backend == "triton":
        try:
            ops.choose_backend("triton", torch.empty(0, device=device))
        except ValueError as error:
            raise OptionError(f"--backend triton: {str(error).rstrip('.')}; or set --backend torch.") from error
    if options.backend == "reference":
        reference_module()


def backend_of(options: Options) -> str | None:
    """As the losses take it."""
    return None if options.backend == "auto" else options.backend


def reference_module() -> ModuleType:
    """The package ``reference`` of a checkout.

    Raises:
        OptionError: there is none.
    """
    module = importlib.import_module("reference") if importlib.util.find_spec("reference") else None
    if hasattr(module, "grpo_loss"):
        return module
    raise OptionError(
        "--backend reference needs the package reference/, which no wheel holds. Run from the root of a checkout of "
        "grpo_kernels, or set --backend torch."
    )


def _lists(support: Support | None) -> list[list[int]] | None:
    """A list of ids per token."""
    if support is None:
        return None
    ids = support.ids.tolist()
    return [ids[first:last] for first, last in zip(support.first.tolist(), support.last.tolist())]


def _reference_loss(
    logits: torch.Tensor, completion_ids: torch.Tensor, advantages: torch.Tensor, *, config: LossConfig,
    return_entropy: bool, support: list[list[int]] | None, **kwargs,
) -> LossOutput:  # fmt: skip
    """Loss and gradient by ``reference``; the sums behind the metrics from its log-probabilities."""
    reference = reference_module()
    names = [field.name for field in dataclasses.fields(reference.Knobs) if hasattr(config, field.name)]
    knobs = {name: getattr(config, name) for name in names}
    own = {name: kwargs[name] for name in kwargs if name in knobs}  # of this micro-batch
    given = {name: value for name, value in kwargs.items() if name not in own}
    knobs |= own
    out = reference.grpo_loss(logits, completion_ids, advantages, support=support, **given, **knobs)
    del given["temperature"]
    beside = policy_loss(
        out.logps.detach(), advantages, entropy=out.entropy.detach(), config=config, backend="torch",
        **given, **own,
    )  # fmt: skip
    return beside._replace(loss=out.loss)
