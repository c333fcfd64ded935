"""TensorBoard files, where the package tensorboard is installed."""

import importlib.util
from pathlib import Path
from typing import Protocol

from grpo_kernels.trainer.rollout import Row

HOW_TO_GET_IT = "no TensorBoard files; there will be after: pip install tensorboard"


class Writer(Protocol):
    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


class Nothing:
    """In the place of a writer."""

    def write(self, row: Row) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Every value of every row as a scalar, at its step."""

    def __init__(self, directory: Path, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote behind its checkpoint is taken back.
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge)

    def write(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


def available() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def writer(directory: Path, resumed_at: int | None = None) -> Writer:
    """Of a run; does nothing where tensorboard is not installed.

    Args:
        resumed_at: the step that the run goes on from.
    """
    return TensorBoard(directory, resumed_at) if available() else Nothing()
