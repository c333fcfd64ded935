"""The [B, T] kernels: sequences in parts, and what is neither stored nor computed twice."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from cases import DEVICE, make_case, on_device
from counting import interpreted, launches
from grpo_kernels import fused_grpo_loss, fused_linear_grpo_loss, policy_loss
from grpo_kernels.call import checks
from grpo_kernels.objective.metrics import SUM_NAMES
from grpo_kernels.triton_backend import launch
from grpo_kernels.triton_backend.shapes import sequence_parts
from pretend_gpu import pretended

pytestmark = pytest.mark.skipif(pretended(), reason="about the kernels' own sums: on a pretended GPU torch computes")

B, T, G = 4, 700, 2  # three blocks of tokens, the last one not full

CASES = {
    "grpo": {},
    "every input": {"beta": 0.1, "entropy_coef": 0.1, "importance_weights": True, "loss_type": "dapo"},
    "dual": {"dual_clip": 1.2, "delta": 3.0},
    "cispo": {"loss_type": "cispo", "cispo_max": 1.1},
    "per token": {"beta": 0.1, "reduction": "none"},
    "quantile": {"top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    "sampler": {"sampling_logps": True},
    "token_mask": {"sampling_logps": True, "sampling_correction": "token_mask"},
    "seq_mask_tis": {"sampling_logps": True, "sampling_correction": "seq_mask_tis"},
    "sequence_truncate": {"sampling_logps": True, "sampling_correction": "sequence_truncate"},
    "gspo": {"loss_type": "gspo"},
}


def run(kwargs, packed):
    """(LossOutput, gradient) of log-probabilities."""
    case = make_case(B, T, 4, seed=3)
    g = torch.Generator().manual_seed(4)
    token = case.inputs("completion_mask", "old_logps", "ref_logps", "importance_weights")
    token["logps"] = case.old_logps + 0.3 * torch.randn(B, T, generator=g)
    token["entropy"] = torch.rand(B, T, generator=g)
    token["sampling_logps"] = case.old_logps + 0.3 * torch.randn(B, T, generator=g)
    kwargs = dict(kwargs)
    for name in ("importance_weights", "sampling_logps"):
        if not kwargs.pop(name, False):
            del token[name]
    if packed:  # sequences of all lengths, and tokens after the last
        token = {name: x.reshape(-1) for name, x in token.items()}
        kwargs["cu_seqlens"] = torch.tensor([0, 3, 3, 1500, B * T - 40], dtype=torch.int32)
        kwargs["max_completion_length"] = T
    inputs = on_device({**token, "rewards": case.rewards, "num_generations": G, **kwargs})
    logps = inputs.pop("logps").requires_grad_()
    out = policy_loss(logps, **inputs, backend="triton")
    (grad,) = torch.autograd.grad(out.loss, logps, torch.full_like(out.loss, 0.5))
    return out, grad


@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("name", CASES)
def test_parts_give_what_the_whole_gives(name, packed, monkeypatch):
    monkeypatch.setattr(checks, "validates", lambda device: False)  # bounds that leave tokens over
    monkeypatch.setattr(launch, "sequence_parts", lambda B, T, whole: 1)
    want, want_grad = run(CASES[name], packed)
    asked = []
    monkeypatch.setattr(launch, "sequence_parts", lambda B, T, whole: asked.append(whole) or (1 if whole else 3))
    out, grad = run(CASES[name], packed)
    assert asked == [name in ("gspo", "sequence_truncate")]
    assert torch.equal(grad, want_grad)
    assert out.sums.keys() == want.sums.keys()
    for each, value in out.sums.items():  # fp64, of 2800 terms below 100: 2800 · 100 · 2⁻⁵³ each
        torch.testing.assert_close(value, want.sums[each], rtol=0, atol=1e-10, msg=each)
    for each, value in (*out.metrics.items(), ("loss", out.loss)):
        value_wanted = want.loss if each == "loss" else want.metrics[each]
        torch.testing.assert_close(value, value_wanted, rtol=2**-22, atol=1e-10, msg=each)


def test_long_sequences_are_shared_out():
    assert sequence_parts(8, 2047, False) == sequence_parts(0, 65536, False) == sequence_parts(4, 0, False) == 1
    assert sequence_parts(8, 8192, False) == 4 and sequence_parts(8, 65536, False) == 16
    assert sequence_parts(256, 65536, False) == 2 and sequence_parts(1024, 65536, False) == 1
    assert sequence_parts(8, 65536, True) == 1


@interpreted
@pytest.mark.parametrize(("loss_type", "programs"), (("grpo", 8), ("gspo", 2)))
def test_a_loss_of_single_tokens_takes_several_programs(loss_type, programs):
    x = torch.zeros(2, 8192)
    with launches(run=False) as seen:
        policy_loss(x, torch.ones(2), loss_type=loss_type, backend="triton")
    assert seen[0].name == "sequence_kernel" and seen[0].grid == (programs,)


# --- nothing for nobody ----------------------------------------------------------------------------


def stored(launch) -> int:
    return sum(len(access.addresses) for access in launch.stored)


@interpreted
@pytest.mark.parametrize(
    ("kwargs", "tensors"),
    [({}, 1), ({"reduction": "none"}, 2), ({"entropy_coef": 0.1}, 2), ({"loss_type": "gspo"}, 3)],
    ids=str,
)
def test_only_what_is_read_is_stored(kwargs, tensors):
    """∂L/∂lp always; ℓ where it is the loss; ∂L/∂H with a bonus; with a level two tensors for the join."""
    case = make_case(3, 5, 7)
    logps = case.old_logps.requires_grad_()
    with launches() as seen:
        policy_loss(logps, case.advantages, entropy=torch.rand(3, 5), backend="triton", **kwargs)
    assert seen[0].name == "sequence_kernel"
    assert stored(seen[0]) == 3 * len(SUM_NAMES) + tensors * 3 * 5


@interpreted
@pytest.mark.parametrize("loss_type", ("dapo", "gspo"))
def test_a_gradient_that_is_written_already_leaves_only_sums_to_store(loss_type):
    """After the one launch over the logits, and after the head's chunks."""
    case = make_case(3, 5, 7)
    kwargs = {**case.inputs("completion_ids", "completion_mask", "advantages"), "loss_type": loss_type}
    hidden, weight = torch.randn(3, 5, 4).requires_grad_(), torch.randn(7, 4)
    with launches() as seen:
        fused_linear_grpo_loss(hidden, weight, backend="triton", **kwargs)
        if loss_type == "dapo":
            fused_grpo_loss(case.logits.requires_grad_(), backend="triton", **kwargs)
    last = [each for each, after in itertools.pairwise(seen) if after.name == "total_kernel"]
    assert {each.name for each in last} == {"sequence_kernel"} and len(last) == 2
    for each in last[1:] if loss_type == "gspo" else last:  # gspo's first is a chunk's own
        assert stored(each) == 3 * len(SUM_NAMES)


@interpreted
def test_the_spread_of_all_rewards_is_computed_once():
    """A row reads the rewards of its group, twice, and its own: none of the others'."""
    case = make_case(8, 3, 7)
    inputs = {"completion_ids": case.completion_ids.clamp(min=0), "rewards": case.rewards}
    with launches() as seen:
        fused_grpo_loss(case.logits.requires_grad_(), **inputs, num_generations=G, scale_rewards="batch",
                        backend="triton")  # fmt: skip
    assert [each.name for each in seen] == ["batch_std_kernel", "loss_kernel", "sequence_kernel", "total_kernel"]
    assert seen[0].reads(inputs["rewards"]).tolist() == [2] * 8
    assert seen[1].reads(inputs["rewards"]).tolist() == [3 * (2 * G + 1)] * 8


# --- packed tokens ---------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("bounds", "numbers"),
    [
        ([2, 4, 4, 7], [3, 3, 0, 0, 2, 2, 2, 3, 3]),
        ([0, 0, 9], [1] * 9),
        ([9, 9], [1] * 9),
        ([5, 3, 8], None),
        ([-4, 12, 2], None),
        ([20, -3, 7, 1], None),
    ],
)
def test_every_packed_token_gets_a_number(bounds, numbers):
    """Outside of all sequences it is how many there are; with bounds that are none, it is no address at least."""
    N, mask = 9, torch.tensor([[1, 0, 1, 1, 1, 0, 1, 1, 1]])
    with launches() as seen:
        found, lengths = launch.segments(mask, torch.tensor(bounds, dtype=torch.int32), N)
    assert (seen[0].writes(found) > 0).all()
    assert ((found >= 0) & (found < len(bounds))).all()
    if numbers is not None:
        assert found.tolist() == numbers
        assert lengths.tolist() == [mask[0, a:b].sum().item() for a, b in itertools.pairwise(bounds)]


def test_without_a_sequence_there_is_no_launch():
    found, lengths = launch.segments(None, torch.zeros(1, dtype=torch.int32, device=DEVICE), 3)
    assert found.tolist() == [0, 0, 0] and lengths.shape == (0,)
