"""Checkpoints: everything a run goes on from, in files that hold no code.

    checkpoints/
      reference/               the policy that the KL is to, if there is one
      step-00000050/           model and tokenizer in the format of Hugging Face, and
        optimizer.safetensors    AdamW's moments, by the parameter's name
        random.safetensors       states of the random generators
        state.json               options, step, schedule, position in the data, rewards of the last steps

A directory is written under another name, flushed to disk and then renamed: whatever has its final name
is whole. Tensors are in safetensors and all else in JSON, so that loading executes nothing.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.trainer.options import OptionError, Options, flag
from grpo_kernels.trainer.progress import Progress
from grpo_kernels.trainer.randomness import random_states, set_random_states
from grpo_kernels.trainer.task import Task

VERSION = 1
_TEMPORARY = ".unfinished-"


class Checkpoint(NamedTuple):
    """A checkpoint on disk."""

    path: Path
    state: dict

    @property
    def options(self) -> dict:
        """Of `Options`."""
        saved = {name: tuple(x) if isinstance(x, list) else x for name, x in self.state["options"].items()}
        return {name: saved[name] for name in Options.__dataclass_fields__ if name in saved}

    @property
    def step(self) -> int:
        return self.state["progress"]["step"]

    def ends(self, options: Options) -> bool:
        """Whether nothing is left to do; a finished run can be given more steps."""
        return self.state["finished"] and (options.steps is None or options.steps <= self.step)

    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32, use_safetensors=True)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.path, padding_side="left")


class Checkpoints:
    """The checkpoints of a run, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def all(self) -> list[Path]:
        """The paths of those that are whole, oldest first."""
        return sorted(path for path in self.directory.glob("step-[0-9]*") if (path / "state.json").is_file())

    def latest(self) -> Checkpoint:
        """The newest.

        Raises:
            OptionError: there is none, or it is from another version.
        """
        found = self.all()
        if not found:
            raise OptionError(
                f"--resume: there is no checkpoint in {self.directory}. Name the run's --output-dir, or leave "
                "--resume out to start anew."
            )
        state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
        if state["version"] != VERSION:
            raise OptionError(
                f"--resume: {found[-1]} has format {state['version']}, and this is {VERSION}. Resume with the version "
                "of grpo_kernels that wrote it."
            )
        return Checkpoint(found[-1], state)

    def clear(self) -> None:
        """Removes what a run has written here, and nothing else."""
        for path in (*self.all(), self.reference_dir()):
            if path.exists():
                self._remove(path)

    def sweep(self) -> None:
        """Removes what an interrupted write or removal has left."""
        for path in self.directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path)

    def reference_dir(self) -> Path:
        return self.directory / "reference"

    def publish(self, name: str, write) -> None:
        """``write(directory)``, as a directory that is whole as soon as it is there."""
        temporary, final = self.directory / f"{_TEMPORARY}{name}", self.directory / name
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        for path in sorted(temporary.rglob("*")):
            _flush(path)
        _flush(temporary)
        if final.exists():  # a run that was extended ends where it had ended
            self._remove(final)
        os.replace(temporary, final)
        _flush(self.directory)

    def prune(self, keep: int) -> None:
        for path in self.all()[:-keep]:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first, so that a removal that is interrupted leaves no half of a checkpoint.
        doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    """To disk, so that a loss of power cannot leave the name without the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some file systems cannot flush directories
            raise
    finally:
        os.close(descriptor)


# --- the optimizer --------------------------------------------------------------------------------


def optimizer_tensors(policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Its state by parameter: ``name/exp_avg`` and the like; on the CPU."""
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def set_optimizer(
    policy: PreTrainedModel, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    groups = optimizer.state_dict()["param_groups"]  # settings are the options'; the rate is the schedule's
    state: dict[int, dict[str, torch.Tensor]] = {}
    for index, (name, _) in enumerate(policy.named_parameters()):
        own = {key.removeprefix(f"{name}/"): x for key, x in tensors.items() if key.startswith(f"{name}/")}
        if own:
            state[index] = own
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# --- a run's ------------------------------------------------------------------------------------


def fingerprint(task: Task) -> str:
    """Of the problems, in their order."""
    problems = [(each.prompt, each.answer, *([dict(each.columns)] if each.columns else ()))
                for each in (*task.train, *task.held_out)]  # fmt: skip
    # A field that JSON has no form for counts as its type alone.
    text = json.dumps(problems, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def check_options(options: Options, resumed: Checkpoint) -> None:
    """Raises OptionError where an option differs from the checkpoint's that may not."""
    saved = resumed.options
    for field in dataclasses.fields(Options):
        # A checkpoint from before an option was there was trained with its default.
        now, then = getattr(options, field.name), saved.get(field.name, field.default)
        if now != then and not field.metadata["resumable"]:
            raise OptionError(
                f"--resume: {flag(field.name)} is {_said(then)} in the checkpoint and {_said(now)} here, and cannot "
                f"change. Leave it out, or start anew in another --output-dir."
            )


def check_data(options: Options, resumed: Checkpoint, task: Task) -> None:
    """Raises OptionError where the problems are not the checkpoint's."""
    if fingerprint(task) != resumed.state["data"]["fingerprint"]:
        raise OptionError(
            f"--resume: the problems of {options.dataset or options.task} are not those of the checkpoint. Put them "
            "back, or start anew in another --output-dir."
        )


def _said(value: object) -> str:
    if value is None or value == ():
        return "not set"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class RunSaver:
    """Saves a run's state every ``save_every`` steps and at the end; 0: never.

    See `grpo_kernels.trainer.progress.Saver`.
    """

    def __init__(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, options: Options,
        resumed: Checkpoint | None = None, before=lambda: None,
    ) -> None:  # fmt: skip
        """``before()`` is called before each checkpoint: what it must not be ahead of has to be on disk."""
        self._policy, self._tokenizer, self._options, self._resumed = policy, tokenizer, options, resumed
        self._before, self._data = before, fingerprint(task)
        self._checkpoints = Checkpoints(options.checkpoints_dir())

    def restore(self, optimizer: torch.optim.Optimizer) -> Progress:
        if self._resumed is None:
            return Progress()
        path, state = self._resumed
        set_optimizer(self._policy, optimizer, load_file(path / "optimizer.safetensors"))
        set_random_states(load_file(path / "random.safetensors"))
        return Progress(**state["progress"])

    def save(self, optimizer: torch.optim.Optimizer, progress: Progress, last: bool) -> None:
        every = self._options.save_every
        if not every or (not last and progress.step % every):
            return
        self._before()
        state = {
            "version": VERSION,
            "finished": last,
            "progress": dataclasses.asdict(progress),
            "schedule": {"name": self._options.lr_scheduler_type, "step": progress.step,
                         "learning_rate": optimizer.param_groups[0]["lr"]},
            "data": {"fingerprint": self._data, "batches": progress.step},
            "options": dataclasses.asdict(self._options) | {"resume": False, "overwrite": False},
            "python": sys.version.split()[0],
            "torch": torch.__version__,
        }  # fmt: skip

        def write(directory: Path) -> None:
            self._policy.save_pretrained(directory)
            self._tokenizer.save_pretrained(directory)
            save_file(optimizer_tensors(self._policy, optimizer), directory / "optimizer.safetensors")
            save_file(random_states(), directory / "random.safetensors")
            (directory / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

        self._checkpoints.publish(f"step-{progress.step:08d}", write)
        self._checkpoints.prune(self._options.save_total_limit)
