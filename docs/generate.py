"""Writes the tables of the catalogue into the README and the pages under docs/.

    python docs/generate.py            # rewrite what is stale
    python docs/generate.py --check    # exit 1 if anything is

A table stands between two markers, the first of which names it:

    <!-- catalogue:loss-types -->
    <!-- /catalogue -->

`TABLES` has the names. Words after a name choose rows: ``catalogue:loss-types cispo``, ``catalogue:presets cispo``.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from grpo_kernels import LossConfig  # noqa: E402
from grpo_kernels.objective.aggregations import AGGREGATIONS  # noqa: E402
from grpo_kernels.objective.catalogue import KL_ESTIMATORS, LEVELS, LOSS_TYPES, TERMS  # noqa: E402
from grpo_kernels.objective.corrections import CORRECTIONS  # noqa: E402

BLOCK = re.compile(r"(<!-- catalogue:([\w-]+)((?: [\w.+-]+)*) -->\n).*?(<!-- /catalogue -->)", re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]+`")  # a marker in it is spoken of, and marks nothing
PARTS = {  # fields whose default is the loss type's own
    "policy_term": "the loss type's", "importance_sampling_level": "the loss type's", "loss_agg_mode": "the loss type's"
}  # fmt: skip


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


# --- Markdown --------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def several(names: Iterable[str]) -> str:
    return ", ".join(map(code, names))


def linked(text: str) -> str:
    """With arXiv numbers as links."""
    return re.sub(r"([^,;]+), arXiv:(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\2)", text)


def chosen(catalogue: dict, names: list[str]) -> dict:
    missing = [name for name in names if name not in catalogue]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not in the catalogue. Choose from: {', '.join(catalogue)}.")
    return {name: catalogue[name] for name in names} if names else catalogue


# --- The tables ------------------------------------------------------------------------------------


def loss_types(*names: str) -> str:
    rows = (
        (code(name), code(v.term), code(v.level), code(v.aggregation), linked(v.paper))
        for name, v in chosen(LOSS_TYPES, names).items()
    )
    return table(("`loss_type`", "`policy_term`", "`importance_sampling_level`", "`loss_agg_mode`", "source"), rows)


def policy_terms(*names: str) -> str:
    rows = (
        (code(name), code(term.formula), code(term.gradient), linked(term.paper))
        for name, term in chosen(TERMS, names).items()
    )
    return table(("`policy_term`", "ℓ of a token", "gradient", "source"), rows)


def levels_of_terms() -> str:
    """The terms by the levels at which they are defined."""
    terms: dict[tuple[str, ...], list[str]] = {}
    for name, term in TERMS.items():
        terms.setdefault(term.levels, []).append(name)
    rows = (("every" if at == tuple(LEVELS) else several(at), several(names)) for at, names in terms.items())
    return table(("levels", "`policy_term`"), rows)


def levels(*names: str) -> str:
    rows = (
        (code(name), code(level.formula), level.gradient, linked(level.paper))
        for name, level in chosen(LEVELS, names).items()
    )
    return table(("`importance_sampling_level`", "log ratio", "its gradient goes to", "source"), rows)


def kl(*names: str) -> str:
    rows = ((code(name), summary(function)) for name, function in chosen(KL_ESTIMATORS, names).items())
    return table(("`kl_estimator`", "value, with u = log π_ref − log π_θ"), rows)


def summary(function) -> str:
    """The docstring of a @jit function, on one line, without its full stop."""
    return " ".join(function.fn.__doc__.split()).removesuffix(".")


def aggregations(*names: str) -> str:
    rows = (
        (code(name), code(aggregation.formula), several(k for k, v in LOSS_TYPES.items() if v.aggregation == name))
        for name, aggregation in chosen(AGGREGATIONS, names).items()
    )
    return table(("`loss_agg_mode`", "weight of a token", "loss types"), rows)


def corrections(*names: str) -> str:
    rows = []
    for name, correction in chosen(CORRECTIONS, names).items():
        ratio = "`exp Σ d`, one per sequence" if correction.per_sequence else "`exp d`, one per token"
        beyond = "held at the bound" if correction.truncate else "0"
        if correction.gated:
            beyond = "0 for the whole sequence if `exp(mean d)` is beyond; else as it is"
        rows.append((code(name), ratio, beyond))
    return table(("`sampling_correction`", "ratio", "beyond the bounds"), rows)


def config() -> str:
    defaults = {field.name: field.default for field in dataclasses.fields(LossConfig)}
    rows = (
        (several(fields), ", ".join(PARTS.get(field) or code(plain(defaults[field])) for field in fields), meaning)
        for fields, meaning in meanings()
    )
    return table(("field of `LossConfig`", "default", "meaning"), rows)


def presets(*names: str) -> str:
    """What these loss types choose, and the settings that their terms read. For the pages in docs/objectives."""
    types = chosen(LOSS_TYPES, list(names))
    lines = (
        f'- `loss_type="{name}"`: term {code(v.term)}, level {code(v.level)}, aggregation {code(v.aggregation)}\n'
        for name, v in types.items()
    )
    knobs = dict.fromkeys(knob for v in types.values() for knob in TERMS[v.term].knobs)
    return "".join(lines) + (defaults(*knobs) if knobs else "- no settings\n")


def defaults(*names: str) -> str:
    values = chosen({field.name: field.default for field in dataclasses.fields(LossConfig)}, list(names))
    words = [f"`{name}={plain(value)}`" for name, value in values.items()]
    link = "- [settings](../README.md#every-setting):"
    return textwrap.fill(f"{link} {', '.join(words)}", 118, subsequent_indent="  ", break_on_hyphens=False) + "\n"


def plain(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def meanings() -> list[tuple[list[str], str]]:
    """(names, text) of each entry under "Attributes:" of LossConfig's docstring."""
    text = inspect.getdoc(LossConfig).split("Attributes:\n")[1].split("\n\n")[0]
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.*?)(?=^    \w|\Z)", text, re.DOTALL | re.MULTILINE)
    found = [(names.split(", "), " ".join(meaning.split()).replace("``", "`")) for names, meaning in entries]
    fields = [field.name for field in dataclasses.fields(LossConfig)]
    if sorted(name for names, _ in found for name in names) != sorted(fields):
        raise ValueError("the docstring of LossConfig does not say what each of its fields means")
    return found


TABLES: dict[str, Callable[..., str]] = {
    "loss-types": loss_types,
    "terms": policy_terms,
    "term-levels": levels_of_terms,
    "levels": levels,
    "kl": kl,
    "aggregations": aggregations,
    "corrections": corrections,
    "config": config,
    "presets": presets,
}


# --- Files -----------------------------------------------------------------------------------------


def filled(text: str) -> str:
    """A page's text with its tables made anew."""

    def fill(match: re.Match) -> str:
        start, name, words, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"catalogue:{name} is not a table. Choose one of: {', '.join(TABLES)}.")
        return start + TABLES[name](*words.split()) + end

    blocks, prose = len(BLOCK.findall(text)), INLINE_CODE.sub("", text)
    if prose.count("<!-- catalogue:") != blocks or prose.count("<!-- /catalogue -->") != blocks:
        raise ValueError("a catalogue marker has no partner, or is not written as in the docstring of docs/generate.py")
    return BLOCK.sub(fill, text)


def stale() -> dict[Path, str]:
    """Pages whose tables are not those of the catalogue, with the text they should have."""
    found = {}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            wanted = filled(text)
        except ValueError as error:
            raise ValueError(f"{page.relative_to(ROOT)}: {error}") from None
        if wanted != text:
            found[page] = wanted
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the catalogue's tables into the README and docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if a table is stale")
    check = parser.parse_args().check
    found = stale()
    for page, text in found.items():
        print(f"{'stale' if check else 'written'}: {page.relative_to(ROOT)}")
        if not check:
            page.write_text(text, encoding="utf-8")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
