"""The loss's part of `Options`: an option for every field of `LossConfig`, made of its type, default and docstring."""

import dataclasses
import functools
import importlib
import inspect
import operator
import re
import typing
import unicodedata
from collections.abc import Sequence

import torch

from grpo_kernels import LossConfig

# Fields of LossConfig that are no options, and why.
LEFT_OUT = {
    "max_completion_length": "Options has its own, where completions are cut; the loss gets the run's",
    "global_batch_size": "the trainer counts the sequences of a minibatch itself",
    "reward_weights": "Options has its own, one for each --reward; the trainer passes them on",
    "sampling_correction": "the policy itself samples, so that there is no other sampler to correct for",
    "sampling_correction_min": "as sampling_correction",
    "sampling_correction_max": "as sampling_correction",
}
DEFAULTS = {"beta": 0.04}  # where the trainer's is not LossConfig's


def option(
    default: object, help: str, choices: Sequence[str | None] | None = None, *, resumable: bool = False,
    of_loss: bool = False,
):  # fmt: skip
    """A field of `Options`.

    Args:
        choices: the only values; None: any.
        resumable: may differ from the checkpoint's when a run is resumed.
        of_loss: is a field of `LossConfig`; where that may be None, the command line takes ``none``.
    """
    metadata = {"help": help, "choices": choices, "resumable": resumable, "of_loss": of_loss}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def members(hint: object) -> tuple:
    """The types that a hint allows, but for tensors, which no command line has."""
    union = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    return tuple(member for member in union if member is not torch.Tensor)


_UNIONS = (typing.Union, type(int | str))


def loss_fields(config: type) -> list[tuple[str, object, dataclasses.Field]]:
    """(name, type, field) of each option, for `dataclasses.make_dataclass`."""
    hints, texts, made = typing.get_type_hints(config), _attributes(inspect.getdoc(config) or ""), []
    for field in dataclasses.fields(config):
        if field.name in LEFT_OUT:
            continue
        allowed, text = members(hints[field.name]), texts.get(field.name, "")
        choices = (_choices(text) if str in allowed else None) or None
        if choices and type(None) in allowed:
            choices = (None, *choices)
        default = DEFAULTS.get(field.name, field.default)
        made.append((field.name, functools.reduce(operator.or_, allowed),
                     option(default, _plain(text), choices, of_loss=True)))  # fmt: skip
    return made


def _attributes(docstring: str) -> dict[str, str]:
    """Text by name, of a docstring's section "Attributes"."""
    section = docstring.partition("Attributes:\n")[2].split("\n\n")[0]
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


_ONE_OF = re.compile(r"one of `([\w.]+)\.(\w+)`")


def _choices(text: str) -> tuple[str, ...]:
    """What a docstring allows: the keys of "one of `module.NAMES`", or the names in quotes."""
    if found := _ONE_OF.search(text):
        return tuple(getattr(importlib.import_module(found[1]), found[2]))
    return tuple(re.findall(r'``"([\w-]+)"``', text))


_ASCII = str.maketrans({"−": "-", "·": "*", "±": "+-", "≥": ">=", "≤": "<=", "²": "^2", "⁄": "/", "–": "-"})


def _plain(text: str) -> str:
    """A docstring's text for a terminal: its names listed, without marks, in ASCII (ε is epsilon)."""
    text = _ONE_OF.sub(lambda found: "one of " + ", ".join(_choices(found[0])), text)
    text = re.sub(r"\bNone\b", "none", text).replace("`", "").replace('"', "").rstrip(".")
    text = re.sub(r"[α-ω]", lambda letter: unicodedata.name(letter[0]).split()[-1].lower(), text.translate(_ASCII))
    return unicodedata.normalize("NFKD", text).translate(_ASCII).encode("ascii", "ignore").decode()


LossOptions = dataclasses.make_dataclass("LossOptions", loss_fields(LossConfig), frozen=True)
LossOptions.__doc__ = "An option for every field of `LossConfig`, but for `LEFT_OUT`."
LOSS_FIELDS = tuple(LossOptions.__dataclass_fields__)
_NAMES = "|".join(LOSS_FIELDS)


def in_flags(message: str) -> str:
    """What `LossConfig` says, in the command line's words: ``cispo_max=5`` is ``--cispo-max 5``."""
    # A name behind a sign is a number in a formula: 1 - epsilon.
    message = re.sub(rf"(?<![\w=])(?<![-+=] )({_NAMES})\b(=?)",
                     lambda found: flag(found[1]) + " " * len(found[2]), message)  # fmt: skip
    return re.sub(r"\bNone\b", "none", message)
