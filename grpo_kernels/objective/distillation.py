"""What a distillation needs besides the logits, and its structure, in the form that the backends take."""

from typing import NamedTuple

import torch

from grpo_kernels.objective.batch import Cap, one_tensor
from grpo_kernels.objective.plan import key_of, plan_of

OUTCOMES = {True: "rest", False: "few", None: "raw"}  # ``tail`` of a TopK -> `DistillationPlan.outcomes`


class Head(NamedTuple):
    """What happens to a model's logits z before the temperature: softcap·tanh(scale·z/softcap), or scale·z."""

    scale: float = 1.0
    softcap: float = torch.inf

    @property
    def cap(self) -> Cap | None:
        return Cap.of(self.softcap, self.scale)

    @property
    def factor(self) -> float:
        """Of the logits after the cap."""
        return self.scale if self.softcap == torch.inf else 1.0


class DistillationBatch(NamedTuple):
    """Tensors of a call, None where there is none; and its numbers.

    As in `grpo_kernels.objective.batch.Batch` packed input comes as one row of N tokens, with ``cu``; * broadcasts.
    """

    mask: torch.Tensor | None = None  # (B, T) or (1, N)
    token_ids: torch.Tensor | None = None  # (B, T, K) or (1, N, K): the teacher's tokens; None: it has all
    teacher_logps: torch.Tensor | None = None  # likewise
    temperature: torch.Tensor | None = None  # *, in place of `one_temperature`
    count: torch.Tensor | None = None  # (B,) or (): what the weight divides by
    loss_scale: torch.Tensor | None = None  # ()
    cu: torch.Tensor | None = None  # (B+1,) bounds of the sequences in packed input
    segments: torch.Tensor | None = None  # (N,) int32: the sequence of each packed token
    # From here on numbers.
    one_temperature: float = 1.0
    beta: float = 1.0
    w_factor: float = 1.0
    student_scale: float = 1.0
    student_softcap: float = torch.inf
    teacher_scale: float = 1.0
    teacher_softcap: float = torch.inf

    @property
    def student(self) -> Head:
        return Head(self.student_scale, self.student_softcap)

    @property
    def teacher(self) -> Head:
        return Head(self.teacher_scale, self.teacher_softcap)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(self[:_TENSORS])

    def sequences(self, B: int) -> int:
        """How many there are; B of padded input."""
        return B if self.cu is None else self.cu.shape[0] - 1

    def pack(self) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
        """What an op takes: the tensors, and the numbers as one of them."""
        return self.tensors, one_tensor(self[_TENSORS:])

    @classmethod
    def unpack(cls, tensors: tuple | list, numbers: torch.Tensor) -> "DistillationBatch":
        """From what `pack` gave; reads host memory, so no device is waited for."""
        return cls(*tensors, *numbers.tolist())


_TENSORS = DistillationBatch._fields.index("one_temperature")


class DistillationPlan(NamedTuple):
    """The structure of a call, which is what a kernel is specialised for; ops take it as a string (`key`)."""

    mixed: bool = False  # the divergences are from a mixture of both
    by_teacher: bool = False  # the teacher's probabilities weigh
    outcomes: str = "all"  # tokens; or K of them and the "rest", the "few" alone, renormalised, or as they are, "raw"
    weighted: bool = True  # the loss is one number, its aggregation's; else one per token

    @property
    def whole_student(self) -> bool:
        """Whether all of a row of the student's logits is read."""
        return self.outcomes != "few"

    def key(self) -> str:
        return key_of(self)

    @classmethod
    def from_key(cls, key: str) -> "DistillationPlan":
        return plan_of(cls, key)
