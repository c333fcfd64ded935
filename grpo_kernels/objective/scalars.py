"""What counts as one number: Python's and NumPy's, and where a call says so a tensor without dimensions."""

import numbers

import torch


def is_number(value: object) -> bool:
    """Whether this is a real number of Python or NumPy; True and False are none."""
    return isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether this is an integer of Python or NumPy; True and False are none."""
    return isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)


def plain(value: float) -> float:
    """A number as Python's own int or float."""
    if type(value) in (int, float):
        return value
    return int(value) if is_whole(value) else float(value)


def check_scalar_tensor(name: str, value: torch.Tensor) -> None:
    """A tensor of one number, without dimensions and without a gradient; its value is not looked at."""
    if value.is_nested:
        raise TypeError(f"{name} must be a number or a 0-d tensor, got a nested one.")
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}.")
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a number or a 0-d tensor of one, got {value.dtype}.")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but gradients flow to the logits only. Pass {name}.detach().")
