"""How often Triton would compile each kernel, counted without a GPU. Run by test_laws.py.

    python tests/triton_backend/fake_driver.py        prints JSON, one entry per kernel and call structure

Triton's own launcher binds the arguments of every launch and derives the key of its specialisation.
Where it would compile, the key is noted instead, and nothing runs. Every key is a compilation.
"""

import itertools
import json
import os
from collections import defaultdict
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from counting import bare_ops
from grpo_kernels import Support, fused_grpo_loss, token_logprobs
from grpo_kernels.triton_backend import launch, ways


class FakeDriver:
    """As much of a GPU's driver as binding the arguments of a launch takes."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


keys: dict[str, set] = defaultdict(set)
launches: dict[str, int] = defaultdict(int)


def note(kernel, key, *_) -> None:
    """In place of JITFunction._do_compile; what is not compiled is not launched."""
    name = kernel.fn.__name__
    keys[name].add(str(key))
    launches[name] += 1


def tensor(shape, dtype=torch.float32, *, device, kind="whole"):
    """Zeros; or a slice that starts off any alignment, or every second column, or strides above 2³¹."""
    if kind == "offset":
        return torch.zeros(*shape[:-1], shape[-1] + 3, dtype=dtype, device=device)[..., 3:]
    if kind == "gaps":
        return torch.zeros(*shape, 2, dtype=dtype, device=device)[..., 1]
    if kind == "huge":
        strides = [2**40 >> 4 * place for place in range(len(shape))]
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return torch.zeros(shape, dtype=dtype, device=device)


# What a kernel may be compiled for anew: which inputs there are, dtypes, the path. Not their values.
STRUCTURES = {
    "token_logprobs": {"logprobs": True},
    "lean": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "none": {"reduction": "none"},
    "no grad": {"grad": False},
    "skip": {"skip_zero_advantage": True},
    "rewards": {"rewards": True, "mask": True},
    "full": {"mask": True, "token": True, "tensors": True, "loss_type": "dapo", "beta": 0.1, "entropy_coef": 0.1},
    "gspo": {"loss_type": "gspo", "mask": True, "token": True},
    "gspo, none": {"loss_type": "gspo", "reduction": "none", "mask": True},
    "fipo": {"loss_type": "fipo", "mask": True, "token": True},
    "full, fp16": {"dtype": torch.float16, "mask": True, "token": True, "tensors": True, "beta": 0.1,
                   "entropy_coef": 0.1},
    "id lists": {"restricted": "lists", "mask": True, "entropy_coef": 0.1},
    "id lists, logprobs": {"restricted": "lists", "logprobs": True},
    "kept mask": {"restricted": "mask", "loss_type": "gspo"},
}  # fmt: skip
ON_CHIP = {name: {**STRUCTURES[name], "dtype": torch.bfloat16} for name in ("lean", "skip", "rewards", "full")}

# And what no kernel may be compiled for anew.
VALUES = [
    {},
    *({"B": B} for B in (1, 2, 16, 17, 48)),
    *({"T": T} for T in (1, 2, 15, 16, 17, 32)),
    {"B": 1, "T": 1},
    *({"temperature": t} for t in (1, 2, 0.7)),
    *({"epsilon": e} for e in (0, 1, 0.1)),
    *({"epsilon_high": e, "delta": d} for e, d in ((1, 2), (0.3, 1.5))),
    *({"fipo_decay_rate": x, "fipo_clip_range": x} for x in (1, 16, 0.3)),
    *({"beta": b} for b in (1, 16, 0.04)),
    *({"entropy_coef": c} for c in (1, 0.001)),
    *({"G": G} for G in (2, 3, 16)),
    *({"advantage_eps": e} for e in (0, 1, 1e-6)),
    *({"max_completion_length": n} for n in (1, 16, 1000)),
    *({"number": n} for n in (1, 16, 0.5)),
    *({"kind": kind} for kind in ("offset", "gaps", "huge")),
    *({"K": K} for K in (0, 1, 15, 16, 512)),
    {"extra": 1},
    {"extra": 1, "T": 1},
    *({"B": B, "T": T} for B in (1, 2, 3, 4, 5, 7, 8, 12, 16, 33) for T in (1, 2, 3, 5, 8, 11, 16, 31, 32, 63)),
]
SLICED = ("offset", "huge")  # logits whose gradient is laid out otherwise


def groups(V: int) -> list[tuple[str, list[dict]]]:
    """Rows of odd V start anywhere; where those of the gradient do otherwise, their accesses are others."""
    sliced = [value for value in VALUES if value.get("kind") in SLICED and V % 16]
    whole = [value for value in VALUES if value not in sliced]
    return [("whole", whole), ("sliced", sliced)] if sliced else [("whole", whole)]


def call(structure: dict, value: dict, V: int) -> None:
    """One forward and backward, with the value laid over what the structure has of it."""
    s = {**structure, **{k: v for k, v in value.items() if k not in ("beta", "entropy_coef") or k in structure}}
    G, T, extra, kind = s.pop("G", 4), s.pop("T", 7), s.pop("extra", 0), s.pop("kind", "whole")
    B = s.pop("B", 2 * G)
    device = "meta" if kind == "huge" or V > 1000 else "cpu"  # meta: tensors of any size without the memory
    like = {"device": device, "kind": kind}
    if s.pop("rewards", False):
        B = B if B % G == 0 else G * B
        inputs = {"rewards": tensor((B,), **like), "num_generations": G}
    else:
        inputs = {"advantages": tensor((B,), **like)}
    if s.pop("mask", False):
        inputs["completion_mask"] = tensor((B, T), **like)
    if s.pop("token", False):
        inputs |= {name: tensor((B, T), **like) for name in ("old_logps", "ref_logps", "importance_weights")}
    inputs["loss_scale"] = s.pop("number", 0.25)
    if s.pop("tensors", False):
        inputs |= {name: torch.zeros((), device=device) for name in ("loss_scale", "num_items_in_batch")}
    x = tensor((B, T + extra, V), s.pop("dtype", torch.float32), device=device)
    if kind == "huge":
        x = torch.empty_strided(x.shape, (2**40 + V, 2**32 + V, 1), dtype=x.dtype, device="meta")  # aligned as V is
    elif kind == "offset":  # a completion cut out of a longer sequence
        x = torch.cat([x, x], 1)[:, 1 : 1 + T + extra]
    x = x.requires_grad_(s.pop("grad", True))
    ids = tensor((B, T), torch.int64, **like)
    support, K = s.pop("restricted", None), s.pop("K", 5)
    if support == "lists":
        support = Support(tensor((B * T * K,), torch.int64, **like), tensor((B * T + 1,), torch.int64, **like))
    elif support == "mask":
        support = tensor((B, T, V), torch.bool, device=device)
    if s.pop("logprobs", False):
        loss = token_logprobs(x, ids, backend="triton", temperature=s.get("temperature", 1.0),
                              support=support).logps  # fmt: skip
    else:
        loss = fused_grpo_loss(x, ids, backend="triton", support=support, **inputs, **s).loss
    if x.requires_grad:
        torch.autograd.grad(loss, x, torch.full_like(loss, 0.5))


def count(V: int, structures: dict = STRUCTURES) -> list[dict]:
    found = []
    for (name, structure), (logits, values) in itertools.product(structures.items(), groups(V)):
        keys.clear()
        launches.clear()
        for value in values:
            call(structure, value, V)
        found += [
            {"V": V, "structure": name, "logits": logits, "kernel": kernel, "launches": launches[kernel],
             "keys": sorted(keys[kernel])}
            for kernel in keys
        ]  # fmt: skip
    return found


def count_on_chip() -> list[dict]:
    """The same of the on-chip kernel, which Gluon's launcher binds with Triton's."""
    os.environ[ways.VARIABLE] = "onchip"
    ways.device_obstacle = lambda logits: None
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    return [each for V in (32000, 151936) for each in count(V, ON_CHIP)]


@triton.jit
def specialised_kernel(x, n, beta, T: tl.constexpr):
    tl.store(x, n * beta)


def control() -> list[dict]:
    """A kernel that specialises as Triton does by default, so that a count of 1 means something."""
    x = torch.zeros(40)
    found = []
    for what, runs in {
        "length as a constant": [(x, 7, 0.1, T) for T in (7, 8)],
        "size 1": [(x, n, 0.1, 7) for n in (1, 7)],
        "size 16": [(x, n, 0.1, 7) for n in (16, 17)],
        "integer for a float": [(x, 7, beta, 7) for beta in (0.1, 7)],
        "alignment": [(y, 7, 0.1, 7) for y in (x, x[1:])],
        "above 2³¹": [(x, n, 0.1, 7) for n in (7, 2**33 + 7)],
    }.items():
        keys.clear()
        for arguments in runs:
            specialised_kernel[(1,)](*arguments)
        found.append({"what": what, "launches": len(runs), "keys": sorted(keys["specialised_kernel"])})
    return found


def main() -> None:
    triton.runtime.driver.set_active(FakeDriver())
    triton.runtime.JITFunction._do_compile = note
    launch.require_available = lambda device: None  # there is no GPU, and nothing will run
    with bare_ops():
        counts = [each for V in (128, 50257) for each in count(V)] + count_on_chip()
        print(json.dumps({"control": control(), "counts": counts}))


if __name__ == "__main__":
    main()
