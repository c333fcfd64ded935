"""slime and miles: a `Support` from the sets that a truncated sampler kept, which each of their samples records.

See docs/truncated-sampling.md.
"""

from collections.abc import Iterable, Sequence

import torch

from grpo_kernels import Support

Numbers = Sequence[int] | torch.Tensor


def support_of_samples(
    token_ids: Iterable[Numbers],
    offsets: Iterable[Numbers],
    responses: Iterable[Numbers],
    empty_is_the_token: bool = True,
    y_may_be_outside: bool = True,
) -> Support:
    """A Support of the tokens of all responses, one response behind the other.

    Args:
        token_ids, offsets: one of each per sample; token i of a response has ``token_ids[offsets[i]:offsets[i + 1]]``.
        responses: the sampled tokens of each sample.
        empty_is_the_token: an empty record means the token alone, as in slime; if False, that it was not restricted,
            as in miles.
        y_may_be_outside: add a token that its record lacks, as in slime; if False, raise, as miles does.

    Raises:
        ValueError: a sampled token was not kept, where y_may_be_outside is False; records of different lengths;
            offsets that fall, or go beyond the ids.
    """
    rows = []
    for ids, ends, sampled in zip(token_ids, offsets, responses, strict=True):
        ids, ends, sampled = (torch.as_tensor(x).tolist() for x in (ids, ends, sampled))
        if ends != sorted(ends) or (ends and not 0 <= ends[0] <= ends[-1] <= len(ids)):
            raise ValueError(f"offsets must rise from 0 or more to at most the {len(ids)} token_ids, got {ends}.")
        for y, first, last in zip(sampled, ends[:-1], ends[1:], strict=True):
            kept = ids[first:last]
            if not y_may_be_outside and kept and y not in kept:
                raise ValueError(f"token {y} was not kept by the sampler: {kept}.")
            rows.append(kept or ([y] if empty_is_the_token else []))
    return Support.from_lists(rows)
