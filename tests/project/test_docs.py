"""The documentation: generated tables are fresh, nothing is missing, links lead somewhere, examples run."""

import importlib.util
import inspect
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from grpo_kernels import LossConfig
from grpo_kernels.objective import catalogue, config, metrics
from grpo_kernels.objective.aggregations import AGGREGATIONS
from grpo_kernels.objective.catalogue import KL_ESTIMATORS, LEVELS, LOSS_TYPES, TERMS
from grpo_kernels.objective.corrections import CORRECTIONS

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]

spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code(text: str) -> list[str]:
    """What stands in `spans`, and in fenced and indented blocks, on one page."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    plain = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return fenced + re.findall(r"`([^`\n]+)`", plain) + re.findall(r"^    (.+)$", plain, re.MULTILINE)


def by_hand(page: Path) -> str:
    """A page's text without what docs/generate.py writes."""
    return generate.BLOCK.sub("", page.read_text(encoding="utf-8"))


# --- Generated tables ------------------------------------------------------------------------------


def test_tables_are_fresh():
    stale = [name(page) for page in generate.stale()]
    assert not stale, f"run `python docs/generate.py`: {', '.join(stale)}"


def test_a_stale_table_shows():
    text = "<!-- catalogue:loss-types grpo -->\nold\n<!-- /catalogue -->\n"
    made = generate.filled(text)
    assert "[DeepSeekMath](https://arxiv.org/abs/2402.03300)" in made and "old" not in made
    assert generate.filled(generate.filled(text)) == generate.filled(text)
    end = "<!-- /catalogue -->"
    unknown = (f"<!-- catalogue:nonsense -->\n{end}", f"<!-- catalogue:terms nonsense -->\n{end}")
    for wrong in (*unknown, "<!-- catalogue:loss-types -->\n", end):
        with pytest.raises(ValueError, match="catalogue"):
            generate.filled(wrong)


def test_a_page_of_an_objective_names_its_settings():
    """Presets and defaults in a line each; what a setting means stands once, where that line leads."""
    made = generate.presets("gspo", "cispo")
    assert '`loss_type="gspo"`: term `clipped`, level `sequence`, aggregation `sequence-mean`' in made
    assert "`epsilon=0.2`" in made and "`cispo_max=5.0`" in made and made.count("#every-setting") == 1
    assert "no settings" in generate.presets("reinforce")
    assert "`beta=0.0`" in generate.defaults("beta") and "`loss_type" not in generate.defaults("beta")
    for wrong in (generate.presets, generate.defaults):
        with pytest.raises(ValueError, match="nonsense"):
            wrong("nonsense")


def test_the_readme_s_first_screen():
    """What it is, how to install it, code that runs, the two commands, measured numbers and their plot; in 40 lines."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = "\n".join(lines[:40])
    for wanted in ("pip install", "```python", "make demo", "make test", "kernels of commit", "| forward + backward |",
                   "python -m benchmarks", "copy_multiples.png"):  # fmt: skip
        assert wanted in first, wanted
    assert max(map(len, lines)) <= 120


def test_a_marker_in_code_marks_nothing():
    text = "Write `<!-- catalogue:loss-types NAME -->`, closed by `<!-- /catalogue -->`.\n"
    assert generate.filled(text) == text
    with pytest.raises(ValueError, match="no partner"):
        generate.filled("<!-- catalogue:loss-types grpo -->\n" + text)


def test_check_writes_nothing(monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- catalogue:kl -->\nold\n<!-- /catalogue -->\n", encoding="utf-8")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "pages", lambda: [page])
    for argument, status, what in (("--check", 1, "stale"), (None, 0, "written"), ("--check", 0, "")):
        monkeypatch.setattr("sys.argv", ["generate.py", *filter(None, [argument])])
        assert generate.main() == status
        assert capsys.readouterr().out == (f"{what}: page.md\n" if what else "")


# --- Nothing is missing ----------------------------------------------------------------------------

REPORTS = {term.reports for term in TERMS.values()} - {"", "clip_ratio"}
METRICS = {*metrics.METRIC_NAMES, *REPORTS}
SUMS = {*metrics.SUM_NAMES, *REPORTS, *(f"{report}/count" for report in REPORTS)}


@pytest.mark.parametrize(
    "names",
    [LossConfig.field_names(), LOSS_TYPES, TERMS, LEVELS, KL_ESTIMATORS, AGGREGATIONS, CORRECTIONS],
    ids=("fields", "loss types", "terms", "levels", "KL estimators", "aggregations", "corrections"),
)
def test_everything_is_explained(names):
    """In code, and by hand: a generated table alone explains nothing."""
    said = "\n".join(piece for page in DOCS for piece in code(by_hand(page)))
    missing = [each for each in names if not re.search(rf"(?<![\w-]){re.escape(each)}(?![\w+-])", said)]
    assert not missing


@pytest.mark.parametrize(("names", "part"), [(METRICS, 0), (SUMS, 1)], ids=("metrics", "sums"))
def test_every_metric_is_in_the_glossary(names, part):
    text = by_hand(ROOT / "docs" / "metrics.md").split("## Sums and combine")[part]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    explained = {word for row in rows for word in code(row.split(" | ")[0])}
    assert not names - explained


def test_every_paper_has_its_keywords():
    cited = set(re.findall(r"arXiv:(\d{4}\.\d{5})", inspect.getsource(catalogue) + inspect.getsource(config)))
    table = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert not cited - set(re.findall(r"arXiv:(\d{4}\.\d{5})", table))
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("|")][2:]
    for paper, keywords, _ in rows:
        assert code(keywords), paper
        for configuration in code(keywords):
            LossConfig(**eval(f"dict({configuration})"))


# --- Links -----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """GitHub's: lower case, without punctuation, spaces as hyphens."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        at = (page.parent / path).resolve() if path else page
        assert at.exists() and at.is_relative_to(ROOT), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(at), f"{target}: no such heading"


def test_every_page_is_linked():
    start = ROOT / "docs" / "README.md"
    linked = set(re.findall(r"\]\(([\w./-]+\.md)\)", start.read_text(encoding="utf-8")))
    assert {page.relative_to(start.parent).as_posix() for page in DOCS} - linked == {"README.md"}


# --- Examples --------------------------------------------------------------------------------------


def examples(page: Path) -> list[tuple[int, str]]:
    """(line, code) of each Python block."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


EXAMPLES = [(page, line, source) for page in PAGES for line, source in examples(page)]
[(START, SETUP)] = examples(ROOT / "docs" / "README.md")

# A GRPOConfig of TRL, as much of it as matters; TRL itself is not needed to read the examples.
TRL_ARGS = SimpleNamespace(loss_type="cispo", epsilon=0.2, epsilon_high=5.0, beta=0.0, scale_rewards=True,
                           importance_sampling_level="token", delta=None, use_vllm=False)  # fmt: skip


def run(page: Path, line: int, source: str, names: dict) -> dict:
    exec(compile("\n" * line + source, f"<{name(page)}>", "exec"), names)  # an error names the page's own line
    return names


@pytest.fixture(scope="module")
def one_process():
    """A process group of one, for the examples over ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("page", "line", "source"), EXAMPLES, ids=[f"{name(page)}:{line + 1}" for page, line, _ in EXAMPLES]
)
def test_examples(page, line, source, one_process):
    """Each by itself, after the page that sets the stage; those of the README one after the other."""
    torch.manual_seed(0)
    names = {"args": TRL_ARGS}
    if page == ROOT / "README.md":
        for earlier, code_before in examples(page):
            if earlier < line:
                run(page, earlier, code_before, names)
    elif (page, line) != (ROOT / "docs" / "README.md", START):
        run(ROOT / "docs" / "README.md", START, SETUP, names)
    run(page, line, source, names)
    if (found := names.get("found")) is not None:  # log-probabilities, without a loss
        assert found.logps.isfinite().all() and found.logps.any()
        return
    out = names.get("out")
    if out is None:  # it sets the stage, or compares parts with a whole
        assert source == SETUP or "parts" in names
        return
    assert out.loss.isfinite().all() and all(value.isfinite() for value in out.metrics.values())
    if ".backward()" not in source and out.loss.requires_grad:
        out.loss.sum().backward()
    if out.loss.requires_grad:
        differentiated = names["logits"].grad if "hidden" not in source else names["hidden"].grad
        assert differentiated.isfinite().all()


def test_own_objective(capsys):
    runpy.run_path(str(ROOT / "examples" / "own_objective.py"), run_name="__main__")
    assert "loss" in capsys.readouterr().out


def test_from_trl_takes_the_trap():
    """What the page on CISPO says of `epsilon_high`."""
    assert LossConfig.from_trl(TRL_ARGS).cispo_max == 5.0
    with pytest.raises(ValueError, match="epsilon_high"):
        LossConfig(loss_type="cispo", epsilon_high=5.0)
