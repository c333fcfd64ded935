"""The losses from hidden states under DDP and FSDP2: two gloo processes, each with half of the data."""

import pytest
import torch

from linear_ranks import CHECKS
from processes import run_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What the two ranks printed; all checks run in one pair of processes."""
    return run_ranks("linear_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks_give_the_mean_of_both(outputs, name):
    assert all(f"passed: {name}\n" in text for text in outputs), "\n".join(outputs)
