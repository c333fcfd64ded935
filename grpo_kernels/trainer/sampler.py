"""The sampler, where it truncates: ``generate`` draws from what `Truncation` leaves, which the loss is told."""

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from grpo_kernels import Support


class Truncation(LogitsProcessor):
    """Temperature, top-k and top-p of one call of ``generate``, as transformers has them; writes down what it kept.

    The sampler draws a token from the kept set, and its probabilities are normalised over that.

    Args:
        prompt_length: P, where completions start.
        eos_token_id: behind which nothing is written down.
        top_k: the likeliest tokens, so many of them; 0: all.
        top_p: of these the likeliest that make up this probability; 1: all.
    """

    def __init__(self, prompt_length: int, eos_token_id: int, temperature: float, top_k: int, top_p: float) -> None:
        self._start, self._eos = prompt_length, eos_token_id
        self._warpers = [TemperatureLogitsWarper(float(temperature))]
        self._warpers += [TopKLogitsWarper(top_k)] if top_k > 0 else []
        self._warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        self._ids: list[torch.Tensor] = []  # of each position, the kept ids of all sequences
        self._counts: list[torch.Tensor] = []  # (B,) of each position
        self._logps: list[torch.Tensor] = []  # (B,) of each position but the last
        self._scores: torch.Tensor | None = None  # (B, V), what the next token is drawn from

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._drawn(input_ids[:, -1])
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        over = (input_ids[:, self._start :] == self._eos).any(1)
        kept = (scores > -torch.inf) & ~over[:, None]
        self._ids.append(kept.nonzero()[:, 1])
        self._counts.append(kept.sum(1))
        self._scores = scores
        return scores

    def _drawn(self, tokens: torch.Tensor) -> None:
        """Tokens (B,), of the scores before."""
        if self._scores is not None:
            logps = self._scores.float().log_softmax(1)
            self._logps.append(logps.gather(1, tokens[:, None])[:, 0])

    def kept(self, completion_ids: torch.Tensor, mask: torch.Tensor) -> tuple[Support, torch.Tensor]:
        """The kept set of each token of what was sampled, (B, T), and the sampler's log-probabilities (B, T).

        Args:
            mask: (B, T) bool; behind the end rows have no ids, and log-probabilities are 0.
        """
        self._drawn(completion_ids[:, -1])
        by_position = Support.from_counts(torch.cat(self._ids), torch.cat(self._counts))  # T·B rows
        batch, length = completion_ids.shape
        rows = torch.arange(batch * length, device=completion_ids.device).view(length, batch).T.reshape(-1)
        return by_position[rows], torch.stack(self._logps, dim=1).masked_fill(~mask, 0.0)
