"""How often Triton would compile each kernel, counted without a GPU. Run by test_recompilation.py.

    python tests/fake_driver.py        prints a JSON list, one entry per kernel and call structure

Triton's own launcher binds the arguments of every launch, derives the specialisation and asks its
cache hook, which notes the key and declines: nothing is compiled or run. Every key is a compilation.
"""

import json
from collections import defaultdict

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from counting import bare_ops
from grpo_kernels import fused_grpo_loss, token_logprobs
from grpo_kernels.kernels import launch


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


def note(*, key, fn, **_) -> bool:
    name = fn.name.rsplit(".", 1)[-1]
    keys[name].add(str(key))
    launches[name] += 1
    return True  # declines: neither compiled nor launched


def tensor(shape, dtype=torch.float32, *, kind="whole"):
    """Zeros; or a slice that starts off any alignment, or every second column, or strides above 2³¹."""
    if kind == "offset":
        return torch.zeros(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., 3:]
    if kind == "gaps":
        return torch.zeros(*shape, 2, dtype=dtype)[..., 1]
    if kind == "huge":
        far = [2**33 >> place for place in range(len(shape))]
        return torch.empty_strided(shape, far, dtype=dtype, device="meta")
    return torch.zeros(shape, dtype=dtype)


# What a kernel may be compiled for anew: which inputs there are, dtypes, the path. Not their values.
STRUCTURES = {
    "lean": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "none": {"reduction": "none"},
    "no grad": {"grad": False},
    "skip": {"skip_zero_advantage": True},
    "rewards": {"rewards": True, "mask": True},
    "full": {"mask": True, "token": True, "tensors": True, "loss_type": "dapo", "beta": 0.1, "entropy_coef": 0.1},
    "full, fp16": {"dtype": torch.float16, "mask": True, "token": True, "tensors": True, "beta": 0.1, "entropy_coef": 0.1},
}  # fmt: skip

# And what no kernel may be compiled for anew.
VALUES = [
    {},
    *({"B": B} for B in (1, 2, 16, 17, 48)),
    *({"T": T} for T in (1, 2, 15, 16, 17, 32, 4096)),
    {"B": 1, "T": 1},
    *({"temperature": t} for t in (1, 2, 0.7)),
    *({"epsilon": e} for e in (0, 1, 0.1)),
    *({"epsilon_high": e, "delta": d} for e, d in ((1, 2), (0.3, 1.5))),
    *({"beta": b} for b in (1, 16, 0.04)),
    *({"entropy_coef": c} for c in (1, 0.001)),
    *({"G": G} for G in (2, 3, 16)),
    *({"advantage_eps": e} for e in (0, 1, 1e-6)),
    *({"max_completion_length": n} for n in (1, 16, 1000)),
    *({"number": n} for n in (1, 16, 0.5)),
    *({"kind": kind} for kind in ("offset", "gaps", "huge")),
    {"extra": 1},
    {"extra": 1, "T": 1},
]


def call(structure: dict, value: dict, V: int) -> None:
    """One forward and backward, with the value laid over what the structure has of it."""
    s = {**structure, **{k: v for k, v in value.items() if k not in ("beta", "entropy_coef") or k in structure}}
    G = s.pop("G", 4)
    B, T, extra, kind = s.pop("B", G * 2), s.pop("T", 7), s.pop("extra", 0), s.pop("kind", "whole")
    if s.pop("rewards", False):
        B = B if B % G == 0 else G * B
        inputs = {"rewards": tensor((B,), kind=kind), "num_generations": G}
    else:
        inputs = {"advantages": tensor((B,), kind=kind)}
    if s.pop("mask", False):
        inputs["completion_mask"] = tensor((B, T), kind=kind)
    if s.pop("token", False):
        for name in ("old_logps", "ref_logps", "importance_weights"):
            inputs[name] = tensor((B, T), kind=kind)
    number = s.pop("number", 0.25)
    if s.pop("tensors", False):
        device = "meta" if kind == "huge" else "cpu"
        inputs |= {"loss_scale": torch.tensor(number, device=device), "num_items_in_batch": torch.tensor(3.0, device=device)}
    else:
        inputs["loss_scale"] = number
    x = tensor((B, T + extra, V), s.pop("dtype", torch.float32))
    if kind == "huge":
        x = torch.empty_strided(x.shape, (2**40, 2**32, 1), dtype=x.dtype, device="meta")
    x = x.requires_grad_(s.pop("grad", True)) * 1
    ids = tensor((B, T), torch.int64, kind=kind)
    out = fused_grpo_loss(x, ids, backend="triton", **inputs, **s)
    logps = token_logprobs(x, ids, backend="triton", temperature=s.get("temperature", 1.0))
    if x.requires_grad:
        (out.loss.sum() + logps.logps.sum()).backward()


def count(V: int) -> list[dict]:
    found = []
    for name, structure in STRUCTURES.items():
        keys.clear()
        launches.clear()
        for value in VALUES:
            call(structure, value, V)
        found += [
            {"V": V, "structure": name, "kernel": kernel, "launches": launches[kernel], "keys": sorted(keys[kernel])}
            for kernel in keys
        ]
    return found


@triton.jit
def specialised_kernel(x, n, beta, T: tl.constexpr):
    tl.store(x, n * beta)


def control() -> dict:
    """A kernel that specialises as Triton does by default, so that a count of 1 means something."""
    x = torch.zeros(40)
    counts = {}
    for what, runs in {
        "length as a constant": [(x, 7, 0.1, T) for T in (7, 8, 9)],
        "size 1, 16, 17": [(x, n, 0.1, 7) for n in (1, 16, 17)],
        "integer or float": [(x, 7, beta, 7) for beta in (0.1, 7)],
        "alignment": [(y, 7, 0.1, 7) for y in (x, x[1:])],
        "above 2³¹": [(x, n, 0.1, 7) for n in (7, 2**33 + 7)],
    }.items():
        keys.clear()
        for arguments in runs:
            specialised_kernel[(1,)](*arguments)
        counts[what] = len(keys["specialised_kernel"]) / len(runs)
    return counts


def main() -> None:
    triton.runtime.driver.set_active(FakeDriver())
    triton.knobs.runtime.jit_cache_hook = note
    launch.require_available = lambda device: None  # there is no GPU, and nothing will run
    with bare_ops():
        print(json.dumps({"control": control(), "counts": [each for V in (128, 50257) for each in count(V)]}))


if __name__ == "__main__":
    main()
