"""Launches: the Triton backend, with the same functions as `grpo_kernels.torch_backend`."""

import contextlib
import math

import torch

from grpo_kernels.inputs import Coefs, Inputs
from grpo_kernels.jit import is_interpreted, triton
from grpo_kernels.kernels.reduce import sequence_kernel, total_kernel
from grpo_kernels.kernels.rows import logprob_kernel, loss_kernel, scale_kernel, slope_kernel
from grpo_kernels.metrics import METRIC_NAMES, SUM_NAMES
from grpo_kernels.variants import TERMS, Plan

_LOG2E = math.log2(math.e)
_WAVE = 64 if torch.version.hip else 32


def tile_shape(V: int, itemsize: int, entropy: bool = False, wave: int = _WAVE) -> dict[str, int]:
    """K, L and launch options for rows of V entries: 16 bytes a thread side by side, K such lines deep.

    One program of 1024 threads fills a multiprocessor, so that few rows are in flight at a time and
    the second pass finds its row in L2. Left to itself ptxas squeezes such a program into 32
    registers, to fit two, and spills; ``maxnreg`` grants it the 64 that one can have. Entropies keep
    more per lane, which leaves registers for one line only.
    """
    vector = 16 // itemsize
    most = 1024 // wave
    warps = max(4, min(most, triton.next_power_of_2(triton.cdiv(V, vector * wave * 2))))
    lanes = vector * wave * warps
    limit = {"maxnreg": 64} if wave == 32 else {}
    if lanes >= V:
        return {"K": 1, "L": triton.next_power_of_2(V), "num_warps": warps, **limit}
    return {"K": 2 if wave == 32 and not entropy else 1, "L": lanes, "num_warps": warps, **limit}


def require_available(device: torch.device) -> None:
    """Raise unless the kernels can run on tensors of this device."""
    if triton is None:
        raise ValueError("backend='triton' needs Triton, which is not installed. `pip install triton`, or use 'torch'.")
    if device.type == "cpu" and not is_interpreted(loss_kernel):
        raise ValueError(
            "backend='triton' on CPU tensors needs Triton's interpreter: set TRITON_INTERPRET=1 before the first "
            "import of grpo_kernels. For speed on a CPU use backend='torch'."
        )


def logprobs(logits, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logps, entropies, stats); stats [B·T, 3] keeps what `slope` needs of each row."""
    B, T = inputs.ids.shape
    V = logits.shape[2]
    logps = logits.new_empty((B, T), dtype=torch.float32)
    entropies = _entropy_like(logps, entropy)
    stats = logits.new_empty((B * T, 3), dtype=torch.float32)
    with _on(logits):
        logprob_kernel[(B * T,)](
            logits, inputs.ids, inputs.mask, inputs.adv, inputs.rewards, logps, entropies, stats,
            *logits.stride()[:2], *_strides(inputs.ids), *_strides(inputs.mask), *_strides(inputs.adv),
            B, T, V, inputs.num_generations, _LOG2E / coefs.temperature, coefs.adv_eps,
            SCALE=plan.scale_rewards, UNBIASED=plan.unbiased, SKIP=plan.skip, ENTROPY=entropy,
            ALIGNED=_aligned(logits), **tile_shape(V, logits.element_size(), entropy),
        )  # fmt: skip
    return logps, entropies, stats


def loss(logits, out, inputs: Inputs, coefs: Coefs, plan: Plan, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, entropies) of a token-level objective, whose gradient goes to ``out`` in the same launch."""
    B, T = inputs.ids.shape
    rows, V = logits.shape[1:]
    logps = logits.new_empty((B, T), dtype=torch.float32)
    entropies = _entropy_like(logps, entropy)
    term = TERMS[plan.term]
    with _on(logits):
        loss_kernel[(B * rows,)](
            logits, out, inputs.ids, inputs.mask, inputs.old, inputs.ref, inputs.adv, inputs.rewards,
            inputs.is_weight, logps, entropies, inputs.count, inputs.loss_scale, inputs.tokens,
            *logits.stride()[:2], *out.stride()[:2], *_strides(inputs.ids), *_strides(inputs.mask),
            *_strides(inputs.old), *_strides(inputs.ref), *_strides(inputs.adv), *_strides(inputs.is_weight),
            _stride(inputs.count),
            B, T, rows, V, inputs.num_generations, _LOG2E / coefs.temperature, 1.0 / coefs.temperature, coefs.beta,
            coefs.w_factor, coefs.h_factor, coefs.adv_eps, term.kind(*coefs.term),
            TERM=term.function, KL=plan.kl_function, SCALE=plan.scale_rewards, UNBIASED=plan.unbiased,
            SKIP=plan.skip, ENTROPY=entropy, BONUS=plan.bonus,
            ALIGNED=_aligned(logits, out), **tile_shape(V, logits.element_size(), entropy),
        )  # fmt: skip
    return logps, entropies


def slope(logits, out, ids, mask, stats, g, h, up, coefs: Coefs) -> None:
    """out = (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)], both factors times ``up``."""
    B, T = ids.shape
    rows, V = logits.shape[1:]
    up = None if up is None else up.expand(B, T)
    with _on(logits):
        slope_kernel[(B * rows,)](
            logits, out, ids, mask, stats, g, h, up, *logits.stride()[:2], *out.stride()[:2], *_strides(ids),
            *_strides(mask), *_strides(up), T, rows, V, _LOG2E / coefs.temperature, 1.0 / coefs.temperature,
            ALIGNED=_aligned(logits, out), **tile_shape(V, logits.element_size(), h is not None),
        )  # fmt: skip


def scale(grad: torch.Tensor, out: torch.Tensor, up: torch.Tensor) -> None:
    """out = grad · up, in place or not; nothing moves in place where up is 1."""
    B, rows, V = grad.shape
    with _on(grad):
        scale_kernel[(B * rows,)](
            grad, out, up, *grad.stride()[:2], *out.stride()[:2], rows, V,
            SAME=grad.data_ptr() == out.data_ptr(), ALIGNED=_aligned(grad, out), **tile_shape(V, grad.element_size()),
        )  # fmt: skip


def objective(
    logps: torch.Tensor, entropies: torch.Tensor | None, inputs: Inputs, coefs: Coefs, plan: Plan, weighted: bool
) -> tuple[torch.Tensor, ...]:
    """The [B, T] maths: (loss [], ℓ [B, T], ∂/∂lp [B, T], ∂/∂H [B, T], sums [S], metrics [M])."""
    B, T = inputs.ids.shape
    losses, g, h = (torch.empty_like(logps) for _ in range(3))
    partial = logps.new_empty((B, len(SUM_NAMES)), dtype=torch.float64)
    sums = logps.new_empty(len(SUM_NAMES), dtype=torch.float64)
    total, metrics = logps.new_empty(()), logps.new_empty(len(METRIC_NAMES))
    term = TERMS[plan.term]
    with _on(logps):
        sequence_kernel[(B,)](
            logps, entropies, inputs.mask, inputs.old, inputs.ref, inputs.adv, inputs.rewards, inputs.is_weight,
            losses, g, h, partial, inputs.count, inputs.loss_scale, inputs.tokens,
            *_strides(inputs.mask), *_strides(inputs.old), *_strides(inputs.ref), *_strides(inputs.adv),
            *_strides(inputs.is_weight), _stride(inputs.count), B, T, inputs.num_generations, coefs.beta,
            coefs.w_factor, coefs.h_factor, coefs.adv_eps, term.kind(*coefs.term),
            TERM=term.function, REGION=term.region, KL=plan.kl_function, SCALE=plan.scale_rewards,
            UNBIASED=plan.unbiased, SKIP=plan.skip, BONUS=plan.bonus, WEIGHTED=weighted, num_warps=4,
        )  # fmt: skip
        total_kernel[(1,)](partial, sums, total, metrics, B, num_warps=4)
    return total, losses, g, h, sums, metrics


def _on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """The tensor's own device, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row starts on 16 bytes, so that loads and stores can be wide."""
    sizes = ((x.element_size(), x.data_ptr(), x.stride(0), x.stride(1)) for x in tensors)
    return all(start % 16 == 0 and b * size % 16 == 0 and t * size % 16 == 0 for size, start, b, t in sizes)


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    """The first two strides, 0 where a size is 1 (so that it broadcasts) or the tensor is missing."""
    if x is None:
        return 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride()[:2]))


def _stride(count: torch.Tensor | None) -> int:
    return 0 if count is None or count.dim() == 0 else count.stride(0)


def _entropy_like(logps: torch.Tensor, entropy: bool) -> torch.Tensor:
    return torch.empty_like(logps) if entropy else logps.new_empty(0)
