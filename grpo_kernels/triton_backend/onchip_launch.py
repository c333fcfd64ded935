"""Shape and launch of the on-chip kernel."""

import torch

from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.language import tl
from grpo_kernels.objective.plan import Plan
from grpo_kernels.triton_backend.onchip import onchip_kernel
from grpo_kernels.triton_backend.rewards import group_advantage
from grpo_kernels.triton_backend.row_kernels import kernel
from grpo_kernels.triton_backend.shapes import OPTIONS, crowded

_SHORT = 2 * 36_864  # bytes of a row, of which a third of a multiprocessor holds one
MOST_HELD = 12  # lines in registers: with more the kernel spills
_FITS = 16 * 512 * (28 + MOST_HELD)  # bytes of a row that slots and registers hold
# Of longer rows, by bytes of an entry: slots, lines, lag, width, held.
_LONG = {2: (14, 2, 4, 1, 1), 4: (28, 1, 4, 2, 2)}
_LONG_CROWDED = (28, 1, 4, 1, 1)


def onchip_shape(V: int, crowded: int = 0, itemsize: int = 2) -> dict[str, int]:
    """Slots, lines, lag and options for rows of V entries, and ``programs`` per multiprocessor.

    ``crowded``: see `shapes.crowded`.

    Measured on an H200 in bf16, in × copy: one program of 16 warps with 7 slots of 4 lines takes 1.13 at V = 151936 and
    1.11 at 128256; three of 8 warps with 6 slots of 2 lines take 1.23 at V = 32000. fp32 rows, longer rows and
    ``crowded`` calls would spill with these, on sm_90 or sm_100, with one of the Tritons from 3.6 to 3.9. They have
    constants that do not spill. These were not timed, so ``auto`` takes none of them. For the same reason programs draw
    no rows where bf16 rows are longer, or ``crowded`` is 2.
    """
    if itemsize * V <= _SHORT:
        registers, programs = (128, 2) if crowded else (80, 3)
        return _shape(V, itemsize=itemsize, slots=6, lines=2, warps=8, lag=2, registers=registers, programs=programs)
    slots, lines, lag, width, held = (7, 4, 3, 1, MOST_HELD)
    if crowded:
        slots, lines, lag = 14, 2, 2
    elif itemsize == 4:
        slots, lines, lag = 14, 2, 4
    fits = itemsize * V <= _FITS
    if not fits:
        slots, lines, lag, width, held = _LONG_CROWDED if crowded else _LONG[itemsize]
    return _shape(V, itemsize=itemsize, slots=slots, lines=lines, warps=16, lag=lag, registers=128, programs=1,
                  held=held, width=width, tickets=itemsize == 4 or (fits and crowded < 2))  # fmt: skip


def _shape(V: int, *, slots: int, lines: int, warps: int, lag: int, registers: int, programs: int, itemsize: int = 2,
           held: int = MOST_HELD, width: int = 0, tickets: bool = True) -> dict[str, int]:  # fmt: skip
    """``held``: lines in registers, at most. ``width``: of the tiles that pass through them, where a row needs such.

    ``tickets``: programs draw their rows.
    """
    line = 32 * warps * 16 // itemsize  # entries
    beyond = passing = 0
    if V > (slots * lines + held) * line:
        width = width or max(1, lines // 2)
        beyond = -(-(V - (slots * lines + held) * line) // (width * line))
        passing = max(4, beyond)
        slots -= -(-(passing - beyond) * width // lines)
    slots = min(slots, (V - 1) // (lines * line))  # an entry is left at least
    left = -(-(V - (slots * lines + passing * width) * line) // line)  # in registers: two parts of up to four, or three
    first = min(4, _power(-(-left // 2)))
    second = min(4, _power(left - first))
    third = _power(left - first - second) if left > first + second else 0
    return {
        "S": slots, "K": lines, "PASSING": passing, "PK": max(1, width), "D1": first, "D2": second, "D3": third,
        "LAG": min(lag, slots), "WARPS": warps, "num_warps": warps, "maxnreg": registers,
        "programs": programs, "tickets": tickets, **OPTIONS,
    }  # fmt: skip


def _power(n: int) -> int:
    """The power of two from n on."""
    return 1 << max(n - 1, 0).bit_length()


@kernel
def advantages_kernel(rewards, groups, batch_std, adv, B, G, adv_eps: tl.float32, SCALE: tl.constexpr,
                      UNBIASED: tl.constexpr):  # fmt: skip
    """One program per sequence: its advantage, out: [B]."""
    seq = tl.program_id(0).to(tl.int64)
    A = group_advantage(rewards, groups, batch_std, seq, B, G, adv_eps, SCALE, UNBIASED)[0]
    tl.store(adv + seq, A)


def with_advantages(batch: Batch, plan: Plan) -> Batch:
    """Advantages in place of rewards, in a small launch: a persistent program would wait for them at every row."""
    if batch.rewards is None:
        return batch
    if batch.adv is not None:
        return batch._replace(rewards=None, groups=None, batch_std=None)
    B = batch.sequences
    adv = torch.empty((B, 1), dtype=torch.float32, device=batch.rewards.device)
    advantages_kernel[(B,)](
        batch.rewards, batch.groups, batch.batch_std, adv, B, int(batch.num_generations), batch.adv_eps,
        SCALE=plan.scale_rewards, UNBIASED=plan.unbiased, num_warps=1, **OPTIONS,
    )  # fmt: skip
    return batch._replace(adv=adv, rewards=None, groups=None, batch_std=None)


def launcher(logits: torch.Tensor, batch: Batch, entropy: bool):
    """(kernel over its programs, shape): persistent ones, at most one per row."""
    B, rows, V = logits.shape
    shape = onchip_shape(V, crowded(batch, entropy), logits.element_size())
    processors = torch.cuda.get_device_properties(logits.device).multi_processor_count
    programs = min(processors * shape.pop("programs"), B * rows)
    shape["tickets"] = torch.zeros(1, dtype=torch.int32, device=logits.device) if shape["tickets"] else None
    return onchip_kernel[(programs,)], shape
