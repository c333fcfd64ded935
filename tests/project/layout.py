"""Who may import whom, and how long a file may be: `make layout`, or `python tests/project/layout.py [PACKAGE]`.

The package has floors. A module imports from its own floor and from those below it. There is no circle
of imports; those inside of functions and for type checkers count here. Five modules stand in the root at
most. No file of the repository has more than 400 lines. Exit status 1 and a line for each breach.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "grpo_kernels"
# From the top down. What stands in one row shares a floor.
FLOORS = (
    ("integrations", "trainer", "explain", "env"),
    ("",),  # __init__.py: the public names
    ("metrics",),  # the public door to objective.metrics
    ("api",),
    ("linear",),
    ("call",),
    ("triton_backend", "cpu_backend"),
    ("objective",),
)
APART = ("triton_backend", "cpu_backend")  # neither imports the other
ROOT_MODULES, LINES = 5, 400


def modules(package: Path) -> dict[str, Path]:
    """Dotted name, without the package's own -> file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path, names: dict[str, Path], late: bool = False) -> Iterator[str]:
    """The package's modules that a file imports as it is loaded; ``late``: those of functions and the like, too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target != PACKAGE and not target.startswith(PACKAGE + "."):
                continue
            name = target.removeprefix(PACKAGE).removeprefix(".")
            while name and name not in names:  # a function of a module: the module
                name = name.rpartition(".")[0]
            yield name


def floor(name: str) -> int:
    folder = name.split(".")[0]
    for number, row in enumerate(FLOORS):
        if folder in row:
            return number
    raise LookupError(f"{name}: its folder has no floor, see FLOORS in tests/project/layout.py")


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """The modules of one circle, or None."""
    done, path = set(), []

    def visit(name: str) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        found = next((c for other in sorted(graph[name]) if (c := visit(other))), None)
        path.pop()
        done.add(name)
        return found

    return next((c for name in sorted(graph) if (c := visit(name))), None)


def breaches(package: Path, files: list[Path]) -> list[str]:
    names = modules(package)
    graph = {name: set(imports(path, names)) - {name} for name, path in names.items()}
    found = []
    for name, others in graph.items():
        for other in sorted(others):
            if other == "" and floor(name) > floor(""):
                found.append(f"{name} imports the package itself, {PACKAGE}/__init__.py")
            elif floor(other) < floor(name):
                found.append(f"{name} imports {other}, which stands on a floor above it")
            elif {name.split(".")[0], other.split(".")[0]} == set(APART):
                found.append(f"{name} imports {other}: the two backends know nothing of each other")
    if loop := circle({name: set(imports(path, names, late=True)) - {name, ""} for name, path in names.items()}):
        found.append(f"a circle of imports: {' -> '.join(loop)}")
    in_root = sorted(path.stem for path in package.glob("*.py"))
    if len(in_root) > ROOT_MODULES:
        found.append(f"{len(in_root)} modules in the package's root, {ROOT_MODULES} at most: {', '.join(in_root)}")
    for path in files:
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LINES:
            found.append(f"{path}: {lines} lines, {LINES} at most")
    return found


def main(argv: list[str]) -> int:
    root = Path(__file__).resolve().parents[2]
    package = Path(argv[0]) if argv else root / PACKAGE
    try:
        command = ["git", "-C", str(root), "ls-files", "*.py"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        files = [root / name for name in listed if (root / name).exists()]
    except (OSError, subprocess.CalledProcessError):  # no git: all that does not lie in a hidden folder
        files = [path for path in root.rglob("*.py") if "/." not in path.relative_to(root.parent).as_posix()]
    found = breaches(package, files)
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{len(modules(package))} modules, {len(found) or 'no'} breaches")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
