"""`vocab_group`: logits whose vocabulary is spread over two or three gloo processes."""

import os
import subprocess
import sys

import pytest
import torch

from vocab_ranks import BOUNDS, CHECKS

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module", params=BOUNDS, ids="{} ranks".format)
def outputs(request, tmp_path_factory):
    """What the ranks printed; all checks run in one set of processes."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((".", "tests")), "CUDA_VISIBLE_DEVICES": ""}
    env |= {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    pipes = dict(env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    store = str(tmp_path_factory.mktemp("ranks") / "store")
    command = [sys.executable, "-m", "vocab_ranks"]
    world = request.param
    ranks = [subprocess.Popen([*command, str(rank), str(world), store], **pipes) for rank in range(world)]
    try:
        return [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("name", CHECKS)
def test_every_rank_has_the_loss_of_the_whole_and_its_part_of_the_gradient(outputs, name):
    assert all(f"passed: {name}\n" in text for text in outputs), "\n".join(outputs)
