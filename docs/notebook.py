"""Makes examples/grpo_from_scratch.ipynb of examples/grpo_from_scratch.py.

    python docs/notebook.py            # run it, and write it with its outputs: a minute or two
    python docs/notebook.py --check    # exit 1 if its cells are not those of the file

A line ``# %%`` starts a cell of code, ``# %% [markdown]`` one of text, which stands in comments. The docstring at the
top is text, too. To run it takes `pip install '.[notebook]'`; to check takes nothing.
"""

import argparse
import json
import re
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "examples" / "grpo_from_scratch.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")
SECONDS = 1200  # for one cell
MARKER = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def cells_of(source: str) -> list[tuple[str, str]]:
    """(``"markdown"`` or ``"code"``, text) of each cell.

    Raises:
        ValueError: the file does not start with a docstring, or a line of text is no comment.
    """
    head, *rest = MARKER.split(source)
    docstring = re.fullmatch(r'"""(.*)"""\s*', head, re.DOTALL)
    if docstring is None:
        raise ValueError("the file must start with a docstring, and the first `# %%` must follow it")
    title, text = docstring[1].split("\n", 1)
    cells = [("markdown", f"# {title.rstrip('.')}\n{text}".rstrip())]
    for kind, body in zip(rest[::2], rest[1::2]):
        if kind is None:
            cells.append(("code", body.strip("\n")))
            continue
        lines = body.rstrip("\n").split("\n")
        if wrong := [line for line in lines if not re.match(r"#( |$)", line)]:
            raise ValueError(f"text must stand in comments, got {wrong[0]!r}")
        cells.append(("markdown", "\n".join(line[2:] for line in lines)))
    return cells


def made_of(cells: list[tuple[str, str]]) -> dict:
    """A notebook without outputs, format 4.5."""
    parts = []
    for number, (kind, text) in enumerate(cells):
        part = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        parts.append({**part, "execution_count": None, "outputs": []} if kind == "code" else part)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}
    return {"cells": parts, "metadata": {"kernelspec": kernel, "language_info": language}, "nbformat": 4,
            "nbformat_minor": 5}  # fmt: skip


def sources_of(notebook: dict) -> list[tuple[str, str]]:
    """What `cells_of` gives, of a notebook."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def run(notebook: dict, folder: Path) -> dict:
    """The notebook with its outputs; ``folder``: where its files go.

    Raises:
        CellExecutionError: of nbclient, if a cell raises.
    """
    import nbformat
    from nbclient import NotebookClient

    node = nbformat.reads(json.dumps(notebook), as_version=4)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(node, timeout=SECONDS, kernel_name="python3", resources=where).execute()
    for cell in node.cells:
        cell.metadata.clear()  # when it ran
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    node.metadata = nbformat.from_dict(notebook["metadata"])  # which Python this was
    nbformat.validate(node)
    return json.loads(nbformat.writes(node))


def joined(outputs: list[dict]) -> list[dict]:
    """What is printed in several goes, as one output."""
    kept: list[dict] = []
    for output in outputs:
        if kept and output["output_type"] == kept[-1]["output_type"] == "stream" and output["name"] == kept[-1]["name"]:
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def printed(notebook: dict) -> str:
    """All that the cells print."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def pictures(notebook: dict) -> list[str]:
    """The PNGs that the cells show, in base64."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    return ["".join(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", ())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if its cells are not the file's")
    check = parser.parse_args().check
    cells = cells_of(SOURCE.read_text(encoding="utf-8"))
    if check:
        fresh = NOTEBOOK.exists() and sources_of(json.loads(NOTEBOOK.read_text(encoding="utf-8"))) == cells
        if not fresh:
            print(f"stale: {NOTEBOOK.name}; run python docs/notebook.py")
        return int(not fresh)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        done = run(made_of(cells), Path(folder))
    NOTEBOOK.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {NOTEBOOK.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
