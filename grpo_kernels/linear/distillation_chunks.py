"""Distillation from hidden states, chunk by chunk: both models' logits of a chunk, which become the student's gradient.

Two products make a chunk's logits, the student's and the teacher's, and two the gradients of the student's hidden
states and weight. Where the gradient has to wait (`pull_back`) the logits are made again. Rows that do not count are
left out before the products.
"""

from types import ModuleType

import torch
from torch import Tensor

from grpo_kernels.linear.chunks import Rows, finish
from grpo_kernels.linear.head import ChunkedHead, Gradients
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.distillation import DistillationBatch, DistillationPlan
from grpo_kernels.objective.plan import Plan


class Pairs:
    """The rows that are read, of both models.

    Args:
        student, teacher: (hidden states (B, rows, H), weight (V, H), bias or None); teacher None: the batch has
            some of its tokens.
        T: tokens of a sequence.
        height: rows of logits at a time.
        count: how many rows are read, -1 where the host has to ask.
        fp32_logits: of both models, whatever the dtypes of their heads.
    """

    def __init__(
        self, student: tuple, teacher: tuple | None, batch: DistillationBatch, T: int, height: int, count: int,
        fp32_logits: bool,
    ):  # fmt: skip
        shape = (student[0].shape[0], T)
        tokens = Batch(student[0].new_empty(1).expand(shape), mask=batch.mask, cu=batch.cu, segments=batch.segments)
        self.rows, self.batch, self.height = Rows(tokens, Plan(), count), batch, height
        how = self.rows.index, T, height, fp32_logits
        self.student = ChunkedHead(*student, *how)
        self.teacher = None if teacher is None else ChunkedHead(*teacher, *how)
        self.temperature = self.rows.per_token(batch.temperature)
        count = batch.count
        self.counts = None if count is None or count.dim() == 0 else self.rows.per_token(count[:, None])
        self.told = [self._of_rows(x) for x in (batch.token_ids, batch.teacher_logps)]

    def _of_rows(self, x: Tensor | None) -> Tensor | None:
        """(n, K) of (B, T, K)."""
        if x is None:
            return None
        x = x.flatten(0, 1)
        return x if self.rows.index is None else x.index_select(0, self.rows.index)

    def __iter__(self):
        """Of each chunk (start, end, hidden states, student's logits (n, 1, V), where their gradient (n, V) goes, the
        teacher's logits or None, their batch)."""
        for start in range(0, self.student.count, self.height):
            end = min(start + self.height, self.student.count)
            h = self.student.rows(start, end)
            z = self.student.logits(h)
            dz, z = self.student.gradient_of(z), z[:, None]
            u = None if self.teacher is None else self.teacher.logits(self.teacher.rows(start, end))[:, None]
            ids, logps, heat = (None if x is None else x[start:end, None] for x in (*self.told, self.temperature))
            part = self.batch._replace(
                mask=None, cu=None, segments=None, token_ids=ids, teacher_logps=logps, temperature=heat,
                count=self.batch.count if self.counts is None else self.counts[start:end],
            )  # fmt: skip
            yield start, end, h, z, dz, u, part

    def spread_out(self, values: Tensor) -> Tensor:
        """(3, B, T) of (3, n)."""
        return torch.stack([self.rows.spread_out(x) for x in values])


def write_gradients(run: ModuleType, pairs: Pairs, plan: DistillationPlan, into: Gradients) -> Tensor:
    """Values (3, B, T); the student's gradients go ``into``."""
    values = torch.empty(3, pairs.student.count, dtype=torch.float32, device=pairs.student.weight.device)
    for start, end, h, z, dz, u, part in pairs:
        values[:, start:end] = run.gradient(z, u, dz[:, None], part, plan, 1)[..., 0]
        pairs.student.add(into, start, end, h, dz, start == 0)
    finish(pairs.student, into)
    return pairs.spread_out(values)


def score(run: ModuleType, pairs: Pairs, plan: DistillationPlan, stats: Tensor) -> Tensor:
    """Values (3, B, T) without a gradient; ``stats`` takes what `pull_back` needs of each row."""
    values = torch.empty(3, pairs.student.count, dtype=torch.float32, device=pairs.student.weight.device)
    for start, end, _, z, _, u, part in pairs:
        said, stat = run.compare(z, u, part, plan, 1)
        values[:, start:end] = said[..., 0]
        stats[start:end] = stat
    return pairs.spread_out(values)


def pull_back(
    run: ModuleType, pairs: Pairs, plan: DistillationPlan, stats: Tensor, up: Tensor, into: Gradients
) -> None:
    """Gradients times ``up`` [] or (B, T), through logits made anew, which must be the same again."""
    up = pairs.rows.per_token(up)
    for start, end, h, z, dz, u, part in pairs:
        run.slope(z, u, dz[:, None], part, plan, 1, stats[start:end], up[start:end, None])
        pairs.student.add(into, start, end, h, dz, start == 0)
    finish(pairs.student, into)
