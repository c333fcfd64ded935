"""Laws of several targets per row: launches, no host sync, traffic, 64-bit offsets, torch.compile."""

import pytest
import torch

from cases import BACKENDS, DEVICE
from counting import Device, HostSync, bare_ops, interpreted, launches
from grpo_kernels import Targets, linear_token_logprobs, token_logprobs
from target_cases import expected, make_targets, target_bounds
from test_traffic import rows_written
from tolerance import assert_within

B, T, V, K = 8, 32, 64, 3
FORMS = ("padded", "lists")


def on_meta(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


def targets_on_meta(form):
    if form == "padded":
        return on_meta(B, T, K, dtype=torch.int64)
    return Targets(on_meta(B * T * K, dtype=torch.int64), on_meta(B * T + 1, dtype=torch.int64))


@interpreted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "both"))
def test_two_launches_over_the_rows_and_no_host_sync(entropy, form):
    """On tensors without data, whose ops raise where a GPU would be waited for."""
    x, mask = on_meta(B, T, V).requires_grad_(), on_meta(B, T, dtype=torch.bool)
    with bare_ops(), launches(run=False) as seen, Device() as device:
        out = token_logprobs(x, targets_on_meta(form), mask=mask, temperature=on_meta(B, T), return_entropy=entropy,
                             backend="triton")  # fmt: skip
        outputs = [out.logps, out.entropy] if entropy else [out.logps]
        torch.autograd.grad(outputs, x, [y.new_empty(y.shape) for y in outputs])
    assert [launch.name for launch in seen] == ["logprob_kernel", "slope_kernel"]
    own = [(name, size) for name, size in device.ops if not name.startswith(("aten.index.Tensor", "aten.index_put_"))]
    assert all(size <= B * T * K + 1 for _, size in own), own  # nothing else is as large as the logits
    assert len(device.ops) <= 120, len(device.ops)  # of torch, over M entries or the rows, whatever K


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_the_host_waits_for_the_bounds_of_lists_alone(form):
    """From hidden states, without a mask: not at all, or once in the forward."""
    hidden, weight = on_meta(B, T, 16).requires_grad_(), on_meta(V, 16).requires_grad_()
    answers = [[0, 300, 768]] if form == "lists" else []
    with bare_ops(), launches(run=False), Device(answers) as device:
        out = linear_token_logprobs(hidden, weight, targets_on_meta(form), chunk_bytes=4 * V * B * T // 2,
                                    backend="triton")  # fmt: skip
        torch.autograd.grad(out.logps, [hidden, weight], out.logps.new_empty(out.logps.shape))
    assert device.waits == len(answers)
    if form == "lists":
        with pytest.raises(HostSync), bare_ops(), launches(run=False), Device():
            linear_token_logprobs(hidden, weight, targets_on_meta(form), backend="triton")


@interpreted
@pytest.mark.unshifted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "both"))
def test_one_read_for_the_values_one_read_and_one_write_for_the_gradient(entropy, form):
    """Whatever K; besides them torch gathers M entries and writes M. Masked rows are not read."""
    case = make_targets(2, 4, 2500, 5, dtype=torch.bfloat16, extra=1)
    x, read = case.logits.clone().requires_grad_(), case.mask
    with launches() as seen:
        out = token_logprobs(x, case.targets(form), mask=case.mask, return_entropy=entropy, backend="triton")
        ups = [case.per_target(form, case.g), *([case.h] if entropy else [])]
        (grad,) = torch.autograd.grad([y for y in out if y is not None], x, ups)
    first, second = seen
    rows_read = lambda launch: (launch.reads(x) > 0)[:, :4].double().mean(-1)  # noqa: E731
    assert torch.equal(rows_read(first), read.double()) and not first.writes(x).any()
    none = (case.ids < 0).all(-1) & (not entropy)  # a row without a slope is not read for its gradient
    assert torch.equal(rows_read(second), (read & ~none).double())
    assert (rows_written(second, grad) == 1).all()
    assert not any(launch.reads(x)[:, 4:].any() for launch in seen)


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_rows_beyond_two_to_the_31_elements(form, tmp_path):
    """Three rows 2³⁰ elements apart, in a file of holes."""
    stride, V = 2**30 + 8, 40
    size = (2 * stride + V) * 2
    with open(tmp_path / "logits", "wb") as file:
        file.truncate(size)
    storage = torch.UntypedStorage.from_file(str(tmp_path / "logits"), shared=True, nbytes=size)
    far = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (3, 1, V), (stride, stride, 1))
    case = make_targets(1, 3, V, 4, dtype=torch.bfloat16, mask=False)
    for name in ("logits", "ids", "g", "listed"):
        setattr(case, name, getattr(case, name).transpose(0, 1))
    case.mask, case.h = case.mask.T, case.h.T
    far.copy_(case.logits)
    with launches():  # an address outside of the file fails, rather than crashing
        out = token_logprobs(far.requires_grad_(), case.targets(form), return_entropy=True, backend="triton")
        (grad,) = torch.autograd.grad([out.logps, out.entropy], far, [case.per_target(form, case.g), case.h])
    lp, H, want = expected(case)
    allowed = target_bounds(case)
    assert_within(out.logps, case.per_target(form, lp), case.per_target(form, allowed[0]), "logps")
    assert_within(out.entropy, H, allowed[1], "entropy")
    assert_within(grad, want, allowed[2], "gradient")


@pytest.mark.unshifted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_compiled_is_eager(form, backend):
    """torch.compile(fullgraph=True), for targets of several sizes, once."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, targets, mask):
        out = token_logprobs(x * 1, targets, mask=mask, return_entropy=True, backend=backend)
        return out.logps.exp().sum() + out.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(4):
        case = make_targets(2, 4, 37, 3 + seed, seed=seed)
        x = case.logits.to(DEVICE).requires_grad_()
        given = (case.targets(form), case.mask.to(DEVICE))
        (want,) = torch.autograd.grad(step(x, *given), x)
        (got,) = torch.autograd.grad(compiled(x, *given), x)
        assert torch.equal(got, want)
    assert counter.frame_count <= 2
    torch._dynamo.reset()
