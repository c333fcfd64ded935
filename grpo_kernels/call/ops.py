"""Custom ops: what torch.compile and the dispatcher see. Each runs on either backend.

``tensors`` and ``numbers`` are a packed `grpo_kernels.objective.batch.Batch`, ``plan`` is the key of a `Plan`. Ops
whose names end in an underscore write over their first argument.
"""

import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_kernels.call import checks
from grpo_kernels.call.library import fake, operator
from grpo_kernels.call.supports import check_support_values, local_support
from grpo_kernels.objective.advantages import normalised_sum
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.corrections import CORRECTIONS
from grpo_kernels.objective.metrics import METRIC_NAMES, SUM_NAMES
from grpo_kernels.objective.parts import absent_part
from grpo_kernels.objective.plan import Plan

_BACKENDS = {"torch": "grpo_kernels.cpu_backend.backend", "triton": "grpo_kernels.triton_backend.launch"}


@functools.cache
def backend_of(name: str):
    return importlib.import_module(_BACKENDS[name])


def choose_backend(backend: str | None, x: Tensor) -> str:
    """``"triton"`` on CUDA (and ROCm) tensors, else ``"torch"``, unless the caller says which."""
    if backend is None:
        return "triton" if x.is_cuda else "torch"
    if not isinstance(backend, str) or backend not in _BACKENDS:
        raise ValueError(f"backend must be None, 'triton' or 'torch', got {backend!r}.")
    if backend == "triton" and not torch.compiler.is_compiling():
        backend_of(backend).require_available(x.device)
    return backend


def check_values(batch: Batch, V: int) -> None:
    if checks.validates(batch.ids.device):
        checks.check_values(batch.ids, batch.mask, V)
        check_support_values(batch, V)


def stats_shape(rows: int, backend: str) -> tuple[int, ...]:
    """Shape of what `slope_op` needs of each row; the torch backend keeps none and computes it again."""
    return (0,) if backend == "torch" else (rows, 3)


@operator()
def logprobs_op(
    logits: Tensor, tensors: Sequence[Tensor | None], numbers: Tensor, plan: str, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, entropies, what `slope_op` needs of each row)"""
    batch = Batch.unpack(tensors, numbers)
    check_values(batch, logits.shape[-1])
    return backend_of(backend).logprobs(logits, batch, Plan.from_key(plan), entropy)


@fake(logprobs_op)
def _(logits, tensors, numbers, plan, entropy, backend):
    logps, entropies = fake_rows(logits, tensors[0], entropy)
    return logps, entropies, logps.new_empty(stats_shape(tensors[0].numel(), backend))


def fake_rows(logits: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    logps = logits.new_empty(ids.shape, dtype=torch.float32)
    return logps, torch.empty_like(logps) if entropy else logps.new_empty(0)


@operator()
def local_ids_op(ids: Tensor, mask: Tensor | None, sizes: Tensor, rank: int) -> Tensor:
    """Token ids counted from where this rank's part of the vocabulary starts; int64, others are out of range.

    ``sizes`` [ranks]: entries of each rank's part.
    """
    if checks.validates(ids.device):
        checks.check_values(ids, mask, int(sizes.sum()))
    return ids.long() - sizes[:rank].sum()


@fake(local_ids_op)
def _(ids, mask, sizes, rank):
    return torch.empty_like(ids, dtype=torch.int64)


@operator()
def local_support_op(
    support: Tensor, first: Tensor, last: Tensor, mask: Tensor | None, sizes: Tensor, rank: int
) -> Tensor:
    """The ids of a `Support` (M,), whole, as `local_ids_op`'s; those of other ranks are passed over."""
    if checks.validates(support.device):
        batch = Batch(first, mask, support=support, support_first=first, support_last=last)
        check_support_values(batch, int(sizes.sum()))
    return local_support(support, sizes, rank)


@fake(local_support_op)
def _(support, *args):
    return torch.empty_like(support)


@operator()
def shard_op(
    logits: Tensor, tensors: Sequence[Tensor | None], numbers: Tensor, plan: str, entropy: bool, backend: str
) -> Tensor:
    """[4·B·T] of logits that hold a part of the vocabulary, for `unite_op`; ids as `local_ids_op` has them."""
    batch, plan = Batch.unpack(tensors, numbers), Plan.from_key(plan)
    if logits.shape[2] == 0:
        return absent_part(batch, plan)
    return backend_of(backend).shard(logits, batch, plan, entropy)


@fake(shard_op)
def _(logits, tensors, numbers, plan, entropy, backend):
    return logits.new_empty(4 * tensors[0].numel(), dtype=torch.float32)


@operator()
def unite_op(
    parts: Tensor, tensors: Sequence[Tensor | None], numbers: Tensor, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What `logprobs_op` gives, from `shard_op`'s [ranks, 4·B·T] of all ranks."""
    return backend_of(backend).unite(parts, Batch.unpack(tensors, numbers), entropy)


@fake(unite_op)
def _(parts, tensors, numbers, entropy, backend):
    return *fake_rows(parts, tensors[0], entropy), parts.new_empty(tensors[0].numel(), 3)


def _loss(logits, out, tensors, numbers, plan, entropy, backend) -> tuple[Tensor, ...]:
    batch = Batch.unpack(tensors, numbers)
    check_values(batch, logits.shape[-1])
    return backend_of(backend).loss(logits, out, batch, Plan.from_key(plan), entropy)


def fake_totals(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = like.new_empty(len(SUM_NAMES), dtype=torch.float64)
    return like.new_empty((), dtype=torch.float32), sums, like.new_empty(len(METRIC_NAMES), dtype=torch.float32)


@operator()
def loss_op(
    logits: Tensor, tensors: Sequence[Tensor | None], numbers: Tensor, plan: str, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropies, loss [], sums [S], metrics [M], gradient of the logits)"""
    out = logits.new_empty(logits.shape)
    return *_loss(logits, out, tensors, numbers, plan, entropy, backend), out


@fake(loss_op)
def _(logits, tensors, numbers, plan, entropy, backend):
    return *fake_rows(logits, tensors[0], entropy), *fake_totals(logits), logits.new_empty(logits.shape)


@operator(writes_over="logits")
def loss_op_(
    logits: Tensor, tensors: Sequence[Tensor | None], numbers: Tensor, plan: str, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`loss_op`, the gradient taking the place of the logits."""
    return _loss(logits, logits, tensors, numbers, plan, entropy, backend)


@fake(loss_op_)
def _(logits, tensors, numbers, plan, entropy, backend):
    return *fake_rows(logits, tensors[0], entropy), *fake_totals(logits)


@operator()
def objective_op(
    logps: Tensor, entropies: Tensor | None, tensors: Sequence[Tensor | None], numbers: Tensor, plan: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], sums [S], metrics [M], ℓ, local, spread, share, ∂/∂H); see the backends.

    Where the loss is weighted, ``local`` is all of ∂L/∂lp, and ℓ, ``spread`` and ``share`` are empty; ∂/∂H is where
    there is no bonus.
    """
    batch, plan = Batch.unpack(tensors, numbers), Plan.from_key(plan)
    run = backend_of(backend)
    *totals, losses, local, spread, share, h = run.objective(logps, entropies, batch, plan)
    if plan.weighted and plan.spread:
        local, spread, share = run.join(local, spread, share, None, batch.cu), None, None
    return *totals, *(logps.new_empty(0) if x is None else x for x in (losses, local, spread, share, h))


@fake(objective_op)
def _(logps, entropies, tensors, numbers, plan, backend):
    plan = Plan.from_key(plan)
    apart = bool(plan.spread) and not plan.weighted
    found = (not plan.weighted, True, apart, apart, plan.bonus)
    return *fake_totals(logps), *(torch.empty_like(logps) if each else logps.new_empty(0) for each in found)


@operator()
def join_op(
    local: Tensor, spread: Tensor, share: Tensor, up: Tensor | None, cu: Tensor | None, backend: str
) -> Tensor:
    """∂L/∂lp = up·local + share·Σ up·spread, the sum over each sequence."""
    return backend_of(backend).join(local, spread, share, up, cu)


@fake(join_op)
def _(local, *args):
    return torch.empty_like(local)


@operator()
def correct_op(old: Tensor, tensors: Sequence[Tensor | None], numbers: Tensor, mode: str, backend: str) -> Tensor:
    """Importance weights, (B, T) or (B, 1), from the sampler's log-probabilities."""
    return backend_of(backend).correct(old, Batch.unpack(tensors, numbers), CORRECTIONS[mode])


@fake(correct_op)
def _(old, tensors, numbers, mode, backend):
    shape = (Batch(*tensors).sequences, 1) if CORRECTIONS[mode].per_sequence else old.shape
    return old.new_empty(shape, dtype=torch.float32)


@operator()
def threshold_op(
    ordered: Tensor, everywhere: Tensor, tensors: Sequence[Tensor | None], numbers: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """The entropy above which a token acts on the policy term [], and how many of this batch do []."""
    if everywhere.numel() == 0:
        return ordered.new_full((), torch.inf), ordered.new_zeros(())
    return backend_of(backend).threshold(ordered, everywhere, Batch.unpack(tensors, numbers).quantile)


@fake(threshold_op)
def _(ordered, everywhere, tensors, numbers, backend):
    return ordered.new_empty(()), ordered.new_empty(())


@operator()
def segments_op(mask: Tensor | None, cu: Tensor, N: int, backend: str) -> tuple[Tensor, Tensor]:
    """Of packed input: the sequence of each token [N] int32, and the unmasked tokens of each sequence."""
    if checks.validates(cu.device):
        checks.check_bounds(cu, N)
    return backend_of(backend).segments(mask, cu, N)


@fake(segments_op)
def _(mask, cu, N, backend):
    return cu.new_empty(N, dtype=torch.int32), cu.new_empty(cu.shape[0] - 1, dtype=torch.float32)


@operator()
def groups_op(sizes: Tensor, B: int, backend: str) -> Tensor:
    """(2, B) int32: first row and size of each row's group, see `grpo_kernels.objective.advantages.group_rows`."""
    if checks.validates(sizes.device):
        checks.check_group_sizes(sizes.tolist(), B)
    return backend_of(backend).groups(sizes, B)


@fake(groups_op)
def _(sizes, B, backend):
    return sizes.new_empty((2, B), dtype=torch.int32)


@operator()
def batch_std_op(rewards: Tensor, unbiased: bool, backend: str) -> Tensor:
    """The spread of the rewards [], fp32, see `grpo_kernels.objective.advantages.batch_spread`."""
    return backend_of(backend).batch_std(rewards, unbiased).float()


@fake(batch_std_op)
def _(rewards, unbiased, backend):
    return rewards.new_empty((), dtype=torch.float32)


@operator()
def normalised_sum_op(
    rewards: Tensor, weights: Sequence[float], size: int, groups: Tensor | None, unbiased: bool, eps: float
) -> Tensor:
    """(B,) advantages of (B, K) rewards, see `grpo_kernels.objective.advantages.normalised_sum`."""
    return normalised_sum(rewards, weights, size, groups, unbiased, eps, None)


@fake(normalised_sum_op)
def _(rewards, *args):
    return rewards.new_empty(rewards.shape[0])


@operator()
def slope_op(
    logits: Tensor, tensors: Sequence[Tensor | None], numbers: Tensor, stats: Tensor, g: Tensor, h: Tensor | None,
    up: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    """Gradient of the logits, (1/temperature)·[g·(onehot − p) + h·p·(x̄ − x)] times ``up``."""
    out = logits.new_empty(logits.shape)
    if out.numel() == 0:
        return out
    backend_of(backend).slope(logits, out, Batch.unpack(tensors, numbers), stats, g, h, up)
    return out


@fake(slope_op)
def _(logits, *args):
    return logits.new_empty(logits.shape)


@operator(writes_over="logits")
def slope_op_(
    logits: Tensor, tensors: Sequence[Tensor | None], numbers: Tensor, stats: Tensor, g: Tensor, h: Tensor | None,
    up: Tensor | None, backend: str,
) -> None:  # fmt: skip
    """`slope_op`, the gradient taking the place of the logits."""
    if logits.numel() == 0:
        return
    backend_of(backend).slope(logits, logits, Batch.unpack(tensors, numbers), stats, g, h, up)


@fake(slope_op_)
def _(*args):
    return None


@operator()
def scale_op(grad: Tensor, up: Tensor, backend: str) -> Tensor:
    out = torch.empty_like(grad)
    backend_of(backend).scale(grad, out, up)
    return out


@fake(scale_op)
def _(grad, up, backend):
    return torch.empty_like(grad)


@operator(writes_over="grad")
def scale_op_(grad: Tensor, up: Tensor, backend: str) -> None:
    backend_of(backend).scale(grad, grad, up)


@fake(scale_op_)
def _(*args):
    return None
