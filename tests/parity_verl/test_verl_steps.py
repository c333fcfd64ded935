"""verl's engine in `benchmarks.end_to_end`: tiny policies on the CPU, no Ray."""

import csv
import importlib.metadata
import sys

import pytest
import torch

try:
    importlib.metadata.version("verl")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("verl is not installed; it gets an environment of its own: make test-verl", allow_module_level=True)
from transformers import Qwen2ForCausalLM
from verl_oracle import actor_config  # imports verl, without Ray where there is none

from benchmarks import end_to_end, training_steps, verl_steps
from benchmarks.measure import Failed
from benchmarks.suite import OK
from benchmarks.training_steps import FUSED, MODEL_ALONE, STOCK, VERL, VERL_FUSED, Setting

CPU = torch.device("cpu")
# fp32; a gradient sums over the 4 × 16 tokens, and each token's over 512 entries of the vocabulary.
TOLERANCE = 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("shape", ("tiny", "tiny-untied"))
def test_all_hosts_take_the_same_steps(shape, tmp_path, capsys):
    """verl's with its own losses and with the fused ones; and TRL's, which clips and averages likewise."""
    assert actor_config().loss_agg_mode == "token-mean"
    given = ["--device", "cpu", "--steps", "3", "--shapes", shape, "--learning-rate", "1e-3", "--checkpointing"]
    before = Qwen2ForCausalLM.forward
    assert end_to_end.main([*given, "--hosts", "trl", "verl", "--out", str(tmp_path)]) == 0
    assert Qwen2ForCausalLM.forward is before and "ray" not in sys.modules
    assert not torch.distributed.is_initialized()
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    with (tmp_path / "end_to_end.csv").open(newline="") as file:
        rows = {row["trainer"]: row for row in csv.DictReader(file)}
    assert list(rows) == [MODEL_ALONE, STOCK, FUSED, VERL, VERL_FUSED]
    assert {row["status"] for row in rows.values()} == {OK}
    for number in ("loss", "grad_norm", "entropy"):
        assert float(rows[VERL_FUSED][f"{number}_difference"]) <= TOLERANCE, number
    for name in (VERL, VERL_FUSED):
        assert float(rows[name]["step_ms"]) > 0 and float(rows[name]["rollout_ms"]) > 0
    first = [float(rows[name]["grad_norms"].split()[0]) for name in (STOCK, VERL)]
    assert first[0] == pytest.approx(first[1], rel=TOLERANCE)


def test_the_fused_row_is_fused(monkeypatch):
    """Its log-probabilities come from `linear_token_logprobs` and its loss from `policy_loss`; verl's own do not."""
    from grpo_kernels.integrations import verl, verl_linear

    seen = []

    def watch(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (seen.append(name), real(*args, **kwargs))[1])

    watch(verl_linear, "linear_token_logprobs")
    watch(verl, "policy_loss")
    one = Setting("tiny", 2, 8, steps=1)
    assert not isinstance(training_steps.attempt(one, VERL, CPU), Failed)
    assert seen == []
    assert not isinstance(training_steps.attempt(one, VERL_FUSED, CPU), Failed)
    assert seen == ["linear_token_logprobs"] * 2 + ["policy_loss"]


def test_a_reference_is_refused():
    with pytest.raises(ValueError, match=r"beta must be 0, got 0\.1"):
        verl_steps.run(Setting("tiny", 2, 8, beta=0.1), VERL, CPU)
