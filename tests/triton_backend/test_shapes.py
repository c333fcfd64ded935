"""How rows are cut into tiles."""

import pytest

from grpo_kernels.triton_backend.shapes import gradient_shape, logprob_shape


@pytest.mark.parametrize(
    ("V", "itemsize", "warps"),
    [(50257, 2, 16), (32000, 2, 8), (128256, 2, 32), (151936, 2, 32), (152064, 2, 32), (262144, 2, 32),
     (50257, 4, 32), (32000, 4, 16), (128256, 4, 32), (37, 2, 4)],
)  # fmt: skip
def test_short_rows_share_a_multiprocessor(V, itemsize, warps):
    """As many programs as fill it, unless their rows come to more than 256 KB."""
    found = gradient_shape(V, itemsize, 16 // itemsize, wave=32)
    assert found["num_warps"] == warps and found["N"] == 32 * warps
    assert warps == 32 or 32 // warps * V * itemsize <= 2**18


@pytest.mark.parametrize("V", (8192, 50257, 151936, 262144))
def test_rows_read_once_have_small_programs_at_every_vocabulary(V):
    """At most 16 warps, so that several programs share a multiprocessor."""
    for itemsize in (2, 4):
        vector = 16 // itemsize
        found = logprob_shape(V, itemsize, vector, wave=32)
        assert found["num_warps"] <= 16 and found["N"] == 32 * found["num_warps"]
        assert found["maxnreg"] * found["N"] * 2 <= 65536
        assert logprob_shape(V, itemsize, vector, wave=64) == gradient_shape(V, itemsize, vector, wave=64)
