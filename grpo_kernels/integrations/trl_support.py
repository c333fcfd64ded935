"""TRL: the sets that a truncating sampler kept, from what ``rollout_func`` returns to the passes of `FusedGRPOTrainer`.

TRL 1.16 hands no sampler's mask over, but keeps every further field that ``rollout_func`` returns. Of these
``sampling_mask`` is taken: a list per completion, of a list per token, of token ids. It is laid out as a tensor
(B, T, K), which TRL shuffles and splits with the rest of its batch.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from trl import GRPOTrainer

from grpo_kernels.objective.lists import joined
from grpo_kernels.objective.supports import Support

FIELD = "sampling_mask"
_generate_of_trl = GRPOTrainer._generate
_score_of_trl = GRPOTrainer._generate_and_score_completions


def _generate(self, prompts):
    """TRL's own; its results are looked through for a sampler's mask."""
    results = _generate_of_trl(self, prompts)
    completion_ids, extra_fields = results[1], results[5]
    if extra_fields.get(FIELD) is None or not hasattr(self, "_seam"):
        return results
    if not self._replays:
        warnings.warn(f"{type(self).__name__} has a _compute_loss of its own, so that {FIELD} of rollout_func is not "
                      "used, by no pass. Derive it from FusedGRPOTrainer.", stacklevel=2)  # fmt: skip
    else:
        lengths = [len(ids) for ids in completion_ids]
        self._kept = padded(extra_fields[FIELD], lengths, self.pad_to_multiple_of).to(self.accelerator.device)
    return results


def _generate_and_score_completions(self, inputs):
    """TRL's own; the old and the reference pass are over the kept sets, which go into the batch."""
    self._kept = None
    try:
        batch = _score_of_trl(self, inputs)
        return batch if self._kept is None else {**batch, FIELD: self._kept}
    finally:
        self._kept = None


def padded(masks: Sequence[Sequence | None], lengths: Sequence[int], multiple: int | None = None) -> torch.Tensor:
    """Kept sets (B, T, K) int32, −1 where there is no id; T is the longest completion's length, padded as TRL pads.

    Args:
        masks: for each of B completions a list of ids per token; None, as a completion or a token: not restricted.
        lengths: of the completions.
        multiple: of which T is one.

    Raises:
        ValueError: another number of completions, or of tokens. TypeError: a token's entry is no list of integers.
    """
    if len(masks) != len(lengths):
        raise ValueError(
            f"{FIELD} of rollout_func has {len(masks)} completions, and completion_ids has {len(lengths)}. Return a "
            "list per completion."
        )
    longest = max(lengths, default=0)
    T = longest + (-longest % multiple if multiple else 0)
    rows: list[Sequence[int]] = []
    for n, (mask, length) in enumerate(zip(masks, lengths)):
        if mask is not None and len(mask) != length:
            raise ValueError(
                f"{FIELD}[{n}] of rollout_func has {len(mask)} tokens, and the completion has {length}. Return a list "
                "of token ids per token; one without ids for tokens that were not sampled, of a tool say."
            )
        rows += [() if ids is None else ids for ids in mask or [None] * length] + [()] * (T - length)
    ids, counts = joined(rows, FIELD)
    K = max(int(counts.max()), 1) if rows else 1
    out = torch.full((len(rows), K), -1, dtype=torch.int32)
    out[torch.arange(K) < counts[:, None]] = ids.int()
    return out.view(len(lengths), T, K)


def in_parts(kept: torch.Tensor | None) -> Callable[[int], Support | None]:
    """``take(n)`` gives the support of the next n completions: TRL scores a batch in parts, in order."""
    start = 0

    def take(rows: int) -> Support | None:
        nonlocal start
        start += rows
        return None if kept is None else Support.from_padded(kept[start - rows : start])

    return take
