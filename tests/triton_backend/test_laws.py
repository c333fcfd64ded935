"""The kernels' other laws: launches, no host sync, 64-bit offsets, no recompilation, the same bits again."""

import ast
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import BACKENDS, make_case, ours
from counting import Device, HostSync, bare_ops, interpreted, launches
from grpo_kernels import Support, fused_grpo_loss, token_logprobs
from grpo_kernels.call import checks, sharded
from grpo_kernels.objective.aggregations import AGGREGATIONS
from grpo_kernels.objective.catalogue import LOSS_TYPES
from tolerance import assert_within, bounds

# --- launches and host syncs -----------------------------------------------------------------------

B, T, V = 8, 48, 64  # a sequence has a row of sums, 33 of them: longer ones than that


def on_meta(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


def device_calls():
    """Every path and optional input: loss types × where advantages come from × the rest, drawn once each."""
    number = {"num_items_in_batch": 100, "loss_scale": 0.5}
    tensor = {"num_items_in_batch": on_meta(), "loss_scale": on_meta()}
    options = [
        {},
        {"completion_mask": on_meta(B, T, dtype=torch.bool), **number},
        {"completion_mask": on_meta(B, T, dtype=torch.int64), **tensor, "entropy_coef": 0.1},
        {"completion_mask": on_meta(B, T), "beta": 0.1, "ref_logps": on_meta(B, T),
         "importance_weights": on_meta(B, 1)},
        {"completion_mask": on_meta(B, T), **tensor, "beta": 0.1, "ref_logps": on_meta(B, T), "entropy_coef": 0.1,
         "return_entropy": True, "old_logps": on_meta(B, T), "importance_weights": on_meta(B, T), "temperature": 0.7},
        {"skip_zero_advantage": True, "inplace": True, "old_logps": on_meta(B, T)},
    ]  # fmt: skip
    advantages = [
        {"advantages": on_meta(B)},
        {"advantages": on_meta(B, T)},
        {"rewards": on_meta(B), "num_generations": 4},
        {"rewards": on_meta(B), "num_generations": on_meta(3, dtype=torch.int64), "scale_rewards": "batch"},
    ]
    kinds = [
        {}, {"dtype": torch.bfloat16, "extra": 1}, {"dtype": torch.float16}, {"reduction": "none"},
        {"grad": False},
    ]  # fmt: skip
    for each in itertools.product(("grpo", "bnpo", "dapo", "dr_grpo"), options, advantages, kinds):
        loss_type, *rest = each
        yield {"loss_type": loss_type, **{k: v for part in rest for k, v in part.items()}}
    token = {name: on_meta(B, T) for name in ("old_logps", "ref_logps", "completion_mask", "advantages")}
    sampled = {"sampling_logps": on_meta(B, T)}
    knobs = [
        {},
        {"beta": 0.1, "use_bias_correction_kl": True, "importance_weights": on_meta(B)},
        {"beta": 0.1, "kl_estimator": "k3+", "temperature": on_meta(B, T), "off_policy_mask_threshold": 0.1, **sampled},
        {"sampling_correction": "token_mask", **sampled},
        {"sampling_correction": "sequence_mask", **sampled, "old_logps": None},
        {"top_entropy_quantile": 0.2, "entropy_coef": 0.1},
    ]
    for loss_type, extra, kind in itertools.product(LOSS_TYPES, knobs, kinds):
        yield {**token, "loss_type": loss_type, **extra, **kind}
    for mode in AGGREGATIONS:
        yield {**token, "loss_agg_mode": mode, "importance_sampling_level": "sequence"}
    for loss_type in ("gspo", "topr", "vespo", "fipo"):  # rows can be skipped with their whole sequence
        for each in advantages:
            yield {"loss_type": loss_type, "skip_zero_advantage": True, "completion_mask": on_meta(B, T), **each}


def packed_calls():
    """The same of packed input, B sequences in B·T tokens."""
    token = {name: on_meta(B * T) for name in ("old_logps", "ref_logps", "completion_mask")}
    for loss_type, advantages, grad in itertools.product(LOSS_TYPES, (on_meta(B), on_meta(B * T)), (False, True)):
        kwargs = {**token, "loss_type": loss_type, "advantages": advantages}
        kwargs["cu_seqlens"] = on_meta(B + 1, dtype=torch.int32)
        yield {**kwargs, "max_completion_length": 9, "grad": grad, "temperature": on_meta(B), "beta": 0.1}


@interpreted
def test_few_small_launches_and_no_host_sync():
    """Forward and backward on tensors without data, whose ops raise where a GPU would be waited for.

    What runs on the CPU beside them (packing a handful of coefficients) is no work for the device.
    """
    for kwargs in itertools.chain(device_calls(), packed_calls()):
        label = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        grad, dtype, extra = kwargs.pop("grad", True), kwargs.pop("dtype", torch.float32), kwargs.pop("extra", 0)
        shape = (B * T,) if "cu_seqlens" in kwargs else (B, T)
        x = on_meta(*shape[:-1], shape[-1] + extra, V, dtype=dtype).requires_grad_(grad) * 1
        ids = on_meta(*shape, dtype=torch.int64)
        with bare_ops(), launches(run=False) as seen, Device() as device:
            out = fused_grpo_loss(x, ids, backend="triton", **kwargs)
            forward = len(seen)
            if grad:
                upstream = out.loss.new_empty(out.loss.shape)
                torch.autograd.grad(out.loss, x, upstream)
        rows = [max(y.numel() for y in launch.tensors) >= x.numel() for launch in seen]
        assert sum(rows[:forward]) == 1 and sum(rows[forward:]) == (1 if grad else 0), label
        assert all(len(launch.grid) == 1 for launch in seen), label
        assert len(device.ops) + rows.count(False) <= 8, (label, device.ops)
        assert all(size <= B * T for _, size in device.ops), (label, device.ops)
        small = [launch for launch, is_row in zip(seen, rows) if not is_row]
        assert all(y.numel() <= B * T for launch in small for y in launch.tensors), label


@interpreted
@pytest.mark.parametrize("entropy", (False, True))
def test_token_logprobs_launch_twice_without_host_sync(entropy):
    x, ids = on_meta(B, T, V).requires_grad_(), on_meta(B, T, dtype=torch.int64)
    with bare_ops(), launches(run=False) as seen, Device() as device:
        out = token_logprobs(x, ids, mask=on_meta(B, T), return_entropy=entropy, backend="triton")
        up = [on_meta(B, T)] * (2 if entropy else 1)
        torch.autograd.grad([y for y in out if y is not None], x, up)
    assert len(seen) == 2 and len(device.ops) <= 8 and all(size <= B * T for _, size in device.ops)


@interpreted
def test_every_knob_at_once_takes_eleven_small_launches():
    """As docs/how-it-works.md says: packed, a correction, an entropy threshold, sequences that are not empty."""
    N = B * T
    x, ids = on_meta(N, V).requires_grad_(), on_meta(N, dtype=torch.int64)
    inputs = {name: on_meta(N) for name in ("old_logps", "ref_logps", "sampling_logps", "completion_mask")}
    inputs |= {"advantages": on_meta(B), "cu_seqlens": on_meta(B + 1, dtype=torch.int32)}
    with bare_ops(), launches(run=False) as seen, Device() as device:
        out = fused_grpo_loss(
            x, ids, **inputs, loss_type="gspo", beta=0.1, loss_agg_mode="seq-mean-token-mean", entropy_coef=0.1,
            sampling_correction="token_mask", top_entropy_quantile=0.2, backend="triton",
        )  # fmt: skip
        torch.autograd.grad(out.loss, x, out.loss.new_empty(()))
    rows = sum(max(y.numel() for y in launch.tensors) >= x.numel() for launch in seen)
    assert rows == 2 and len(device.ops) + len(seen) - rows == 11, (device.ops, [launch.name for launch in seen])


@interpreted
@pytest.mark.parametrize("support", (None, "Support", "mask"))
@pytest.mark.parametrize("loss_type", ("dapo", "gspo"))
def test_a_vocabulary_in_parts_takes_two_launches_and_no_host_sync(loss_type, support, monkeypatch):
    """The exchange between ranks apart, which needs ranks: test_vocab_parallel.py has them."""
    monkeypatch.setattr(sharded, "gathered", lambda x, group: x.new_empty((2, *x.shape)))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 1)
    monkeypatch.setattr(checks, "check_vocab_group", lambda group: group)
    x, ids = on_meta(B, T, V).requires_grad_(), on_meta(B, T, dtype=torch.int64)
    inputs = {name: on_meta(B, T) for name in ("completion_mask", "old_logps", "ref_logps")}
    inputs["advantages"] = on_meta(B)
    most, size = {None: (8, 4 * B * T), "Support": (23, 4 * B * T), "mask": (12, B * T * V)}[support]
    if support == "Support":
        counts = on_meta(B, T, dtype=torch.int64)
        inputs["support"] = Support.from_counts(on_meta(3 * B * T, dtype=torch.int64), counts)
    elif support == "mask":
        inputs["support"] = on_meta(B, T, V, dtype=torch.bool)
    with bare_ops(), launches(run=False) as seen, Device() as device:
        out = fused_grpo_loss(x, ids, **inputs, beta=0.1, loss_type=loss_type, vocab_group=2, backend="triton")
        torch.autograd.grad(out.loss, x, out.loss.new_empty(()))
    rows = sum(max(y.numel() for y in launch.tensors) >= x.numel() for launch in seen)
    small = len(device.ops) + len(seen) - rows
    assert rows == 2 and small <= most, (device.ops, [launch.name for launch in seen])
    assert all(n <= size for _, n in device.ops), device.ops


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x), lambda x: x.cpu(), lambda x: x.tolist(), lambda x: x.add_(torch.ones(4)),
        lambda x: torch.tensor(1.0, device=x.device), lambda x: torch.ones(4).to(x.device), lambda x: x.new_tensor(1.0),
        lambda x: torch.equal(x, x),
    ],
)  # fmt: skip
def test_the_device_mode_notices_a_host_sync(sync):
    x = on_meta(4)
    with pytest.raises((HostSync, RuntimeError, NotImplementedError)), Device():
        sync(x)


# --- offsets ---------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("along", ("batch", "sequence"))
@pytest.mark.parametrize("kwargs", ({}, {"inplace": True}, {"inplace": True, "reduction": "none"}), ids=str)
def test_rows_beyond_two_to_the_31_elements(along, kwargs, tmp_path):
    """Three rows 2³⁰ elements apart, each factor of the offset within 32 bits, in a file of holes."""
    stride, V = 2**30 + 8, 40
    size = (2 * stride + V) * 2
    with open(tmp_path / "logits", "wb") as file:
        file.truncate(size)
    storage = torch.UntypedStorage.from_file(str(tmp_path / "logits"), shared=True, nbytes=size)
    shape = (3, 1, V) if along == "batch" else (1, 3, V)
    far = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, shape, (stride, stride, 1))
    case = make_case(*shape, dtype=torch.bfloat16)
    inputs = dict(completion_ids=case.completion_ids.clamp(min=0), advantages=case.token_advantages)
    _, want = ours(case.logits, "triton", **inputs)
    with torch.no_grad():
        far.copy_(case.logits)
    x = _Alias.apply(far, torch.zeros((), requires_grad=True))
    with launches():  # an address outside of the file fails, rather than crashing
        out = fused_grpo_loss(x, backend="triton", **inputs, **kwargs)
        upstream = torch.full_like(out.loss, 1 / 3)
        (grad,) = torch.autograd.grad(out.loss, x, upstream if "reduction" in kwargs else None)
    allowed = bounds(case.logits, **inputs, roundings=2).grad  # once more where the upstream gradient multiplies it
    assert_within(grad, want, allowed, "gradient", factor=2)
    with torch.no_grad():
        if "inplace" in kwargs:
            assert_within(far, want, allowed, "memory of the logits", factor=2)
        else:
            assert torch.equal(far, case.logits)


class _Alias(torch.autograd.Function):
    """A tensor as if a model had computed it, without a copy of its storage."""

    @staticmethod
    def forward(ctx, x, parameter):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, None


@interpreted
@pytest.mark.parametrize("what", ("loss", "logps"))
def test_sequences_longer_than_65535(what):
    """A grid has 65535 programs at most in its second and third dimension, so there is none."""
    T, V = 65_600, 4
    case = make_case(1, 4, V)
    last = slice(T - 4, T)
    x = torch.full((1, T, V), torch.nan)
    x[:, last] = case.logits
    ids, old, mask = torch.zeros(1, T, dtype=torch.int64), torch.zeros(1, T), torch.zeros(1, T, dtype=torch.bool)
    ids[:, last], old[:, last], mask[:, last] = case.completion_ids.clamp(min=0), case.old_logps, True

    def run(x, ids, old, mask):
        if what == "loss":
            return fused_grpo_loss(x, ids, case.advantages, old_logps=old, completion_mask=mask, backend="triton").loss
        return token_logprobs(x, ids, mask=mask, backend="triton").logps[:, -4:].exp().sum()

    few = x[:, last].clone().requires_grad_()
    want = run(few, ids[:, last], old[:, last], mask[:, last])
    (want_grad,) = torch.autograd.grad(want, few)
    x.requires_grad_()
    with launches(programs=range(T - 4, T)) as seen:
        got = run(x, ids, old, mask)
        (grad,) = torch.autograd.grad(got, x)
    assert all(len(launch.grid) == 1 for launch in seen) and seen[0].grid == (T,)
    assert torch.equal(got, want) and torch.equal(grad[:, last], want_grad)  # rows start alike: 4 logits of 4 bytes


# --- recompilation ---------------------------------------------------------------------------------


def test_no_kernel_recompiles_for_new_values():
    """Triton's launcher, without the interpreter, on 100 shapes, on coefficients, strides, slices."""
    here = Path(__file__).parent
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "GRPO_KERNELS_VALIDATE": "0"}
    run = subprocess.run([sys.executable, here / "fake_driver.py"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert all(len(each["keys"]) == each["launches"] for each in found["control"]), found["control"]
    counts = found["counts"]
    assert len({each["kernel"] for each in counts}) == 10  # the on-chip kernel and its advantages among them
    on_chip = {(each["V"], each["structure"]) for each in counts if each["kernel"] == "onchip_kernel"}
    assert len(on_chip) == 8
    assert min(each["launches"] for each in counts if each["logits"] == "whole") > 100
    again = [each for each in counts if len(each["keys"]) != 1]
    assert not again, "\n".join(f"{each['structure']}, {each['kernel']}: {each['keys']}" for each in again)


# --- the same bits again ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "reduction"), [(torch.float32, "mean"), (torch.bfloat16, "none"), (torch.float16, "mean")], ids=str
)
def test_two_runs_give_the_same_bits(dtype, reduction, backend):
    case = make_case(4, 4, 517, dtype=dtype)
    kwargs = dict(
        **case.inputs("completion_ids", "completion_mask", "old_logps", "ref_logps", "rewards"), num_generations=2,
        beta=0.1, entropy_coef=0.01, return_entropy=True, reduction=reduction, loss_type="dapo",
    )  # fmt: skip
    (a, grad), (b, again) = (ours(case.logits, backend, **kwargs) for _ in range(2))
    assert torch.equal(grad, again)
    for name in ("loss", "logps", "entropy"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.metrics == b.metrics and a.sums == b.sums


# --- what a GPU fuses ------------------------------------------------------------------------------


def differences_of_equals(source: str) -> list[int]:
    """Lines on which something is subtracted from itself."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Sub) and ast.dump(node.left) == ast.dump(node.right)]  # fmt: skip


def test_nothing_is_subtracted_from_itself():
    """x − x is no test of x being finite: where x is a product a GPU fuses both, and has what x was rounded by."""
    assert differences_of_equals("a = 1\nb = x * y - x * y\nc = x - y\n") == [2]
    package = Path(fused_grpo_loss.__code__.co_filename).parents[1]
    found = {str(path.relative_to(package)): lines for path in sorted(package.rglob("*.py"))
             if (lines := differences_of_equals(path.read_text(encoding="utf-8")))}  # fmt: skip
    assert not found, "use softmax.zero_of"
