"""The language-model head of a transformers model, for the losses that take hidden states."""

from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from grpo_kernels.linear.head_checks import has_adapter

PROBE = 8  # tokens that a model's own logits are compared on
TOLERANCE = 0.02  # of the largest logit; bf16 rounds it by 0.004
FINE = 0.05  # of that, for fp32: a softcap far above the logits of the probe bends them by little
# As the configs of transformers name them; the first that is set counts.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere; Muse; Falcon-H1
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM


class HeadError(ValueError):
    """Hidden states and head do not give the model's own logits."""


@dataclass(frozen=True)
class ModelHead:
    """logits = softcap·tanh(logit_scale·(hidden·weightᵀ + bias)/softcap), of the hidden states of ``body(model)``."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def arguments(self, model: PreTrainedModel, hidden: torch.Tensor) -> dict[str, torch.Tensor | float | None]:
        """Of `fused_linear_grpo_loss` and `linear_token_logprobs`; weights in the dtype of the hidden states."""
        head = model.get_output_embeddings()
        weight, bias = (None if x is None else x.to(hidden.dtype) for x in (head.weight, head.bias))
        return {"hidden": hidden, "weight": weight, "bias": bias, **asdict(self)}

    def logits(self, model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        z = self.logit_scale * model.get_output_embeddings()(hidden)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def body(model: PreTrainedModel) -> nn.Module:
    """What makes the hidden states that the head is applied to."""
    return model.base_model


def named_head(model: PreTrainedModel) -> ModelHead:
    """The head of a causal model, by the names that transformers has for scales and caps."""
    config = model.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None) or 1.0
    scaling = scaling if config.model_type == "hyperclovax" else 1 / scaling  # HyperCLOVA X multiplies, Granite divides
    return ModelHead(float((_first(config, SCALES) or 1.0) * scaling), _first(config, SOFTCAPS))


def find_head(model: PreTrainedModel) -> ModelHead:
    """`named_head`, tried out.

    Raises:
        HeadError: hidden states and head do not give the model's own logits.
    """
    head = named_head(model)
    if body(model) is model:
        raise _not_understood(model, "it has no body that stops at the hidden states (base_model)")
    kind = type(model.get_output_embeddings()).__name__
    if has_adapter(model.get_output_embeddings()):  # a new one may change nothing yet, and be taken for none
        raise _not_understood(model, f"the output embedding is a {kind} with an adapter on it")
    if type(model.get_output_embeddings()) is not nn.Linear:
        raise _not_understood(model, f"the output embedding is a {kind}, not a torch.nn.Linear")
    training = model.training
    try:
        error = _error(model.eval(), head)
    finally:
        model.train(training)
    if not error <= (TOLERANCE if model.dtype in (torch.bfloat16, torch.float16) else TOLERANCE * FINE):
        raise _not_understood(model, f"{head} is off by {error:.2g} of the model's largest logit")
    return head


def _first(config: PretrainedConfig, names: tuple[str, ...]) -> float | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


@torch.no_grad()
def _error(model: PreTrainedModel, head: ModelHead) -> float:
    """Of the logits of a few tokens, in units of the largest."""
    ids = (torch.arange(PROBE, device=model.device) % model.config.get_text_config().vocab_size)[None]
    hidden = getattr(body(model)(input_ids=ids), "last_hidden_state", None)
    if hidden is None:
        return torch.inf
    want = model(input_ids=ids).logits.float()
    return ((head.logits(model, hidden).float() - want).abs().max() / want.abs().max()).item()


def _not_understood(model: PreTrainedModel, why: str) -> HeadError:
    return HeadError(f"the head of {type(model).__name__} is not understood: {why}.")
