"""A character tokenizer in the `transformers` format, so that AutoTokenizer loads what a run saves."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token per character of ``alphabet``, after ``<pad>``, ``<eos>`` and ``<unk>``.

    Pads on the left, as generation needs: a completion starts right after its prompt.

    Raises:
        ValueError: a character occurs twice, or there is none.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"the alphabet must have characters, each once, got {alphabet!r}.")
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNK, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
