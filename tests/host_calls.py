"""How test_hosts.py and test_hosts_others.py load a recipe behind a fake of its host, and compare it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

HOSTS = Path(__file__).resolve().parents[1] / "examples" / "hosts"
V = 29
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # fp32: sums over a vocabulary of 29 and some twenty tokens


def load(monkeypatch, name: str, **fakes: dict):
    """The recipe, imported by path as its host imports it, with the host's modules faked: dots as two underlines."""
    for path, members in fakes.items():
        parts = path.split("__")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if end == len(parts):
                monkeypatch.setitem(sys.modules, module, ModuleType(module))
                vars(sys.modules[module]).update(members)
            elif module not in sys.modules:
                monkeypatch.setitem(sys.modules, module, ModuleType(module))
    spec = importlib.util.spec_from_file_location(f"fused_{name}", HOSTS / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, recipe)  # dataclasses look their module up
    spec.loader.exec_module(recipe)
    return recipe


def compare(run, maths, leaf):
    """run(x) and maths(x) -> (loss, metrics): loss, gradient in x, and every metric of the host's maths."""
    exact = leaf.detach().double().requires_grad_()
    loss, log = run(leaf)
    want, wanted = maths(exact)
    torch.testing.assert_close(loss.detach().double(), want.detach(), **CLOSE)
    assert loss.dim() == 0 and leaf.grad is None
    loss.backward()
    want.backward()
    assert want.grad_fn is not None and exact.grad.abs().max() > 0
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-5 * exact.grad.abs().max().item())
    assert log.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(torch.as_tensor(log[name]).double(), value.detach().double(), **CLOSE,
                                   msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip


def noisy(x: torch.Tensor, g: torch.Generator, size=0.3) -> torch.Tensor:
    """Log-probabilities of a policy nearby: ratios on both sides of the clip range."""
    return x + size * torch.randn(x.shape, generator=g)


def record(monkeypatch, recipe) -> list[tuple[str, object]]:
    """(function, ``vocab_group``) of each call that the recipe makes with logits; the functions get no group."""
    calls = []

    def recorded(name, function):
        def call(*args, **kwargs):
            calls.append((name, kwargs.pop("vocab_group", None)))
            return function(*args, **kwargs)

        return call

    for name in ("fused_grpo_loss", "token_logprobs"):
        if hasattr(recipe, name):
            monkeypatch.setattr(recipe, name, recorded(name, getattr(recipe, name)))
    return calls
