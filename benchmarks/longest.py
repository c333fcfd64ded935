"""The longest completion that fits into a GPU, from few runs: the peak of memory is close to a line over T."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

LONGEST = 2**17  # tokens of a completion
UNIT = 256  # all T that are tried but the first are multiples of it
STEP = 0.05  # the answer is this close
PROBES = 6  # runs, at most


class Found(NamedTuple):
    """What was seen; None where nothing was."""

    fits: int | None  # the greatest T that fits
    too_long: int | None  # the least that does not


def longest(
    peak: Callable[[int], int | None], start: int, start_peak: int | None, room: int, spent: Callable[[], bool]
) -> Found:
    """The greatest T that fits, to 5% or 256 tokens, in at most six runs; often three.

    Each T to try follows from a line through the peaks of the two greatest that fit. It is an estimate: memory has
    gaps, and a peak bends where another part of the step becomes the greatest. So a T counts once a run had room.

    Args:
        peak: bytes that a run with T tokens takes, or None if it does not fit.
        start: a T whose peak is known.
        start_peak: that peak; None: it does not fit.
        room: bytes that there are.
        spent: has the time run out? Then the result is what was seen so far.

    Returns: T that fit, up to `LONGEST`, and T that did not.
    """
    fits, failed = {}, []
    if start_peak is None:
        failed.append(start)
    else:
        fits[start] = start_peak
    for _ in range(PROBES):
        T = _next(fits, failed, room)
        if T is None or spent():
            break
        found = peak(T)
        if found is None:
            failed.append(T)
        else:
            fits[T] = found
    return Found(max(fits, default=None), min(failed, default=None))


def _next(fits: dict[int, int], failed: list[int], room: int) -> int | None:
    """The T to try; None: close enough."""
    low, high = max(fits, default=0), min(failed, default=None)
    if high is None:
        if low >= LONGEST:
            return None
        return min(_up(max(_reach(fits, room), low + max(UNIT, int(STEP * low)))), LONGEST)
    step = max(UNIT, int(STEP * high))
    if high - low <= step:
        return None
    T = (low + high) // 2
    if len(fits) > 1:  # where the line was too hopeful, 5% less, then 10%, 20%
        reach = _reach(fits, room)
        T = reach if low < reach < high - step // 2 else max(T, high - step * 2 ** (len(failed) - 1))
    T = _up(T) if _up(T) < high else T // UNIT * UNIT
    return T if low < T < high else None


def _reach(fits: dict[int, int], room: int) -> int:
    """A T that should fit."""
    low = max(fits)
    share = room / fits[low]  # so many times low fit for sure: a peak has a part that does not grow
    if len(fits) == 1:  # a second point for the line
        return int(low * min(2.0, share))
    below = max(T for T in fits if T < low)
    slope = (fits[low] - fits[below]) / (low - below)
    T = low * share if slope <= 0 else low + (room - fits[low]) / slope
    return int((1 - STEP / 2) * T) // UNIT * UNIT


def _up(T: int) -> int:
    return -(-T // UNIT) * UNIT
