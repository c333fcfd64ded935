"""Supports of every kind for a batch, as lists, as `Support` and as a mask, and the logits that say the same."""

import torch

from cases import DEVICE, Case
from grpo_kernels import Support
from reference.supports import of_lists, restrict

KINDS = ("empty", "token", "outside", "one other", "all", "some", "repeated", "most")


def make_rows(case: Case, V: int, seed: int = 0) -> list[list[int]]:
    """B·T lists of token ids, the kinds one after another; masked rows hold anything."""
    g = torch.Generator().manual_seed(seed)
    ids, mask = case.completion_ids.flatten().tolist(), case.completion_mask.flatten().tolist()
    return [make_row(KINDS[(n + seed) % len(KINDS)], y, V, g) if m else [V + 7, -3] for n, (y, m) in
            enumerate(zip(ids, mask))]  # fmt: skip


def make_row(kind: str, y: int, V: int, g: torch.Generator) -> list[int]:
    order = torch.randperm(V, generator=g).tolist()
    others = [j for j in order if j != y]
    some = others[: max(1, V // 7)]
    return {
        "empty": [],
        "token": [y],
        "outside": some,
        "one other": others[:1],
        "all": order,
        "some": [*some, y],
        "repeated": [*some, y, *some[::2], y, y],
        "most": [*others[: V // 2], y],
    }[kind]


def make_support(form: str, rows: list[list[int]], shape: tuple[int, ...], mask: torch.Tensor):
    """A "Support" or a "mask" of these rows; ``shape``: (B, T, V), or packed (N, V)."""
    if form == "Support":
        return Support.from_lists(rows).to(DEVICE)
    return of_lists(rows, shape, mask).to(DEVICE)


def restricted(logits: torch.Tensor, case: Case, rows: list[list[int]]) -> torch.Tensor:
    """The logits with −inf outside of the supports."""
    T, mask = case.completion_ids.shape[1], case.completion_mask
    x = logits.clone()
    x[:, :T] = restrict(logits[:, :T], case.completion_ids.where(mask, 0), mask, rows).where(mask[..., None], x[:, :T])
    return x


def near(case: Case, rows: list[list[int]], seed: int = 3) -> None:
    """Old and ref log-probabilities near what is asked over the supports: the objective moves with them."""
    T, mask = case.completion_ids.shape[1], case.completion_mask
    x = restricted(case.logits.double(), case, rows)[:, :T]
    lp = x.log_softmax(-1).gather(-1, case.completion_ids.where(mask, 0)[..., None])[..., 0].where(mask, 0.0)
    noise = 0.3 * torch.randn(2, *lp.shape, generator=torch.Generator().manual_seed(seed))
    case.old_logps, case.ref_logps = (lp + noise[0]).float(), (lp + noise[1]).float()
