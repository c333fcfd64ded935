"""The losses from hidden states under DDP and FSDP2: two gloo processes, each with half of the data."""

import os
import subprocess
import sys

import pytest
import torch

from linear_ranks import CHECKS

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What the two ranks printed; all checks run in one pair of processes."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((".", "tests")), "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    store = str(tmp_path_factory.mktemp("ranks") / "store")
    command = [sys.executable, "-m", "linear_ranks"]
    ranks = [subprocess.Popen([*command, str(rank), store], **pipes) for rank in range(2)]
    try:
        return [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks_give_the_mean_of_both(outputs, name):
    assert all(f"passed: {name}\n" in text for text in outputs), "\n".join(outputs)
