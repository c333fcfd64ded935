"""`data_group`: what spans data-parallel ranks, with two gloo processes that see half of a batch each."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

RANK = textwrap.dedent("""
    import os, sys, torch
    import torch.distributed as dist
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    from interpreter import hasten
    hasten()
    from cases import make_case
    from grpo_kernels import fused_grpo_loss, group_advantages

    names = ("completion_ids", "completion_mask", "old_logps", "ref_logps", "rewards")
    case = make_case(B=6, T=7, V=31, seed=3)
    case.rewards[3] = float("nan")
    part = slice(0, 2) if rank == 0 else slice(2, 6)  # of different sizes
    common = dict(num_generations=2, beta=0.1, num_items_in_batch=int(case.completion_mask.sum()), loss_type="dapo")
    for backend in ("torch", "triton"):
        for extra in (dict(scale_rewards="batch"), dict(top_entropy_quantile=0.3, importance_sampling_level="sequence"),
                      dict(scale_rewards="batch", top_entropy_quantile=0.5)):
            grads = []
            for rows, group in ((slice(None), None), (part, dist.group.WORLD)):
                x = case.logits[rows].clone().requires_grad_()
                inputs = {name: value[rows] for name, value in case.inputs(*names).items()}
                out = fused_grpo_loss(x, **inputs, **common, **extra, backend=backend, data_group=group)
                grads.append(torch.autograd.grad(out.loss, x)[0])
            torch.testing.assert_close(grads[1], grads[0][part], rtol=1e-5, atol=1e-8)
            if "scale_rewards" in extra:
                alone = fused_grpo_loss(x, **inputs, **common, **extra, backend=backend)  # this rank by itself
                (other,) = torch.autograd.grad(alone.loss, x)
                assert not torch.allclose(other, grads[0][part], rtol=1e-3)
                mine = group_advantages(case.rewards[part], 2, scale_rewards="batch", data_group=dist.group.WORLD)
                whole = group_advantages(case.rewards, 2, scale_rewards="batch")[part]
                torch.testing.assert_close(mine, whole, rtol=1e-6, atol=0.0)
    flat = group_advantages(torch.full((4,), 0.7), 2, scale_rewards="batch", data_group=dist.group.WORLD)
    assert not flat.any()
    dist.barrier()
    dist.destroy_process_group()
    print("passed", flush=True)
    os._exit(0)  # gloo's threads may abort an orderly exit, long after the last assertion
""")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_give_what_one_gives(tmp_path):
    path = os.pathsep.join((".", "tests"))
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    pipes = dict(env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    store = str(tmp_path / "store")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), store], **pipes) for rank in range(2)]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert all(rank.returncode == 0 and "passed" in text for rank, text in zip(ranks, outputs)), "\n".join(outputs)
