"""One of two ranks, for test_empty_ranks.py: ``python -m empty_ranks RANK STORE``. Rank 0 has nothing of its own."""

import os
import sys
import traceback

import torch
import torch.distributed as dist

from benchmarks.interpreter import hasten
from cases import make_case
from grpo_kernels import Support, fused_grpo_loss, fused_linear_grpo_loss, group_advantages, token_logprobs
from linear_tolerance import linear_bounds
from tolerance import advantage_error, assert_within, bounds, logprob_bounds

NAMES = ("completion_ids", "completion_mask", "old_logps")
V, H = 37, 6
SPANNING = (
    {"scale_rewards": "batch"},
    {"top_entropy_quantile": 0.5, "loss_type": "gspo"},
    {"scale_rewards": "batch", "top_entropy_quantile": 0.5, "entropy_coef": 0.1},
)


def data_parallel(backend):
    """A rank without samples, or without a token, takes part; the other has what it has alone."""
    case, group = make_case(B=4, T=3, V=V, seed=5), dist.group.WORLD
    hidden, weight = torch.randn(4, 3, H), torch.randn(V, H)
    for rows, tokens in ((slice(0, 0), slice(None)), (slice(None), slice(0, 0))):
        has_samples = rows != slice(0, 0)
        if dist.get_rank() == 1:
            rows = tokens = slice(None)
        inputs = {name: value[rows, tokens] for name, value in case.inputs(*NAMES).items()}
        inputs |= {"rewards": case.rewards[rows], "num_generations": 2, "backend": backend}
        for extra in SPANNING:
            if has_samples and "scale_rewards" in extra:
                continue  # rank 0's have rewards, which count
            for function, leaf, more in (
                (fused_grpo_loss, case.logits[rows, tokens].clone().requires_grad_(), ()),
                (fused_linear_grpo_loss, hidden[rows, tokens].clone().requires_grad_(), (weight,)),
            ):
                found = []
                for given in (None, group):
                    out = function(leaf, *more, **inputs, **extra, data_group=given)
                    found.append((out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]))
                assert (dist.get_rank() == 1) == bool(found[1][1].any())
                if dist.get_rank() == 0:
                    assert not found[0][1].any() and found[0][0] == found[1][0] == 0.0
                    continue
                if more:
                    allowed, (of_leaf, _) = linear_bounds({"hidden": leaf, "weight": weight}, inputs, **extra)
                else:
                    allowed = bounds(leaf, **inputs, **extra)
                    of_leaf = allowed.grad
                assert_within(found[1][0], found[0][0], allowed.loss, "loss", factor=2)
                assert_within(found[1][1], found[0][1], of_leaf, "gradient", factor=2)
    rewards = case.rewards[slice(0, 0) if dist.get_rank() == 0 else slice(None)]
    found = [group_advantages(rewards, 2, scale_rewards="batch", data_group=given) for given in (None, group)]
    std = rewards.std() if len(rewards) else 1.0
    assert_within(found[1], found[0], advantage_error(rewards, found[0], std) if len(rewards) else 0.0, "advantages", 2)
    assert not group_advantages(rewards[:0], 2, scale_rewards="batch", data_group=group).numel()


def no_part(backend):
    """Rank 0 holds no entry of the vocabulary, rank 1 all of them; and the other way round."""
    case, group = make_case(B=4, T=3, V=V, seed=6, extra=1), dist.group.WORLD
    inputs = {**case.inputs(*NAMES, "advantages"), "backend": backend}
    inputs["advantages"][1] = 0.0
    for empty_rank in (0, 1):
        mine = slice(0, 0) if dist.get_rank() == empty_rank else slice(None)
        for kwargs in ({"entropy_coef": 0.1, "return_entropy": True}, {"loss_type": "gspo"},
                       {"skip_zero_advantage": True}, {"inplace": True}):  # fmt: skip
            x, y = case.logits[..., mine].clone().requires_grad_(), case.logits.clone().requires_grad_()
            out = fused_grpo_loss(x * 1, **inputs, **kwargs, vocab_group=group)
            whole = fused_grpo_loss(y * 1, **inputs, **kwargs)
            allowed = bounds(case.logits, **inputs, **kwargs)
            assert_within(out.loss, whole.loss, allowed.loss, "loss", factor=2)
            assert_within(out.logps, whole.logps, allowed.logps, "logps", factor=2)
            (grad,), (want,) = torch.autograd.grad(out.loss, x), torch.autograd.grad(whole.loss, y)
            assert_within(grad, want[..., mine], allowed.grad[..., mine], "gradient", factor=2)
        keep = torch.rand(4, 3, V) < 0.3
        keep[0, 0] = False  # not restricted
        narrow = case.logits[:, :3].masked_fill(~keep, -torch.inf)
        narrow[0, 0] = case.logits[0, 0]
        at = inputs["completion_ids"].where(inputs["completion_mask"], 0)[..., None]
        narrow.scatter_(-1, at, case.logits[:, :3].gather(-1, at))
        for support, own in ((Support.from_mask(keep), Support.from_mask(keep)), (keep, keep[..., mine])):
            x, y = case.logits[..., mine].clone().requires_grad_(), case.logits.clone().requires_grad_()
            out = fused_grpo_loss(x * 1, **inputs, support=own, vocab_group=group)
            whole = fused_grpo_loss(y * 1, **inputs, support=support)
            allowed = bounds(narrow, **inputs)
            assert_within(out.loss, whole.loss, allowed.loss, "loss", factor=2)
            (grad,), (want,) = torch.autograd.grad(out.loss, x), torch.autograd.grad(whole.loss, y)
            assert_within(grad[:, :3], want[:, :3, mine], allowed.grad[..., mine], "gradient", factor=2)
            assert not grad[:, 3:].any()
        x = case.logits[..., mine].clone().requires_grad_()
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        out = token_logprobs(x, ids, mask=mask, return_entropy=True, vocab_group=group, backend=backend)
        whole = token_logprobs(case.logits, ids, mask=mask, return_entropy=True, backend=backend)
        allowed = logprob_bounds(case.logits, ids, mask, 1.0, lambda lp, H: (lp + H).sum())
        assert_within(out.logps, whole.logps, allowed.logps, "logps", factor=2)
        assert_within(out.entropy, whole.entropy, allowed.entropy, "entropy", factor=2)
        (out.logps + out.entropy).sum().backward()
        assert x.grad.shape == x.shape
    try:
        fused_grpo_loss(case.logits[..., :0], **inputs, vocab_group=group)
        raise AssertionError("a vocabulary without an entry was accepted")
    except IndexError as error:
        assert "outside the vocabulary of 0" in str(error), error


def no_token(backend):
    """No rank has a token, and the exchange takes place all the same."""
    case, group = make_case(B=2, T=3, V=V), dist.group.WORLD
    mine = slice(0, 20) if dist.get_rank() == 0 else slice(20, V)
    for rows, tokens in ((slice(0, 0), slice(None)), (slice(None), slice(0, 0))):
        inputs = {name: value[rows, tokens] for name, value in case.inputs(*NAMES).items()}
        for loss_type in ("grpo", "gspo"):
            x = case.logits[rows, tokens, mine].clone().requires_grad_()
            out = fused_grpo_loss(x, **inputs, advantages=case.advantages[rows], loss_type=loss_type,
                                  return_entropy=True, vocab_group=group, backend=backend)  # fmt: skip
            out.loss.backward()
            assert out.loss == 0.0 and x.grad.shape == x.shape and not x.grad.any()


if __name__ == "__main__":
    hasten()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
    try:
        for check in (data_parallel, no_part, no_token):
            for backend in ("torch", "triton"):
                torch.manual_seed(0)
                check(backend)
                dist.barrier()
        print("passed", flush=True)
    except Exception:
        print(traceback.format_exc(), flush=True)
        os._exit(1)  # the other rank may be anywhere
    os._exit(0)  # gloo's threads may abort an orderly exit, long after the last assertion
