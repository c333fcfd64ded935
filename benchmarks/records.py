"""What was measured and is kept in `benchmarks/results`, and the tables of it in README and docs/performance.md.

    python -m benchmarks.records                    # which records there are, and which speak of older kernels
    python -m benchmarks.records --write            # both sections anew
    python -m benchmarks.records --write NAME       # from another record: benchmarks/results/NAME
    python -m benchmarks.records --adopt DIR NAME   # keep DIR's results as the record NAME, and write from it
    python -m benchmarks.records --check            # exit 1 if a section is stale

A record is what `python -m benchmarks --out DIR` writes. A `record.json` beside it says what these results do not, such
as the commit of the kernels. The README quotes its main lines, docs/performance.md all. Either section stands between
two markers, the first of which names it:

    <!-- record:h200 -->
    <!-- /record -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import environment
from benchmarks.cases import OBJECTIVES
from benchmarks.suite import OK

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- record:)([\w.-]+)( -->\n).*?(<!-- /record -->)", re.DOTALL)
OURS = "grpo_kernels"
PEERS = ("Liger-Kernel", "TRL kernel", "eager PyTorch", "torch.compile")
ORDER = ("loss", "logprobs", "entropies", "linear")
NAMED = {"sequence": ["sequence level"], "distillation": ["distillation"]}
PHRASES = {
    "loss": "forward + backward", "logprobs": "log-probs only", "entropies": "log-probs and entropies",
    "linear": "head, forward + backward",
}  # fmt: skip
PLOT = "copy_multiples.png"
NOT_MEASURED = "–"

Row = dict[str, object]


class RecordError(Exception):
    """A record or a section is not there; the message says what to do."""


@dataclass(frozen=True)
class Record:
    name: str
    where: dict[str, object]  # the environment of the run, and what record.json adds
    rows: list[Row]

    @property
    def kernels_commit(self) -> str:
        commit = str(self.where.get("kernels_commit") or self.where.get("commit") or "unknown")
        return commit.partition("+")[0][:7] + (" with changes" if "+" in commit else "")

    @property
    def is_old(self) -> bool:
        """Have the kernels changed since? Not where `benchmarks.same_code` has found their machine code the same."""
        return environment.kernels_digest() not in (self.where.get("kernels"), self.where.get("same_code"))


@dataclass
class Line:
    """One case in one mode: times as multiples of a copy of the logits, of a head as multiples of its products."""

    title: str
    row: Row  # this package's
    floor: float  # at a copy's bandwidth; of a head: 1, its products alone
    times: dict[str, float] = field(default_factory=dict)  # implementation → multiple
    in_place: dict[str, float] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        return self.row["mode"]


def load(name: str) -> Record:
    """
    Raises:
        RecordError: there is no such record.
    """
    folder = RESULTS / name
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{folder / 'results.json'}: {error.strerror}. There are: {', '.join(names())}.") from None
    beside = folder / "record.json"
    more = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    where = results["environment"]
    if more and more.get("date") != where["date"]:
        raise RecordError(f"{beside} is of {more.get('date')}, the results beside it are of {where['date']}")
    return Record(name, where | more, results["rows"])


def names() -> list[str]:
    """Records of GPUs; those of a CPU do not speak of kernels."""
    found = []
    for path in sorted(RESULTS.glob("*/results.json")):
        if json.loads(path.read_text(encoding="utf-8")).get("environment", {}).get("device_type") == "cuda":
            found.append(path.parent.name)
    return found


def adopt(directory: Path, name: str, commit: str | None) -> None:
    """Copies results and draws them; says which commit's kernels they speak of.

    Raises:
        RecordError: there are no results, or the commit is not known.
    """
    try:
        where = json.loads((directory / "results.json").read_text(encoding="utf-8"))["environment"]
    except OSError as error:
        raise RecordError(f"{directory / 'results.json'}: {error.strerror}") from None
    if commit is None:
        files = [str(path) for path in environment.kernel_files()]
        same = where.get("kernels") == environment.kernels_digest()
        edited = environment.run("git", "status", "--porcelain", "--", *files)
        commit = environment.run("git", "rev-parse", "HEAD") if same and not edited else None
        if commit is None:
            raise RecordError("these are not the kernels of this checkout's commit: say which one's with --commit")
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.png"), *folder.glob("record.json")):
        path.unlink()
    for file in ("results.json", "results.csv"):
        (folder / file).write_bytes((directory / file).read_bytes())
    more = {"date": where["date"], "kernels_commit": commit}
    (folder / "record.json").write_text(json.dumps(more, indent=2) + "\n", encoding="utf-8")

    from benchmarks import plots  # which reads records

    print(*plots.draw(folder), sep="\n")


# --- what is quoted -----------------------------------------------------------------------------------------


def quoted(rows: Sequence[Row]) -> list[Line]:
    """What the table and the plot hold: of cases with as many rows as the first, its dtype and nothing special, every
    vocabulary; of every other kind the first case."""
    chosen: dict[object, Line] = {}
    lines = all_lines(rows)
    for line in lines:
        row = line.row
        if tokens(row) != tokens(lines[0].row):
            continue
        kind = (line.mode, row["dtype"], *_special(row))
        plain = line.mode in ("loss", "logprobs") and kind[1:] == (lines[0].row["dtype"], False, False, False)
        chosen.setdefault((kind, row["vocab"]) if plain else kind, line)
    return list(chosen.values())


def all_lines(rows: Sequence[Row]) -> list[Line]:
    """Everything that this package was measured in, the plainest first."""
    own = [r for r in rows if r["implementation"] == OURS and r["status"] == OK and r["mode"] in ORDER]
    lines = []
    for row in sorted(own, key=lambda r: (ORDER.index(r["mode"]), *_special(r))):
        floor = 1.0 if row["hidden"] else row["minimum_bytes"] / (2 * row["logits_bytes"])
        line = Line(_title(row, own[0]), row, floor)
        for other in rows:
            if other["case"] == row["case"] and other["status"] == OK:
                multiple = other["products_multiple"] or other["copy_multiple"]
                if other["mode"] == row["mode"]:
                    line.times[other["implementation"]] = multiple
                elif row["mode"] == "loss" and other["mode"] == "inplace":
                    line.in_place[other["implementation"]] = multiple
        lines.append(line)
    return lines


def tokens(row: Row) -> int:
    return row["batch"] * row["length"]


def _special(row: Row) -> tuple[int | bool, ...]:
    return list(OBJECTIVES).index(row["objective"]), row["masked"] > 0, row["zero_advantage"] > 0


def _title(row: Row, first: Row) -> str:
    parts = [PHRASES[row["mode"]], *NAMED.get(row["objective"], ())]
    parts += [f"{row['masked']:.0%} masked"] * bool(row["masked"])
    parts += [f"{row['zero_advantage']:.0%} with A = 0"] * bool(row["zero_advantage"])
    parts += [f"V = {row['vocab']} {row['dtype']}", *[f"H = {row['hidden']}"] * bool(row["hidden"])]
    parts += [f"{tokens(row)} rows"] * (tokens(row) != tokens(first))
    return ", ".join(parts)


def lost(lines: Sequence[Line]) -> list[str]:
    """Where another was faster, in words."""
    found = []
    for line in lines:
        for place, times in ((" out of place" if line.in_place else "", line.times), (" in place", line.in_place)):
            others = {name: times[name] for name in PEERS if name in times}
            best = min(others, key=others.get, default=None)
            if best is not None and OURS in times and others[best] < times[OURS]:
                found.append(f"{line.title}{place} ({times[OURS]:.2f} beside {best}'s {others[best]:.2f})")
    return found


# --- the sections -----------------------------------------------------------------------------------------


def section(record: Record, brief: bool = False) -> str:
    """For docs/performance.md; ``brief``: its main lines, for the README."""
    lines, where = quoted(record.rows), record.where
    first = next((r for r in record.rows if r["implementation"] == OURS and r["status"] == OK), None)
    if first is None:
        raise RecordError(f"the record {record.name!r} has no time of {OURS}")
    device, folder = str(where["device"]).removeprefix("NVIDIA "), f"benchmarks/results/{record.name}"
    made = (
        f"{where['device']}, {str(where['date'])[:10]}, kernels of commit {record.kernels_commit}, driver "
        f"{where['driver']}, torch {where['torch']}, Triton {where['triton']}, Liger-Kernel {where['liger_kernel']}, "
        f"TRL {where['trl']}, `{where.get('command', 'python -m benchmarks --suite gpu --out DIR')}`"
    )
    old = "**The kernels have changed since this was measured.** These are the older ones' times."
    unit = "Each time is divided by that of a copy of the logits"
    heads = "the head's by that of its three matrix products"
    size = f"V = {first['vocab']} {first['dtype']}"
    title = f"On an {device}" if device[0] in "AH" else f"On a {device}"
    if brief:
        parts = [
            f"## {title}",
            f"![× a copy, all lines]({folder}/{PLOT})",
            f"{old} " * record.is_old + f'{unit} ({tokens(first)} rows, {size}), {heads}. "At least": '
            f"the time of the bytes that must move. All were checked against float64. {NOT_MEASURED}: not measured.",
            _table([line for line in lines if is_main(line, first)]).replace(f", {size}", ""),
            *_lost(record),
            f"{made}. [All lines](docs/performance.md#the-record), [every row]({folder}/results.csv).",
        ]
    else:
        parts = [
            *[old] * record.is_old,
            f'{title}. {unit} in the same run ({tokens(first)} rows), {heads}. "At least" is the time of '
            "the bytes that must move, at the copy's speed. Every result was checked against float64. "
            f"{NOT_MEASURED}: not measured.",
            f"![the table as a plot](../{folder}/{PLOT})",
            _table(lines),
            *_lost(record),
            *_sentences(record),
            *(f"{name}: not measured." for name in PEERS if not any(name in line.times for line in lines)),
            f"{made}; every row in [`{folder}`](../{folder}/results.csv).",
        ]
    return "\n\n".join(part if part.startswith(("|", "!", "#")) else _wrapped(part) for part in parts) + "\n"


def is_main(line: Line, first: Row) -> bool:
    """Of the vocabulary and dtype of the first row, with nothing masked, no entropies, and one line of a head."""
    row = line.row
    same = all(row[name] == first[name] for name in ("vocab", "dtype", "masked", "zero_advantage"))
    return same and line.mode != "entropies" and not (row["hidden"] and row["objective"] != first["objective"])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(lines: Sequence[Line]) -> str:
    peers = [name for name in PEERS[1:] if any(name in line.times for line in lines)]
    head = ["", "at least", "grpo_kernels", "in place", "Liger (in place)", *peers]
    cells = [head, ["---"] * len(head)]
    for line in lines:
        own, others = line.times.get(OURS), line.times
        fastest = all(own <= others[name] for name in PEERS if name in others)
        liger = _number(others, "Liger-Kernel") + (
            f" ({line.in_place['Liger-Kernel']:.2f})" if "Liger-Kernel" in line.in_place else ""
        )
        rest = [_number(others, name) for name in peers]
        own_text = f"**{own:.2f}**" if fastest else f"{own:.2f}"
        in_place = f"{line.in_place[OURS]:.2f}" if OURS in line.in_place else ""
        cells.append([line.title, f"{line.floor:.2f}", own_text, in_place, liger, *rest])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _number(times: dict[str, float], name: str) -> str:
    if name not in times:
        return NOT_MEASURED
    return f"{times[name]:.1f}" if times[name] >= 10 else f"{times[name]:.2f}"


def _lost(record: Record) -> list[str]:
    slower = lost(all_lines(record.rows))
    return [f"**Slower than another:** {'; '.join(slower)}."] if slower else []


def _sentences(record: Record) -> list[str]:
    text = []
    found = {(r["case"], r["mode"], r["implementation"]): r for r in record.rows if r["status"] == OK}
    case = next(iter(found))[0]

    def memory(mode: str, name: str) -> str:
        row = found.get((case, mode, name))
        return "not measured" if row is None or row["extra_per_logits"] is None else f"{row['extra_per_logits']:.2f}"

    text.append(
        f"Extra memory in the first line, × the logits: {memory('loss', OURS)} out of place, {memory('inplace', OURS)} "
        f"in place; Liger-Kernel {memory('loss', PEERS[0])} and {memory('inplace', PEERS[0])}; TRL "
        f"{memory('loss', PEERS[1])}; eager PyTorch {memory('loss', PEERS[2])}."
    )
    quack = {r["mode"]: f"{r['copy_multiple']:.2f}" for r in found.values() if r["implementation"] == "quack"}
    if quack:
        each = " and ".join(
            f"{quack[m]} {how}" for m, how in (("loss", "out of place"), ("inplace", "in place")) if m in quack
        )
        text.append(
            f"quack's cross-entropy with its gradient, the nearest kernel of another loss (it is no GRPO): {each}."
        )
    timed = found.get((case, "loss", OURS), {})
    if timed.get("do_bench_ms"):
        text.append(
            f"By `triton.testing.do_bench` the first line takes {timed['do_bench_ms']:.3f} ms, "
            f"{timed['do_bench_copy_multiple']:.2f} × a copy by the same timer."
        )
    return text


def filled(page: Path, name: str | None = None) -> str:
    """A page's text with its section made anew, from the record it names or from `name`.

    Raises:
        RecordError: there is no section, or no such record.
    """
    text = page.read_text(encoding="utf-8")
    match = BLOCK.search(text)
    if match is None:
        raise RecordError(f"{page.name} has no section between <!-- record:NAME --> and <!-- /record -->")
    name = name or match[2]
    made = section(load(name), brief=page == README)
    return BLOCK.sub(lambda m: f"{m[1]}{name}{m[3]}{made}{m[4]}", text, count=1)


# --- which are old --------------------------------------------------------------------------------------------


def last_change() -> str:
    """Of the kernels, as far as git tells."""
    files = [str(path) for path in environment.kernel_files()]
    change = environment.run("git", "log", "-1", "--format=%h, %cs", "--", *files)
    if change is None:
        return "git does not tell when the kernels changed last: told by their text alone"
    edited = environment.run("git", "status", "--porcelain", "--", *files)
    return f"kernels changed last in commit {change}" + (", and are edited in this checkout" if edited else "")


def listing() -> list[str]:
    lines = [f"{last_change()} ({environment.kernels_digest()})."]
    for name in names():
        record = load(name)
        state = "older kernels than these" if record.is_old else "these kernels"
        where = f"{record.where['device']}, {str(record.where['date'])[:10]}, kernels of {record.kernels_commit}"
        lines.append(f"{name}: {state} ({where})")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.records", description=__doc__.split("\n")[0])
    todo = parser.add_mutually_exclusive_group()
    todo.add_argument("--write", nargs="?", const="", metavar="NAME", help="write the sections, from NAME")
    todo.add_argument("--adopt", nargs=2, metavar=("DIR", "NAME"), help="keep DIR's results as NAME, and write from it")
    todo.add_argument("--check", action="store_true", help="exit 1 if a section is stale")
    parser.add_argument("--commit", help="with --adopt: whose kernels they are (default: this checkout's, if it is)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.adopt:
            adopt(Path(arguments.adopt[0]), arguments.adopt[1], arguments.commit)
            arguments.write = arguments.adopt[1]
        if arguments.write is None and not arguments.check:
            print(*listing(), sep="\n")
            return 0
        wanted = {page: filled(page, arguments.write or None) for page in (README, PERFORMANCE)}
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stale = [page for page in wanted if wanted[page] != page.read_text(encoding="utf-8")]
    for page in stale:
        print(f"{'stale' if arguments.check else 'written'}: {page.name}")
        if not arguments.check:
            page.write_text(wanted[page], encoding="utf-8")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
