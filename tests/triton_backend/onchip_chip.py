"""The on-chip kernel's stand-in in the place of the kernel, for the tests of its ways."""

import pytest
import torch

from cases import check, make_case
from gluon_standin import Kernel
from grpo_kernels.triton_backend import onchip, onchip_launch, ways
from pretend_gpu import pretended

ON_GPU = torch.cuda.is_available()
body = pytest.mark.skipif(ON_GPU or pretended(), reason="runs the kernel's body on the CPU; this process sees a GPU")
LINE = 256  # bf16 entries of a line of one warp
BF16 = torch.bfloat16


class Chip:
    """The kernel's stand-in, as launched for any number of programs and slots."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.kernel = None
        monkeypatch.setenv(ways.VARIABLE, "onchip")
        monkeypatch.setattr(ways, "device_obstacle", lambda logits: None)
        monkeypatch.setattr(ways, "LEAST_BYTES", 0)

    def set(self, programs=3, slots=3, lines=1, lag=2, held=12, width=0, tickets=False, **changes):
        def launcher(logits, inputs, entropy):
            shape = onchip_launch._shape(logits.shape[2], slots=slots, lines=lines, warps=1, lag=lag, registers=128,
                                         programs=programs, itemsize=logits.element_size(), held=held, width=width,
                                         tickets=tickets)  # fmt: skip
            del shape["programs"]
            shape["tickets"] = torch.zeros(1, dtype=torch.int32) if tickets else None
            self.shape = shape
            rows = logits.shape[0] * logits.shape[1]
            self.kernel = Kernel(onchip.onchip_kernel, min(programs, rows), changes)
            return self.kernel, shape

        self.monkeypatch.setattr(onchip_launch, "launcher", launcher)
        return self


def case_of(V=3 * LINE + 40, **kwargs):
    return make_case(V=V, dtype=BF16, spread=3.0, **kwargs)


GIVEN = ("completion_ids", "advantages", "old_logps", "completion_mask")


def check_case(case, *names, **kwargs):
    names = names or GIVEN
    return check(case.logits, "triton", **case.inputs(*names), **kwargs)


ODD_ROWS = {  # what the row is like, and what its gradient must be
    "token at −inf": ("token", -torch.inf),
    "token below 2^-64": ("token", -60.0),
    "token below 2^-150": ("token", -120.0),
    "banned entries": ("others", -torch.inf),
    "huge logits": ("all", 1e5),
    "NaN": ("one", torch.nan),
    "+inf": ("one", torch.inf),
    "an entry far above": ("one", 300.0),
}


def spoil(case, ids, name):
    """Makes three rows such ones."""
    which, value = ODD_ROWS[name]
    for b, t in ((0, 1), (1, 0), (2, 3)):
        if which == "token":
            case.logits[b, t, ids[b, t]] = value
        elif which == "others":
            keep = case.logits[b, t, ids[b, t]].clone()
            case.logits[b, t, : 2 * LINE] = value
            case.logits[b, t, ids[b, t]] = keep
        elif which == "all":
            case.logits[b, t] += value
        else:
            case.logits[b, t, 7] = value
