"""How test_hosts.py and test_hosts_others.py load a recipe behind a fake of its host, and compare it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from tolerance import assert_within, bounds_of, written

HOSTS = Path(__file__).resolve().parents[2] / "examples" / "hosts"
V = 29


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

    def evaluate(x):
        loss, log = maths(x)
        values = {name: torch.as_tensor(value).detach().double() for name, value in log.items()}
        return {" loss": loss.detach(), " grad": torch.autograd.grad(loss, x)[0], **values}

    allowed = bounds_of(evaluate, {"x": leaf})
    assert_within(loss, want, allowed[" loss"], "loss")
    assert loss.dim() == 0 and leaf.grad is None
    loss.backward()
    want.backward()
    assert want.grad_fn is not None and exact.grad.abs().max() > 0
    assert_within(leaf.grad, exact.grad, allowed[" grad"] + written(exact.grad, leaf.dtype), "gradient")
    assert log.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_within(torch.as_tensor(log[name]), value, allowed[name], name)


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
