"""The random generators of a process: their states, and a block of code that leaves them as they were."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from grpo_kernels.trainer.options import OptionError


def seed_all(seed: int) -> None:
    """torch's on every device, Python's and NumPy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def set_aside(seed: int) -> Iterator[None]:
    """Inside, all generators start from ``seed``; behind it, they go on as if nothing had been drawn."""
    states = random_states()
    seed_all(seed)
    try:
        yield
    finally:
        set_random_states(states)



def random_states() -> dict[str, torch.Tensor]:
    """Of torch on the CPU and each GPU, of Python and of NumPy, as rewards may use them."""
    _, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    if kind != "MT19937":
        raise OptionError(f"NumPy's global generator is {kind}, which a checkpoint cannot hold: leave it MT19937.")
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    has_gauss, gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss if has_gauss else None))
    position, has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy_gauss"].item()))
    cuda = [states[name] for name in sorted(states) if name.startswith("cuda")]
    for i, state in enumerate(cuda[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, i)
