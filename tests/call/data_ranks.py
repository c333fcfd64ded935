"""One of two data-parallel ranks, for test_distributed.py: ``python -m data_ranks RANK STORE``."""

import os
import sys
import traceback

import torch
import torch.distributed as dist

import variation
from benchmarks.interpreter import hasten
from cases import make_case
from grpo_kernels import fused_grpo_loss, group_advantages
from tolerance import advantage_error, assert_within, bounds

NAMES = ("completion_ids", "completion_mask", "old_logps", "ref_logps", "rewards")
SPANNING = (
    {"scale_rewards": "batch"},
    {"advantage_estimator": "gdpo"},
    {"top_entropy_quantile": 0.3, "importance_sampling_level": "sequence"},
    {"scale_rewards": "batch", "top_entropy_quantile": 0.5},
)


def check() -> None:
    case = make_case(B=6, T=7, V=31, seed=3)
    case.rewards[3] = float("nan")
    part = slice(0, 2) if dist.get_rank() == 0 else slice(2, 6)  # of different sizes
    tokens = int(case.completion_mask.sum())
    common = {"num_generations": 2, "beta": 0.1, "num_items_in_batch": tokens, "loss_type": "dapo"}
    for backend in ("torch", "triton"):
        for extra in SPANNING:
            grads = []
            for rows, group in ((slice(None), None), (part, dist.group.WORLD)):
                x = case.logits[rows].clone().requires_grad_()
                inputs = {name: value[rows] for name, value in case.inputs(*NAMES).items()}
                out = fused_grpo_loss(x, **inputs, **common, **extra, backend=backend, data_group=group)
                grads.append(torch.autograd.grad(out.loss, x)[0])
            allowed = bounds(case.logits, **case.inputs(*NAMES), **common, **extra).grad[part]
            assert_within(grads[1], grads[0][part], allowed, "gradient", factor=2)
            if "scale_rewards" in extra:
                alone = fused_grpo_loss(x, **inputs, **common, **extra, backend=backend)  # this rank by itself
                (other,) = torch.autograd.grad(alone.loss, x)
                assert not torch.allclose(other, grads[0][part], rtol=1e-3)
                mine = group_advantages(case.rewards[part], 2, scale_rewards="batch", data_group=dist.group.WORLD)
                whole = group_advantages(case.rewards, 2, scale_rewards="batch")[part]
                allowed = advantage_error(case.rewards, whole, case.rewards[~case.rewards.isnan()].std())
                assert_within(mine, whole, allowed, "advantages", factor=2)
    several = torch.rand(6, 2, generator=torch.Generator().manual_seed(2)).double()
    kwargs = {"reward_weights": (1.0, 0.5)}
    several[3], several[4, 0] = float("nan"), float("nan")
    mine = group_advantages(several[part], 2, advantage_estimator="gdpo", data_group=dist.group.WORLD, **kwargs)
    whole = group_advantages(several, 2, advantage_estimator="gdpo", **kwargs)[part]
    torch.testing.assert_close(mine, whole, rtol=1e-12, atol=1e-12)
    flat = group_advantages(torch.full((4,), 0.7), 2, scale_rewards="batch", data_group=dist.group.WORLD)
    assert not flat.any()


if __name__ == "__main__":
    variation.from_environment()
    hasten()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
    try:
        check()
        dist.barrier()
        print("passed", flush=True)
    except Exception:
        print(traceback.format_exc(), flush=True)
    os._exit(0)  # gloo's threads may abort an orderly exit, long after the last assertion
