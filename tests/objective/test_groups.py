"""Groups of unequal size, and rewards that are not finite: by hand, on both backends, against the reference."""

import math

import pytest
import torch

import reference
from cases import BACKENDS, DEVICE, check, make_case, on_device
from counting import bare_ops, interpreted, launches
from grpo_kernels import fused_grpo_loss, fused_linear_grpo_loss, group_advantages, policy_loss
from grpo_kernels.call import checks, ops
from grpo_kernels.objective.advantages import group_rows
from grpo_kernels.objective.metrics import combine
from tolerance import advantage_error, assert_within, bounds, near

INF, NAN = math.inf, math.nan
SIZES = [4, 2, 1, 5]  # 12 rows
INPUTS = ("completion_ids", "completion_mask", "old_logps", "rewards")
SCALES = ("group", "batch", "none")


def forms(sizes):
    yield list(sizes)
    yield tuple(sizes)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        yield torch.tensor(sizes, dtype=dtype)


# --- by hand ---------------------------------------------------------------------------------------


def test_advantages_by_hand():
    # (1, 3) has mean 2 and std √2, (5) no spread, (0, 0, 3) mean 1 and std √3
    rewards = torch.tensor([1.0, 3.0, 5.0, 0.0, 0.0, 3.0], device=DEVICE)
    a, b = 1 / math.sqrt(2), 1 / math.sqrt(3)
    for sizes in forms([2, 1, 3]):
        got = group_advantages(rewards, sizes, eps=0.0).cpu()
        wanted = torch.tensor([-a, a, 0.0, -b, -b, 2 * b], dtype=torch.float64)
        assert_within(got, wanted, advantage_error(rewards.cpu(), wanted), "advantages")
    plain = group_advantages(rewards, [2, 1, 3], scale_rewards="none").cpu()
    assert plain.tolist() == [-1.0, 1.0, 0.0, -1.0, -1.0, 2.0]


@pytest.mark.parametrize("scale", SCALES)
def test_groups_without_spread(scale):
    rewards = torch.tensor([1.0, 1, 1, 1, 0, 0], device=DEVICE)
    assert group_advantages(rewards, [4, 2], scale_rewards=scale).tolist() == [0.0] * 6
    assert group_advantages(torch.tensor([0.7], device=DEVICE), [1], scale_rewards=scale).tolist() == [0.0]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_of_groups_without_spread(backend, scale):
    case = make_case(B=6)
    inputs = case.inputs("completion_ids", "completion_mask", "old_logps")
    x = case.logits.to(DEVICE).requires_grad_()
    out = fused_grpo_loss(x, **on_device({**inputs, "rewards": torch.tensor([1.0, 1, 1, 1, 0, 0])}),
                          num_generations=[4, 2], scale_rewards=scale, backend=backend)  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == 0.0 and not x.grad.any()
    assert out.metrics["frac_reward_zero_std"].item() == (0.0 if scale == "batch" else 1.0)


# --- against the reference -------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("unbiased", (True, False))
def test_advantages_against_the_reference(scale, unbiased):
    rewards = make_case(B=12, seed=3).rewards.double()
    rewards[[1, 8]] = torch.tensor([NAN, INF], dtype=torch.float64)
    kwargs = {"scale_rewards": scale, "unbiased": unbiased}
    got = group_advantages(rewards.to(DEVICE), SIZES, **kwargs).cpu()
    torch.testing.assert_close(got, reference.group_advantages(rewards, SIZES, **kwargs), rtol=1e-12, atol=1e-12)
    equal = reference.group_advantages(rewards, 4, **kwargs)
    torch.testing.assert_close(group_advantages(rewards.to(DEVICE), [4] * 3, **kwargs).cpu(), equal,
                               rtol=1e-12, atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", ({}, {"loss_type": "gspo"}, {"skip_zero_advantage": True}), ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_losses(scale, kwargs, backend):
    """One launch and two, rewards that count nowhere among them."""
    case = make_case(B=12, seed=4)
    case.rewards[[1, 8, 10]] = torch.tensor([NAN, INF, -INF])
    for sizes in (SIZES, torch.tensor(SIZES, dtype=torch.int32)):
        if kwargs.get("skip_zero_advantage"):  # metrics are then of the rows that are read
            x = on_device({"logits": case.logits, **case.inputs(*INPUTS)})
            out = fused_grpo_loss(**x, **on_device({"num_generations": sizes}), scale_rewards=scale, backend=backend,
                                  **kwargs)  # fmt: skip
            whole = fused_grpo_loss(**x, **on_device({"num_generations": sizes}), scale_rewards=scale, backend=backend)
            allowed = bounds(case.logits, **case.inputs(*INPUTS), num_generations=sizes, scale_rewards=scale)
            assert_within(out.loss, whole.loss, allowed.loss, "loss", factor=2)
            assert out.metrics["frac_reward_zero_std"] == whole.metrics["frac_reward_zero_std"]
        else:
            check(case.logits, backend, **case.inputs(*INPUTS), num_generations=sizes, scale_rewards=scale, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend):
    case = make_case(B=12, seed=5)
    mask = case.completion_mask
    cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    packed = {name: getattr(case, name)[mask] for name in ("completion_ids", "old_logps")}
    out, _ = check(case.logits[mask], backend, **packed, cu_seqlens=cu, rewards=case.rewards, num_generations=SIZES)
    padded = fused_grpo_loss(**on_device({"logits": case.logits, **case.inputs(*INPUTS)}), num_generations=SIZES,
                             backend=backend)  # fmt: skip
    allowed = bounds(case.logits, **case.inputs(*INPUTS), num_generations=SIZES)
    assert_within(out.loss, padded.loss, allowed.loss, "loss", factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_functions(backend):
    case = make_case(B=12, seed=6, V=33)
    inputs = on_device(case.inputs(*INPUTS))
    want = fused_grpo_loss(case.logits.to(DEVICE), **inputs, num_generations=SIZES, backend=backend)
    given = {name: x for name, x in inputs.items() if name != "completion_ids"}
    of_logps = policy_loss(want.logps, **given, num_generations=SIZES, backend=backend)
    allowed = bounds(case.logits, **case.inputs(*INPUTS), num_generations=SIZES)
    assert_within(of_logps.loss, want.loss, allowed.loss, "loss", factor=2)
    eye = torch.eye(33, device=DEVICE)
    linear = fused_linear_grpo_loss(case.logits.to(DEVICE), eye, **inputs, num_generations=SIZES, backend=backend)
    assert_within(linear.loss, want.loss, allowed.loss, "loss", factor=2)  # products with 1 and 0 are exact


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_that_are_not_finite(backend):
    """Counted nowhere but in their own metric, and parts give the metrics of the whole."""
    case = make_case(B=8, seed=1)
    rewards = torch.tensor([1.0, INF, 3.0, NAN, 2.0, -INF, 2.0, 2.0])
    inputs = {"logits": case.logits, "completion_ids": case.completion_ids % 131, "old_logps": case.old_logps}

    def run(part):
        mine = on_device({**{name: x[part] for name, x in inputs.items()}, "rewards": rewards[part]})
        return fused_grpo_loss(**mine, num_generations=4, backend=backend, advantage_eps=0.0)

    whole, parts = run(slice(0, 8)), [run(slice(0, 4)), run(slice(4, 8))]
    joined = combine(part.sums for part in parts)
    for metrics in (whole.metrics, joined):
        assert metrics["reward_not_finite"].item() == 3
        assert metrics["reward"].item() == 2.0
        assert metrics["reward_std"].item() == near(math.sqrt(0.5), 5)
        assert metrics["frac_reward_zero_std"].item() == 0.5
    assert whole.sums["rewards"].item() == 5 and whole.sums["reward_not_finite"].item() == 3
    a = 1 / math.sqrt(2)
    want = torch.tensor([-a, 0, a, 0, 0, 0, 0, 0])
    off = advantage_error(rewards.where(rewards.isfinite(), 0.0), want)
    assert_within(group_advantages(rewards, 4, eps=0.0), want, off, "advantages")
    assert_within(reference.group_advantages(rewards, 4, eps=1e-12), want, off, "the reference's")
    advantages = fused_grpo_loss(**on_device({**inputs, "advantages": want}), backend=backend)
    allowed = bounds(case.logits, **{name: inputs[name] for name in ("completion_ids", "old_logps")}, advantages=want)
    assert_within(whole.loss, advantages.loss, allowed.loss, "loss", factor=2)


# --- what is refused, and what is not read ---------------------------------------------------------

WRONG = (
    ([4, 1], ValueError, "add up to the 6 rewards"), ([4, 3], ValueError, "add up to the 6 rewards"),
    ([4, 3, -1], ValueError, "positive"), ([6, 0], ValueError, "positive"), ([], ValueError, "add up"),
    ([4, 2.0], TypeError, "must hold integers"), ([True] * 6, TypeError, "must hold integers"),
)  # fmt: skip
WRONG_TENSORS = (
    (torch.tensor([4, 1]), ValueError, "add up to the 6 rewards"), (torch.tensor([7, -1]), ValueError, "positive"),
    (torch.tensor([4.0, 2.0]), TypeError, "must hold integers"), (torch.tensor(6), ValueError, "their sizes"),
    (torch.tensor([[4, 2]]), ValueError, "their sizes"),
)  # fmt: skip


@pytest.mark.parametrize(("sizes", "error", "words"), (*WRONG, *WRONG_TENSORS), ids=str)
def test_wrong_sizes(sizes, error, words, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "1")
    case = make_case(B=6)
    inputs = on_device({"logits": case.logits, **case.inputs(*INPUTS)})
    with pytest.raises(error, match=words):
        group_advantages(inputs["rewards"], on_device({"n": sizes})["n"])
    for backend in BACKENDS:
        with pytest.raises(error, match=words):
            fused_grpo_loss(**inputs, **on_device({"num_generations": sizes}), backend=backend)


UNCHECKED = ([4, 1], [4, 3], [9, 9], [-3, 9], [3, -2, 6], [7, -1], [-1, -1], [2**30, 2**30])


@pytest.mark.parametrize("sizes", UNCHECKED, ids=str)
def test_unchecked_sizes_stay_within_the_rows(sizes, monkeypatch):
    """As on a GPU: rows of no group, or of one that does not lie within the batch, get NaN."""
    monkeypatch.setattr(checks, "validates", lambda device: False)
    rewards = torch.randn(6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    given = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    for first, size in (group_rows(given, 6).cpu(), ops.groups_op(given, 6, "triton").cpu()):
        assert (first >= 0).all() and (first < 6).all() and (size >= 0).all() and (first + size <= 6).all()
    case = make_case(B=6)
    inputs = on_device({"logits": case.logits, "completion_ids": case.completion_ids % 131})
    for backend in BACKENDS:
        out = fused_grpo_loss(**inputs, rewards=rewards, num_generations=given, backend=backend)
        assert out.loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_group(backend, monkeypatch):
    monkeypatch.setattr(checks, "validates", lambda device: False)
    rows = ops.groups_op(torch.tensor([2, 3], device=DEVICE), 6, backend).tolist()
    assert rows == [[0, 0, 2, 2, 2, 5], [2, 2, 3, 3, 3, 0]]
    assert ops.groups_op(torch.tensor([2, 5], device=DEVICE), 6, backend).tolist()[1] == [2, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("n", (1, 40, 100))
def test_many_groups(n):
    """More groups, and larger ones, than a tile of the kernel has room for."""
    sizes = torch.randint(1, 90, (n,), generator=torch.Generator().manual_seed(n)).to(DEVICE)
    B = int(sizes.sum())
    want = group_rows(sizes, B)
    assert torch.equal(ops.groups_op(sizes, B, "triton"), want)
    assert want[1].tolist() == [size for size in sizes.tolist() for _ in range(size)]


@interpreted
@pytest.mark.unshifted
def test_tensors_of_sizes_are_not_read_back():
    """On tensors without data, which raise where a GPU would be waited for; one more small launch."""
    case = make_case(B=6)
    inputs = {name: x.to("meta") for name, x in {"logits": case.logits, **case.inputs(*INPUTS)}.items()}
    with bare_ops(), launches(run=False) as seen:
        fused_grpo_loss(**inputs, num_generations=torch.zeros(2, dtype=torch.int64, device="meta"), backend="triton")
    assert [launch.name for launch in seen].count("groups_kernel") == 1


@pytest.mark.unshifted
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    """In one graph, which serves other sizes too; as does one number."""
    torch._dynamo.reset()
    case = make_case(B=6)
    inputs = on_device({"logits": case.logits, **case.inputs(*INPUTS)})
    compiled = torch.compile(fused_grpo_loss, fullgraph=True, backend="aot_eager")
    for sizes in (*(torch.tensor(sizes, device=DEVICE) for sizes in ([4, 2], [3, 3], [1, 5])), 2, 3, 6):
        want = fused_grpo_loss(**inputs, num_generations=sizes, backend=backend)
        got = compiled(**inputs, num_generations=sizes, backend=backend)
        allowed = bounds(case.logits, **case.inputs(*INPUTS), num_generations=sizes)
        assert_within(got.loss, want.loss, allowed.loss, "loss", factor=2)
        assert got.metrics["reward_std"] == want.metrics["reward_std"]
