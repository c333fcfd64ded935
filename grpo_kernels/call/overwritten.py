"""With GRPO_KERNELS_VALIDATE=1: logits that ``inplace=True`` has given up are not read again unnoticed.

Autograd notices a graph that was built before the logits were overwritten. One built afterwards reads whatever
lies there. Under validation the gradient gets memory of its own, the logits are filled with NaN, and the tensor
that the caller holds refuses every operation. Other views of the same memory cannot refuse, and read NaN.
"""

import os

import torch

_DESCRIBES = frozenset({
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "grad_fn", "is_leaf", "retains_grad",
    "is_cuda", "is_cpu", "itemsize", "nbytes", "_version", "_base", "_backward_hooks",
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous",
    "is_floating_point", "data_ptr", "untyped_storage",
})  # fmt: skip


class OverwrittenLogits(torch.Tensor):
    """What the caller's tensor becomes. It still says its shape and the like."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = function.__name__
        if name == "__get__":
            name = function.__self__.__name__
        if name in _DESCRIBES:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise RuntimeError(
            f"{name}: these logits are gone, inplace=True has overwritten them with their gradient. Compute what needs "
            "them from a clone that is made before the loss, or use inplace=False."
        )


def are_guarded() -> bool:
    """Whether to guard logits that are given up: GRPO_KERNELS_VALIDATE=1 asks for it, and no compiler traces."""
    return os.environ.get("GRPO_KERNELS_VALIDATE") == "1" and not torch.compiler.is_compiling()


def give_up(logits: torch.Tensor) -> None:
    """Fills the logits with NaN and makes the caller's tensor refuse operations.

    A graph that was built earlier notices the change in place.
    """
    logits.detach().fill_(torch.nan)
    whole = logits._base
    for x in (logits, whole if whole is not None and whole.numel() == logits.numel() else None):
        if type(x) is torch.Tensor:
            x.__class__ = OverwrittenLogits
