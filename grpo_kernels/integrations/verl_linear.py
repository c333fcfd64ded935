"""verl's fused linear op, log-probabilities and entropies from hidden states and the head, on `linear_token_logprobs`.

verl has two with one purpose, chosen by ``model.fused_kernel_options.impl_backend``: `linear_cross_entropy` (triton)
and `FusedLinearForPPO` (torch, liger). `patch()` replaces both; importing `grpo_kernels.integrations.verl_patch` does
so where no code of yours runs.
"""

import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import distributed as dist

from grpo_kernels.api.linear import linear_token_logprobs
from grpo_kernels.api.logprobs import TokenLogprobs

TESTED = "0.9"


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`, on a CPU too and for any hidden size.

    Args:
        hidden: (B, T, H) or (N, H), fp32, bf16 or fp16.
        weight: (V, H), in the dtype of ``hidden``.
        labels: (B, T) or (N,), integers: what the hidden state of that position predicts.
        temperature: divides the logits.
        reduction: of the log-probabilities: ``"none"``, ``"sum"`` or ``"mean"``.
        dist_process_group: ranks that the vocabulary is sharded over; None, or a group of one.

    Returns:
        Log-probabilities (N,), or () if reduced, and entropies (N,), N = B·T; fp32, differentiable in ``hidden`` and
        ``weight``.

    Raises:
        ValueError: another reduction, a group of several ranks, wrong shapes or devices.
        TypeError: wrong dtypes.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}.")
    if dist_process_group is not None and dist.get_world_size(dist_process_group) > 1:
        raise ValueError(
            f"dist_process_group has {dist.get_world_size(dist_process_group)} ranks: the fused op does not take a "
            "weight that is sharded over the vocabulary. Use verl's own op (undo patch()), or "
            "tensor_model_parallel_size=1."
        )
    logps, entropy = _score(hidden, weight, labels, temperature)
    return _REDUCTIONS[reduction](logps), entropy


_REDUCTIONS = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}


def fused_linear_for_ppo(
    hidden_states: torch.Tensor, vocab_weights: torch.Tensor, input_ids: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `verl.utils.experimental.torch_functional.FusedLinearForPPO` computes.

    Args:
        hidden_states: (B, T, H) or (N, H), fp32, bf16 or fp16.
        vocab_weights: (V, H), in the same dtype. Under autocast both are cast to its dtype, as a product would be.
        input_ids: (B, T) or (N,), integers: what the hidden state of that position predicts, shifted already.
        temperature: divides the logits.

    Returns:
        Log-probabilities, fp32, and entropies, in the dtype of ``hidden_states``, both shaped as ``input_ids``;
        differentiable in hidden states and weights.

    Raises:
        ValueError, TypeError: wrong shapes, devices or dtypes.
    """
    if input_ids.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"input_ids must be {tuple(hidden_states.shape[:-1])}, as hidden_states without its last dimension, got "
            f"{tuple(input_ids.shape)}."
        )
    dtype, device = hidden_states.dtype, hidden_states.device.type
    if torch.is_autocast_enabled(device):
        cast = torch.get_autocast_dtype(device)
        hidden_states, vocab_weights = hidden_states.to(cast), vocab_weights.to(cast)
    logps, entropy = _score(hidden_states, vocab_weights, input_ids, temperature)
    return logps.view(input_ids.shape), entropy.view(input_ids.shape).to(dtype)


def _score(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, temperature: float) -> TokenLogprobs:
    """Of rows one after the other: (N,) each."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return linear_token_logprobs(rows, weight, ids.reshape(-1), temperature=temperature, return_entropy=True)


def _forward(
    self, hidden_states: torch.Tensor, vocab_weights: torch.Tensor, input_ids: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of `FusedLinearForPPO.forward`; its chunk_size and impl_backend say nothing here."""
    return fused_linear_for_ppo(hidden_states, vocab_weights, input_ids, temperature)


def patch() -> Callable[[], None]:
    """Puts `linear_cross_entropy` and `fused_linear_for_ppo` in the place of verl's own, for every caller.

    It has no effect unless ``model.use_fused_kernels`` is on: only then does verl call these ops. Patching twice is
    patching once.

    Returns:
        A function that undoes it.

    Raises:
        ImportError: without verl, with the remedy.
    """
    try:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO
        from verl.utils.kernel import linear_cross_entropy as home
    except ImportError as error:
        raise without_verl(error) from error
    if FusedLinearForPPO.forward is not _forward:
        _stock.update(op=home.linear_cross_entropy, forward=FusedLinearForPPO.forward)
    _replace(_stock["op"], linear_cross_entropy)
    FusedLinearForPPO.forward = _forward

    def undo() -> None:
        _replace(linear_cross_entropy, _stock["op"])
        FusedLinearForPPO.forward = _stock["forward"]

    return undo


_stock: dict[str, Callable] = {}  # verl's own


def _replace(old: Callable, new: Callable) -> None:
    """In every module of verl that has the name: Megatron's import it by name."""
    for module in [module for name, module in sys.modules.items() if name.startswith("verl.")]:
        if isinstance(module, ModuleType) and vars(module).get("linear_cross_entropy") is old:
            module.linear_cross_entropy = new


def without_verl(error: ImportError) -> ImportError:
    """What to raise where verl cannot be imported; the error itself if verl is there and lacks something else."""
    if (error.name or "").split(".")[0] != "verl":
        return error
    return ImportError(
        f"grpo_kernels.integrations.verl needs verl {TESTED}, which cannot be imported here ({error}). "
        f'Install it: pip install "verl=={TESTED}.*".',
        name=error.name,
    )
