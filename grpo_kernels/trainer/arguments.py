"""The command line: `Options` from arguments, and for ``--resume`` from the checkpoint's options."""

import argparse
import dataclasses
import re
import sys
import typing
from collections.abc import Callable, Sequence

from grpo_kernels.trainer.loss_options import members
from grpo_kernels.trainer.options import OptionError, Options, flag

DESCRIPTION = (
    "Train a language model with GRPO. Without options: a tiny model on two-digit addition, a short supervised "
    "warm-up and then reinforcement learning from an exact-match reward alone, which needs no download. "
    "'plot DIR... [--out FILE]' overlays the curves of finished runs."
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of all the options is for --help."""

    def error(self, message: str) -> typing.NoReturn:
        print(f"error: {message.rstrip('.')}. See --help.", file=sys.stderr)
        raise SystemExit(2)


def _how(field: dataclasses.Field, hint: object) -> dict:
    """Arguments of ``add_argument``; what is not given stays out of the result."""
    help, choices, of_loss = (field.metadata[name] for name in ("help", "choices", "of_loss"))
    if "(default: " not in help:
        shown = {None: "none", True: "on", False: "off"} if field.default is None or field.type is bool else {}
        help += f" (default: {shown.get(field.default, field.default)})"
    how = {"help": help.replace("%", "%%").strip(), "default": argparse.SUPPRESS}
    allowed = members(hint)
    if bool in allowed:
        return how | {"action": argparse.BooleanOptionalAction}
    several = [member for member in allowed if typing.get_origin(member) is tuple]
    kind = typing.get_args(several[0])[0] if several else next(member for member in allowed if member in _LETTERS)
    many = {} if not several else {"action": "append"} if kind is str else {"nargs": "+"}
    if of_loss:  # Options knows the names, and None among them
        return how | many | {
            "type": _or_none(kind) if type(None) in allowed else kind, "metavar": "NAME" if choices else _LETTERS[kind],
        }  # fmt: skip
    return how | many | {"type": kind, "choices": choices, "metavar": None if choices else _LETTERS[kind]}


_LETTERS = {float: "X", int: "N", str: "TEXT"}


def _or_none(kind: type) -> Callable[[str], object]:
    def read(text: str) -> object:
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it where it fails
    return read


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m grpo_kernels.trainer", usage="%(prog)s [options]", description=DESCRIPTION,
                  allow_abbrev=False)  # fmt: skip
    made._negative_number_matcher = re.compile(r"-(\d|\.\d|inf)")  # values too, which argparse takes for options
    loss = made.add_argument_group("the loss", "The fields of grpo_kernels.LossConfig.")
    types = typing.get_type_hints(Options)
    for field in dataclasses.fields(Options):
        group = loss if field.metadata["of_loss"] else made
        group.add_argument(flag(field.name), **_how(field, types[field.name]))
    return made


def _value(name: str, value: object) -> object:
    """As `Options` has it: several values as a tuple, and one alone as itself where a number or a pair is asked for."""
    if not isinstance(value, list):
        return value
    if None in value and len(value) > 1:
        raise OptionError(f"{flag(name)} takes none alone, or numbers.")
    alone = len(value) == 1 and len(members(typing.get_type_hints(Options)[name])) > 1
    return value[0] if alone else tuple(value)


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from a command line; exits with status 2 and one line on stderr if they are unusable.

    With ``--resume`` those that are not given are the checkpoint's.
    """
    reader = parser()
    parsed = vars(reader.parse_args(argv))
    try:
        given = {name: _value(name, value) for name, value in parsed.items()}
        if not given.get("resume"):
            return Options(**given)
        from grpo_kernels.trainer.checkpoint import Checkpoints

        default = Options.__dataclass_fields__["output_dir"].default
        output_dir = given.get("output_dir", default)
        saved = Checkpoints(Options(output_dir=output_dir).checkpoints_dir()).latest().options
        return Options(**{**saved, "output_dir": output_dir, **given})
    except OptionError as error:
        reader.error(str(error))
