"""metrics.jsonl: one JSON object per line, written as it comes, so that a stopped run keeps its rows."""

import json
import math
from pathlib import Path

from grpo_kernels.trainer.loop import Row


class Records:
    """Writes rows to a file and keeps them for the plot.

    Raises:
        OSError: the file cannot be created or written.
    """

    def __init__(self, path: Path) -> None:
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def write(self, row: Row) -> None:
        self.rows.append(row)
        # JSON has no NaN: a value that is not a number is null.
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of the rows that have ``name``."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]
