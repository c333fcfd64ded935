"""Ranks that have nothing, neither a token nor an entry of the vocabulary, beside ranks that have something."""

import pytest
import torch

from processes import run_ranks


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_a_rank_without_anything_takes_part(tmp_path):
    outputs = run_ranks("empty_ranks", tmp_path, TRITON_INTERPRET="1")
    assert all(text.endswith("passed\n") for text in outputs), "\n".join(outputs)
