"""`vocab_group`: logits whose vocabulary is spread over two or three gloo processes."""

import pytest
import torch

from processes import run_ranks
from vocab_ranks import BOUNDS, CHECKS

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module", params=BOUNDS, ids="{} ranks".format)
def outputs(request, tmp_path_factory):
    """What the ranks printed; all checks run in one set of processes."""
    world = request.param
    env = {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    return run_ranks("vocab_ranks", tmp_path_factory.mktemp("ranks"), world, arguments=(str(world),), **env)


@pytest.mark.parametrize("name", CHECKS)
def test_every_rank_has_the_loss_of_the_whole_and_its_part_of_the_gradient(outputs, name):
    assert all(f"passed: {name}\n" in text for text in outputs), "\n".join(outputs)
