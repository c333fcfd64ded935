"""From the arguments of a distillation to what its ops take, a batch and a plan; and from what they give."""

import torch

from grpo_kernels.call import checks
from grpo_kernels.call.checks import Layout
from grpo_kernels.call.combinations import check_horizon, check_reduction
from grpo_kernels.call.distillation_checks import TopK, check_beta, check_choices
from grpo_kernels.call.output import LossOutput
from grpo_kernels.call.prepare import apart, count_tokens
from grpo_kernels.objective.aggregations import AGGREGATIONS
from grpo_kernels.objective.distillation import OUTCOMES, DistillationBatch, DistillationPlan, Head
from grpo_kernels.objective.metrics import DISTILLATION_METRICS, DISTILLATION_SUMS


def prepare(
    layout: Layout,
    like: torch.Tensor,
    few: TopK | None,
    backend: str,
    *,
    beta: float,
    temperature: torch.Tensor | float,
    tail: bool | None,
    completion_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    loss_agg_mode: str,
    num_items_in_batch: torch.Tensor | float | None,
    max_completion_length: torch.Tensor | float | None,
    global_batch_size: torch.Tensor | float | None,
    loss_scale: torch.Tensor | float,
    reduction: str,
    student: Head | None = None,
    teacher: Head | None = None,
) -> tuple[DistillationBatch, DistillationPlan]:
    """Check the arguments that both functions share, and put them together; see `distillation_loss` for them.

    ``like`` is a tensor on the device; ``few`` the teacher where it tells some tokens; ``student`` and ``teacher`` say
    what happens to logits, None: nothing.
    """
    beta = check_beta(beta)
    check_reduction(reduction)
    check_choices(tail, loss_agg_mode)
    checks.check_mask("completion_mask", completion_mask, like, layout)
    temperature = checks.check_temperature(temperature, like, layout)
    aggregation = AGGREGATIONS[loss_agg_mode]
    check_horizon(layout, loss_agg_mode, max_completion_length)
    mask, cu, segments, sizes = count_tokens(
        layout, like, completion_mask, cu_seqlens, backend, num_items_in_batch=num_items_in_batch,
        max_completion_length=max_completion_length, global_batch_size=global_batch_size,
    )  # fmt: skip
    count, w_factor = aggregation.function(sizes)
    scale_number, scale_tensor = apart(checks.check_factor("loss_scale", loss_scale, like))
    per_token = isinstance(temperature, torch.Tensor)
    student, teacher = student or Head(), teacher or Head()
    batch = DistillationBatch(
        mask=mask,
        token_ids=None if few is None else _in_a_row(layout.tokens(few.token_ids)),
        teacher_logps=None if few is None else _in_a_row(layout.tokens(few.logps)),
        temperature=layout.rows(temperature) if per_token else None,
        count=count,
        loss_scale=scale_tensor,
        cu=cu,
        segments=segments,
        one_temperature=1.0 if per_token else temperature,
        beta=beta,
        w_factor=w_factor * scale_number,
        student_scale=student.scale,
        student_softcap=student.softcap,
        teacher_scale=teacher.scale,
        teacher_softcap=teacher.softcap,
    )
    plan = DistillationPlan(
        mixed=0.0 < beta < 1.0,
        by_teacher=beta == 0.0,
        outcomes="all" if few is None else OUTCOMES[tail],
        weighted=reduction == "mean",
    )
    return batch, plan


def _in_a_row(x: torch.Tensor) -> torch.Tensor:
    """A row's tokens next to each other, as the kernels read them."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def output(layout: Layout, loss, values, sums, metrics) -> LossOutput:
    """Puts names to values, sums and metrics."""
    return LossOutput(
        layout.restore(loss), None, layout.restore(values[1]),
        dict(zip(DISTILLATION_METRICS, metrics.unbind())), dict(zip(DISTILLATION_SUMS, sums.unbind())),
    )  # fmt: skip
