"""Several targets per row in every form, what float64 makes of them, and how close a dtype must come.

With the anchor a of a row, the target k, and what `tolerance` derives of the row::

    δlp_k ≤ δlp_a + δx_k + δx_a + u·|lp_k|                 δx holds the difference's and the quotient's roundings
    δG    ≤ u·|G|,  G = Σ g of a token's targets           the sums are made in fp64, and rounded once
    entry of a target:  (G − p·s)/τ,  s = Σ g + h·(lp + H)
      δs  ≤ u·|Σ g| + |h|·(δlp + δH + 2u·(|lp| + |H|)) + u·|s|,    δp ≤ p·(δlp + 4u)
      δ   ≤ (δG + δp·|s| + p·δs + 3u·(|G| + p·|s|))/τ
    any other entry: that of one target of slope Σ g

The entry is then rounded once, to the gradient's dtype.
"""

import dataclasses

import torch
from torch import Tensor

import reference
from cases import DEVICE, make_case
from grpo_kernels import Targets
from tolerance import TINY, U, gradient_error, rows, written
from variation import unshifted

FORMS = ("padded", "lists", "packed", "packed lists")


@dataclasses.dataclass
class TargetCase:
    """A batch on the CPU."""

    logits: Tensor  # (B, T[+1], V); NaN in masked rows
    ids: Tensor  # (B, T, K); anything in masked rows
    mask: Tensor  # (B, T) bool
    g: Tensor  # (B, T, K) ∂L/∂lp
    h: Tensor  # (B, T) ∂L/∂H
    listed: Tensor  # (B, T, K) bool: those that are in the lists; the others are absent

    @property
    def there(self) -> Tensor:
        return (self.ids >= 0) & self.mask[..., None]

    def targets(self, form: str) -> Tensor | Targets:
        if form == "padded":
            return self.ids.to(DEVICE)
        if form == "packed":
            return self.ids.flatten(0, 1).to(DEVICE)
        offsets = torch.nn.functional.pad(self.listed.sum(-1).flatten().cumsum(0), (1, 0))
        return Targets(self.ids[self.listed], offsets).to(DEVICE)

    def per_token(self, form: str, x):
        """(B, T, ...) as the form has it."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        return (x.flatten(0, 1) if "packed" in form else x).to(DEVICE)

    def per_target(self, form: str, x: Tensor) -> Tensor:
        """(B, T, K) as the form has it."""
        return (x[self.listed] if "lists" in form else self.per_token(form, x)).to(DEVICE)


def make_targets(B=3, T=5, V=131, K=3, *, dtype=torch.float32, extra=0, seed=0, spread=2.0, mask=True) -> TargetCase:
    """Ids repeated and absent, a row without a target, one whose targets all have −inf, and one with one such."""
    case = make_case(B, T, V, dtype=dtype, extra=extra, seed=seed, spread=spread)
    g = torch.Generator().manual_seed(seed + 50)
    ids = torch.randint(0, V, (B, T, K), generator=g)
    ids = torch.where(torch.rand(B, T, K, generator=g) < 0.2, -1 - ids, ids)
    if K > 1:
        ids[:, 1::2, K - 1] = ids[:, 1::2, 0]
        ids[:, ::2, K // 2] = ids[:, ::2, 0]
    ids[0, 0] = -7
    counted = case.completion_mask if mask else torch.ones(B, T, dtype=torch.bool)
    counted[0, :3] = True
    logits = case.logits
    ids[0, 1, 0], ids[0, 2, 0] = 2, 1
    logits[0, 1, ids[0, 1].clamp(min=0)] = -torch.inf
    logits[0, 2, 1] = -torch.inf
    logits[0, 1:3, 0] = 1.0
    logits[:, :T][~counted] = torch.nan
    ids = torch.where(counted[..., None], ids, V + 3)
    slopes = torch.randn(B, T, K + 1, generator=g)
    listed = (ids >= 0) | (torch.arange(T)[:, None] % 2 == 0)
    return TargetCase(logits, ids, counted, slopes[..., 1:], slopes[..., 0], listed)


@unshifted()
def expected(case: TargetCase, temperature=1.0, entropy=True) -> tuple[Tensor, Tensor, Tensor]:
    """(logps (B, T, K), entropies, gradient) by the reference, in float64."""
    x = case.logits.double().requires_grad_()
    heat = temperature.double() if isinstance(temperature, Tensor) else temperature
    lp, H = reference.target_logprobs(x, case.ids, heat, case.mask)
    (grad,) = torch.autograd.grad([lp, H], x, [case.g.double(), entropy * case.h.double()])
    return lp.detach(), H.detach(), grad


def target_bounds(case: TargetCase, temperature=1.0, entropy=True, d_logits=0.0, dtype=None) -> tuple[Tensor, ...]:
    """Of (logps, entropies, gradient); ``d_logits``: the error of the logits themselves."""
    mask, there = case.mask, case.there[case.mask]
    T = mask.shape[1]
    ids = torch.where(there, case.ids[mask], 0)
    heat = torch.as_tensor(temperature, dtype=torch.float64)
    heat = heat.expand(mask.shape)[mask] if heat.dim() else heat
    x = case.logits[:, :T][mask].double()
    moved = d_logits[:, :T][mask] if isinstance(d_logits, Tensor) else d_logits
    at = torch.where(there, x.gather(-1, ids), -torch.inf).argmax(-1, keepdim=True)
    anchor = ids.gather(-1, at)
    r = rows(x, anchor[:, 0], heat, moved)
    lse = r.x.where(r.p > 0, -torch.inf).logsumexp(-1, keepdim=True)
    lp = r.x.gather(-1, ids) - lse  # of a banned target: that of a logit of 0, which is larger than what it stands for
    d_lp = r.d_logps[:, None] + r.d_x.gather(-1, ids) + r.d_x.gather(-1, anchor) + U * lp.abs()

    g, h = torch.where(there, case.g[mask].double(), 0.0), entropy * case.h[mask].double()
    total, H = g.sum(-1, keepdim=True), lse - r.mean
    nowhere = r._replace(at_token=torch.zeros_like(r.p))
    inner = gradient_error(nowhere, total[:, 0], h, U * total[:, 0], torch.zeros_like(h))
    own = torch.zeros_like(r.p).scatter_add_(-1, ids, g)
    entry = own - r.p * (total + h[:, None] * (r.x - lse + H))
    G, p, h = own.gather(-1, ids).abs(), r.p.gather(-1, ids), h.abs()[:, None]
    s = total.abs() + h * (lp.abs() + H.abs())
    d_s = U * total.abs() + h * (d_lp + r.d_entropy[:, None] + 2 * U * (lp.abs() + H.abs())) + U * s
    of_targets = (U * G + p * (d_lp + 4 * U) * s + p * d_s + 3 * U * (G + p * s)) / r.heat.abs()
    inner = inner.scatter_reduce(-1, ids, torch.where(there, of_targets, 0.0), "amax")
    grad = torch.zeros(case.logits.shape, dtype=torch.float64)
    lost = TINY * (total.abs() + h * (r.x - lse + H).abs()) / r.heat.abs()  # of p that fp32 has as 0
    grad[:, :T][mask] = inner + lost + written(entry / r.heat, dtype or case.logits.dtype)
    logps, entropies = torch.zeros(case.ids.shape, dtype=torch.float64), torch.zeros(mask.shape, dtype=torch.float64)
    logps[mask], entropies[mask] = torch.where(there, d_lp, 0.0), r.d_entropy
    return logps, entropies, grad
