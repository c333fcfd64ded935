"""Cases of hidden states and a head: their data, the float64 truth about them, and the head's products alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.baselines import Outcome
from benchmarks.cases import Case, Inputs, around, row_chunks
from benchmarks.oracle import FP32_TOLERANCE, Verdict, demand, largest, loss_and_slopes
from reference import token_logprobs

SPREAD = 3.0  # standard deviation of the logits
# Of a gradient's norm; of a row's, where in half precision the logit of a token may round to its neighbour, which
# moves the row's own factor; and, absolute, of the loss.
WHOLE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-7}
ROW = {torch.float32: 2e-3, torch.bfloat16: 0.2}
LOSS = {torch.float32: FP32_TOLERANCE, torch.bfloat16: 2e-3}


def make_linear_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Hidden states and a head whose tokens are drawn from what they predict; ratios as `cases.around` has them."""
    generator = torch.Generator(device).manual_seed(seed)
    like = {"device": device, "dtype": case.dtype, "generator": generator}
    hidden = torch.randn(case.batch, case.length, case.hidden, **like)
    weight = torch.randn(case.vocab, case.hidden, **like).mul_(SPREAD / math.sqrt(case.hidden))
    ids = torch.zeros(case.batch, case.length, dtype=torch.long, device=device)
    lp = torch.zeros(case.batch, case.length, device=device)
    for b, start, stop in row_chunks(case):
        logits = (hidden[b, start:stop] @ weight.T).float()
        noise = torch.empty_like(logits).exponential_(generator=generator)
        ids[b, start:stop] = (torch.softmax(logits, -1) / noise).argmax(-1)
        chunk = logits.double()[None]
        lp[b, start:stop] = token_logprobs(chunk, ids[b : b + 1, start:stop]).logps[0]
    return around(case, ids, lp, generator, hidden=hidden, weight=weight)


class LinearOracle:
    """The float64 truth: loss, and gradients of hidden states and weight.

    Logits are rounded to the dtype, as every head rounds them; nothing else is.
    """

    slack = 1.0  # times `WHOLE`

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.loss = torch.zeros((), dtype=torch.float64, device=inputs.hidden.device)
        self.scale = torch.ones_like(self.loss)  # of what the loss is the sum of
        self.d_hidden = torch.zeros_like(inputs.hidden, dtype=torch.float64)
        self.d_weight = torch.zeros_like(inputs.weight, dtype=torch.float64)
        self._find()

    def _find(self) -> None:
        inputs, hidden, weight = self.inputs, self.inputs.hidden.double(), self.inputs.weight.double()
        chunks = row_chunks(inputs.case)
        logps = torch.zeros_like(inputs.old_logps, dtype=torch.float64)
        for b, start, stop in chunks:
            logps[b, start:stop] = self._rows(hidden, weight, b, start, stop)[1][0].detach()
        self.loss, slopes = loss_and_slopes(inputs, logps)
        for b, start, stop in chunks:
            x, lp = self._rows(hidden, weight, b, start, stop)
            (dz,) = torch.autograd.grad(lp, x, slopes[b : b + 1, start:stop])
            self.d_hidden[b, start:stop] = dz[0] @ weight
            self.d_weight.addmm_(dz[0].T, hidden[b, start:stop])

    def _rows(self, hidden: Tensor, weight: Tensor, b: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Logits (1, rows, V) in float64, as a leaf, and log-probs (1, rows)."""
        x = (hidden[b, start:stop] @ weight.T).to(self.inputs.case.dtype).double()[None].requires_grad_()
        rows = slice(b, b + 1), slice(start, stop)
        return x, token_logprobs(x, self.inputs.completion_ids[rows], mask=self.inputs.mask[rows]).logps

    def check(self, mode: str, outcome: Outcome) -> Verdict:
        """The worst deviation.

        Raises:
            ValueError: a tensor is not there, or has the wrong shape.
        """
        dtype = self.inputs.case.dtype
        got = demand("loss", outcome.loss, torch.Size()).double()
        verdicts = [Verdict(((got - self.loss).abs() / (LOSS[dtype] * self.scale)).item(), "loss")]
        d_hidden, d_weight = outcome.grads or (None, None)
        idle = demand("d hidden", d_hidden, self.d_hidden.shape)[self.inputs.mask == 0]
        verdicts.append(Verdict(largest(idle.abs().double() / 1e-300), "d hidden of masked rows"))
        for name, x, want in (("d hidden", d_hidden, self.d_hidden), ("d weight", d_weight, self.d_weight)):
            error = (demand(name, x, want.shape).double() - want).norm(dim=-1)
            size = want.norm(dim=-1)
            usual = size.square().mean().sqrt().clamp(min=1e-300)
            off = (error.norm() / size.norm().clamp(min=1e-300)).item()
            verdicts.append(Verdict(off / (self.slack * WHOLE[dtype]), name))
            verdicts.append(Verdict(largest(error / (size + usual)) / ROW[dtype], f"a row of {name}"))
        return max(verdicts, key=lambda v: float("inf") if v.error != v.error else v.error)


class Products:
    """The three matrix products of a head alone, with everything allocated: what no implementation does without.

    Of a distillation the one that makes the teacher's logits, too.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.hidden, self.weight = inputs.hidden.flatten(0, 1), inputs.weight
        self.z = self.hidden.new_empty(self.hidden.shape[0], self.weight.shape[0])
        self.d_hidden, self.d_weight = torch.empty_like(self.hidden), torch.empty_like(self.weight)
        self.teacher = None
        if inputs.teacher_hidden is not None:
            self.teacher = inputs.teacher_hidden.flatten(0, 1), inputs.teacher_weight.T

    def __call__(self) -> None:
        if self.teacher is not None:
            torch.mm(*self.teacher, out=self.z)
        torch.mm(self.hidden, self.weight.T, out=self.z)
        torch.mm(self.z, self.weight, out=self.d_hidden)
        torch.mm(self.z.T, self.hidden, out=self.d_weight)
