"""What the tests of distillation share: pairs of models, our answer and the reference's, and how close it must come."""

import contextlib
import dataclasses

import torch
from torch import Tensor

import reference
from cases import DEVICE, on_device
from grpo_kernels import TopK, distillation_loss
from reference import distillation as stated
from reference.packed import layout_of
from tolerance import U, assert_within, bounds_of, row_size, steps, written

BETAS = (0.0, 0.3, 1.0)
TAILS = {"rest": True, "few": False, "raw": None}  # of a TopK
TEACHERS = ("whole", *TAILS)
METRICS = ("divergence", "entropy", "teacher_entropy")


@dataclasses.dataclass
class Pair:
    """A student's logits and a teacher, on the CPU."""

    logits: Tensor  # (B, T, V) or (B, T+1, V); packed (N, V)
    teacher: Tensor | TopK
    mask: Tensor
    kwargs: dict


def make_pair(teacher="whole", B=3, T=4, V=131, K=6, *, dtype=torch.float32, extra=0, seed=0, spread=1.5,
              temperature=1.0, **kwargs) -> Pair:  # fmt: skip
    """Two models that differ; one token is masked, one sequence too; a TopK has absent tokens and one empty row."""
    g = torch.Generator().manual_seed(seed)
    x, z = ((spread * torch.randn(B, T + extra, V, generator=g)).to(dtype) for _ in range(2))
    mask = torch.rand(B, T, generator=g) < 0.8
    mask[0], mask[B - 2] = True, B < 3
    kwargs = {"temperature": temperature, "completion_mask": mask, **kwargs}
    if teacher == "whole":
        return Pair(x, z, mask, kwargs)
    heat = temperature if not isinstance(temperature, Tensor) or temperature.dim() == 0 else temperature[..., None]
    heat = heat[:, None] if isinstance(heat, Tensor) and heat.dim() == 2 else heat
    logps, ids = torch.log_softmax(z[:, :T].float() / heat, -1).topk(K)
    order = torch.rand(ids.shape, generator=g).argsort(-1)
    logps, ids = logps.gather(-1, order), ids.gather(-1, order)
    ids[0, 0, 1], logps[0, -1, 0] = -1, -torch.inf
    if T > 2:
        ids[0, 2] = -100
    return Pair(x, TopK(ids, logps), mask, {**kwargs, "tail": TAILS[teacher]})


def ours(pair: Pair, backend: str, *, upstream=None, **changes):
    """(LossOutput, gradient of the logits on the CPU), from a non-leaf so that inplace may be asked for."""
    leaf = pair.logits.detach().to(DEVICE).clone().requires_grad_()
    grads = []
    x = leaf * 1
    x.register_hook(grads.append)
    teacher = pair.teacher
    teacher = TopK(*(y.to(DEVICE) for y in teacher)) if isinstance(teacher, TopK) else teacher.to(DEVICE)
    out = distillation_loss(x, teacher, backend=backend, **on_device({**pair.kwargs, **changes}))
    up = torch.ones_like(out.loss) if upstream is None else torch.as_tensor(upstream, dtype=torch.float32).to(DEVICE)
    torch.autograd.backward(out.loss, up.expand_as(out.loss))
    return out, grads[0].cpu()


@contextlib.contextmanager
def rest_off_by(*errors: Tensor):
    """What K tokens have together is off by these, in the order in which the reference asks: student, teacher."""
    saved, todo = stated.rest, list(errors)

    def rest(logps):
        together = logps.logsumexp(-1, keepdim=True) + todo.pop(0)
        return torch.log(-torch.expm1(together.clamp(max=stated.TAIL_CLAMP)))

    stated.rest = rest
    try:
        yield
    finally:
        stated.rest = saved


def wanted(pair: Pair, *, upstream=None, dtype=None, roundings=1, errors=None, **changes) -> tuple[dict, dict]:
    """(what float64 says, how far one of ours may be off), by name: loss, grad, entropy; "mean " and a metric.

    Both models' logits are moved by the error of a row's statistics, a teacher's log-probabilities by that of their
    exponentials, and what K tokens have together by both: 1 − Σ p loses what is small.
    """
    kwargs = {**pair.kwargs, **changes}
    kwargs = {k: v for k, v in kwargs.items() if k not in ("inplace", "backend")}
    kwargs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    few = isinstance(pair.teacher, TopK)
    up = 1.0 if upstream is None else torch.as_tensor(upstream, dtype=torch.float64)

    def evaluate(x, told, p=None, q=None):
        teacher = reference.TopK(pair.teacher.token_ids, told) if few else told
        if p is not None and "cu_seqlens" in kwargs:
            p, q = map(layout_of(kwargs["cu_seqlens"], x.shape[0]).pad, (p, q))
        with rest_off_by(p, q) if few and kwargs.get("tail", True) else contextlib.nullcontext():
            out = reference.distillation_loss(x, teacher, **kwargs)
        (grad,) = torch.autograd.grad((out.loss * up).sum(), x)
        w = out.weights if kwargs.get("reduction", "mean") == "mean" else torch.ones_like(out.weights)
        return {"loss": out.loss.detach(), "grad": grad, "entropy": out.entropy, "w": (w * up).abs()} | {
            f"mean {name}": value for name, value in out.metrics.items()
        }

    inputs = {"x": pair.logits, "told": pair.teacher.logps if few else pair.teacher}
    inputs = {name: value.detach().double() for name, value in inputs.items()}
    heat = float(torch.as_tensor(kwargs.get("temperature", 1.0)).min())
    sizes = {name: heat * row_size(value / heat) + 0 * value.nan_to_num(0, 0, 0) for name, value in inputs.items()}
    for name, error in (errors or {}).items():
        sizes[name] = sizes[name] + error
    if few:
        logps = inputs["told"].nan_to_num(0, 0, 0)
        sizes["told"] = U * (4 * logps.abs() + 8)
        inputs |= {name: torch.zeros_like(logps[..., :1]) for name in "pq"}
        rows = inputs["x"][:, : logps.shape[1]] if logps.dim() == 3 else inputs["x"]
        lost = U * (8 + steps(logps.shape[-1]) + 4 * logps.abs().amax(-1, keepdim=True))
        sizes |= {"p": row_size(rows / heat) + lost, "q": lost}
    exact = evaluate(**{name: value.clone().requires_grad_() for name, value in inputs.items()})
    allowed = bounds_of(evaluate, inputs, sizes)
    allowed["grad"] += lost_of_terms(pair, inputs["x"], exact.pop("w"), kwargs)
    allowed["grad"] += written(exact["grad"], dtype or pair.logits.dtype, roundings)
    return exact, allowed


def lost_of_terms(pair: Pair, x: Tensor, w: Tensor, kwargs: dict) -> Tensor:
    """What p·(log p − log m − KL) loses where its logarithms cancel; of m it is known that log m ≥ log p + log(1−β).

    w (B, T) is the size of ∂L/∂D.
    """
    heat = torch.as_tensor(kwargs.get("temperature", 1.0), dtype=torch.float64)
    heat = heat[(..., *(None,) * (x.dim() - heat.dim()))] if heat.dim() else heat
    out = torch.zeros_like(x)
    rows = x[:, : w.shape[1]] if x.dim() == 3 else x
    logp = torch.log_softmax(rows / heat, -1)
    if isinstance(pair.teacher, TopK) and kwargs.get("tail", True) is False:
        ids = pair.teacher.token_ids.long().clamp(0, x.shape[-1] - 1)
        logp = (logp - logp.gather(-1, ids).logsumexp(-1, keepdim=True)).clamp(max=0.0)
    logp = logp.nan_to_num(0, 0, -745.0).clamp(min=-745.0)
    lost = w[..., None] * logp.exp() * 8 * U * (logp.abs() + 1) / heat
    (out[:, : w.shape[1]] if x.dim() == 3 else out)[...] = lost
    return out


def check(pair, backend, *, upstream=None, roundings=1, **changes):
    """Ours within what rounding explains of the reference."""
    out, grad = ours(pair, backend, upstream=upstream, **changes)
    exact, allowed = wanted(pair, upstream=upstream, roundings=roundings, **changes)
    assert_within(out.loss, exact["loss"], allowed["loss"], "loss")
    assert_within(grad, exact["grad"], allowed["grad"], "gradient")
    assert_within(out.entropy, exact["entropy"], allowed["entropy"], "entropy")
    assert out.logps is None and tuple(out.metrics) == METRICS
    for name in METRICS:
        assert_within(out.metrics[name], exact[f"mean {name}"], allowed[f"mean {name}"], name)
    return out, grad


def pair_of(x, z):
    """One row."""
    pair = make_pair(B=1, T=1, completion_mask=None)
    pair.logits, pair.teacher = torch.tensor([[x]]), torch.tensor([[z]])
    return pair
