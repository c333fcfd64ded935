"""What a user would run instead, besides writing it down in PyTorch: torch.compile, TRL's kernel, Liger-Kernel.

And quack's cross-entropy: another loss, by the nearest kernel that also writes the gradient in one launch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.baselines import (
    Implementation,
    Outcome,
    eager,
    eager_entropies,
    eager_logprobs,
    logps_of_logits,
    loss_of_logps,
    missing_module,
    our_entropies,
    our_logprobs,
    ours,
    ours_inplace,
)
from benchmarks.baselines_linear import (
    eager_linear,
    liger_linear,
    liger_linear_missing,
    ours_linear,
    trl_linear,
    trl_linear_missing,
)
from benchmarks.cases import EPSILON, OBJECTIVES, Case, Inputs
from benchmarks.distillation import IMPLEMENTATIONS as DISTILLATION
from benchmarks.distillation import OBJECTIVE

COMPILE_WHEN = ("none", "auto", "all")
NOT_COMPILED = "not measured; --compile auto"


# --- torch.compile of the eager loss --------------------------------------------------------------------


class Compiled:
    """The eager loss, compiled for one case at a time with static shapes, which is its fastest.

    Every new case is compiled anew, which takes longer than measuring it: so none is unless asked for.

    Args:
        when: "none"; "auto": cases that are marked, on a GPU; "all" cases on every device.
    """

    def __init__(self, when: str = "none") -> None:
        self.when = when
        self.case: Case | None = None

    def loss(self, inputs: Inputs, logits: Tensor) -> Outcome:
        self._start(inputs.case)
        x = logits.detach().requires_grad_()
        loss = self._loss(inputs, x)
        return Outcome(loss.detach(), torch.autograd.grad(loss, x)[0])

    def logprobs(self, inputs: Inputs, logits: Tensor) -> Outcome:
        self._start(inputs.case)
        with torch.no_grad():
            return Outcome(logps=self._logprobs(logits, inputs.completion_ids))

    def _start(self, case: Case) -> None:
        if self.case != case:
            torch.compiler.reset()  # else the ninth shape would run uncompiled
            self._loss = torch.compile(_eager_loss, dynamic=False)
            self._logprobs = torch.compile(logps_of_logits, dynamic=False)
            self.case = case

    def missing(self, case: Case, device: torch.device) -> str | None:
        if self.when == "none":
            return NOT_COMPILED
        if self.when == "auto" and device.type != "cuda":
            return "timed on a GPU only; --compile all"
        if self.when == "auto" and not case.compiled:
            return "compiles anew for every shape; --compile all"
        return missing_compiler(device)


def _eager_loss(inputs: Inputs, x: Tensor) -> Tensor:
    return loss_of_logps(inputs, logps_of_logits(x, inputs.completion_ids))


def missing_compiler(device: torch.device) -> str | None:
    """Generated C++ is compiled with a C++ compiler, and Triton compiles its launchers with a C compiler."""
    variable, names = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++", "clang++", "c++"))
    if not any(shutil.which(name) for name in (os.environ.get(variable), *names) if name):
        return f"no compiler found: neither ${variable} nor {', '.join(names)}"
    return None


# --- TRL ------------------------------------------------------------------------------------------------


def trl(inputs: Inputs, logits: Tensor) -> Outcome:
    x = logits.detach().requires_grad_()
    loss = loss_of_logps(inputs, _trl_logps(inputs, x))
    return Outcome(loss.detach(), torch.autograd.grad(loss, x)[0])


def trl_logprobs(inputs: Inputs, logits: Tensor) -> Outcome:
    with torch.no_grad():
        return Outcome(logps=_trl_logps(inputs, logits))


def trl_entropies(inputs: Inputs, logits: Tensor) -> Outcome:
    with torch.no_grad():
        logps, entropies = _trl_kernel(inputs, logits)
        return Outcome(logps=logps, entropies=entropies)


def _trl_logps(inputs: Inputs, x: Tensor) -> Tensor:
    return _trl_kernel(inputs, x)[0]


def _trl_kernel(inputs: Inputs, x: Tensor) -> tuple[Tensor, Tensor]:
    """Over all T+1 positions, the last one masked: slicing it off, as TRL does, costs one more copy."""
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    ids = torch.nn.functional.pad(inputs.completion_ids, (0, 1))
    mask = torch.nn.functional.pad(inputs.mask, (0, 1))
    logps, entropies = selective_log_softmax_and_entropy(x, ids, temperature=1.0, row_mask=mask)
    return logps[:, :-1], entropies[:, :-1]


def trl_missing(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    return missing_module("trl.kernels.logprob_entropy", "'trl>=1.16'")


# --- Liger-Kernel ---------------------------------------------------------------------------------------


def liger(inputs: Inputs, logits: Tensor) -> Outcome:
    return _liger(inputs, logits, inplace=False)


def liger_inplace(inputs: Inputs, logits: Tensor) -> Outcome:
    return _liger(inputs, logits, inplace=True)


def _liger(inputs: Inputs, logits: Tensor, inplace: bool) -> Outcome:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    x = logits.detach().requires_grad_()
    loss, _ = triton_grpo_loss(
        x,
        inputs.old_logps,
        inputs.ref_logps,
        inputs.completion_ids,
        inputs.advantages,
        inputs.mask,
        temperature=1.0,
        beta=inputs.case.beta,
        eps_low=EPSILON,
        eps_high=EPSILON,
        inplace=inplace,
        loss_type="grpo",
        importance_sampling_level=inputs.case.objective,
        reduce=True,
    )
    return Outcome(loss.detach(), torch.autograd.grad(loss, x)[0])


def liger_logprobs(inputs: Inputs, logits: Tensor) -> Outcome:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    ids, mask = inputs.completion_ids, inputs.mask
    return Outcome(logps=fused_selective_log_softmax(logits, ids, temperature=1.0, mask=mask))


def liger_missing(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    return missing_module("liger_kernel.transformers.grpo_loss", "'liger-kernel>=0.8'")


# --- quack ------------------------------------------------------------------------------------------------


def quack(inputs: Inputs, logits: Tensor) -> Outcome:
    return _quack(inputs, logits, inplace=False)


def quack_inplace(inputs: Inputs, logits: Tensor) -> Outcome:
    return _quack(inputs, logits, inplace=True)


def _quack(inputs: Inputs, logits: Tensor, inplace: bool) -> Outcome:
    """Cross-entropy and its gradient from one launch; what is ignored has the label -100."""
    from quack.cross_entropy import cross_entropy_fwd

    labels = torch.nn.functional.pad(inputs.completion_ids.masked_fill(inputs.mask == 0, -100), (0, 1), value=-100)
    rows = logits.flatten(0, 1)
    losses, grad = cross_entropy_fwd(rows, labels.flatten(), return_dx=True, inplace_backward=inplace)
    return Outcome(losses.sum(), grad.view_as(logits))


def quack_missing(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    return missing_module("quack.cross_entropy", "quack-kernels")


# --- all of them ----------------------------------------------------------------------------------------


OURS = Implementation(
    "grpo_kernels",
    {
        "loss": ours,
        "inplace": ours_inplace,
        "logprobs": our_logprobs,
        "entropies": our_entropies,
        "linear": ours_linear,
    },
)
EAGER = Implementation(
    "eager PyTorch",
    {"loss": eager, "logprobs": eager_logprobs, "entropies": eager_entropies, "linear": eager_linear},
    objectives=tuple(name for name in OBJECTIVES if name != OBJECTIVE),
)


def implementations(compile_when: str = "none") -> tuple[Implementation, ...]:
    """In the order of the report.

    Args:
        compile_when: see `Compiled`.
    """
    compiled = Compiled(compile_when)

    def liger_head_missing(case: Case, device: torch.device) -> str | None:
        """On a GPU it goes through torch.compile."""
        if device.type == "cuda" and compile_when == "none":
            return NOT_COMPILED
        return liger_linear_missing(case, device)

    return (
        OURS,
        EAGER,
        Implementation(
            "torch.compile",
            {"loss": compiled.loss, "logprobs": compiled.logprobs},
            missing=compiled.missing,
            compiles=("loss", "logprobs"),
        ),
        Implementation(
            "TRL kernel",
            {"loss": trl, "logprobs": trl_logprobs, "entropies": trl_entropies, "linear": trl_linear},
            missing=trl_missing,
            missing_linear=trl_linear_missing,
        ),
        Implementation(
            "Liger-Kernel",
            {"loss": liger, "inplace": liger_inplace, "logprobs": liger_logprobs, "linear": liger_linear},
            missing=liger_missing,
            missing_linear=liger_head_missing,
            compiles=("linear",),
        ),
        Implementation(
            "quack",
            {"loss": quack, "inplace": quack_inplace},
            missing=quack_missing,
            objectives=("cross-entropy",),
        ),
        *DISTILLATION,
    )


def apart(who: Sequence[Implementation]) -> tuple[list[Implementation], list[Implementation]]:
    """(what does not go through torch.compile, what does): each implementation with those of its modes."""
    parts = []
    for compiles in (False, True):
        calls = [{m: call for m, call in each.calls.items() if (m in each.compiles) == compiles} for each in who]
        parts.append([replace(each, calls=those) for each, those in zip(who, calls) if those])
    return tuple(parts)
