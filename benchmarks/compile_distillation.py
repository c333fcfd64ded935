"""The launches of distillation that `benchmarks.compile_launches` records."""

import functools
from collections.abc import Callable, Iterator

import torch

from grpo_kernels.objective.distillation import OUTCOMES, DistillationBatch, DistillationPlan
from grpo_kernels.triton_backend import distillation_launch as launch

KERNELS = ("whole_teacher_kernel", "few_tokens_kernel", "sequence_sums_kernel", "batch_sums_kernel")
TOLD = 64  # tokens of a teacher that tells the likeliest
FEW = ("reverse all full", "mixed few full")  # of each kernel of rows one form
# Of which a brief record has both passes in launches of their own, too: the others have them in one launch.
APART = (*FEW, "mixed all full", "reverse all cap", "mixed rest cap")


def calls(logits: torch.Tensor, every: bool = True) -> Iterator[tuple[str, Callable]]:
    """(label, call) of each divergence and teacher with all inputs, and two under soft caps.

    What a teacher of few tokens adds is a few numbers of a row: one divergence stands for all. Without ``every``, only
    those APART have both passes in launches of their own.
    """
    B, T, _ = logits.shape
    sequence = torch.zeros(B)
    few = {"token_ids": torch.zeros(B, T, TOLD, dtype=torch.int64), "teacher_logps": torch.zeros(B, T, TOLD)}
    more = {"mask": torch.zeros(B, T, dtype=torch.int64), "temperature": sequence[:, None], "count": sequence,
            "loss_scale": torch.ones(())}  # fmt: skip
    cap = {"student_softcap": 30.0, "teacher_softcap": 30.0}
    flags = {"forward": (False, True), "reverse": (False, False), "mixed": (True, False)}
    kinds = [(name, "all", "full") for name in flags] + [("mixed", few_of, "full") for few_of in OUTCOMES.values()]
    for name, outcomes, form in (*kinds, ("reverse", "all", "cap"), ("mixed", "rest", "cap")):
        fields = cap if form == "cap" else more
        whole = outcomes == "all"
        batch = DistillationBatch(**({} if whole else few), **fields)
        plan = DistillationPlan(*flags[name], outcomes)
        given = (logits, logits if whole else None, batch)
        label = f"{name} {outcomes} {form}"
        yield label, functools.partial(_one_launch, *given, plan)
        if every or label in APART:
            yield label, functools.partial(_two_launches, *given, plan._replace(weighted=False))


def left_out(label: str) -> bool:
    """Whether a launch of distillation, by its label, is none of FEW."""
    return label.split()[0] in KERNELS[:2] and not any(each in label for each in FEW)


def _one_launch(logits, teacher, batch: DistillationBatch, plan: DistillationPlan) -> None:
    values = launch.gradient(logits, teacher, logits, batch, plan, logits.shape[1])
    launch.totals(values, batch, plan)


def _two_launches(logits, teacher, batch: DistillationBatch, plan: DistillationPlan) -> None:
    T = logits.shape[1]
    values, stats = launch.compare(logits, teacher, batch, plan, T)
    launch.slope(logits, teacher, logits, batch, plan, T, stats, values[0])
