"""Ranks as processes of their own, for the tests of what spans them."""

import os
import subprocess
import sys
from pathlib import Path


def run_ranks(module: str, folder: Path, world: int = 2, *, arguments: tuple[str, ...] = (), **env: str) -> list[str]:
    """What each of ``python -m MODULE RANK *ARGUMENTS STORE`` printed, all of them together within 300 seconds."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "", **env}
    pipes = dict(env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    commands = ([sys.executable, "-m", module, str(rank), *arguments, str(folder / "store")] for rank in range(world))
    ranks = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        return [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
