"""A case of `benchmarks.smoke` on a device: its data, the call, and the float64 truth with what is tolerated of it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.smoke_cases import BF16, FP16, FP32, Case
from grpo_kernels import fused_grpo_loss, fused_linear_grpo_loss, linear_token_logprobs, policy_loss, token_logprobs
from grpo_kernels.call import ops as kernel_ops
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.plan import Plan
from grpo_kernels.triton_backend import ways
from reference import policy_loss as exact_policy_loss
from reference import token_logprobs as exact_token_logprobs

B, BOUNDS = 4, (0, 8, 9, 9, 16, 32)  # sequences; packed, one of them empty, with 8 tokens of each
H = 128  # of hidden states
# fp32 has 24 bits; sums over a row cost up to 8 of them: relative, of log-probs, of probabilities and of sums.
SUMS = 2.0**-16
TAIL = 1e-6  # of a row's factor: probabilities below it need not be right
ROUNDING = {FP32: 2.0**-23, BF16: 2.0**-8, FP16: 2.0**-11}  # on being written; the interpreter truncates
SUBNORMAL = {FP32: 0.0, BF16: 0.0, FP16: 2.0**-24}
OURS_ALONE = (
    "inplace", "skip_zero_advantage", "return_entropy", "chunk_bytes", "softcap", "logit_scale", "logits_dtype",
    "temperature",
)  # fmt: skip
NEEDS = {"beta": "ref_logps", "num_generations": "rewards", "sampling_correction": "sampling_logps",
         "off_policy_mask_threshold": "sampling_logps", "num_items_in_batch": "num_items_in_batch"}  # fmt: skip

Truth = dict[str, tuple[Tensor, Tensor]]  # name → (what is wanted, what is tolerated), float64


class Job:
    """A case with its data on a device: what to call, and what must come out."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device, self.V = case, device, case.V
        self.generator = torch.Generator(device).manual_seed(seed)
        self.T = case.tokens // (2 if self.interpreted else 1)
        self.shape = (B * self.T,) if case.packed else (B, self.T)
        self.cu = torch.tensor(BOUNDS, device=device) * self.T // 8 if case.packed else None
        sequences = len(BOUNDS) - 1 if case.packed else B
        mask = torch.rand(self.shape, device=device, generator=self.generator) < 0.8
        mask.view(-1)[::8] = True
        self.mask = mask if case.masked else torch.ones_like(mask)
        self.temperature: float | Tensor = case.options.get("temperature", 1.0)
        if isinstance(self.temperature, str):
            size = (sequences,) if self.temperature == "sequences" else self.shape
            self.temperature = self._uniform(*size, low=0.7, high=1.3)
        self.head: dict[str, Tensor] = {}
        self.more: dict = {}  # keywords of the call that the reference has no word for
        self._graph = None
        self._fill(sequences)

    # --- data -----------------------------------------------------------------------------------

    def _fill(self, sequences: int) -> None:
        """What the call is given."""
        case = self.case
        self.z = self._logits_of_head() if case.head else self._logits()
        near, _ = exact_token_logprobs(self._rows(self._scores(self.z.double())), self._rows(self.ids),
                                       self._rows(self.temperature), self._rows(self.mask))  # fmt: skip
        near = near.view(self.shape)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], device=self.device)[:sequences]
        advantages = signs * self._uniform(sequences, low=0.5, high=1.5)
        if case.options.get("skip_zero_advantage"):
            advantages[1] = 0.0
        old = (near + self._uniform(*self.shape, low=-0.5, high=0.5)).float()
        self.tensors = {
            "advantages": advantages,
            "old_logps": old,
            "ref_logps": (near + self._uniform(*self.shape, low=-0.5, high=0.5)).float(),
            "sampling_logps": (old + self._uniform(*self.shape, low=-0.3, high=0.3)),
            # A group's are far from equal: else its mean, rounded as they are, is off by much of what they differ by.
            "rewards": self._uniform(sequences, low=-0.5, high=0.5) + 2.0 * (signs < 0),
            "num_items_in_batch": torch.tensor(40.0, device=self.device),
        }
        self.g, self.h = (self._uniform(*self.shape, low=-1.0, high=1.0) for _ in range(2))
        self.ids = torch.where(self.mask, self.ids, -100)
        self.odd = 3 if bool(self.mask.view(-1)[3]) else 0  # the row that is NaN, or has no id
        self.given = self._spoilt()

    def _uniform(self, *size: int, low: float, high: float) -> Tensor:
        return torch.zeros(size, device=self.device).uniform_(low, high, generator=self.generator)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device, generator=self.generator)

    def _logits(self) -> Tensor:
        """Of a sharp model: targets of 5% to 88% probability, unless they are to be rare."""
        n, V = self.mask.numel(), self.V
        self.ids = torch.randint(V, self.shape, device=self.device, generator=self.generator)
        logits = self._normal(n, V).mul_(2)
        if self.case.spoil == "inf":
            logits[0::2, : V // 2] = -math.inf
            logits[1::2, V // 2 :] = -math.inf
        target = math.log(V) + 2 + self._uniform(n, 1, low=-3.0, high=2.0)
        if self.case.spoil == "rare":
            target[::3] = -200.0
        logits.scatter_(-1, self.ids.view(n, 1), target)
        return logits.to(self.case.dtype).view(*self.shape, V)

    def _logits_of_head(self) -> Tensor:
        self.head, z = self._made_head()
        noise = torch.empty(self.mask.numel(), self.V, device=self.device).exponential_(generator=self.generator)
        self.ids = (torch.softmax(self._scores(z.float()).view(noise.shape), -1) / noise).argmax(-1).view(self.shape)
        return z

    def _made_head(self) -> tuple[dict[str, Tensor], Tensor]:
        """Hidden states, weight and bias, and the logits that they give.

        Multiples of 1/32 whose sums fp32 holds: in whatever order, products are exact before their rounding.
        """
        dtype, n = self.case.dtype, self.mask.numel()
        head = {"hidden": (self._normal(*self.shape, H).mul_(2).round_() / 2).clamp_(-2, 2).to(dtype),
                "weight": (self._normal(self.V, H).mul_(4).round_() / 16).clamp_(-1, 1).to(dtype)}  # fmt: skip
        if self.case.bias:
            head["bias"] = (self._normal(self.V).mul_(4).round_() / 16).to(dtype)
        z = head["hidden"].double().view(n, H) @ head["weight"].double().T
        z = (z + head["bias"].double() if self.case.bias else z).to(self.case.options.get("logits_dtype", dtype))
        return head, z.view(*self.shape, self.V)

    def _spoilt(self) -> tuple[Tensor, Tensor]:
        """(logits, ids) as they are handed over; masked rows and the position that is not read hold NaN."""
        case, z, ids = self.case, self.z.clone(), self.ids.clone()
        z[~self.mask] = math.nan
        if case.spoil == "nan":
            z.view(-1, self.V)[self.odd, self.V // 3] = math.nan
        if case.spoil == "id":
            ids.view(-1)[self.odd] = self.V + 5
        if case.layout == "extra":
            z = torch.cat([z, torch.full_like(z[:, :1], math.nan)], 1)
        return z, ids

    def _scores(self, z: Tensor) -> Tensor:
        """What the head makes of its products."""
        scale, cap = self.case.options.get("logit_scale", 1.0), self.case.options.get("softcap")
        return z * scale if cap is None else cap * torch.tanh(z * scale / cap)

    def _rows(self, x: Tensor | float) -> Tensor | float:
        """Packed input as one sequence."""
        return x[None] if self.case.packed and isinstance(x, Tensor) else x

    def _inputs(self, ours: bool) -> dict:
        """Keywords of the objective."""
        options = {name: value for name, value in self.case.options.items() if ours or name not in OURS_ALONE}
        wanted = ["rewards" if "num_generations" in options else "advantages"] + ["old_logps"] * self.case.old
        wanted += [NEEDS[name] for name in options if name in NEEDS]
        options |= {name: self.tensors[name] if ours else self.tensors[name].double() for name in wanted}
        if ours and isinstance(self.temperature, Tensor):
            options["temperature"] = self.temperature
        options |= self.more if ours else {}
        return {**options, "completion_mask": self.mask, "cu_seqlens": self.cu}

    # --- the call -------------------------------------------------------------------------------

    def fresh(self) -> dict[str, Tensor]:
        """What a call starts from, and memory whose former content shows where nobody writes."""
        given = self.head or {"logits": self.given[0]}
        if self.case.kind == "policy":
            given = {"logits": torch.where(self.mask, self._exact()[0].detach(), math.nan).float()}
        leaves = {name: x.detach().clone().requires_grad_(self.case.backward) for name, x in given.items()}
        if self.case.options.get("inplace"):  # no leaf: a model's logits are none, and only those may be written over
            leaves = {name: x.clone() for name, x in leaves.items()}
        for x in given.values():
            torch.full_like(x, math.nan)
        return leaves

    def run(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Forward and backward, by name; ``leaves`` as `fresh` gives them."""
        if self.case.how == "graph":
            return self._replayed(leaves)
        return self._run(leaves)

    def _run(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        with _setting(self.case.rows):
            return self._called(leaves)

    def _called(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        case, (_, ids) = self.case, self.given
        if case.kind == "parts":
            return self._run_parts(leaves["logits"])
        if case.kind in ("logps", "head logps"):
            options = {**case.options, "temperature": self.temperature, "mask": self.mask, "backend": "triton"}
            options |= self.more
            function = linear_token_logprobs if case.head else token_logprobs
            out = function(**leaves, completion_ids=ids, **options)
            results, loss = {"logps": out.logps}, out.logps
            up = self.g
            if case.backward and out.entropy is not None:
                loss, up = (out.logps * self.g + out.entropy * self.h).sum(), None
        else:
            inputs = {**self._inputs(ours=True), "backend": "triton"}
            if case.kind == "policy":
                out = policy_loss(leaves["logits"], **inputs)
            elif case.head:
                out = fused_linear_grpo_loss(**leaves, completion_ids=ids, **inputs)
            else:
                out = (_compiled() if case.how == "compile" else fused_grpo_loss)(leaves["logits"], ids, **inputs)
            results, loss = {"loss": out.loss, "logps": out.logps}, out.loss
            up = torch.full_like(loss, case.upstream)
            results |= {f"metric {name}": value for name, value in out.metrics.items() if case.metrics}
            if case.kind == "policy":
                del results["logps"]
        if getattr(out, "entropy", None) is not None:
            results["entropy"] = out.entropy
        return self._with_gradients(results, leaves, loss, up)

    def _with_gradients(self, results: dict, leaves: dict[str, Tensor], loss: Tensor, up) -> dict[str, Tensor]:
        if self.case.backward:
            grads = torch.autograd.grad(loss, tuple(leaves.values()), up)
            results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
        return {name: x.detach() for name, x in results.items()}

    def _run_parts(self, logits: Tensor) -> dict[str, Tensor]:
        """What two ranks of a vocab_group do, in turns."""
        half, plan = self.V // 2, Plan().key()
        parts = [(logits.detach()[..., :half], self.ids), (logits.detach()[..., half:], self.ids - half)]
        of_rank = [self._support_of(rank, half) for rank in range(2)]
        rows = [(x, *Batch(ids=ids, mask=self.mask, **s).pack()) for (x, ids), s in zip(parts, of_rank)]
        sums = torch.stack([kernel_ops.shard_op(*row, plan, True, "triton") for row in rows])
        logps, entropy, stats = kernel_ops.unite_op(sums, *Batch(self.ids, self.mask).pack(), True, "triton")
        grads = [kernel_ops.slope_op(*row, stats, self.g, self.h, None, "triton") for row in rows]
        return {"logps": logps, "entropy": entropy, "gradient of logits": torch.cat(grads, -1)}

    def _support_of(self, rank: int, half: int) -> dict[str, Tensor]:
        """What the rows of one of two parts of a vocabulary are restricted to, the first being its first ``half``."""
        return {}

    def _replayed(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The captured call on the content of ``leaves``."""
        if self._graph is None:
            static = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._run(static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = self._run(static)
            self._graph = graph, static, results
        graph, static, results = self._graph
        with torch.no_grad():
            for name, x in leaves.items():
                static[name].copy_(x)
            for x in results.values():
                x.fill_(math.nan)
        graph.replay()
        return {name: x.clone() for name, x in results.items()}

    # --- the truth ------------------------------------------------------------------------------

    def _exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """(lp, H, the rounded products or logits they depend on), in float64."""
        z = torch.where(self.mask[..., None], self.z.double(), 0).requires_grad_()
        rows = exact_token_logprobs(self._rows(self._scores(z)), self._rows(self.ids), self._rows(self.temperature),
                                    self._rows(self.mask))  # fmt: skip
        return *(x.view(self.shape) for x in rows), z

    def _objective(self, lp: Tensor, entropy: Tensor):
        """(LossOutput, dloss/dlp, dloss/dH) of the reference."""
        lp, entropy = lp.detach().requires_grad_(), entropy.detach().requires_grad_()
        out = exact_policy_loss(lp, entropy=entropy, **self._inputs(ours=False))
        grads = torch.autograd.grad(out.loss.sum(), (lp, entropy), allow_unused=True)
        return out, *(torch.zeros_like(lp) if g is None else g for g in grads)

    def truth(self) -> Truth:
        case = self.case
        lp, entropy, z = self._exact()
        moved = SUMS * lp.detach().abs().clamp(min=1)
        bound = SUMS * (1 + entropy.detach() + lp.detach().abs())
        found: Truth = {"logps": (lp.detach(), moved), "entropy": (entropy.detach(), bound)}
        g, h, slack = self.g.double(), self.h.double(), torch.zeros_like(lp)
        if not case.options.get("return_entropy"):
            h = torch.zeros_like(h)
        if case.kind not in ("logps", "head logps", "parts"):
            out, g, h = self._objective(lp, entropy)
            # A ratio near its bound, and what is left of a policy term and a KL that pull apart, move with lp.
            slack = torch.stack([self._objective(lp + s * moved, entropy)[1] - g for s in (1, -1)]).abs().amax(0)
            found |= self._values(out, lp, g, moved)
            g, h, slack = (x * case.upstream for x in (g, h, slack))
        if case.kind == "policy":
            found["gradient of logits"] = g, slack + SUMS * g.abs() + 1e-30
            return found
        g, h = torch.where(self.mask, g, 0), torch.where(self.mask, h, 0)
        (grad,) = torch.autograd.grad((lp, entropy), z, (g, h))
        bound = self._bound(grad, lp.detach(), entropy.detach(), z.detach(), g.abs(), h.abs(), slack)
        if case.head:
            return found | self._of_head(grad, bound)
        found["gradient of logits"] = self._of_logits(grad, bound)
        return self._odd(found)

    def _values(self, out, lp: Tensor, g: Tensor, moved: Tensor) -> Truth:
        """Loss and metrics; what enters them is known as well as the log-probs are."""
        size = SUMS * lp.detach().abs().amax().clamp(min=1)
        tolerated = (g.abs() * moved).sum() + SUMS * (out.weights * out.per_token_loss).abs().sum() + 1e-9
        if out.loss.dim():
            tolerated = 4 * size * (1 + out.loss.detach().abs())
        found = {"loss": (out.loss.detach(), tolerated)}
        for name, value in out.metrics.items():
            found[f"metric {name}"] = value.double(), 4 * size * (1 + value.double().abs())
        return found

    def _bound(self, grad: Tensor, lp, entropy, z, g: Tensor, h: Tensor, slack: Tensor) -> Tensor:
        """Of dlogits = g·(onehot − p) − h·p·(log p + H): the factors', the probabilities' and the last rounding."""
        case, heat = self.case, torch.as_tensor(self.temperature, device=self.device).double()
        heat = heat[:, None] if heat.dim() == 1 and not case.packed else heat
        scores = self._scores(z) / (heat[..., None] if heat.dim() else heat)
        log_p = torch.log_softmax(scores, -1)
        p, factor = log_p.exp(), (SUMS * g + slack) / heat
        terms = 1 - log_p.clamp(min=-100) + entropy[..., None]  # that enter the derivative of H
        bound = p * (factor[..., None] + SUMS * (h / heat)[..., None] * terms)
        bound.scatter_add_(-1, self.ids.clamp(min=0)[..., None], factor[..., None])
        bound += ((g + h * (1 + entropy)) / heat)[..., None] * TAIL
        return self._rounded(grad, bound.mul_(case.options.get("logit_scale", 1.0)))

    def _rounded(self, grad: Tensor, bound: Tensor) -> Tensor:
        """The bound of dlogits before they are rounded, with what rounding adds."""
        roundings = (2 if self.interpreted else 1) * (2 if self.case.upstream != 1 else 1)
        bound += grad.abs() * (roundings * ROUNDING[self.case.dtype]) + SUBNORMAL[self.case.dtype] + 1e-30
        return bound.mul_(self.mask[..., None]).add_(1e-300)  # a masked row's gradient is 0

    def _of_logits(self, grad: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Both with the position that is not read."""
        if self.case.layout != "extra":
            return grad, bound
        last = torch.zeros_like(grad[:, :1])
        return torch.cat([grad, last], 1), torch.cat([bound, last + 1e-300], 1)

    def _of_head(self, dz: Tensor, bound: Tensor) -> Truth:
        """The products of dz: its own errors weighted as they enter, the rounding of sums, and the last one."""
        dz, bound = dz.view(-1, self.V), bound.view(-1, self.V)
        bound = bound + SUMS * dz.abs()
        hidden, weight = self.head["hidden"].double().view(-1, H), self.head["weight"].double()
        pairs = {
            "hidden": ((dz @ weight).view(*self.shape, H), (bound @ weight.abs()).view(*self.shape, H)),
            "weight": (dz.T @ hidden, bound.T @ hidden.abs()),
            "bias": (dz.sum(0), bound.sum(0)),
        }
        rounding, least = 2 * ROUNDING[self.case.dtype], SUBNORMAL[self.case.dtype] + 1e-30
        return {f"gradient of {name}": (want, allowed + rounding * want.abs() + least)
                for name, (want, allowed) in pairs.items() if name in self.head}  # fmt: skip

    def _odd(self, found: Truth) -> Truth:
        """NaN where it must show: the odd row, and the loss; log-probs of rows that were skipped."""
        at = divmod(self.odd, self.T)
        if self.case.spoil in ("nan", "id"):
            rows = [at] if self.case.options.get("loss_type") != "gspo" else [(at[0], t) for t in range(self.T)]
            for row in rows:
                if bool(self.mask[row]):
                    found["gradient of logits"][0][row] = math.nan
                    if "loss" in found and found["loss"][0].dim():
                        found["loss"][0][row] = math.nan
            for name in ("logps", "entropy"):
                found[name][0][at] = math.nan
            if "loss" in found and not found["loss"][0].dim():
                found["loss"][0].fill_(math.nan)
        if self.case.options.get("skip_zero_advantage"):
            found["logps"][0][1][self.mask[1]] = math.nan
        return found

    @property
    def interpreted(self) -> bool:
        return self.device.type == "cpu"


@contextlib.contextmanager
def _setting(rows: str) -> Iterator[None]:
    """GRPO_KERNELS_ROWS as a case has it; what it was before, where that says nothing."""
    before = os.environ.get(ways.VARIABLE)
    if rows:
        os.environ[ways.VARIABLE] = rows
    try:
        yield
    finally:
        os.environ.pop(ways.VARIABLE, None)
        if before is not None:
            os.environ[ways.VARIABLE] = before


def obstacle(case: Case, device: torch.device) -> str | None:
    """Why this machine cannot run a case, or None."""
    return ways.device_obstacle(torch.empty(0, device=device)) if case.rows == "onchip" else None


@functools.cache
def _compiled() -> Callable:
    return torch.compile(fused_grpo_loss, fullgraph=True)
