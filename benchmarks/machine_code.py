"""Reading machine code: registers, spills, memory accesses, exponentials and loops, of NVIDIA's and AMD's.

A loop is a branch backwards and what lies between it and its target.
"""

import itertools
import os
import re
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Iterable

import triton
from triton.backends.compiler import GPUTarget

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def nvidia(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _tool("cuobjdump", "-res-usage", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", sass)
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    jumps = {at: int(text.split("0x")[-1].split()[0], 16) for at, text in code if re.search(r"\bBRA\b.*0x", text)}
    final = {at for at, text in code if re.match(r"BRA(\.[A-Z]+)? 0x|EXIT|RET", text)}  # no predicate before it
    return {
        "registers": int(found[1]), "stack": int(found[2]),
        "spills": sum(bool(re.search(r"\b(?:LDL|STL)\b", text)) for _, text in code),
        **_accesses(text for _, text in code), "loops": loops(code, jumps, final),
    }  # fmt: skip


def nvidia_usage(cubin: bytes) -> dict:
    """Registers and stack, at a hundredth of the time: where there is no stack, nothing was spilled to it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", file.name)).groups()
    if int(stack):
        return nvidia(cubin)
    return {"registers": int(registers), "stack": 0, "spills": 0, "loops": []}


def amd(assembly: str) -> dict:
    field = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])  # noqa: E731
    lines = list(enumerate(assembly.splitlines()))
    code = [(at, line.strip()) for at, line in lines if re.match(r"\t(?:[vs]|global|flat|ds|buffer)_\w+", line)]
    places = [at for at, _ in code]
    labels = {line.split(":")[0]: places[bisect_left(places, at)] for at, line in lines[: places[-1]]
              if re.match(r"\.L\w+:", line)}  # fmt: skip
    jumps = {at: labels[text.split()[1]] for at, text in code if re.match(r"s_c?branch", text)}
    final = {at for at, text in code if re.match(r"s_branch|s_endpgm", text)}
    return {
        "registers": field("vgpr_count"), "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        **_accesses(text for _, text in code), "loops": loops(code, jumps, final),
    }  # fmt: skip


def _accesses(texts: Iterable[str]) -> dict:
    """What a stretch of machine code does, by kind of instruction; of either vendor."""
    kinds = ("instructions", "ex2", "loads", "wide_loads", "half_loads", "loaded", "stores", "wide_stores")
    found = dict.fromkeys(kinds, 0)
    for text in texts:
        found["instructions"] += 1
        found["ex2"] += bool(re.search(r"\bMUFU\.EX2\b|\bv_exp_f32", text))
        if access := re.search(r"\b(LDG|STG)\b(\S*)|\b(?:global|buffer)_(load|store)_(\w+)", text):
            what = "loads" if "LDG" in access[0] or "load" in access[0] else "stores"
            size = _size(access[2] if access[1] else access[4], bool(access[1]))
            found[what] += 1
            found[f"wide_{what}"] += size >= 16
            found["half_loads"] += what == "loads" and size == 2
            found["loaded"] += size if what == "loads" else 0
    return found


def _size(suffix: str, nvidia: bool) -> int:
    """Bytes that a thread moves with one instruction: LDG.E.EL.128, global_load_dwordx4."""
    if nvidia:
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", suffix)
        return int(bits[1]) // 8 if bits else 4
    if words := re.match(r"dword(?:x(\d))?", suffix):
        return 4 * int(words[1] or 1)
    return 1 if "byte" in suffix else 2


def loops(code: list[tuple[int, str]], jumps: dict[int, int], final: set[int]) -> list[dict]:
    """The innermost loops: what lies between a branch backwards and its target, if that leads to the branch.

    It need not: blocks are laid out in any order. ``final`` instructions do not go on to the next one.
    """
    places = [at for at, _ in code]
    after = {at: following for at, following in itertools.pairwise(places) if at not in final}

    def leads(start: int, end: int) -> bool:
        seen, ahead = set(), {start}
        while ahead and end not in seen:
            seen.add(at := ahead.pop())
            ahead |= {ways[at] for ways in (jumps, after) if at in ways} - seen
        return end in seen

    last = {}  # per first instruction: several branches may lead back to it
    for at, first in sorted(jumps.items()):
        if first < at and leads(first, at):
            last[first] = at
    spans = list(last.items())
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [_accesses(text for at, text in code if first <= at <= end) for first, end in sorted(inner)]


def resident_programs(target: GPUTarget, registers: int, warps: int) -> int:
    """How many programs fit on one multiprocessor by their registers, nothing else considered.

    A multiprocessor has four parts. Each has 512 registers for each lane of a warp, handed out in
    eights, and room for 16 warps on NVIDIA's targets, 8 waves on AMD's.
    """
    most = 16 if target.backend == "cuda" else 8
    return 4 * min(most, 512 // (-(-registers // 8) * 8)) // warps


def _tool(name: str, *args: str) -> str:
    return subprocess.run([os.path.join(_TOOLS, name), *args], capture_output=True, text=True, check=True).stdout
