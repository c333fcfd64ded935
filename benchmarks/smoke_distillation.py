"""The cases of distillation in `benchmarks.smoke`: two models' data, the call, the float64 truth and its tolerance."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

import reference
from benchmarks.smoke_job import SUMS, Job, Truth
from grpo_kernels import TopK, distillation_loss, fused_linear_distillation_loss
from reference.distillation import outcomes_of

FARTHEST = 100.0  # log p of what is as good as impossible
OF_BOTH, OF_HEAD = ("chunk_bytes", "logits_dtype"), ("softcap", "logit_scale")


class DistillationJob(Job):
    """A student and a teacher that has moved away from it; of a TopK the last token is absent."""

    def _fill(self, sequences: int) -> None:
        case = self.case
        if case.head:
            self.head, self.z = self._made_head()
            self.teacher_head, self.u = self._made_head()
        else:
            self.z = self._logits()
            self.u = self._moved()
        self.ids = self.mask.long()  # nobody's
        self.given = self._spoilt()
        self.few = self._few() if case.top else None
        u = self.u.clone()
        u[~self.mask] = math.nan
        self.teacher = self.few or u

    def _moved(self) -> Tensor:
        """The teacher's logits; where half of the vocabulary is banned, half of that half and of the other are."""
        noise = self._normal(*self.z.shape)
        u = torch.where(self.z == -math.inf, 2 * noise, self.z.float() + noise)
        if self.case.spoil == "inf":
            u[..., self.V // 4 : 3 * self.V // 4] = -math.inf
        return u.to(self.case.told or self.case.dtype)

    def _few(self) -> TopK:
        heat = self._tempered(torch.ones_like(self.z[..., :1]).double())
        logps, ids = torch.log_softmax((self._scores(self.u.double()) * heat), -1).topk(self.case.top)
        ids[..., -1] = -1
        return TopK(ids, logps.float())

    def _tempered(self, x: Tensor) -> Tensor:
        """x over the temperature of each token."""
        heat = torch.as_tensor(self.temperature, device=self.device).double()
        heat = heat[:, None] if heat.dim() == 1 and not self.case.packed else heat
        return x / (heat[..., None] if heat.dim() else heat)

    # --- the call -------------------------------------------------------------------------------

    def _options(self) -> dict:
        options = {name: value for name, value in self.case.options.items() if name not in OF_BOTH + OF_HEAD}
        return {**options, "temperature": self.temperature, "completion_mask": self.mask, "cu_seqlens": self.cu}

    def _called(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        case, options = self.case, {**self._options(), "backend": "triton"}
        if case.head:
            options |= {name: case.options[name] for name in OF_BOTH + OF_HEAD if name in case.options}
            told = (self.few,)
            if self.few is None:
                told = (self.teacher_head["hidden"], self.teacher_head["weight"])
                options |= {f"teacher_{name}": case.options[name] for name in OF_HEAD if name in case.options}
                options["teacher_bias"] = self.teacher_head.get("bias")
            bias = leaves.get("bias")
            out = fused_linear_distillation_loss(leaves["hidden"], leaves["weight"], *told, bias=bias, **options)
        else:
            function = _compiled() if case.how == "compile" else distillation_loss
            out = function(leaves["logits"], self.teacher, **options)
        results = {"loss": out.loss, "entropy": out.entropy}
        results |= {f"metric {name}": value for name, value in out.metrics.items()}
        return self._with_gradients(results, leaves, out.loss, torch.full_like(out.loss, case.upstream))

    # --- the truth ------------------------------------------------------------------------------

    def truth(self) -> Truth:
        case = self.case
        z = torch.where(self.mask[..., None], self.z.double(), 0).requires_grad_()
        u = self._scores(torch.where(self.mask[..., None], self.u.double(), 0))
        teacher = u if self.few is None else reference.TopK(self.few.token_ids, self.few.logps.double())
        options = {name: value for name, value in self._options().items() if name != "inplace"}
        if isinstance(self.temperature, Tensor):
            options["temperature"] = self.temperature.double()
        out = reference.distillation_loss(self._scores(z), teacher, **options)
        (grad,) = torch.autograd.grad(out.loss.sum() * case.upstream, z)
        value, bound = self._row_bounds(z.detach(), teacher)
        w = out.weights if case.options.get("reduction", "mean") == "mean" else torch.ones_like(out.weights)
        entropy = SUMS * (1 + out.entropy) + value
        found: Truth = {"entropy": (out.entropy, entropy)}
        D = out.divergence
        allowed = value + SUMS * D.abs() + 1e-30
        found["loss"] = out.loss.detach(), allowed if out.loss.dim() else (w.abs() * allowed).sum()
        for name, mean in out.metrics.items():
            found[f"metric {name}"] = mean, SUMS * (1 + mean.abs()) + value.sum() / self.mask.sum()
        scale = case.options.get("logit_scale", 1.0) * case.upstream
        bound = self._tempered(bound * (w.abs() * scale)[..., None])
        bound = self._rounded(grad, bound)
        if case.head:
            return found | self._of_head(grad, bound)
        return found | {"gradient of logits": self._of_logits(grad, bound)}

    def _row_bounds(self, z: Tensor, teacher: Tensor | reference.TopK) -> tuple[Tensor, Tensor]:
        """What may be wrong of each row's divergence, and of its derivative by each tempered logit.

        Probabilities are right to a share of `SUMS`, and what K tokens leave to a share of that over what is left. An
        outcome's p·(log p − log q) is off by the share of each factor.
        """
        x, mask = self._tempered(self._scores(z)), self._rows(self.mask)
        of_rows = (lambda y: y[None]) if self.case.packed else (lambda y: y)
        told = reference.TopK(*map(of_rows, teacher)) if self.few else of_rows(teacher)
        heat = 1.0 / self._tempered(torch.ones_like(z[..., :1]))
        tail = self.case.options.get("tail", True)
        found = outcomes_of(of_rows(x), told, of_rows(heat), tail, mask)
        P, Q = found.log_p.exp(), found.log_q.exp()
        size = 1 + sum(torch.where(y.exp() > 0, -y, FARTHEST).clamp(0, FARTHEST) for y in found[:2])
        share = torch.full_like(P, SUMS)
        rest = bool(self.few) and tail is True
        if rest:
            share[..., -1] += SUMS / torch.minimum(P, Q)[..., -1]
        error = (P + Q) * (2 * share) * size
        row = error.sum(-1, keepdim=True)
        entries = error + 2 * P * (share / SUMS) * row
        if self.few:
            p = torch.softmax(of_rows(x), -1)
            others = {True: entries[..., -1:] / P[..., -1:], None: 2 * row, False: 0 * row}[tail]
            ids = self._rows(self.few.token_ids)
            here = ids >= 0
            entries = torch.where(here, entries[..., : ids.shape[-1]], 0)
            whole = p * others
            spread = torch.zeros_like(whole).scatter_add_(-1, ids.clamp(min=0), entries)
            entries = torch.where(spread > 0, spread, whole)
        value, entries = torch.where(mask, row[..., 0], 0), torch.where(mask[..., None], entries, 0)
        return (value[0], entries[0]) if self.case.packed else (value, entries)


@functools.cache
def _compiled() -> Callable:
    return torch.compile(distillation_loss, fullgraph=True)
