"""The benchmarks' plots, from made-up rows."""

import builtins
import json

import pytest
import torch

from benchmark_rows import ENVIRONMENT, made_up
from benchmarks import plots, report
from benchmarks.baselines_peers import implementations
from benchmarks.cases import SUITES, Case

pytest.importorskip("matplotlib")


@pytest.fixture
def results(tmp_path):
    report.write(tmp_path, ENVIRONMENT, made_up(SUITES["gpu"]))
    return tmp_path


def load(directory):
    return plots.load(directory).values()


def lines(ax):
    """label → [(x, y)]"""
    return {line.get_label(): list(zip(*line.get_data())) for line in ax.get_lines()}


def test_draws_all_from_results(results, capsys):
    assert plots.main([str(results)]) == 0
    for name in plots.PLOTS:
        assert str(results / name) in capsys.readouterr().out or (results / name).exists()
        header = (results / name).read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        width, height = int.from_bytes(header[16:20]), int.from_bytes(header[20:24])
        assert width >= 1500 and 1000 <= height <= width  # fills a slide


def test_time_against_vocabulary(results):
    fig = plots.time_against_vocabulary(*load(results))
    loss, logprobs = fig.axes
    ours = lines(loss)["grpo_kernels"]
    assert [v for v, _ in ours] == [32000, 50257, 128256, 151936, 262144]
    case = Case(8, 1024, 151936, torch.bfloat16)
    assert ours[3][1] == pytest.approx(1.25 * 2 * case.logits_bytes / 4e9)
    assert lines(loss)["copy of the logits"][3][1] == pytest.approx(2 * case.logits_bytes / 4e9)
    assert lines(logprobs)["TRL kernel"][3][1] == pytest.approx(2 * case.logits_bytes / 4e9)
    assert "torch.compile" not in lines(loss) and "grpo_kernels, in place" in lines(loss)
    for ax in fig.axes:
        assert "vocabulary" in ax.get_xlabel() and "(ms)" in ax.get_ylabel()
    texts = [text.get_text() for text in fig.texts]
    assert any("8192 rows, bf16" in text for text in [fig.get_suptitle()])
    (conditions,) = (text for text in texts if "NVIDIA H200" in text)
    for part in ("driver 570.1", "2026-01-02", "torch 2.13.0", "triton 3.7.1", "0123456789+changes"):
        assert part in conditions


def test_memory_against_rows(results):
    (ax,) = plots.memory_against_rows(*load(results)).axes
    rows = [512, 2048, 8192, 32768]
    assert [n for n, _ in lines(ax)["grpo_kernels"]] == rows
    assert [n for n, _ in lines(ax)["eager PyTorch"]] == rows[:-1]
    largest = Case(16, 2048, 151936, torch.bfloat16).logits_bytes / 2**30
    assert lines(ax)["grpo_kernels"][-1][1] == pytest.approx(largest)
    assert [text.get_text() for text in ax.texts] == ["out of memory:\neager PyTorch"]
    assert "(GiB)" in ax.get_ylabel() and "rows" in ax.get_xlabel()


def test_share_of_copy_bandwidth(results):
    axes = plots.share_of_copy_bandwidth(*load(results)).axes
    labels = [label.get_text() for ax in axes for label in ax.get_yticklabels()]
    assert labels[:3] == ["Qwen2.5", "Llama-3", "gpt2"]
    assert {"Qwen2.5\nsequence", "Qwen2.5\n50% masked"} <= set(labels)
    assert "80%" in [text.get_text() for text in axes[0].texts]  # 1/1.25
    assert all("%" in ax.get_xlabel() for ax in axes)


def test_colours_and_markers_are_distinct():
    looks = [plots.style((name, "loss")) for name in [*plots.STYLES, "another"]]
    for part in ("color", "marker"):
        assert len({look[part] for look in looks}) == len(looks)
    assert set(plots.STYLES) == {i.name for i in implementations()}


def test_too_few_rows_make_no_plot(tmp_path):
    report.write(tmp_path, ENVIRONMENT, made_up([Case(2, 8, 512, torch.float32)]))
    drawn = plots.draw(tmp_path)
    assert [str(d).split()[0].split("/")[-1] for d in drawn] == list(plots.PLOTS)
    assert "two vocabularies" in drawn[0] and "two numbers of rows" in drawn[1]
    assert {path.name for path in tmp_path.glob("*.png")} == {"copy_bandwidth.png", plots.PLOT}


def test_no_results(tmp_path, capsys):
    assert plots.main([str(tmp_path)]) == 1
    assert "python -m benchmarks --out" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{")
    assert plots.main([str(tmp_path)]) == 1 and "not JSON" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(json.dumps({"environment": {}, "rows": [{"case": "x"}]}))
    assert plots.main([str(tmp_path)]) == 1 and "older version" in capsys.readouterr().err


def test_no_matplotlib(results, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert plots.main([str(results)]) == 1
    assert capsys.readouterr().err == "error: matplotlib is not installed: pip install matplotlib\n"
