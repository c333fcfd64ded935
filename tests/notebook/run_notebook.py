"""examples/grpo_from_scratch.ipynb runs from its first cell to its last: `make test-notebook`.

It trains for a minute or two. So the file's name is none that pytest looks for by itself, and `make test` does not run
it; whether the notebook is in step with examples/grpo_from_scratch.py is a test there.
"""

import json
import re

from from_scratch import NOTEBOOK, assert_it_shows_what_it_should, notebook


def test_the_notebook_runs(tmp_path):
    saved = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = notebook.sources_of(saved)
    done = notebook.run(notebook.made_of(cells), tmp_path)
    assert notebook.sources_of(done) == cells
    assert_it_shows_what_it_should(done)
    assert "skipped" not in notebook.printed(done)
    [picture] = tmp_path.rglob("*.png")
    assert picture.relative_to(tmp_path).as_posix() in notebook.printed(done)
    # Another machine rounds otherwise, and its samples are others. What is printed has the same lines.
    words = [re.sub(r"-?\d[\d.e+-]*", " ", notebook.printed(each)).split() for each in (done, saved)]
    assert words[0] == words[1]
