"""The pretended GPU: it refuses what a GPU would refuse, and nothing else. CI runs the suite on it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cases import make_case
from grpo_kernels import fused_grpo_loss, token_logprobs
from grpo_kernels.call.ops import threshold_op
from grpo_kernels.objective.batch import Batch
from pretend_gpu import DeviceMismatch, pretended, pretended_gpu
from tolerance import assert_within, bounds

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    if pretended():  # by --pretend-gpu, and one is enough
        yield
        return
    with pretended_gpu(monkeypatch):
        yield


def on_gpu(*shape):
    return torch.ones(shape, device="cuda")


def test_where_tensors_are():
    x = torch.ones(3)
    y = x.to("cuda")
    assert (x.device.type, x.is_cuda, y.device.type, y.is_cuda, y.cpu().is_cuda) == ("cpu", False, "cuda", True, False)
    assert x.cpu() is x and y.cuda() is y and y.to("cuda") is y and y.data_ptr() != x.data_ptr()
    on = (on_gpu(3), torch.tensor([1.0], device="cuda"), torch.zeros_like(x, device="cuda"), x.to(y), y.double(),
          y.new_zeros(2), y.new_tensor([2.0]), torch.empty_like(y), y[1:], y.expand(2, 3), y + x.sum(), y * 2,
          torch.nn.Parameter(y), y.detach().clone(), torch.zeros((), device="cuda") + torch.ones(()))  # fmt: skip
    assert all(each.is_cuda for each in on)
    off = (x.new_zeros(2), torch.zeros_like(y, device="cpu"), x.sum() + 1, torch.arange(3), torch.tensor(y.tolist()))
    assert not any(each.is_cuda for each in off)
    assert torch.nn.Linear(3, 2).to("cuda")(y).is_cuda


def test_gradients_are_where_their_tensors_are():
    x = torch.ones(3, requires_grad=True)
    loss = x.to("cuda").exp().sum()
    loss.backward(torch.tensor(2.0))
    assert loss.is_cuda and not x.grad.is_cuda
    y = on_gpu(3).requires_grad_()
    (grad,) = torch.autograd.grad(y * 2, y, on_gpu(3))
    assert grad.is_cuda


REFUSED = {
    "an operation": lambda x, y: x + y,
    "in place": lambda x, y: y.add_(x),
    "a product": lambda x, y: x @ y,
    "one number of the GPU": lambda x, y: x + y.sum(),
    "torch.cat": lambda x, y: torch.cat([x, y]),
    "torch.where": lambda x, y: torch.where(x > 0, y, y),
    "torch.equal": torch.equal,
    "torch.equal of numbers": lambda x, y: torch.equal(x.sum(), y.sum()),
    "assert_close": lambda x, y: torch.testing.assert_close(x, y),
    "a comparison": lambda x, y: x == y,
    "NumPy": lambda x, y: y.numpy(),
    "NumPy, in passing": lambda x, y: np.asarray(y),
    "a CPU generator": lambda x, y: torch.randn(3, device="cuda", generator=torch.Generator()),
    "an upstream gradient": lambda x, y: y.clone().requires_grad_().exp().backward(x),
    "grad": lambda x, y: torch.autograd.grad((z := y.clone().requires_grad_()).exp(), z, x),
    "gather": lambda x, y: y.gather(0, torch.tensor([0])),
    "a mask of the GPU": lambda x, y: x[y > 0],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses(name):
    with pytest.raises(AssertionError, match=r"GPU|device"):
        REFUSED[name](torch.ones(3), on_gpu(3))


def test_what_a_gpu_allows():
    x, y = torch.ones(3), on_gpu(3)
    y.copy_(x)
    x.copy_(y)
    y[torch.tensor([0, 1])] = 2 * on_gpu(2)
    assert y[torch.tensor([True, False, True])].is_cuda and (y * torch.tensor(2.0)).is_cuda
    torch.testing.assert_close(y.cpu(), torch.tensor([2.0, 2.0, 1.0]))
    assert y.sum().item() == 5.0 and y.tolist() == [2.0, 2.0, 1.0]


@pytest.mark.parametrize("given", ("logits", "ids", "mask", "everything"))
def test_kernels_take_no_cpu_tensor(given):
    case = make_case()
    cpu = (case.logits, case.completion_ids, case.completion_mask)
    x, ids, mask = (value if given in (name, "everything") else value.to("cuda")
                    for name, value in zip(("logits", "ids", "mask"), cpu))  # fmt: skip
    with pytest.raises(ValueError, match=r"CPU tensors needs|is on cpu|is on cuda"):
        token_logprobs(x, ids, mask=mask, backend="triton")


def test_an_operation_of_the_package_looks_for_itself():
    """Were its callers to let a CPU tensor through."""
    packed = Batch(None, quantile=0.5).pack()
    assert all(value.is_cuda for value in threshold_op(on_gpu(3), on_gpu(3), *packed, "triton"))
    with pytest.raises(DeviceMismatch, match="is given to a compiled kernel"):
        threshold_op(on_gpu(3), torch.ones(3), *packed, "triton")


@pytest.mark.parametrize("backend", (None, "torch", "triton"))
def test_the_loss_is_that_of_the_cpu(backend):
    case = make_case()
    names = ("completion_ids", "completion_mask", "advantages", "old_logps")
    x = case.logits.to("cuda").requires_grad_()
    out = fused_grpo_loss(x, **{name: getattr(case, name).to("cuda") for name in names}, backend=backend)
    out.loss.backward()
    leaf = case.logits.clone().requires_grad_()
    want = fused_grpo_loss(leaf, **case.inputs(*names), backend="torch")
    want.loss.backward()
    assert out.loss.is_cuda and x.grad.is_cuda and all(value.is_cuda for value in out.metrics.values())
    allowed = bounds(case.logits, **case.inputs(*names))
    assert_within(out.loss, want.loss, allowed.loss, "loss", factor=2)
    assert_within(x.grad, leaf.grad, allowed.grad, "gradient", factor=2)


def test_a_bad_test_fails_and_a_good_one_passes(tmp_path):
    """As CI would run it, under the tests' own conftest."""
    test = tmp_path / "test_of_devices.py"
    test.write_text(
        "import torch\n"
        "from cases import DEVICE, make_case\n"
        "from grpo_kernels import token_logprobs\n"
        "def test_good():\n"
        "    case = make_case()\n"
        "    inputs = [x.to(DEVICE) for x in (case.logits, case.completion_ids, case.completion_mask)]\n"
        "    lp = token_logprobs(*inputs[:2], mask=inputs[2], backend='triton').logps\n"
        "    assert torch.equal(lp.cpu(), lp.cpu()) and lp.shape == (4, 5)\n"
        "def test_bad():\n"
        "    case = make_case()\n"
        "    token_logprobs(case.logits, case.completion_ids, mask=case.completion_mask, backend='triton')\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", "--rootdir",
               str(tmp_path), str(test)]  # fmt: skip
    path = os.pathsep.join(str(ROOT / each) for each in (".", "tests", "tests/helpers"))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    for arguments, status, says in (([], 0, "2 passed"), (["--pretend-gpu"], 1, "1 failed, 1 passed")):
        done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, env=env)
        assert done.returncode == status and says in done.stdout, done.stdout + done.stderr
