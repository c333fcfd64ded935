"""Runs of the trainer that are killed while they save, and resumed: `python trainer_faults.py MODEL DIR`.

Nothing is computed in this process: each run is a fork of it, which is killed by SIGKILL at a given event (a flush, a
rename, a removal, a half-written file) and then continued by another fork. A report goes to DIR/report.json.
"""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from grpo_kernels.trainer import checkpoint, cli
from grpo_kernels.trainer.options import Options
from trainer_cases import starts_even  # noqa: F401  (the runs' reward)

SETTINGS = {"steps": 6, "save_every": 2, "save_total_limit": 1, "batch_size": 2, "num_generations": 4,
            "num_minibatches": 2, "eval_every": 3, "samples_every": 0, "held_out": 2, "max_completion_length": 3,
            "learning_rate": 0.02, "reward": ("trainer_cases:starts_even",)}  # fmt: skip


def count_events(kill_at: int | None) -> list[str]:
    """Makes each event of a save known by name, in the order in which they happen; and the run die before one."""
    events: list[str] = []

    def happens(name: str) -> bool:
        events.append(name)
        return len(events) - 1 == kill_at

    def wrap(owner, name: str, described) -> None:
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if happens(described(*args)):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    wrap(checkpoint, "_flush", lambda path: f"flush {path.name}")
    wrap(os, "replace", lambda source, target: f"rename to {Path(target).name}")
    wrap(shutil, "rmtree", lambda path, *_: f"remove {Path(path).name}")
    save = checkpoint.save_file

    def torn(tensors, path) -> None:
        save(tensors, path)
        if happens(f"half of {path.name} of {path.parent.name}"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = torn
    return events


def in_a_fork(model: str, data: str, directory: Path, kill_at: int | None, resume: bool) -> int:
    """One run; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            events = count_events(kill_at)
            cli.save_curves = lambda *_: None  # costs more than the run
            options = Options(output_dir=str(directory), model=model, dataset=data, resume=resume, **SETTINGS)
            cli.run(options, Console(file=io.StringIO()))
            (directory / "events.json").write_text(json.dumps(events))
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def chosen(events: list[str]) -> list[int]:
    """Events of each kind, early and late: the first save has nothing behind it, the last removes one."""
    renames = [i for i, event in enumerate(events) if event.startswith("rename to step-")]
    torn = [i for i, event in enumerate(events) if event.startswith("half of")]
    removals = [i for i, event in enumerate(events) if event.startswith("remove")]
    moved = [i for i, event in enumerate(events) if event.startswith("rename to .unfinished")]
    flushes = [i for i, event in enumerate(events) if event.startswith("flush state.json")]
    return sorted({renames[0], renames[1], renames[-1], renames[-1] + 1, torn[2], torn[-1], moved[0], removals[0],
                   removals[-1], flushes[1]})  # fmt: skip


def main(model: str, directory: Path) -> None:
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(9)))
    assert in_a_fork(model, str(data), directory / "whole", None, False) == 0
    events = json.loads((directory / "whole" / "events.json").read_text())
    report = []
    for at in chosen(events):
        run = directory / f"killed-{at}"
        killed = in_a_fork(model, str(data), run, at, False)
        found = checkpoint.Checkpoints(run / "checkpoints").all()
        resumed = in_a_fork(model, str(data), run, None, bool(found))
        report.append({"event": events[at], "run": run.name, "killed": killed, "resumed": resumed,
                       "from": found[-1].name if found else None})  # fmt: skip
    twice = directory / "killed-twice"
    first = in_a_fork(model, str(data), twice, chosen(events)[3], False)
    second = in_a_fork(model, str(data), twice, 3, True)
    third = in_a_fork(model, str(data), twice, None, True)
    report.append({"event": "twice", "run": twice.name, "killed": first, "again": second, "resumed": third,
                   "from": ""})  # fmt: skip
    (directory / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
