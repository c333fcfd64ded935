"""The policy: any causal LM of `transformers`, or by default a tiny Qwen2 that needs no download."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo_kernels.trainer.options import OptionError, Options

CONTEXT = 64  # of the tiny model, where no longer one is needed
HIDDEN_SIZE = 64  # likewise, where --hidden-size says nothing


def tiny_qwen2(
    tokenizer: PreTrainedTokenizerBase, max_completion_length: int, context: int = CONTEXT,
    hidden_size: int = HIDDEN_SIZE,
) -> Qwen2ForCausalLM:  # fmt: skip
    """A Qwen2 of two layers, drawn from torch's global generator; of width 64 it has about 80,000 parameters.

    Args:
        tokenizer: gives the vocabulary and the special tokens.
        max_completion_length: how many tokens ``generate`` adds unless told otherwise.
        context: most tokens of prompt and completion; no weight depends on it.
        hidden_size: the width, a multiple of 16.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=8,  # many narrow heads find the carry soonest
        num_key_value_heads=8,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        # 0.08 at 64. The usual 0.02 suits widths in the thousands; here it starts on a plateau of hundreds of steps.
        initializer_range=0.64 / hidden_size**0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.max_new_tokens = max_completion_length
    return model


def _why(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def load_tokenizer(options: Options) -> PreTrainedTokenizerBase:
    """The tokenizer of --model, padding on the left, as generation needs.

    Raises:
        OptionError: it cannot be loaded, or has no token to pad with or to end on.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    except Exception as error:  # of many kinds: files, the network, the hub
        raise OptionError(
            f"--model {options.model}: its tokenizer could not be loaded: {_why(error)}. Name a local folder or a hub "
            "model that has one."
        ) from error
    if options.pad_token is not None:
        if options.pad_token not in tokenizer.get_vocab():
            raise OptionError(f"--pad-token {options.pad_token} is not in the vocabulary of --model {options.model}. "
                              "Name a token that is.")  # fmt: skip
        tokenizer.pad_token = options.pad_token
    if tokenizer.pad_token is None:
        hint = tokenizer.eos_token or "TOKEN"
        raise OptionError(f"--model {options.model} has no pad token. Name a token that may pad: --pad-token '{hint}'.")
    if tokenizer.eos_token is None:
        raise OptionError(f"--model {options.model} has no end-of-sequence token, so that no completion could end. "
                          "Take another model.")  # fmt: skip
    return tokenizer


def context_of(config: PreTrainedConfig) -> int | None:
    """Most tokens that a model takes; None: it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_config(options: Options) -> PreTrainedConfig:
    """Of --model, without dropout: log-probabilities of one policy must not differ from call to call.

    Raises:
        OptionError: it cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(options.model)
    except Exception as error:  # as above
        raise OptionError(
            f"--model {options.model} could not be loaded: {_why(error)}. Name a local folder with a config.json, or "
            "a hub model."
        ) from error
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(text, name, 0.0)
    return config


def load_model(options: Options, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> PreTrainedModel:
    """--model with fp32 weights, which samples as the options say and not as its own defaults do.

    From safetensors alone: other formats may execute code as they are loaded.

    Raises:
        OptionError: it cannot be loaded, or is no causal LM.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            options.model, config=config, dtype=torch.float32, use_safetensors=True
        )
    except Exception as error:  # as above
        raise OptionError(f"--model {options.model} could not be loaded as a causal LM: {_why(error)}. Name one that "
                          "AutoModelForCausalLM loads, with its weights in safetensors.") from error  # fmt: skip
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise OptionError(f"--model {options.model}: the tokenizer has {len(tokenizer)} tokens, and the model {rows}. "
                          "Use the tokenizer it came with.")  # fmt: skip
    # A repetition penalty, say, would make the sampled distribution another one than the loss assumes.
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return model
