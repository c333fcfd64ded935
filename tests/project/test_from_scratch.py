"""examples/grpo_from_scratch.py: small, torch alone, right, and the notebook is in step with it.

`make test-notebook` runs all of it.
"""

import ast
import json
import subprocess
import sys

import pytest
import torch

import reference
from from_scratch import NOTEBOOK, SOURCE, assert_it_shows_what_it_should, loaded, notebook
from tolerance import assert_within, bounds


@pytest.fixture(scope="module")
def example():
    return loaded(SOURCE)


@pytest.fixture(scope="module")
def trained(example, one_thread):
    """(curve, what the loss was given last, (reward before, after)) of a few steps, for a reward soon learned."""
    torch.manual_seed(0)
    policy = example.Policy()
    example.warm_up(policy, most=3)

    def is_low(ids, answers):
        return (ids[:, 0] < 5).float()

    def mean_reward():
        return is_low(example.sample(policy, example.PROMPTS[:500]), None).mean().item()

    before = mean_reward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "reward", is_low)
        curve, last = example.train(policy, steps=12, prompts=16)
    return curve, last, (before, mean_reward())


# --- what it is -----------------------------------------------------------------------------------


def test_one_short_file_that_imports_torch_alone():
    text = SOURCE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    top = [node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) == {"torch"}


def test_the_problems(example):
    """A sum last digit first; no problem is held out in one order alone."""
    texts = ["".join(example.ALPHABET[i] for i in [*p, *a]) for p, a in zip(example.PROMPTS, example.ANSWERS)]
    for text in texts:
        a, b, said = text.replace("=", "+").split("+")
        assert int(said.rstrip(".")[::-1]) == int(a) + int(b)
    held_out, train = ({text[:5] for text in part} for part in (texts[: example.HELD_OUT], texts[example.HELD_OUT :]))
    assert len(train | held_out) == 8100 and not train & held_out
    assert {f"{text[3:]}+{text[:2]}" for text in held_out} == held_out


@pytest.mark.parametrize(
    ("completion", "mask", "reward"),
    [("58..", [1, 1, 1, 0], 1), ("58.7", [1, 1, 1, 0], 1), ("587.", [1, 1, 1, 1], 0), ("5..8", [1, 1, 0, 0], 0),
     ("58+=", [1, 1, 1, 1], 0), (".58.", [1, 0, 0, 0], 0)],
)  # fmt: skip
def test_mask_and_reward_worked_by_hand(example, completion, mask, reward):
    ids, answer = example.encode([completion], 4), example.encode(["58"], 4)
    assert example.mask_of(ids).tolist() == [mask]
    assert example.reward(ids, answer).item() == reward


def test_a_completion_without_an_end_is_not_right(example):
    """Though it is the answer so far: of four digits and no end."""
    ids = example.encode(["5812"], 4)
    assert example.reward(ids, ids).item() == 0


# --- its loss -------------------------------------------------------------------------------------


def test_loss_and_advantages_are_the_reference_s(example):
    B, T, V = 2 * example.G, 5, 7
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(B, T, V, dtype=torch.float64, generator=g)
    ids = torch.randint(V, (B, T), generator=g)
    mask = (torch.arange(T) <= torch.randint(T, (B, 1), generator=g)).double()
    rewards = torch.randint(3, (B,), generator=g).double()
    lp = reference.token_logprobs(logits, ids).logps
    old, ref = (lp + 0.3 * torch.randn(B, T, dtype=torch.float64, generator=g) for _ in range(2))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, clipped, kl = example.grpo_loss(ours, ids, example.group_advantages(rewards), old, ref, mask)
    want = reference.grpo_loss(
        theirs, ids, rewards=rewards, num_generations=example.G, old_logps=old, ref_logps=ref, completion_mask=mask,
        epsilon=example.EPSILON, beta=example.BETA,
    )  # fmt: skip
    loss.backward()
    want.loss.backward()
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(loss, want.loss, **close)
    torch.testing.assert_close(ours.grad, theirs.grad, **close)
    torch.testing.assert_close(clipped, want.metrics["clip_ratio/region_mean"], **close)
    torch.testing.assert_close(kl, want.metrics["kl"], **close)
    assert 0.1 < clipped < 0.9


def test_a_few_steps_and_the_comparison(example, trained, capsys):
    curve, last, (before, after) = trained
    assert [step for step, _ in curve] == [0, 10, 12] and all(0 <= right <= 1 for _, right in curve)
    assert after > before + 0.2
    loss, gradient, fused, fused_gradient = example.compare(*last)
    logits, ids, rewards, old, ref, mask = last
    allowed = bounds(logits, ids, rewards=rewards, num_generations=example.G, old_logps=old, ref_logps=ref,
                     completion_mask=mask, epsilon=example.EPSILON, beta=example.BETA)  # fmt: skip
    assert_within(fused, loss, allowed.loss, "loss", factor=2)
    assert_within(fused_gradient, gradient, allowed.grad, "gradient", factor=2)
    assert gradient.abs().max() > 100 * allowed.grad.max()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["above", "loss", "|gradient|"]


def test_what_is_printed_fits(example, trained, capsys, one_thread):
    example.train(example.Policy(), steps=1, prompts=1)
    example.compare(*trained[1])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines[0]) == len(lines[1])  # the head and its row end together


def test_what_is_not_installed_is_skipped_and_said(example, trained, monkeypatch, capsys, tmp_path):
    for name in ("grpo_kernels", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert example.compare(*trained[1]) is None
    example.plot([(0, 0.4), (1, 0.5)], tmp_path / "curve.png")
    assert capsys.readouterr().out.splitlines() == [
        "grpo_kernels is not installed: the comparison with fused_grpo_loss is skipped.",
        "matplotlib is not installed: the plot is skipped.",
    ]
    assert not list(tmp_path.iterdir())


def test_the_plot(example, tmp_path, capsys):
    example.plot([(0, 0.4), (1, 0.5)], tmp_path / "made" / "curve.png")
    assert (tmp_path / "made" / "curve.png").read_bytes()[:4] == b"\x89PNG"


# --- its notebook ---------------------------------------------------------------------------------


def test_the_notebook_is_in_step():
    saved = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook.sources_of(saved) == notebook.cells_of(SOURCE.read_text(encoding="utf-8")), (
        "run `python docs/notebook.py`"
    )
    assert_it_shows_what_it_should(saved)


def test_cells_have_all_of_the_file():
    """But the lines that start cells, the comment signs of text, and empty lines."""
    text = SOURCE.read_text(encoding="utf-8")
    lines = [line for _, cell in notebook.cells_of(text) for line in cell.splitlines() if line]
    left = [line for line in text.splitlines() if line.strip('# "') and not line.startswith("# %%")]
    assert len(lines) == len(left)
    assert all(ours.lstrip("# ") in theirs for ours, theirs in zip(lines[1:], left[1:]))


@pytest.mark.parametrize("text", ["x = 1\n# %%\ny = 2\n", '"""A.\n"""\n\n# %% [markdown]\n# text\nx = 1\n'])
def test_a_file_that_makes_no_notebook_raises(text):
    with pytest.raises(ValueError, match="must"):
        notebook.cells_of(text)


def test_check_says_what_is_stale(tmp_path):
    """From the command line, with a copy whose text has moved on."""
    folder = tmp_path / "examples"
    folder.mkdir()
    (tmp_path / "docs").mkdir()
    for path in (SOURCE, NOTEBOOK):
        (folder / path.name).write_bytes(path.read_bytes())
    script = tmp_path / "docs" / "notebook.py"
    script.write_bytes((SOURCE.parents[1] / "docs" / "notebook.py").read_bytes())
    for changed, status in (("", 0), ("# more\n", 1)):
        with (folder / SOURCE.name).open("a", encoding="utf-8") as file:
            file.write(changed)
        done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
        assert (done.returncode, "stale" in done.stdout) == (status, bool(status)), done.stderr
