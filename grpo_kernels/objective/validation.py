"""Whether a call looks at the values that it is given."""

import os

import torch


def validates(device: torch.device) -> bool:
    """Whether values are checked: on the CPU, and elsewhere with GRPO_KERNELS_VALIDATE=1, which syncs.

    Never while torch.compile traces, where there are none.
    """
    if torch.compiler.is_compiling():
        return False
    setting = os.environ.get("GRPO_KERNELS_VALIDATE")
    if not setting:
        return device.type == "cpu"
    if setting not in ("0", "1"):
        raise ValueError(f"GRPO_KERNELS_VALIDATE must be 0 or 1, got {setting!r}.")
    return setting == "1"
