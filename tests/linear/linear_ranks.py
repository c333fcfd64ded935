"""One of two data-parallel ranks, for test_linear_distributed.py: ``python -m linear_ranks RANK STORE``.

Each check trains a tiny model on this rank's half of a batch, and compares gradients, and the weights after a
step, with a model that saw both halves in one process.
"""

import copy
import os
import sys
import traceback
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import variation
from cases import make_case
from grpo_kernels import fused_linear_grpo_loss, linear_token_logprobs
from linear_tolerance import linear_bounds
from memory import peak_bytes
from tolerance import U, assert_within, bounds_of

B, T, H, V = 4, 5, 6, 23  # V is odd: the shards of the head are of different heights
CHUNK = 7 * V * 4


class Model(nn.Module):
    """Embedding, a body, a head; the forward stops at the hidden states, or goes on to the loss."""

    def __init__(self, tied=False, loss=None):
        super().__init__()
        self.embed, self.body = nn.Embedding(V, H), nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=not tied)
        self.loss = loss
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, inputs=None):
        hidden = torch.tanh(self.body(self.embed(ids)))
        return hidden if inputs is None else self.loss(self, hidden, inputs)


def batch(rank):
    """(ids that are read, inputs of the loss), other ones on each rank."""
    case = make_case(B, T, V, seed=10 + rank)
    inputs = case.inputs("completion_ids", "completion_mask", "old_logps", "advantages")
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(rank)), inputs


def by_weight(model, hidden, inputs):
    head = model.head
    return fused_linear_grpo_loss(hidden, head.weight, **inputs, bias=head.bias, chunk_bytes=CHUNK).loss


def by_module(model, hidden, inputs):
    return fused_linear_grpo_loss(hidden, model.head, **inputs, chunk_bytes=CHUNK, loss_type="gspo").loss


def by_logps(model, hidden, inputs):
    out = linear_token_logprobs(hidden, model.head, inputs["completion_ids"], mask=inputs["completion_mask"])
    return -(out.logps * inputs["advantages"][:, None]).sum()


def twice(model, hidden, inputs):
    return by_weight(model, hidden, inputs) + by_logps(model, hidden, inputs)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def of_both(plain, loss):
    """The loss of both ranks' data."""
    return sum(loss(plain, plain(ids), inputs) for ids, inputs in map(batch, range(2))) / 2


def allowed_to(plain, loss):
    """How far each gradient of `plain` may be off, by name: see `bounds_of`."""

    def evaluate(**weights):
        moved = copy.deepcopy(plain)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.copy_(weights[name.replace(".", " ")])
        names, leaves = zip(*((name, p) for name, p in moved.named_parameters() if p.requires_grad))
        return {name: g.double() for name, g in zip(names, torch.autograd.grad(of_both(moved, loss), leaves))}

    return bounds_of(evaluate, {name.replace(".", " "): p for name, p in plain.named_parameters()})


def compare(parallel, plain, loss, run, rounds=2, rate=0.1):
    """``run``: the loss of this rank. Two steps: the second starts from weights that the first has changed."""
    optimizers = [torch.optim.SGD(m.parameters(), rate, momentum=0.9) for m in (parallel, plain)]
    off = {name: 0.0 for name, _ in plain.named_parameters()}  # of the weights
    for k in range(rounds):
        allowed = {name: (k + 1) * x for name, x in allowed_to(plain, loss).items()}  # and the weights' own error
        run(*batch(dist.get_rank())).backward()
        of_both(plain, loss).backward()
        names = dict(plain.named_parameters())
        for name, p in parallel.named_parameters():
            want = names[name.removeprefix("module.")]
            assert p.grad is not None and type(p.grad) in (type(p), type(p.data)), name
            name = name.removeprefix("module.")
            assert_within(whole(p.grad), want.grad, allowed[name], name, factor=2)
            off[name] = off[name] + rate * 1.9 * allowed[name] + U * want.detach().double().abs()  # 0.9: the momentum
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, (name, want) in zip(parallel.parameters(), plain.named_parameters()):
        assert_within(whole(p.data), want, off[name], name, factor=2)


def pair(**kwargs):
    torch.manual_seed(0)
    model = Model(**kwargs)
    return model, copy.deepcopy(model)


def ddp(loss, **kwargs):
    model, plain = pair()
    wrapped = DistributedDataParallel(model, **kwargs)
    compare(wrapped, plain, loss, lambda ids, inputs: loss(model, wrapped(ids), inputs))


def fsdp(loss, *, tied=False, alone=False, reshard=None, shape=(2,), placed=None):
    """``alone``: the head is a group of its own; ``placed``: the head is (not) a DTensor when the loss is called."""
    model, plain = pair(tied=tied)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[2 - len(shape):])
    fully_shard(model.body, mesh=mesh)
    if alone:
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)

    def run(ids, inputs):
        hidden = model(ids)
        assert isinstance(model.head.weight, DTensor) == placed, model.head.weight
        return loss(model, hidden, inputs)

    compare(model, plain, loss, run)


def fsdp_inside_forward():
    model, plain = pair(loss=by_module)
    fully_shard(model)
    compare(model, plain, by_module, lambda ids, inputs: model(ids, inputs))


def fsdp_frozen_head():
    model, plain = pair()
    for m in (model, plain):
        m.head.requires_grad_(False)
    fully_shard(model, reshard_after_forward=True)
    ids, inputs = batch(dist.get_rank())
    by_weight(model, model(ids), inputs).backward()
    assert model.head.weight.grad is None
    of_both(plain, by_weight).backward()
    allowed = allowed_to(plain, by_weight)["body.weight"]
    assert_within(whole(model.body.weight.grad), plain.body.weight.grad, allowed, "body", factor=2)


def fsdp_mixed_precision():
    """The shards are fp32 and the hidden states bf16: said so, and the cast that is asked for works."""
    model, _ = pair()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16), reshard_after_forward=True)
    ids, inputs = batch(dist.get_rank())
    hidden = model(ids)
    try:
        by_weight(model, hidden, inputs)
        raise AssertionError("different dtypes were accepted")
    except TypeError as error:
        assert "weight is torch.float32, but hidden is torch.bfloat16" in str(error), error
    weight, bias = (x.to(torch.bfloat16) for x in (model.head.weight, model.head.bias))
    fused_linear_grpo_loss(hidden, weight, **inputs, bias=bias).loss.backward()
    assert isinstance(model.head.weight.grad, DTensor) and model.head.weight.grad.dtype == torch.float32
    assert whole(model.head.weight.grad).abs().max() > 0


def tensor_parallel():
    """A vocabulary sharded over ranks that see the same hidden states: each has the whole gradient, none twice."""
    mesh = init_device_mesh("cpu", (2,))
    _, plain = pair()
    ids, inputs = batch(0)
    weight = nn.Parameter(distribute_tensor(plain.head.weight.detach(), mesh, [Shard(0)]))
    hidden = plain(ids)
    fused_linear_grpo_loss(hidden, weight, **inputs, bias=plain.head.bias.detach()).loss.backward(retain_graph=True)
    by_weight(plain, hidden, inputs).backward()
    assert isinstance(weight.grad, DTensor) and weight.grad.placements == (Shard(0),)
    head = {"hidden": hidden, "weight": plain.head.weight, "bias": plain.head.bias}
    allowed = linear_bounds(head, inputs)[1][1]
    assert_within(weight.grad.full_tensor(), plain.head.weight.grad, allowed, "head", factor=2)


def refused():
    """DTensors that the loss cannot know how to gather say how to."""
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (2,))
    ids, inputs = batch(0)
    _, plain = pair()
    hidden, weight = plain(ids).detach(), plain.head.weight.detach()
    partial = DTensor.from_local(weight, mesh, [Partial()])
    for arguments, words in (
        ((hidden, partial), "weight is a DTensor with placements"),
        ((distribute_tensor(hidden, mesh, [Shard(0)]), weight), "hidden is a DTensor"),
    ):
        try:
            fused_linear_grpo_loss(*arguments, **inputs)
            raise AssertionError(f"accepted, wanted: {words}")
        except ValueError as error:
            assert words in str(error) and "full_tensor" in str(error), error


def unused():
    """DDP that looks for unused parameters takes the head for one: it says so, and trains nothing wrong."""
    model, _ = pair()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    ids, inputs = batch(dist.get_rank())
    loss = by_weight(model, wrapped(ids), inputs)
    try:
        loss.backward()
        raise AssertionError("the gradient of the head may be missing")
    except RuntimeError as error:
        assert "mark a variable ready only once" in str(error), error


class Wide(nn.Module):
    def __init__(self, wide, vocab):
        super().__init__()
        self.body, self.head = nn.Linear(wide, wide), nn.Linear(wide, vocab, bias=False)

    def forward(self, x):
        return torch.tanh(self.body(x))


def peak(parallel):
    """The most that a step's tensors hold: a chunk, its probabilities and the head's gradients, and no row more."""
    tokens, wide, vocab, rows = 256, 16, 4000, 16
    model = Wide(wide, vocab)
    wrapped = parallel(model)
    x, ids, advantages = torch.randn(4, tokens // 4, wide), torch.randint(vocab, (4, tokens // 4)), torch.randn(4)
    chunk, weight = rows * vocab * 4, model.head.weight.numel() * 4

    def step():
        loss = fused_linear_grpo_loss(wrapped(x), model.head.weight, ids, advantages, chunk_bytes=chunk).loss
        loss.backward()
        model.zero_grad()

    held = peak_bytes(step)
    assert chunk + weight <= held <= 2 * chunk + 4 * weight + 2**18 < tokens * vocab * 4 / 2, held


def sharded(model):
    fully_shard(model, reshard_after_forward=False)
    return model


CHECKS = {
    "DDP, peak of memory": lambda: peak(DistributedDataParallel),
    "FSDP2, peak of memory": lambda: peak(sharded),
    "DDP": lambda: ddp(by_weight),
    "DDP, head as a module, by sequence": lambda: ddp(by_module),
    "DDP, gradients are views of buckets": lambda: ddp(by_weight, gradient_as_bucket_view=True),
    "DDP, log-probs": lambda: ddp(by_logps),
    "FSDP2, root left unsharded": lambda: fsdp(by_weight, reshard=False, placed=False),
    "FSDP2, root as it is by default": lambda: fsdp(by_weight, placed=False),
    "FSDP2, head sharded": lambda: fsdp(by_weight, reshard=True, placed=True),
    "FSDP2, head as a module": lambda: fsdp(by_module, reshard=True, placed=True),
    "FSDP2, head a group of its own": lambda: fsdp(by_module, alone=True, placed=True),
    "FSDP2, log-probs": lambda: fsdp(by_logps, reshard=True, placed=True),
    "FSDP2, two losses of one head": lambda: fsdp(twice, reshard=True, placed=True),
    "FSDP2, tied head": lambda: fsdp(by_module, tied=True, reshard=True, placed=True),
    "FSDP2, tied head, unsharded": lambda: fsdp(by_module, tied=True, reshard=False, placed=False),
    "HSDP, replicated": lambda: fsdp(by_weight, reshard=True, shape=(2, 1), placed=True),
    "HSDP, sharded": lambda: fsdp(by_weight, reshard=True, shape=(1, 2), placed=True),
    "FSDP2, loss inside the forward": fsdp_inside_forward,
    "FSDP2, frozen head": fsdp_frozen_head,
    "FSDP2, mixed precision": fsdp_mixed_precision,
    "tensor parallel head": tensor_parallel,
    "refused": refused,
    "DDP, looking for unused parameters": unused,
}


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, check in CHECKS.items():
        try:
            check()
            print(f"passed: {name}", flush=True)
        except Exception:
            print(f"failed: {name}\n{traceback.format_exc()}", flush=True)
        dist.barrier()
    with suppress(Exception):
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort an orderly exit, long after the last assertion


if __name__ == "__main__":
    variation.move_seeds(int(os.environ.get(variation.SEED_OFFSET, "0")))  # FSDP would not bear the other
    main(int(sys.argv[1]), sys.argv[2])
