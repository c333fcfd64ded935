"""The command line: `Options` from arguments, and for ``--resume`` from the checkpoint's options."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence

from grpo_kernels.trainer.options import OptionError, Options, flag

DESCRIPTION = (
    "Train a language model with GRPO. Without options: a tiny model on two-digit addition, a short supervised "
    "warm-up and then reinforcement learning from an exact-match reward alone, which needs no download. "
    "'plot DIR... [--out FILE]' overlays the curves of finished runs."
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of fifty options is for --help."""

    def error(self, message: str) -> typing.NoReturn:
        print(f"error: {message.rstrip('.')}. See --help.", file=sys.stderr)
        raise SystemExit(2)


def _how(field: dataclasses.Field, kind: type) -> dict:
    """Arguments of ``add_argument``; what is not given stays out of the result."""
    help, choices = field.metadata["help"], field.metadata["choices"]
    if "(default: " not in help:
        help += f" (default: {field.default})"
    how = {"help": help.replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        return how | {"action": "store_true"}
    many = {}
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
        many = {"action": "append"} if kind is str else {"nargs": "+"}
    return how | many | {
        "type": kind, "choices": choices, "metavar": None if choices else {int: "N", float: "X", str: "TEXT"}[kind],
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m grpo_kernels.trainer", usage="%(prog)s [options]", description=DESCRIPTION,
                  allow_abbrev=False)  # fmt: skip
    types = typing.get_type_hints(Options)
    for field in dataclasses.fields(Options):
        optional = type(None) in typing.get_args(types[field.name])
        kind = typing.get_args(types[field.name])[0] if optional else types[field.name]
        made.add_argument(flag(field.name), **_how(field, kind))
    return made


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from a command line; exits with status 2 and one line on stderr if they are unusable.

    With ``--resume`` those that are not given are the checkpoint's.
    """
    reader = parser()
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in vars(reader.parse_args(argv)).items()}
    try:
        if not given.get("resume"):
            return Options(**given)
        from grpo_kernels.trainer.checkpoint import Checkpoints

        default = Options.__dataclass_fields__["output_dir"].default
        output_dir = given.get("output_dir", default)
        saved = Checkpoints(Options(output_dir=output_dir).checkpoints_dir()).latest().options
        return Options(**{**saved, "output_dir": output_dir, **given})
    except OptionError as error:
        reader.error(str(error))
