"""examples/grpo_from_scratch.py, its notebook, and what the notebook has to show."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "examples" / "grpo_from_scratch.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebook = loaded(ROOT / "docs" / "notebook.py")


def assert_it_shows_what_it_should(made: dict) -> None:
    """Every cell ran, in order; accuracy rose; one picture; the losses agree; 80 columns."""
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}  # no error
    assert {output.get("name", "stdout") for cell in code for output in cell["outputs"]} == {"stdout"}
    text = notebook.printed(made)
    assert max(map(len, text.splitlines())) <= 80
    before, after = map(float, re.search(r"^GRPO: from ([\d.]+) to ([\d.]+);", text, re.MULTILINE).groups())
    assert 0.3 < before < 0.65 and after > before + 0.15
    [picture] = notebook.pictures(made)
    assert len(picture) > 10_000
    rows = re.findall(r"^(loss|\|gradient\|) +([\d.]+) +([\d.]+) +(\S+)$", text, re.MULTILINE)
    assert [name for name, *_ in rows] == ["loss", "|gradient|"]
    for _, above, fused, gap in rows:
        assert above[:8] == fused[:8] and float(gap) < 1e-6
