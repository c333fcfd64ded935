"""A head of which each row takes the few rows that its support names: no row of logits is as long as the vocabulary.

    z_k = h·W[id_k],    ∂L/∂h = Σ dz_k·W[id_k],    ∂L/∂W[id_k] += dz_k·h        over the row's token and its K ids

To a row kernel the token and the ids are a vocabulary of K + 1, of which the token is entry 0, and whose entries count
where a mask says so: rows have different numbers of ids, an id may come twice, and the token may be one of them.
"""

import torch
from torch import Tensor

from grpo_kernels.linear.chunks import Rows
from grpo_kernels.linear.head import ChunkedHead, Gradients, multiply
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.plan import Plan
from grpo_kernels.objective.supports import REPEATED

CPU_ELEMENTS = 1 << 20  # of gathered rows of the head, which should stay in the cache


class GatheredRows(Rows):
    """Tokens that are read, each restricted to ids of its own.

    Attributes:
        width: K + 1, K being the most ids that one of them has. The host waits for the device to learn it.

    Raises:
        ValueError: one of them has no id, and is not restricted.
    """

    def __init__(self, batch: Batch, plan: Plan, count: int, V: int):
        super().__init__(batch, plan, count)
        self.V, self.ids = V, self.per_token(batch.ids).long()
        first, last = self._ranges
        counts = last - first
        self.width = 1
        if counts.numel():
            least, most = torch.stack([counts.min(), counts.max()]).tolist()
            if least <= 0:
                raise ValueError(
                    "gather_head needs a support of every row that is read, but one has no id, and is over the whole "
                    "vocabulary. Leave gather_head out, or mask the token."
                )
            self.width += most

    def columns(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """(rows of the head (n, width), which of them count, which name no row of it) of some of the tokens."""
        ids, support = self.ids[start:end, None], self.batch.support
        first, last = (x[start:end, None].long() for x in self._ranges)
        at = first + torch.arange(self.width - 1, device=ids.device)
        j = support[at.clamp(0, max(support.shape[0] - 1, 0))].long()
        j = torch.where(at < last, j, REPEATED)
        j = torch.cat([ids, torch.where(j == ids, REPEATED, j)], dim=1)
        keep = (j >= 0) & (j < self.V)
        wrong = ~keep & (j != REPEATED)
        keep[:, 0] = True  # a row is restricted, whatever it names
        return torch.where(keep, j, ids).clamp(0, self.V - 1), keep, wrong

    def restricted(self, start: int, end: int, each: bool = False) -> dict[str, Tensor]:
        return {"support_mask": self.columns(start, end)[1][(slice(None), None) if each else (None,)]}


class GatheredHead(ChunkedHead):
    """`ChunkedHead` of logits (n, K + 1); ``height`` rows of V logits are as large as what it gathers at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: GatheredRows, T: int, height: int,
                 fp32_logits: bool = False):  # fmt: skip
        super().__init__(hidden, weight, bias, rows.index, T, 0, fp32_logits)
        entries = height * weight.shape[0]
        if weight.device.type == "cpu":
            entries = min(entries, CPU_ELEMENTS)
        height = max(1, min(entries // (rows.width * weight.shape[1]), self.count))
        self.of, self.buffer = rows, self.buffer.new_empty((height, rows.width))
        self._last: tuple[Tensor, Tensor]  # of the last product: (rows of the head (n, width), what they hold)

    def product(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        h, z = self.rows(start, end), self.buffer[: end - start]
        index, _, wrong = self.of.columns(start, end)
        W = self.weight.index_select(0, index.view(-1)).view(*index.shape, -1)
        if self.bias is None or z.dtype != h.dtype:
            multiply(W, h[:, :, None], z[:, :, None])
            if self.bias is not None:
                z.add_(self.bias[index])
        else:
            torch.baddbmm(self.bias[index][:, :, None], W, h[:, :, None], out=z[:, :, None])
        z[:, 0].masked_fill_(wrong.any(1), torch.nan)
        self._last = index, W
        return h, z

    def add(self, into: Gradients, start: int, end: int, h: Tensor, dz: Tensor, first: bool) -> None:
        """To be called after `product` of the same rows, before that of others."""
        index, W = self._last
        if into.hidden.numel():
            flat = into.hidden.view(-1, h.shape[1])
            dh = torch.bmm(dz[:, None], W, out=torch.empty_like(h)[:, None])[:, 0]
            place = slice(start, end) if self.place is None else self.place[start:end]
            flat[place] = dh
        if first and into.weight.numel():
            into.weight.zero_()
        dz = dz.float()
        if into.weight.numel():
            part = dz[:, :, None] * h.float()[:, None]
            _add_rows(into.weight, index.view(-1), part.view(-1, h.shape[1]))
        if into.bias.numel():
            _add_rows(into.bias, index.view(-1), dz.view(-1))


def _add_rows(total: Tensor, index: Tensor, parts: Tensor) -> None:
    """total[index[i]] += parts[i], where an index may come many times, always in the same order.

    On a GPU `index_add_` would add by atomics, in another order each time. `index_put_` sorts the indices first.
    """
    if total.is_cuda:
        total.index_put_((index,), parts, accumulate=True)
    else:
        total.index_add_(0, index, parts)
