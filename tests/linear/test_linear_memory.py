"""What the losses from hidden states allocate: a chunk and the gradients, and no [N, V]. Counted on the CPU."""

from dataclasses import replace

import pytest
import torch

from benchmarks.baselines_linear import eager_linear
from benchmarks.cases import Case
from benchmarks.linear_data import make_linear_inputs
from grpo_kernels import fused_linear_grpo_loss, linear_token_logprobs
from memory import peak_bytes

CASE = Case(4, 64, 8000, torch.float32, hidden=32)
ROW = CASE.vocab * 4
CHUNK = 32  # of 256 rows
SCRATCH = CHUNK * ROW  # the probabilities of a chunk
SMALL = 1 << 19  # what is [N] or [N, H]; the logits of a chunk are 1 MB, of all rows 8 MB


def ours(inputs, frozen="", chunk=CHUNK * ROW, **kwargs):
    hidden = inputs.hidden.detach().requires_grad_("h" not in frozen)
    weight = inputs.weight.detach().requires_grad_("w" not in frozen)
    loss = fused_linear_grpo_loss(hidden, weight, inputs.completion_ids, inputs.advantages, old_logps=inputs.old_logps,
                                  chunk_bytes=chunk, **kwargs).loss  # fmt: skip
    return torch.autograd.grad(loss, [x for x in (hidden, weight) if x.requires_grad])


@pytest.fixture(scope="module")
def inputs():
    return make_linear_inputs(CASE, torch.device("cpu"))


@pytest.mark.parametrize("loss_type", ("grpo", "gspo"))
def test_a_chunk_and_the_gradients(inputs, loss_type):
    for frozen, gradients in (("", inputs.weight.nbytes), ("w", 0)):
        peak = peak_bytes(lambda frozen=frozen: ours(inputs, frozen, loss_type=loss_type))
        chunk = CHUNK * ROW  # sequences of two chunks, where whole ones count
        assert chunk + gradients <= peak <= chunk + gradients + SCRATCH + SMALL


def test_a_quarter_of_eager_pytorch(inputs):
    """Whose peak is three times the logits: log-probs, their gradient and the logits' gradient."""
    eager, chunked = peak_bytes(lambda: eager_linear(inputs, None)), peak_bytes(lambda: ours(inputs))
    assert eager >= 3 * CASE.logits_bytes
    assert chunked <= eager / 4


def test_log_probs_take_a_chunk(inputs):
    call = lambda: linear_token_logprobs(inputs.hidden, inputs.weight, inputs.completion_ids, chunk_bytes=CHUNK * ROW)  # noqa: E731
    with torch.no_grad():
        assert peak_bytes(call) <= CHUNK * ROW + SCRATCH + SMALL


@pytest.mark.parametrize("loss_type", ("grpo", "gspo"))
def test_fp32_logits_of_half_precision_take_six_bytes(loss_type):
    """Beside them stands what a CPU copies in fp32 for a product: here all of the weight, or a chunk's gradient."""
    inputs = make_linear_inputs(replace(CASE, dtype=torch.bfloat16), torch.device("cpu"))
    chunk = CHUNK * CASE.vocab * 6
    for frozen, gradients in (("", 2 * inputs.weight.nbytes), ("w", 0)):
        peak = peak_bytes(lambda frozen=frozen: ours(inputs, frozen, chunk, loss_type=loss_type,
                                                     logits_dtype=torch.float32))  # fmt: skip
        assert chunk + gradients <= peak <= chunk + gradients + SCRATCH + SMALL
    call = lambda: linear_token_logprobs(inputs.hidden, inputs.weight, inputs.completion_ids, chunk_bytes=chunk,  # noqa: E731
                                         logits_dtype=torch.float32)  # fmt: skip
    with torch.no_grad():
        assert peak_bytes(call) <= CHUNK * ROW + SCRATCH + SMALL
