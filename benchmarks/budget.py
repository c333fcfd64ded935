"""How long each row may be timed, so that a run keeps to its time."""

from __future__ import annotations

import time


class Budget:
    """Seconds to time each row for, so that the whole run keeps to a number of seconds.

    What is left is dealt out anew before every block of rows. The cases that are left get what the earlier ones
    took for data, checks and compilation, and rows share the rest: so rows get less time before cases are left
    out. What has begun is finished.

    Args:
        seconds: of the whole run; None: no limit, and `per_row` for every row.
        per_row: seconds of one row, at most.
        used: seconds that the run took before.
    """

    def __init__(self, seconds: float | None, per_row: float, used: float = 0.0) -> None:
        self.per_row = per_row
        self.seconds = seconds
        self._start = time.monotonic() - used
        self._cases: list[float] = []  # when each case began, in seconds used
        self._timing = 0.0  # seconds that rows were timed for
        self._timing_before = 0.0  # the same when the last case began

    @property
    def used(self) -> float:
        return time.monotonic() - self._start

    @property
    def spent(self) -> bool:
        return self.seconds is not None and self.used >= self.seconds

    def start_case(self) -> bool:
        """May another case begin? Not if even the shortest of the earlier ones would not fit any more."""
        now = self.used
        ends = [*self._cases[1:], now]
        shortest = min((end - begin for begin, end in zip(self._cases, ends)), default=0.0)
        if self.seconds is not None and (now >= self.seconds or now + shortest > self.seconds):
            return False
        self._cases.append(now)
        self._timing_before = self._timing
        return True

    def timed(self, seconds: float) -> None:
        """Rows were timed for so long."""
        self._timing += seconds

    def for_a_row(self, rows_left: int, cases_left: int) -> float:
        """
        Args:
            rows_left: rows that were not timed, the yardsticks' too.
            cases_left: cases that have not begun.
        """
        if self.seconds is None:
            return self.per_row
        left = max(self.seconds - self.used, 0.0)
        done = len(self._cases) - 1
        if done > 0:
            beside = (self._cases[-1] - self._cases[0] - self._timing_before) / done  # of a case, what is not timing
            left = max(left - beside * cases_left, 0.0)
        else:
            left /= 2
        return min(self.per_row, left / max(rows_left, 1))
