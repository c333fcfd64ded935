"""`data_group`: what spans data-parallel ranks, with two gloo processes that see half of a batch each."""

import pytest
import torch

from processes import run_ranks


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_give_what_one_gives(tmp_path):
    outputs = run_ranks("data_ranks", tmp_path, TRITON_INTERPRET="1")
    assert all(text.endswith("passed\n") for text in outputs), "\n".join(outputs)
