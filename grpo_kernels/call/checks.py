"""Argument checks: each error names the argument, what came, what was wanted, and the remedy."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from grpo_kernels.objective.advantages import ESTIMATORS, divisor_name
from grpo_kernels.objective.scalars import check_scalar_tensor, is_number, is_whole, plain
from grpo_kernels.objective.validation import validates

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_MASKS = (torch.bool, *_INTEGERS, *LOGITS_DTYPES, torch.float64)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if value.is_nested or value.layout is not torch.strided:
        kind = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one. Pad it, or pass {name}.to_dense().")


def check_flags(**flags: object) -> None:
    """Each True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}.")


def is_integer(x: torch.Tensor) -> bool:
    return x.dtype in _INTEGERS


def is_dtensor(x: torch.Tensor) -> bool:
    if type(x) is torch.Tensor or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


class Layout(NamedTuple):
    """B sequences of T tokens each, or packed: B sequences (0: not known) in T tokens, one after another."""

    B: int
    T: int
    packed: bool

    @property
    def per_token(self) -> dict[str, tuple]:
        return {"(N,)": (self.T,)} if self.packed else {"(B, T)": (self.B, self.T)}

    @property
    def per_sequence(self) -> dict[str, tuple]:
        return {"(S,)": (self.B,)} if self.packed else {"(B,)": (self.B,), "(B, 1)": (self.B, 1)}

    def rows(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """Something per token, or per sequence, as the backends have it: two-dimensional."""
        if x is None or x.dim() == 2:  # per token, per sequence, or one number
            return x
        if self.packed and tuple(x.shape) != (self.B,):
            return x.unsqueeze(0)
        return x.unsqueeze(1)

    def tokens(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """Something per token as the backends have it."""
        return x.unsqueeze(0) if x is not None and self.packed else x

    def restore(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """Undoes `tokens`: the shape that the caller's tensors have."""
        return x[0] if x is not None and self.packed and x.dim() else x


def check_logits(
    logits: torch.Tensor, completion_ids: torch.Tensor, cu_seqlens: torch.Tensor | None = None, *, part: bool = False
) -> Layout:
    """The layout of logits (B, T, V) or (B, T+1, V) and ids (B, T); or of packed (N, V) and (N,).

    ``part``: the logits are a part of the vocabulary, which may have no entry.
    """
    check_tensor("logits", logits)
    check_tensor("completion_ids", completion_ids)
    if is_dtensor(logits):
        raise ValueError(
            "logits is a DTensor, whose gradient the loss cannot place. Pass logits.to_local(): with vocab_group if "
            "the vocabulary is sharded, else with the inputs of those rows."
        )
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"logits must be float32, bfloat16 or float16, got {logits.dtype}. Cast them: logits.float(); for a "
            "float64 result use the plain PyTorch code in reference/."
        )
    if not is_integer(completion_ids):
        raise TypeError(f"completion_ids must be integers, got {completion_ids.dtype}. Cast them: .long().")
    if completion_ids.dim() not in (1, 2):
        raise ValueError(f"completion_ids must be (B, T), or packed (N,), got {tuple(completion_ids.shape)}.")
    packed = completion_ids.dim() == 1
    if packed and (logits.dim() != 2 or logits.shape[0] != completion_ids.shape[0]):
        raise ValueError(
            f"packed logits must be (N, V) with N = {completion_ids.shape[0]} from completion_ids, got "
            f"{tuple(logits.shape)}. logits[i] scores completion_ids[i]."
        )
    shape = tuple(completion_ids.shape)
    if not packed and tuple(logits.shape[:-1]) not in (shape, (shape[0], shape[1] + 1)):
        raise ValueError(
            f"logits must be (B, T, V) or (B, T+1, V) with (B, T) = {shape} from completion_ids, got "
            f"{tuple(logits.shape)}. logits[b, t] scores completion_ids[b, t]: cut the prompt off both."
        )
    if logits.shape[-1] == 0 and not part:
        raise ValueError(f"logits {tuple(logits.shape)} are without a vocabulary: their last dimension is V.")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"logits must be contiguous in the vocabulary, got strides {logits.stride()}. Make them so with "
            "logits.contiguous(), which copies, or do not transpose them."
        )
    check_device("completion_ids", completion_ids, logits)
    return check_layout(shape, cu_seqlens, logits)


def check_logprobs(logps: torch.Tensor, entropy: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> Layout:
    """The layout of log-probabilities (B, T), or packed (N,), and entropies of the same shape."""
    for name, value in (("logps", logps), ("entropy", entropy)):
        if value is None and name == "entropy":
            continue
        check_tensor(name, value)
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {value.dtype}.")
        if value.dim() not in (1, 2):
            raise ValueError(f"{name} must be (B, T), or packed (N,), got {tuple(value.shape)}.")
        check_shape(name, value, {"as logps": tuple(logps.shape)})
        check_device(name, value, logps)
    return check_layout(tuple(logps.shape), cu_seqlens, logps)


def check_layout(shape: tuple[int, ...], cu_seqlens: torch.Tensor | None, like: torch.Tensor) -> Layout:
    """The layout of a per-token tensor of this shape, with the bounds of its sequences where it is packed."""
    if cu_seqlens is None:
        return Layout(0, shape[0], True) if len(shape) == 1 else Layout(*shape, False)
    check_tensor("cu_seqlens", cu_seqlens)
    if len(shape) != 1:
        raise ValueError(f"cu_seqlens goes with packed input, logits (N, V) and ids (N,); got ids {shape}.")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < (2 if shape[0] else 1):
        raise ValueError(f"cu_seqlens must be (S+1,), from 0 to N, got {tuple(cu_seqlens.shape)}.")
    check_device("cu_seqlens", cu_seqlens, like)
    return Layout(cu_seqlens.shape[0] - 1, shape[0], True)


def check_bounds(cu_seqlens: torch.Tensor, N: int) -> None:
    """Values of cu_seqlens: from 0 to N, never falling."""
    if bool((cu_seqlens.diff() < 0).any()) or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != N:
        raise ValueError(f"cu_seqlens must rise from 0 to N = {N}, got {cu_seqlens.tolist()}.")


def check_device(name: str, value: torch.Tensor, logits: torch.Tensor) -> None:
    if value.device != logits.device:
        raise ValueError(f"{name} is on {value.device} but the logits are on {logits.device}. Move it there.")


def check_no_grad(name: str, value: torch.Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name} requires grad, but gradients flow to the logits only. Pass {name}.detach(), or build the "
            "objective from token_logprobs."
        )


def check_float(name: str, value: torch.Tensor | None, logits: torch.Tensor, shapes: dict[str, tuple]) -> None:
    """A detached floating-point tensor of one of the named shapes, on the logits' device; or None."""
    if value is None:
        return
    check_tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {value.dtype}. Cast it: .float().")
    check_shape(name, value, shapes)
    check_device(name, value, logits)
    check_no_grad(name, value)


def check_shape(name: str, value: torch.Tensor, shapes: dict[str, tuple]) -> None:
    if tuple(value.shape) not in shapes.values():
        wanted = " or ".join(f"{label} = {shape}" for label, shape in shapes.items())
        raise ValueError(f"{name} must be {wanted}, got {tuple(value.shape)}.")


def check_mask(name: str, mask: torch.Tensor | None, logits: torch.Tensor, layout: Layout) -> None:
    if mask is None:
        return
    check_tensor(name, mask)
    if mask.dtype not in _MASKS:
        raise TypeError(f"{name} must be bool, int or float, got {mask.dtype}. Compare it: {name} != 0.")
    check_shape(name, mask, layout.per_token)
    check_device(name, mask, logits)
    check_no_grad(name, mask)


def check_not_negative(rewards: torch.Tensor) -> None:
    """Of maxrl; where the host need not wait for a device."""
    if not validates(rewards.device):
        return
    if bool(((rewards < 0) & rewards.isfinite()).any()):
        raise ValueError("advantage_estimator='maxrl' divides by the group's mean: rewards must not be negative.")


def check_rewards(
    rewards: torch.Tensor, num_generations: object, scale_rewards: str, estimator: str = "group", weights: object = None
) -> None:
    check_tensor("rewards", rewards)
    if not rewards.dtype.is_floating_point:
        raise TypeError(f"rewards must be floating point, got {rewards.dtype}. Cast them: rewards.float().")
    if rewards.dim() not in (1, 2) or (rewards.dim() == 2 and rewards.shape[1] == 0):
        raise ValueError(f"rewards must be (B,), one per completion, or (B, K), K each, got {tuple(rewards.shape)}.")
    if weights is not None and (rewards.dim() == 1 or len(weights) != rewards.shape[1]):
        raise ValueError(
            f"reward_weights are {len(weights)} and go with rewards (B, {len(weights)}), got {tuple(rewards.shape)}. "
            "Rewards that are summed already need none."
        )
    if not isinstance(estimator, str) or estimator not in ESTIMATORS:
        raise ValueError(f"advantage_estimator must be one of {', '.join(map(repr, ESTIMATORS))}, got {estimator!r}.")
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards must be 'group', 'batch' or 'none', got {scale_rewards!r}.")
    if num_generations is None:
        raise ValueError("rewards need num_generations: the completions per prompt, or the sizes of the groups.")
    if isinstance(num_generations, torch.Tensor):
        check_sizes_tensor(num_generations, rewards)
        return
    if isinstance(num_generations, (list, tuple)):
        wrong = [size for size in num_generations if not is_whole(size)]
        if wrong:
            raise TypeError(f"num_generations must hold integers, got a {type(wrong[0]).__name__}, {wrong[0]!r}.")
        check_group_sizes(num_generations, rewards.shape[0])
        return
    if not is_whole(num_generations):
        raise TypeError(
            "num_generations must be an int, or the sizes of the groups, a list or 1-D tensor of them; got "
            f"{type(num_generations).__name__}."
        )
    if num_generations < 1 or (num_generations < 2 and divisor_name(estimator, scale_rewards) == "group"):
        raise ValueError(
            f"num_generations={num_generations} gives no group to compare with: sample at least 2 completions per "
            "prompt, or pass advantages."
        )
    if rewards.shape[0] % num_generations:
        raise ValueError(
            f"rewards has {rewards.shape[0]} rows, which is not a multiple of num_generations={num_generations}: "
            "rows [k·G, (k+1)·G) must share a prompt. Where groups differ in size pass their sizes."
        )


def check_sizes_tensor(sizes: torch.Tensor, rewards: torch.Tensor) -> None:
    """Checks sizes of groups that are a tensor; their values only where the host need not wait for a device."""
    if not is_integer(sizes):
        raise TypeError(f"num_generations must hold integers, got {sizes.dtype}.")
    if sizes.dim() != 1 or sizes.numel() == 0:
        raise ValueError(f"num_generations must be an int, or (groups,), their sizes; got {tuple(sizes.shape)}.")
    if sizes.device != rewards.device:
        if sizes.device.type != "cpu":
            check_device("num_generations", sizes, rewards)
        check_group_sizes(sizes.tolist(), rewards.shape[0])


def check_group_sizes(sizes: Sequence[int], B: int) -> None:
    """Values of sizes of groups: positive, and B together."""
    if any(size < 1 for size in sizes) or sum(sizes) != B:
        raise ValueError(
            f"num_generations as sizes of groups must be positive and add up to the {B} rewards, got {list(sizes)}, "
            f"which add up to {sum(sizes)}."
        )


def check_temperature(
    temperature: torch.Tensor | float, logits: torch.Tensor, layout: Layout
) -> torch.Tensor | float:
    """A number above 0, or a tensor of them per sequence or token; one without dimensions comes back as (1, 1)."""
    if not isinstance(temperature, torch.Tensor) or temperature.dim() == 0:
        temperature = check_factor("temperature", temperature, logits, "a number, or a tensor of them")
    if not isinstance(temperature, torch.Tensor):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, or a tensor of them, got {temperature!r}.")
        return temperature
    if temperature.dim() == 0:
        temperature = temperature.float().reshape(1, 1)
    else:
        check_float("temperature", temperature, logits, {**layout.per_token, **layout.per_sequence})
    if validates(logits.device) and not bool((temperature.float() > 0).all()):  # float8 has no comparison
        raise ValueError("temperature must be above 0 everywhere, masked tokens included (1 will do there).")
    return temperature


def check_factor(
    name: str, value: torch.Tensor | float, logits: torch.Tensor, wanted: str = "a number or a 0-d tensor"
) -> torch.Tensor | float:
    """A Python number, or a 0-d tensor on the logits' device (a 0-d CPU tensor becomes a number)."""
    if not isinstance(value, torch.Tensor):
        if not is_number(value):
            raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}.")
        return plain(value)
    check_scalar_tensor(name, value)
    if value.device != logits.device:
        if value.device.type != "cpu":
            check_device(name, value, logits)
        return value.item()  # on the CPU: no device is waited for
    return value


def check_count(name: str, value: torch.Tensor | float | None, logits: torch.Tensor) -> torch.Tensor | float | None:
    """`check_factor` of a count, which may be 0 but not less; None where there is none. A tensor is not read."""
    if value is None:
        return None
    value = check_factor(name, value, logits)
    if not isinstance(value, torch.Tensor) and not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, or a 0-d tensor, got {value}.")
    return value


def check_inplace(logits: torch.Tensor) -> None:
    """``inplace=True`` refuses a leaf, a view of a leaf, and entries that share memory."""
    if logits.is_leaf:
        raise ValueError(
            "inplace=True would overwrite a leaf tensor that requires grad. Use inplace=False, or pass logits that "
            "a model computed."
        )
    if torch.compiler.is_compiling():
        return
    if logits._base is not None and logits._base.is_leaf and logits._base.requires_grad:
        raise ValueError("inplace=True would overwrite a view of a leaf tensor that requires grad. Use inplace=False.")
    if logits.numel() and any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride())):
        raise ValueError("inplace=True needs logits whose entries do not share memory, got an expanded tensor.")


def check_mask_values(mask: torch.Tensor | None) -> None:
    """A mask of zeros and ones."""
    if mask is None or mask.dtype == torch.bool:
        return
    if not torch.equal(mask, mask.clamp(0, 1).ceil()):
        strange = (mask != 0) & (mask != 1)
        raise ValueError(
            f"the mask must hold only 0 and 1, got {mask[strange][0].item()}. A weight per token belongs into the "
            "objective (importance_weights, advantages)."
        )


def check_parts(tokens: list[int]) -> None:
    """How many tokens' logits each rank of a vocab_group has."""
    if len(set(tokens)) > 1:
        raise ValueError(
            f"the ranks of vocab_group have logits of {tokens} tokens. Each must have its part of the vocabulary for "
            "the same tokens."
        )


def check_group(name: str, group: object, axis: str) -> None:
    """A process group or None; ``axis``: what a device mesh may call its own."""
    if group is None:
        return
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup, got {type(group).__name__}. From a device mesh: "
            f'mesh.get_group("{axis}").'
        )


def check_vocab_group(group: object) -> object | None:
    """A process group of more than one rank, or None."""
    check_group("vocab_group", group, "tp")
    return None if group is None or group.size() == 1 else group


def check_values(completion_ids: torch.Tensor, mask: torch.Tensor | None, V: int) -> None:
    """Ids inside the vocabulary wherever the mask counts them, and a mask of zeros and ones."""
    check_mask_values(mask)
    if completion_ids.numel() == 0:
        return
    low, high = completion_ids.aminmax()
    if low.item() >= 0 and high.item() < V:
        return
    outside = (completion_ids < 0) | (completion_ids.long() >= V)  # V may lie beyond a narrow dtype's numbers
    if mask is not None:
        outside &= mask != 0
    if bool(outside.any()):
        where = outside.nonzero()[0].tolist()
        raise IndexError(
            f"completion_ids[{', '.join(map(str, where))}] = {completion_ids[tuple(where)].item()} is outside the "
            f"vocabulary of {V}. Mask the position, or check that the tokenizer belongs to the model."
        )
