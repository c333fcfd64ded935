"""The benchmarks' plots hold what the rows say. Made-up rows, as of a device that copies 4 TB/s."""

import builtins
import json

import pytest
import torch

from benchmark_rows import ENVIRONMENT, made_up
from benchmarks import plots, records, report
from benchmarks.baselines_peers import implementations
from benchmarks.cases import SUITES, Case

pytest.importorskip("matplotlib")


@pytest.fixture
def results(tmp_path):
    report.write(tmp_path, ENVIRONMENT, made_up(SUITES["gpu"]))
    return tmp_path


def lines(ax):
    """label → [(x, y)]"""
    return {line.get_label(): list(zip(*line.get_data())) for line in ax.get_lines()}


def test_time_against_vocabulary(results):
    fig = plots.time_against_vocabulary(*plots.load(results).values())
    loss, logprobs = map(lines, fig.axes)
    copy = 2 * Case(8, 1024, 151936, torch.bfloat16).logits_bytes / 4e9
    assert [v for v, _ in loss["grpo_kernels"]] == [32000, 50257, 128256, 151936, 262144]
    assert loss["grpo_kernels"][3][1] == pytest.approx(1.25 * copy) and "grpo_kernels, in place" in loss
    assert loss["copy of the logits"][3][1] == pytest.approx(copy) and "torch.compile" not in loss
    assert logprobs["TRL kernel"][3][1] == pytest.approx(copy)
    said = " ".join(text.get_text() for text in fig.texts) + fig.get_suptitle()
    for part in ("8192 rows, bf16", "NVIDIA H200", "driver 570.1", "2026-01-02", "torch 2.13.0", "0123456789+changes"):
        assert part in said
    assert set(plots.STYLES) == {i.name for i in implementations()}  # each looks like itself


def test_memory_against_rows(results):
    (ax,) = plots.memory_against_rows(*plots.load(results).values()).axes
    rows, found = [512, 2048, 8192, 32768], lines(ax)
    assert [n for n, _ in found["grpo_kernels"]] == rows and [n for n, _ in found["eager PyTorch"]] == rows[:-1]
    largest = Case(16, 2048, 151936, torch.bfloat16).logits_bytes / 2**30
    assert found["grpo_kernels"][-1][1] == pytest.approx(largest)
    assert [text.get_text() for text in ax.texts] == ["out of memory:\neager PyTorch"]


def test_share_of_copy_bandwidth(results):
    axes = plots.share_of_copy_bandwidth(*plots.load(results).values()).axes
    labels = [label.get_text() for ax in axes for label in ax.get_yticklabels()]
    assert labels[:3] == ["Qwen2.5", "Llama-3", "gpt2"] and {"Qwen2.5\nsequence", "Qwen2.5\n50% masked"} <= set(labels)
    assert "80%" in [text.get_text() for text in axes[0].texts]  # 1/1.25


def test_the_plot_of_the_readme_holds_its_table(results):
    environment, rows = plots.load(results).values()
    logits, heads = plots.copy_multiples(environment, rows).axes
    titles = [label.get_text() for ax in (logits, heads) for label in ax.get_yticklabels()]
    assert titles == [line.title for line in records.quoted(rows)] and len(titles) > 12
    assert lines(logits)["grpo_kernels, in place"] and lines(heads)["Liger-Kernel"] == [(pytest.approx(1.75), 0)]
    drawn = {line.get_label(): line for line in logits.get_lines()}  # where both coincide, both are seen
    ring, dot = drawn["grpo_kernels, in place"], drawn["grpo_kernels"]
    assert ring.get_markersize() > dot.get_markersize() and ring.get_markerfacecolor() == "none"


def test_multiples_that_lie_close_have_ticks_between_them():
    for lowest, highest in ((1.0, 1.4), (1.0, 1.99), (1.0, 2.1), (0.25, 13.0), (1.0, 14.0)):
        assert sum(lowest <= tick <= highest for tick in plots._ticks(lowest, highest)) >= 3


def test_too_few_rows_make_no_plot(tmp_path):
    report.write(tmp_path, ENVIRONMENT, made_up([Case(2, 8, 512, torch.float32)]))
    drawn = plots.draw(tmp_path)
    assert "two vocabularies" in drawn[0] and "two numbers of rows" in drawn[1]
    assert drawn[2:] == sorted(tmp_path.glob("*.png")) == [tmp_path / "copy_bandwidth.png", tmp_path / plots.PLOT]


def test_what_stops_it_is_said(results, capsys, monkeypatch):
    def without(name, *rest, real=builtins.__import__):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        assert plots.main([str(results)]) == 1
    assert capsys.readouterr().err == "error: matplotlib is not installed: pip install matplotlib\n"
    old = json.dumps({"environment": {}, "rows": [{"case": "x"}]})
    for text, words in ((None, "python -m benchmarks --out"), ("{", "not JSON"), (old, "older version")):
        (results / "results.json").unlink() if text is None else (results / "results.json").write_text(text)
        assert plots.main([str(results)]) == 1 and words in capsys.readouterr().err
