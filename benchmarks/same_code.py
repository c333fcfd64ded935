"""Which kernels of another commit compile to other machine code? `python -m benchmarks.same_code COMMIT [--note NAME]`

A record names the kernels that were measured by their text. A change of the text may leave the measured kernels as they
are. This compiles for sm_90 what the suite launches, of the commit's files and of these, and compares the PTX. If all
of it is the same, `--note` writes into NAME's record.json that the record speaks of these kernels, too. It covers the
usual forms, as the suite has them; others may differ. Run without TRITON_INTERPRET. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SUITE = ((151936, "bf16"), (151936, "fp32"), (50257, "bf16"))  # the Triton kernels; other vocabularies share their code
ON_CHIP = (32000, 128256, 151936)
NOT_MEASURED = "few_tokens"  # how the names begin that no row of the suite launches: it has no teacher of few tokens
TARGET, ROOT = "sm_90", Path(__file__).resolve().parents[1]


def digest(compiled) -> str:
    """Of the PTX, without what only says which line of a file it comes from."""
    lines = (line.split("//")[0].strip() for line in compiled.asm["ptx"].split(".section")[0].splitlines())
    text = "\n".join(line for line in lines if line and not re.match(r"\.(loc|file)|\$L__tmp\d+:", line))
    return hashlib.sha256(text.encode()).hexdigest()


def codes(only: str) -> dict[str, str]:
    """A digest of the PTX of each launch whose name matches, of the package that this process imports."""
    import triton
    from triton.experimental.gluon._runtime import GluonASTSource

    from benchmarks import compile_launches, compile_report, onchip_report

    found = {}
    for V, dtype in SUITE:
        for each in compile_launches.record_launches(V, dtype, 32, compile_launches.Extent.REPRESENTATIVE):
            arguments, constants, _ = compile_launches.signature(each)
            forms = hashlib.sha256(f"{arguments}{sorted(map(str, constants))}".encode()).hexdigest()[:8]
            name = f"{each.label.strip()} {V} {dtype} {forms}"
            if re.search(only, name) and not name.startswith(NOT_MEASURED):
                found[name] = digest(compile_report.compiled_for(each, TARGET))
    for V in ON_CHIP:
        for each in onchip_report.record_launches(V):
            name = f"{each.label.strip()} {V} bf16"
            if each.label.split()[1:] == ["clipped"] and re.search(only, name):
                source = GluonASTSource(each.kernel, *compile_launches.signature(each))
                options = dict(each.options)
                found[name] = digest(triton.compile(source, target=compile_report.TARGETS[TARGET], options=options))
    return found


def codes_of(tree: Path, only: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).resolve()), "--list", only]
    done = subprocess.run(command, cwd=tree, env=env | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def files_of(commit: str, into: Path) -> None:
    """The commit's files; exits where git has none."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if archive.returncode:
        sys.exit(f"git has no files of {commit}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "x", "-C", str(into)], input=archive.stdout, check=True)


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def note(name: str) -> Path:
    """Writes down that the record speaks of these kernels, too."""
    from benchmarks import environment, records

    path = records.RESULTS / name / "record.json"
    more = json.loads(path.read_text(encoding="utf-8"))
    more["same_code"] = environment.kernels_digest()
    path.write_text(json.dumps(more, indent=2) + "\n", encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_code", description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="whose kernels were measured")
    parser.add_argument("--note", metavar="NAME", help="if all is the same, write it into this record")
    parser.add_argument("--only", default="", metavar="REGEX", help="launches whose name matches; not with --note")
    given = parser.parse_args(argv)
    if given.note and given.only:
        parser.error("--note compares all launches: leave --only out")
    with tempfile.TemporaryDirectory() as folder:
        files_of(given.commit, Path(folder))
        before, now = codes_of(Path(folder), given.only), codes_of(ROOT, given.only)
    other = differences(before, now)
    print(*(f"differs: {name}" for name in other), sep="\n", end="\n" if other else "")
    print(f"{len(now)} launches, {len(other)} differ from {given.commit}")
    if given.note and not other:
        print(f"noted: {note(given.note)}")
    return int(bool(other) or not now)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--list"]:
        sys.path[0] = os.getcwd()  # not this file's folder, whose modules would hide others
        print(json.dumps(codes(sys.argv[2])))
    else:
        sys.exit(main())
