"""metrics.jsonl: one JSON object per line, written as it comes, so that a stopped run keeps its rows."""

import json
import math
import os
from pathlib import Path

from grpo_kernels.trainer.rollout import Row


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; null is NaN. A last line that a killed run left unfinished is not one.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no JSON object of numbers, and it is not the last.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
        except (json.JSONDecodeError, AttributeError):
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is no row of metrics.") from None
    return rows


class Rows:
    """The rows of a run, and the series in them."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of the rows that have ``name``."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def ends(self, name: str) -> tuple[float | None, float | None]:
        """The value before the first step and after the last; None where it was not measured."""
        measured = dict(zip(*self.series(name)))
        return measured.get(0), measured.get(self.rows[-1]["step"]) if self.rows else None

    def names(self, prefix: str = "") -> list[str]:
        """Of all values whose names begin so, in the order in which they come up."""
        return [name for name in dict.fromkeys(n for row in self.rows for n in row) if name.startswith(prefix)]


class Records(Rows):
    """Writes rows to a file and keeps them for the plot.

    Args:
        keep_until: keep the rows that the file has, up to this step; None: start an empty file.

    Raises:
        OSError: the file cannot be created or written, or is to be continued and not there.
        ValueError: it is to be continued, and has a line that is no row.
    """

    def __init__(self, path: Path, keep_until: int | None = None) -> None:
        super().__init__([])
        path.parent.mkdir(parents=True, exist_ok=True)
        if keep_until is None:
            self._file = path.open("w", encoding="utf-8")
            return
        self.rows = [row for row in read_rows(path) if row["step"] <= keep_until]
        # Under another name first: being killed here must not cost the rows.
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, self.rows))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        self.rows.append(row)
        self._file.write(_line(row))
        self._file.flush()

    def flush_to_disk(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(row: Row) -> str:
    # JSON has no NaN: a value that is not a number is null.
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
