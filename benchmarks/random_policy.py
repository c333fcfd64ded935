"""A policy of a known shape with random weights, in a folder that the trainer's --model takes. Nothing is downloaded.

    python -m benchmarks.random_policy --shape qwen2.5-0.5b --out DIR

The run that it is for: docs/trainer.md, "A run on one GPU". Random weights sample nearly every token as often as every
other, so that a completion almost never reaches the target of countdown. `digits` is a reward of which it earns a part.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain, count, islice, product
from pathlib import Path

import torch
from tokenizers import models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from grpo_kernels.trainer.task import countdown
from grpo_kernels.trainer.tokenizer import UNK, character_tokenizer

SEED = 0


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict:
    return {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "tie_word_embeddings": tied}  # fmt: skip


SHAPES = {
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": _qwen(3584, 18944, 28, 28, 4, 152064, False),
    "tiny": _qwen(32, 64, 2, 4, 2, 512, True),
    "tiny-untied": _qwen(32, 64, 2, 4, 2, 512, False),
}


def policy(shape: str, device: torch.device) -> PreTrainedModel:
    """Random weights, each time the same on one kind of device: bf16 on a GPU, fp32 on a CPU."""
    torch.manual_seed(SEED)
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=32768, pad_token_id=0, eos_token_id=1,
                         bos_token_id=None)  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def full_tokenizer(alphabet: str, size: int) -> PreTrainedTokenizerFast:
    """`character_tokenizer` whose other tokens, up to ``size``, are strings of 2, 3, ... characters of ``alphabet``.

    A text is encoded character by character. Every id that a policy of ``size`` tokens samples decodes to a text.
    """
    tokenizer = character_tokenizer(alphabet)
    vocabulary = tokenizer.get_vocab()
    pieces = chain.from_iterable(product(alphabet, repeat=length) for length in count(2))
    for piece in islice(pieces, size - len(vocabulary)):
        vocabulary["".join(piece)] = len(vocabulary)
    tokenizer.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token=UNK)
    return tokenizer


def digits(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """A reward: the share of a completion's characters that are digits; 0 for one without any character."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_policy", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the model")
    given = parser.parse_args(argv)
    model = policy(given.shape, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.save_pretrained(given.out)
    full_tokenizer(countdown().alphabet, SHAPES[given.shape]["vocab_size"]).save_pretrained(given.out)
    print(f"{given.shape}: {model.num_parameters():,} random parameters in {given.out}")


if __name__ == "__main__":
    main()
