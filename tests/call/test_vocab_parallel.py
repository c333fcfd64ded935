"""`vocab_group`: logits whose vocabulary is spread over two or three gloo processes."""

import functools

import pytest
import torch

from processes import run_ranks
from vocab_ranks import CHECKS

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What so many ranks printed; all checks run in one set of processes."""
    env = {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}

    @functools.cache
    def of(world):
        return run_ranks("vocab_ranks", tmp_path_factory.mktemp("ranks"), world, arguments=(str(world),), **env)

    return of


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, checks in CHECKS.items() for name in checks])
def test_every_rank_has_the_loss_of_the_whole_and_its_part_of_the_gradient(outputs, world, name):
    found = outputs(world)
    assert all(f"passed: {name}\n" in text for text in found), "\n".join(found)
