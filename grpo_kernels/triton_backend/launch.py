"""Launches: the Triton backend, with the same functions as `grpo_kernels.cpu_backend.backend`."""

import contextlib
import functools
from collections.abc import Callable

import torch

from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.catalogue import LEVELS, TERMS
from grpo_kernels.objective.corrections import CORRECTIONS, Correction
from grpo_kernels.objective.language import is_interpreted, triton
from grpo_kernels.objective.metrics import METRIC_NAMES, SUM_NAMES
from grpo_kernels.objective.plan import Plan
from grpo_kernels.triton_backend import ways
from grpo_kernels.triton_backend.groups import batch_std_kernel, groups_kernel
from grpo_kernels.triton_backend.objective_kernels import sequence_kernel
from grpo_kernels.triton_backend.quantile import threshold_kernel
from grpo_kernels.triton_backend.row_kernels import logprob_kernel, loss_kernel, scale_kernel, slope_kernel
from grpo_kernels.triton_backend.sequence_kernels import (
    SUFFIX_BLOCK,
    correction_kernel,
    segments_kernel,
    spread_kernel,
    suffix_kernel,
)
from grpo_kernels.triton_backend.shapes import (
    OPTIONS,
    SCALING_WARPS,
    block_shape,
    gradient_shape,
    line_bytes,
    logprob_shape,
    sequence_parts,
)
from grpo_kernels.triton_backend.sharded import BLOCK, unite_kernel
from grpo_kernels.triton_backend.totals import total_kernel


def require_available(device: torch.device) -> None:
    """Raise unless the kernels can run on tensors of this device."""
    if triton is None:
        raise ValueError("backend='triton' needs Triton, which is not installed. `pip install triton`, or use 'torch'.")
    if device.type == "cpu" and not is_interpreted(loss_kernel):
        raise ValueError(
            "backend='triton' on CPU tensors needs Triton's interpreter: set TRITON_INTERPRET=1 before the first "
            "import of grpo_kernels. For speed on a CPU use backend='torch'."
        )


def logprobs(logits, batch: Batch, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, stats); stats [B·T, 3] keeps what `slope` needs of each row."""
    logps = logits.new_empty(batch.ids.shape, dtype=torch.float32)
    entropies, stats = _entropy_like(logps, entropy), logps.new_empty((logps.numel(), 3))
    _score(logits, batch, plan, entropy, logps, entropies, stats, part=False)
    return logps, entropies, stats


def _score(logits, batch: Batch, plan: Plan, entropy: bool, logps, entropies, stats, part: bool) -> None:
    ids, wanted = batch.ids, batch.adv if batch.wanted is None else batch.wanted
    rewards = batch.rewards if batch.wanted is None else None
    V = logits.shape[2]
    with _on(logits):
        _over(logprob_kernel, ids.numel())(
            logits, ids, batch.mask, wanted, rewards, batch.temperature, batch.groups, batch.batch_std,
            batch.segments, logps, entropies, stats,
            *_strides(logits, ids, batch.mask, wanted, batch.temperature),
            batch.sequences, ids.shape[1], V, int(batch.num_generations), 1.0 / batch.one_temperature, batch.cap,
            batch.adv_eps, SCALE=plan.scale_rewards, UNBIASED=plan.unbiased, SKIP=plan.skip, ENTROPY=entropy,
            PART=part, **_support(batch), **_tile(logprob_shape, V, logits, crowding=_crowding(batch)),
        )  # fmt: skip


def shard(logits, batch: Batch, plan: Plan, entropy: bool) -> torch.Tensor:
    """[4·B·T] of logits that hold a part of the vocabulary, ids counted from its start: see `unite_kernel`."""
    n = batch.ids.numel()
    part = logits.new_empty(4 * n, dtype=torch.float32)
    depths, stats = part[3 * n :].view(batch.ids.shape), part[: 3 * n].view(n, 3)
    _score(logits, batch, plan, entropy, depths, depths.new_empty(0), stats, part=True)
    return part


def unite(parts, batch: Batch, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, stats) as `logprobs`, from what `shard` gave on every rank, [ranks, 4·B·T]."""
    ranks, n = parts.shape[0], batch.ids.numel()
    logps = parts.new_empty(batch.ids.shape)
    entropies, stats = _entropy_like(logps, entropy), parts.new_empty(n, 3)
    with _on(parts):
        _over(unite_kernel, triton.cdiv(n, BLOCK))(
            parts, batch.temperature, batch.segments, logps, entropies, stats, *_strides(batch.temperature), ranks,
            n, batch.ids.shape[1], 1.0 / batch.one_temperature, ENTROPY=entropy, BLOCK=BLOCK, **block_shape(),
        )  # fmt: skip
    return logps, entropies, stats


def loss(logits, out, batch: Batch, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, loss [], sums [S], metrics [M]) of an objective of single tokens.

    Its gradient goes to ``out`` in the launch that reads the logits.
    """
    logps, entropies = gradient(logits, out, batch, plan, entropy)
    return logps, entropies, *totals(logps, entropies if entropy else None, batch, plan)


def gradient(logits, out, batch: Batch, plan: Plan, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, entropies) of an objective of single tokens, whose gradient goes to ``out``, in one launch."""
    B, rows, V = logits.shape
    logps = logits.new_empty(batch.ids.shape, dtype=torch.float32)
    entropies = _entropy_like(logps, entropy)
    term = TERMS[plan.term]
    chip = ways.on_chip(logits, out, batch, entropy)
    with _on(logits):
        if chip is None:
            run = _over(loss_kernel, B * rows)
            tile = _tile(gradient_shape, V, logits, out, crowding=_crowding(batch))
            tile = {**tile, **_support(batch, logits, out)}
        else:
            batch = chip.with_advantages(batch, plan)
            run, tile = chip.launcher(logits, batch, entropy)
        run(
            logits, out, batch.ids, batch.mask, batch.old, batch.ref, batch.adv, batch.rewards,
            batch.is_weight, batch.temperature, batch.groups, batch.batch_std, batch.segments, logps, entropies,
            batch.count, batch.loss_scale, batch.tokens, batch.entropy_coef,
            *_strides(logits, out, batch.ids, batch.mask, batch.old, batch.ref, batch.adv, batch.is_weight,
                      batch.temperature), _stride(batch.count), _at(batch),
            batch.sequences, batch.ids.shape[1], rows, V, int(batch.num_generations), 1.0 / batch.one_temperature,
            batch.cap, batch.beta, batch.w_factor, batch.h_factor, batch.adv_eps, batch.limits,
            term.kind(*batch.term),
            TERM=term.function, KL=plan.kl_function, BIAS=plan.bias, LIMITED=plan.limited, CLAMPED=plan.clamped,
            SCALE=plan.scale_rewards, UNBIASED=plan.unbiased, SKIP=plan.skip, ENTROPY=entropy, BONUS=plan.bonus, **tile,
        )  # fmt: skip
    return logps, entropies


def slope(logits, out, batch: Batch, stats, g, h, up) -> None:
    """out = (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], both factors times ``up``."""
    B, rows, V = logits.shape
    ids = batch.ids
    with _on(logits):
        _over(slope_kernel, B * rows)(
            logits, out, ids, batch.mask, batch.temperature, batch.segments, stats, g, h, up,
            *_strides(logits, out, ids, batch.mask, batch.temperature, up), _at(batch),
            batch.sequences, ids.shape[1], rows, V, 1.0 / batch.one_temperature, batch.cap,
            **_support(batch, logits, out), **_tile(gradient_shape, V, logits, out, crowding=_crowding(batch)),
        )  # fmt: skip


def scale(grad: torch.Tensor, out: torch.Tensor, up: torch.Tensor) -> None:
    """out = grad · up, in place or not; nothing moves in place where up is 1, as it mostly is."""
    B, rows, V = grad.shape
    tile = _tile(gradient_shape, V, grad, out)
    with _on(grad):
        _over(scale_kernel, min(B * rows, SCALING_WARPS // tile["num_warps"]))(
            grad, out, up, *_strides(grad, out), B, rows, V, SAME=grad.data_ptr() == out.data_ptr(), **tile,
        )  # fmt: skip


def objective(
    logps: torch.Tensor, entropies: torch.Tensor | None, batch: Batch, plan: Plan, summed: bool = True
) -> tuple[torch.Tensor | None, ...]:
    """The [B, T] maths: (loss [], sums [S], metrics [M], ℓ, local, spread, share, h), see `sequence_kernel`.

    None is what has no reader: ℓ where the loss is weighted, ``spread`` and ``share`` where nothing is spread, ``h``
    without a bonus; the first three unless ``summed``.
    """
    wanted = (not plan.weighted, True, bool(plan.spread), bool(plan.spread), plan.bonus)
    out = [torch.empty_like(logps) if each else None for each in wanted]
    return *_sequences(logps, entropies, batch, plan, *out, summed=summed), *out


def totals(logps, entropies, batch: Batch, plan: Plan) -> tuple[torch.Tensor, ...]:
    """(loss [], sums [S], metrics [M]) of an objective whose gradient is written already."""
    return _sequences(logps, entropies, batch, plan, None, None, None, None, None, summed=True)


def _sequences(
    logps, entropies, batch: Batch, plan: Plan, losses, local, spread, share, h, *, summed: bool
) -> tuple[torch.Tensor | None, ...]:
    """(loss, sums, metrics), None each unless ``summed``; what is no None of the others is written."""
    B, T = batch.sequences, batch.ids.shape[1]
    correction = CORRECTIONS[plan.correction] if plan.correction else None
    parts = sequence_parts(B, T, plan.shares or (correction is not None and correction.per_sequence))
    partial = logps.new_empty((B * parts, len(SUM_NAMES)), dtype=torch.float64) if summed else None
    term, own, suffix = TERMS[plan.term], plan.own, plan.suffix
    with _on(logps):
        future = _future(logps, batch, plan) if suffix else None
        _over(sequence_kernel, B * parts)(
            logps, entropies, batch.mask, batch.old, batch.ref, batch.sampling, batch.adv, batch.rewards,
            batch.wanted, batch.is_weight, future, losses, local, spread, share, h, partial,
            batch.count, batch.loss_scale, batch.tokens, batch.entropy_coef, batch.threshold, batch.groups,
            batch.batch_std, batch.cu,
            *_strides(batch.mask, batch.old, batch.ref, batch.sampling, batch.adv, batch.wanted, batch.is_weight),
            _stride(batch.count),
            parts, B, T, int(batch.num_generations), batch.beta, batch.w_factor, batch.h_factor, batch.adv_eps,
            batch.drift, batch.correction_low, batch.correction_high, batch.limits, term.kind(*batch.term),
            TERM=term.function, REGION=term.region, STATISTIC=own and own.function,
            CORRECTION=own and own.correction, OWN=own.how if own else "", HOW=LEVELS[plan.level].how,
            INFLUENCE=suffix and suffix.influence, SPREAD=plan.spread, KL=plan.kl_function, BIAS=plan.bias,
            OFF_POLICY=plan.off_policy,
            LIMITED=plan.limited, CLAMPED=plan.clamped, WEIGHT_ONCE=plan.weight_once, CLIP_ONCE=plan.clip_once,
            CORRECTED=correction.of if correction and batch.sampling is not None else "",
            SCALE=plan.scale_rewards, UNBIASED=plan.unbiased, SKIP=plan.skip, BONUS=plan.bonus, **block_shape(),
        )  # fmt: skip
        if not summed:
            return None, None, None
        sums = logps.new_empty(len(SUM_NAMES), dtype=torch.float64)
        total, metrics = logps.new_empty(()), logps.new_empty(len(METRIC_NAMES))
        total_kernel[(1,)](partial, sums, total, metrics, B, parts, **block_shape())
    return total, sums, metrics


def _future(logps, batch: Batch, plan: Plan) -> torch.Tensor:
    """[B, T], of each unmasked token, see `suffix_kernel`."""
    future, term = torch.empty_like(logps), TERMS[plan.term]
    _over(suffix_kernel, batch.sequences)(
        logps, batch.old, batch.mask, batch.places, future, batch.cu, *_strides(batch.old, batch.mask),
        batch.sequences, logps.shape[1], batch.limits, term.kind(*batch.term),
        FUNCTION=plan.suffix.function, LIMITED=plan.limited, **block_shape(tokens=int(SUFFIX_BLOCK)),
    )  # fmt: skip
    return future


def join(local, spread, share, up, cu) -> torch.Tensor:
    """g = up·local + share·Σ up·spread, the sum over each sequence."""
    g = torch.empty_like(local)
    B = local.shape[0] if cu is None else cu.shape[0] - 1
    with _on(local):
        _over(spread_kernel, B)(
            g, local, spread, share, up, cu, *_strides(up), B, local.shape[1], **block_shape(),
        )  # fmt: skip
    return g


def correct(old, batch: Batch, correction: Correction) -> torch.Tensor:
    """Importance weights, (B, T) or (B, 1), from the sampler's log-probabilities."""
    B, T = batch.sequences, old.shape[1]
    out = old.new_empty((B, 1) if correction.per_sequence else old.shape, dtype=torch.float32)
    with _on(old):
        _over(correction_kernel, B)(
            old, batch.sampling, batch.mask, out, batch.cu, *_strides(old, batch.sampling, batch.mask), B, T,
            batch.correction_low, batch.correction_high,
            PER_SEQUENCE=correction.per_sequence, TRUNCATE=correction.truncate, GATED=correction.gated,
            **block_shape(),
        )  # fmt: skip
    return out


def threshold(ordered, everywhere, q: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`grpo_kernels.objective.quantile.threshold`."""
    value, kept = ordered.new_empty(()), ordered.new_empty(())
    with _on(ordered):
        threshold_kernel[(1,)](ordered, everywhere, value, kept, ordered.numel(), everywhere.numel(), q, num_warps=1,
                             **OPTIONS)  # fmt: skip
    return value, kept


def groups(sizes: torch.Tensor, B: int) -> torch.Tensor:
    """`grpo_kernels.objective.advantages.group_rows`."""
    out = sizes.new_empty((2, B), dtype=torch.int32)
    n = sizes.shape[0]
    with _on(sizes):
        groups_kernel[(n,)](sizes.contiguous(), out, B, n, num_warps=1, **OPTIONS)
    return out


def batch_std(rewards: torch.Tensor, unbiased: bool) -> torch.Tensor:
    """`grpo_kernels.objective.advantages.batch_spread` in fp32."""
    std = rewards.new_empty((), dtype=torch.float32)
    with _on(rewards):
        batch_std_kernel[(1,)](rewards, std, rewards.shape[0], UNBIASED=unbiased, num_warps=1, **OPTIONS)
    return std


def segments(mask: torch.Tensor | None, cu: torch.Tensor, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of packed input: the sequence of each token [N] int32, and the unmasked tokens of each sequence [B]."""
    B = cu.shape[0] - 1
    if B == 0:
        return torch.zeros(N, dtype=torch.int32, device=cu.device), torch.empty(0, device=cu.device)
    numbers, lengths = torch.empty(N, dtype=torch.int32, device=cu.device), torch.empty(B, device=cu.device)
    with _on(cu):
        segments_kernel[(B,)](mask, cu, numbers, lengths, *_strides(mask), B, N, **block_shape())
    return numbers, lengths


def _support(batch: Batch, *logits_and_out: torch.Tensor) -> dict:
    """What rows are restricted to, for their kernels; with the logits and ``out``, for those that write a gradient.

    Where it takes the place of the logits, there is room for the entries of all ids.
    """
    ids, mask = batch.support, batch.support_mask
    found = {
        "support": ids, "support_first": batch.support_first, "support_last": batch.support_last,
        "keep": None if mask is None else mask.view(torch.uint8), "M": 0 if ids is None else ids.shape[0],
        **dict(zip(("support_b", "support_t"), _strides(batch.support_last))),
        **dict(zip(("keep_b", "keep_t"), _strides(mask))),
        "KEEP_ALIGNED": mask is not None and _is_aligned(mask),
    }  # fmt: skip
    if logits_and_out:
        logits, out = logits_and_out
        over = ids is not None and logits.untyped_storage()._cdata == out.untyped_storage()._cdata
        found["scratch"] = ids.new_empty(ids.shape, dtype=torch.float32) if over else None
    return found


def _over(kernel, programs: int):
    """The kernel, to be called over so many programs; over none there is nothing to launch, and CUDA refuses."""
    return kernel[(programs,)] if programs else lambda *args, **kwargs: None


_HERE = contextlib.nullcontext()


def _on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """The tensor's own device, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _HERE


def _crowding(batch: Batch) -> int:
    """How many times fewer lines a row's pass can hold: under a soft cap, or beside a mask."""
    if batch.support_mask is not None:
        return 4
    return 1 if batch.cap is None else 2


def _is_aligned(mask: torch.Tensor) -> bool:
    """Whether each row of it starts at a multiple of 16 bytes, and its length is one."""
    return not any(x % 16 for x in (mask.data_ptr(), mask.shape[2], *_strides(mask)))


def _tile(shape: Callable, V: int, *tensors: torch.Tensor, crowding: int = 1) -> dict[str, int]:
    """How rows are cut into tiles, by where they start; of one tensor, or of several that go together.

    ALIGNED: every access is 16 bytes, from end to end. Else the body of a row is still accessed so, if all rows are
    equally far off a boundary of 16 bytes; if not, every entry by itself. EDGE: the body starts at a multiple of so
    many entries, those of a line of memory if all rows are equally far off one. Rows of tensors that differ in their
    dtype are cut alike only if every one of them starts at 16 bytes.
    """
    if len({x.element_size() for x in tensors}) > 1:
        return _mixed_tile(shape, V, *tensors, crowding=crowding)
    first, size, line = tensors[0], tensors[0].element_size(), line_bytes(tensors[0])
    seq, tok = _strides(first)
    # Where rows start, and how far those of one tensor are apart from another's. All of several numbers are multiples
    # of a power of two where their bitwise or is one.
    at, apart = first.data_ptr() | seq * size | tok * size, 0
    for x in tensors[1:]:
        other_seq, other_tok = _strides(x)
        apart |= (first.data_ptr() - x.data_ptr()) | (seq - other_seq) * size | (tok - other_tok) * size
    wide = line if apart % line == 0 else 16 if apart % 16 == 0 else size
    aligned = wide >= 16 and at % 16 == 0 and V % 16 == 0
    wide = 16 if aligned else wide  # no edges: one kernel, wherever a line starts
    return _tile_of(shape, V, size, wide, aligned, crowding)


def _mixed_tile(shape: Callable, V: int, *tensors: torch.Tensor, crowding: int) -> dict[str, int]:
    size = tensors[0].element_size()
    aligned = V % 16 == 0 and all(
        x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in _strides(x)) for x in tensors
    )
    return _tile_of(shape, V, size, 16 if aligned else size, aligned, crowding)


@functools.lru_cache(maxsize=256)
def _tile_of(shape: Callable, V: int, size: int, wide: int, aligned: bool, crowding: int) -> dict[str, int]:
    return {"ALIGNED": aligned, "EDGE": wide // size, **shape(V, size, min(wide, 16) // size, crowding)}


def _strides(*tensors: torch.Tensor | None) -> list[int]:
    """The first two strides of each, 0 where a size is 1 (so that it broadcasts); of one number or None (0, 0)."""
    found = []
    for x in tensors:
        if x is None or x.dim() == 0:
            found += (0, 0)
        else:
            shape, stride = x.shape, x.stride()
            found += (0 if shape[0] == 1 else stride[0], 0 if shape[1] == 1 else stride[1])
    return found


def _at(batch: Batch) -> int:
    """How far apart sequences lie in the outputs, 0 for packed input, where a token's place is its own."""
    return batch.ids.shape[1] if batch.cu is None else 0


def _stride(count: torch.Tensor | None) -> int:
    return 0 if count is None or count.dim() == 0 else count.stride(0)


def _entropy_like(logps: torch.Tensor, entropy: bool) -> torch.Tensor:
    return torch.empty_like(logps) if entropy else logps.new_empty(0)
