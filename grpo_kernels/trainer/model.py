"""The policy: a tiny Qwen2 with random weights, so that the demo needs no download."""

from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM


def tiny_qwen2(tokenizer: PreTrainedTokenizerBase, max_completion_length: int) -> Qwen2ForCausalLM:
    """A Qwen2 of two layers and about 80,000 parameters, drawn from torch's global generator.

    Args:
        tokenizer: gives the vocabulary and the special tokens.
        max_completion_length: how many tokens ``generate`` adds unless told otherwise.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,  # many narrow heads find the carry soonest
        num_key_value_heads=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        # The usual 0.02 suits widths in the thousands; at 64 it starts on a plateau of hundreds of steps.
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.max_new_tokens = max_completion_length
    return model
