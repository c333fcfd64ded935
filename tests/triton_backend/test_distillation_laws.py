"""Laws of the distillation kernels: traffic, launches, no host sync, no recompilation, torch.compile, equal bits."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import BACKENDS, DEVICE
from counting import Device, bare_ops, interpreted, launches
from distillation_cases import BETAS, TAILS, TEACHERS, make_pair, ours, wanted
from grpo_kernels import TopK, distillation_loss
from grpo_kernels.call import distillation_ops as ops
from grpo_kernels.objective.distillation import DistillationBatch, DistillationPlan
from tolerance import assert_within

SHAPES = ((2, 3, 131), (1, 1, 9001))  # one tile per row, and several with a ragged end


# --- traffic ---------------------------------------------------------------------------------------


def step(pair, *, inplace=False, upstream=1.0, **changes):
    """(logits, teacher, gradient, launches that touched one of them) of a forward and a backward."""
    x = pair.logits.clone().requires_grad_() * 1
    with launches() as seen:
        out = distillation_loss(x, pair.teacher, backend="triton", inplace=inplace, **{**pair.kwargs, **changes})
        (grad,) = torch.autograd.grad(out.loss, x, torch.full_like(out.loss, upstream))
    told = list(pair.teacher) if isinstance(pair.teacher, TopK) else [pair.teacher]
    return x, told, grad, [launch for launch in seen if any(map(launch.touches, (x, grad, *told)))]


def whole(seen, x):
    """(B, rows): the share of each row that was touched."""
    return (seen(x) > 0).double().mean(-1)


@interpreted
@pytest.mark.unshifted
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inplace", (False, True))
def test_a_whole_teacher_takes_one_launch_of_two_reads_and_one_write(inplace, shape, dtype, beta):
    B, T, V = shape
    pair = make_pair(B=B, T=T, V=V, dtype=dtype, extra=1, completion_mask=torch.ones(B, T))
    x, (z,), grad, (only,) = step(pair, inplace=inplace, beta=beta)
    passes = 3 if 0 < beta < 1 else 2
    for y in (x, z):
        assert (whole(only.reads, y)[:, :T] == 1).all() and (whole(only.reads, y)[:, T:] == 0).all()
        assert (only.reads(y)[:, :T] == passes).all()
    assert (only.writes(grad) == 1).all() and not only.writes(z).any()
    if not inplace:
        assert not only.writes(x).any() and not only.reads(grad).any()


@interpreted
@pytest.mark.unshifted
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("teacher", TAILS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inplace", (False, True))
def test_a_few_tokens_take_one_read_or_none(inplace, shape, teacher, beta):
    """Without the rest no logit is read but those of the K."""
    B, T, V = shape
    pair = make_pair(teacher, B=B, T=T, V=V, extra=1, completion_mask=torch.ones(B, T))
    x, _, grad, (only,) = step(pair, inplace=inplace, beta=beta)
    ids, logps = pair.teacher
    told = torch.zeros(B, T, V + 1).scatter_(-1, torch.where((ids < 0) | logps.isinf(), V, ids), 1.0)[..., :V] > 0
    reads = only.reads(x)[:, :T]
    assert not only.reads(x)[:, T:].any()
    if teacher == "few":
        assert torch.equal(reads > 0, told)
    else:
        assert (reads >= 2).all() and torch.equal(reads == 3, told)
    assert (only.writes(grad)[:, T:] == 1).all() and torch.equal(only.writes(grad)[:, :T] == 2, told)
    assert (only.writes(grad) >= 1).all() and (only.writes(grad) <= 2).all()


@interpreted
@pytest.mark.unshifted
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(
    ("dtype", "reduction", "inplace"),
    [(torch.float16, "mean", False), (torch.float32, "none", False), (torch.bfloat16, "none", True)],
    ids=str,
)
def test_fp16_and_a_loss_per_token_take_two_launches(dtype, reduction, inplace, teacher):
    pair = make_pair(teacher, T=3, dtype=dtype, extra=1, completion_mask=torch.ones(3, 3))
    for beta in BETAS:
        x, told, grad, (first, second) = step(pair, inplace=inplace, beta=beta, reduction=reduction, upstream=3.0)
        assert not first.writes(grad).any() and (second.writes(grad) >= 1).all()
        for y in (x, *told) if teacher == "whole" else (x,):
            for launch in (first, second):
                reads = launch.reads(y)[:, :3]
                assert (reads > 0).all() if teacher != "few" else (reads > 0).double().mean() < 0.1
        if teacher == "whole":
            assert (first.reads(x)[:, :3] == (2 if 0 < beta < 1 else 1)).all() and (second.reads(x)[:, :3] == 1).all()


@interpreted
@pytest.mark.unshifted
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("kwargs", ({}, {"inplace": True}, {"reduction": "none"}, {"grad": False}), ids=str)
def test_masked_rows_are_never_read(kwargs, teacher):
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    pair = make_pair(teacher, completion_mask=mask)
    for beta in BETAS:
        if kwargs.get("grad") is False:
            x, told = pair.logits, list(pair.teacher) if teacher != "whole" else [pair.teacher]
            with launches() as touching:
                distillation_loss(x, pair.teacher, beta=beta, backend="triton", **pair.kwargs)
        else:
            x, told, grad, touching = step(pair, beta=beta, **kwargs)
            written = torch.stack([launch.writes(grad) for launch in touching]).sum(0)
            assert (written[mask == 0] == 1).all() and (grad[mask == 0] == 0).all()
        for launch, y in itertools.product(touching, (x, *told)):
            assert not launch.reads(y)[mask == 0].any()


@interpreted
@pytest.mark.unshifted
def test_rows_without_a_weight_are_read_once_and_get_zeros():
    pair = make_pair(loss_scale=0.0, completion_mask=None)
    pair.teacher[0, 0] = torch.nan
    x, _, grad, (only,) = step(pair)
    assert (only.reads(x) == 1).all() and (grad == 0).all()


# --- launches and host syncs -----------------------------------------------------------------------

B, T, V, K = 8, 32, 64, 5


def on_meta(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


OPTIONS = (
    {},
    {"completion_mask": on_meta(B, T, dtype=torch.bool), "loss_scale": 0.5, "num_items_in_batch": 9},
    {"completion_mask": on_meta(B, T), "loss_scale": on_meta(), "num_items_in_batch": on_meta()},
    {"loss_agg_mode": "seq-mean-token-mean", "completion_mask": on_meta(B, T), "temperature": on_meta(B)},
    {"inplace": True, "dtype": torch.bfloat16},
    {"dtype": torch.float16, "temperature": on_meta()},
    {"reduction": "none", "completion_mask": on_meta(B, T)},
    {"cu_seqlens": on_meta(B + 1, dtype=torch.int32), "loss_agg_mode": "sequence-mean"},
)


@interpreted
@pytest.mark.unshifted
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("kwargs", OPTIONS, ids=lambda kwargs: ",".join(kwargs))
def test_few_small_launches_and_no_host_sync(kwargs, teacher):
    for beta in BETAS:
        more, shape = dict(kwargs), (B * T,) if "cu_seqlens" in kwargs else (B, T)
        dtype = more.pop("dtype", torch.float32)
        x = on_meta(*shape, V, dtype=dtype).requires_grad_() * 1
        told = on_meta(*shape, V, dtype=dtype)
        if teacher != "whole":
            told, more["tail"] = TopK(on_meta(*shape, K, dtype=torch.int64), on_meta(*shape, K)), TAILS[teacher]
        with bare_ops(), launches(run=False) as seen, Device() as device:
            out = distillation_loss(x, told, beta=beta, backend="triton", **more)
            forward = len(seen)
            torch.autograd.grad(out.loss, x, out.loss.new_empty(out.loss.shape))
        rows = [max(y.numel() for y in launch.tensors) >= x.numel() for launch in seen]
        assert sum(rows[:forward]) == 1 and sum(rows[forward:]) == 1
        assert all(len(launch.grid) == 1 for launch in seen)
        assert len(device.ops) + rows.count(False) <= 8, device.ops
        assert all(size <= 3 * B * T for _, size in device.ops), device.ops


# --- recompilation ---------------------------------------------------------------------------------


@pytest.mark.unshifted
def test_no_kernel_recompiles_for_new_values():
    here = Path(__file__).parent
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "GRPO_KERNELS_VALIDATE": "0"}
    run = subprocess.run([sys.executable, here / "distillation_driver.py"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert all(len(each["keys"]) == each["launches"] for each in found["control"]), found["control"]
    counts = found["counts"]
    kernels = {"whole_teacher_kernel", "few_tokens_kernel", "sequence_sums_kernel", "batch_sums_kernel", "scale_kernel"}
    assert {each["kernel"] for each in counts} == kernels
    forms = 2  # a loss per token has its values in one launch, its gradient in another
    again = [each for each in counts if len(each["keys"]) > (forms if "none" in each["structure"] else 1)]
    assert not again, "\n".join(f"{each['structure']}, {each['kernel']}: {each['keys']}" for each in again)


# --- torch.compile ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.mark.unshifted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("more", "teacher"),
    [*(({}, teacher) for teacher in TEACHERS),
     *itertools.product(({"reduction": "none"}, {"inplace": True}), ("whole", "rest"))],
    ids=str,
)  # fmt: skip
def test_compiled_is_eager(more, teacher, backend, fresh_dynamo):
    """Teachers of few tokens make one graph, whatever becomes of the rest: the other ways have one of them."""
    pair = make_pair(teacher, V=37, temperature=1.3)
    told = TopK(*(y.to(DEVICE) for y in pair.teacher)) if teacher != "whole" else pair.teacher.to(DEVICE)
    kwargs = {**pair.kwargs, "completion_mask": pair.mask.to(DEVICE), "backend": backend, **more}

    def train(x, told, loss_scale):
        return distillation_loss(x * 1.0, told, beta=0.3, loss_scale=loss_scale, **kwargs)

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    for loss_scale in (1.0, 0.25, 0.125):
        got = []
        for run in (train, compiled):
            x = pair.logits.to(DEVICE).requires_grad_()
            out = run(x, told, loss_scale)
            out.loss.sum().backward()
            got.append((out, x.grad))
        (want, want_grad), (out, grad) = got
        _, allowed = wanted(pair, beta=0.3, loss_scale=loss_scale, **more)
        assert_within(out.loss, want.loss, allowed["loss"], "loss", factor=2)
        assert_within(grad, want_grad, allowed["grad"], "gradient", factor=2)
        assert out.metrics.keys() == want.metrics.keys() and out.sums.keys() == want.sums.keys()


@pytest.mark.unshifted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_ops(teacher, backend):
    pair = make_pair(teacher, V=20)
    few = pair.teacher if teacher != "whole" else None
    batch = DistillationBatch(pair.mask, *(few or (None, None)))
    batch = batch._replace(**{k: v.to(DEVICE) for k, v in batch._asdict().items() if isinstance(v, torch.Tensor)})
    plan = DistillationPlan(outcomes=teacher if few else "all").key()
    x, z = pair.logits.to(DEVICE), None if few else pair.teacher.to(DEVICE)
    given = (x, z, *batch.pack(), plan, 4, backend)
    *_, stats = ops.distillation_values_op(*given)
    slope = (x, z, *batch.pack(), stats, torch.ones((), device=DEVICE), plan, 4, backend)
    checks = {ops.distillation_loss_op: given, ops.distillation_loss_op_: given, ops.distillation_values_op: given,
              ops.distillation_slope_op: slope, ops.distillation_slope_op_: slope}  # fmt: skip
    for op, arguments in checks.items():
        tests = ["test_schema", "test_faketensor"]
        if arguments is given and op is not ops.distillation_values_op:  # which leaves masked rows of its stats as is
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op, (arguments[0].clone(), *arguments[1:]), test_utils=tests)


# --- offsets, bits ---------------------------------------------------------------------------------


@interpreted
@pytest.mark.unshifted
@pytest.mark.parametrize("of", ("student", "teacher"))
def test_rows_beyond_two_to_the_31_elements(of, tmp_path):
    """Three rows 2³⁰ elements apart, in a file of holes."""
    stride, V = 2**30 + 8, 40
    with open(tmp_path / "logits", "wb") as file:
        file.truncate((2 * stride + V) * 2)
    storage = torch.UntypedStorage.from_file(str(tmp_path / "logits"), shared=True, nbytes=(2 * stride + V) * 2)
    far = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (1, 3, V), (stride, stride, 1))
    pair = make_pair(B=1, T=3, V=V, dtype=torch.bfloat16, completion_mask=None)
    _, want = ours(pair, "triton", beta=0.3)
    far.copy_(pair.logits if of == "student" else pair.teacher)
    x = pair.logits.clone() if of == "teacher" else far
    shape = torch.zeros((), requires_grad=True)
    x = _Alias.apply(x, shape)
    told = pair.teacher if of == "student" else far
    with launches():
        loss = distillation_loss(x, told, beta=0.3, inplace=True, backend="triton").loss
        (grad,) = torch.autograd.grad(loss, x)
    _, allowed = wanted(pair, beta=0.3)
    assert_within(grad, want, allowed["grad"], "gradient", factor=2)


class _Alias(torch.autograd.Function):
    """A tensor as if a model had computed it, without a copy of its storage."""

    @staticmethod
    def forward(ctx, x, parameter):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(("dtype", "reduction"), [(torch.float32, "mean"), (torch.bfloat16, "none")], ids=str)
def test_two_runs_give_the_same_bits(dtype, reduction, teacher, backend):
    pair = make_pair(teacher, V=517, dtype=dtype)
    for beta in BETAS:
        (a, grad), (b, again) = (ours(pair, backend, beta=beta, reduction=reduction) for _ in range(2))
        assert torch.equal(grad, again) and torch.equal(a.loss, b.loss) and torch.equal(a.entropy, b.entropy)
        assert a.metrics == b.metrics and a.sums == b.sums
