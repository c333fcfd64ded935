"""One run from options to files: build, warm up, train, save; and the command line around it."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from grpo_kernels.trainer import overlay, tensorboard
from grpo_kernels.trainer.arguments import parse
from grpo_kernels.trainer.build import Built, build
from grpo_kernels.trainer.checkpoint import Checkpoint, Checkpoints, RunSaver, check_data, check_options
from grpo_kernels.trainer.console import Reporter
from grpo_kernels.trainer.loop import frozen, train
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.plots import save_curves
from grpo_kernels.trainer.records import Records
from grpo_kernels.trainer.rewards import RewardError
from grpo_kernels.trainer.rollout import Row
from grpo_kernels.trainer.scoring import check_backend
from grpo_kernels.trainer.warmup import warm_up


class Result(NamedTuple):
    """What `run` did."""

    accuracy_before: float | None  # on the held-out problems, after the warm-up; None: not measured
    accuracy_after: float | None  # the same, after GRPO
    metrics: Path
    curves: Path
    model: Path


def run(options: Options, console: Console | None = None) -> Result:
    """Warms a model up where that is asked for, trains it with GRPO, and writes metrics, curves, checkpoints and model.

    Args:
        console: where progress goes; None: standard output.

    Raises:
        OptionError: model, data, device or output directory are not usable; nothing was written.
        RewardError: a reward function fails.
    """
    device = options.torch_device()
    check_backend(options, device)
    checkpoints = Checkpoints(options.checkpoints_dir())
    resumed = checkpoints.latest() if options.resume else None
    if resumed is None:
        _refuse_unfinished(checkpoints, options)
    else:
        check_options(options, resumed)
    built = build(options, device, resumed)
    if resumed is not None:
        check_data(options, resumed, built.task)
    records = _open(options, checkpoints, resumed)
    board = tensorboard.writer(Path(options.output_dir) / "tensorboard", resumed and resumed.step)
    try:
        return _run(options, built, checkpoints, resumed, records, board, console)
    finally:
        records.close()
        board.close()


def _refuse_unfinished(checkpoints: Checkpoints, options: Options) -> None:
    """A run that is not finished is not replaced by mistake."""
    if not checkpoints.all() or options.overwrite:
        return
    last = checkpoints.latest()
    if not last.state["finished"]:
        raise OptionError(
            f"--output-dir {options.output_dir} has a run that was stopped, with a checkpoint of step {last.step}. "
            "Continue it with --resume, replace it with --overwrite, or choose another directory."
        )


def _open(options: Options, checkpoints: Checkpoints, resumed: Checkpoint | None) -> Records:
    """The run's directories, and its metrics up to where it goes on."""
    metrics = options.metrics_dir() / "metrics.jsonl"
    try:
        options.model_dir().mkdir(parents=True, exist_ok=True)
        checkpoints.sweep()
        if resumed is None:
            checkpoints.clear()
        checkpoints.prune(options.save_total_limit)
        return Records(metrics, None if resumed is None else resumed.step)
    except OSError as error:
        if resumed is not None and isinstance(error, FileNotFoundError):
            raise OptionError(f"--resume: {metrics} is gone, which the run would go on in. Put it back.") from error
        raise OptionError(
            f"--output-dir {options.output_dir} is not usable: {error.strerror}: {error.filename}. Choose another."
        ) from error
    except ValueError as error:
        raise OptionError(f"--resume: {error} Put the file back as the run wrote it.") from error


def _run(
    options: Options, built: Built, checkpoints: Checkpoints, resumed: Checkpoint | None, records: Records,
    board: tensorboard.Writer, console: Console | None,
) -> Result:  # fmt: skip
    task, tokenizer, policy, left_out, teacher = built
    curves, start = options.metrics_dir() / "curves.png", time.perf_counter()
    finished = resumed is not None and resumed.ends(options)
    with Reporter(options, console) as reporter:

        def log(row: Row) -> None:
            records.write(row)
            board.write(row)
            reporter.row(row)

        reporter.header(task, policy.num_parameters(), policy.device, len(tokenizer), left_out)
        if resumed is not None:
            reporter.resumed(resumed.step, finished)
        else:
            reporter.warmed_up(warm_up(policy, tokenizer, task, options, reporter.warming_up))
        warmed_up = time.perf_counter()
        if not finished:
            saver = RunSaver(policy, tokenizer, task, options, resumed, before=records.flush_to_disk)
            train(policy, tokenizer, task, options, log, reference=_reference(policy, options, checkpoints, resumed),
                  teacher=teacher, saver=saver, watch=reporter.samples)  # fmt: skip
        trained = time.perf_counter()
        save_curves(records, options, task.name, curves)
        policy.save_pretrained(options.model_dir())
        tokenizer.save_pretrained(options.model_dir())
        seconds = {"warm-up": warmed_up - start, "GRPO": trained - warmed_up}
        files = {"metrics": options.metrics_dir() / "metrics.jsonl", "curves": curves, "model": options.model_dir()}
        reporter.summary(records, seconds, files)
    return Result(*records.ends("eval/accuracy"), **files)


def _reference(
    policy: PreTrainedModel, options: Options, checkpoints: Checkpoints, resumed: Checkpoint | None
) -> PreTrainedModel | None:
    """The policy that GRPO starts from; kept on disk, since nothing else has it once the run was stopped."""
    if options.teacher is not None or not options.beta or options.kl_to != "reference":
        return None
    if resumed is None:
        if options.save_every:
            checkpoints.publish("reference", policy.save_pretrained)
        return frozen(policy)
    path = checkpoints.reference_dir()
    if not path.exists():
        raise OptionError(f"--resume: {path} is gone, which the KL is to. Put it back, or start anew.")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    return frozen(model.to(policy.device))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["plot"]:
        return overlay.main(argv[1:])
    options = parse(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    try:
        run(options)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "; --resume goes on from the last checkpoint" if Checkpoints(options.checkpoints_dir()).all() else ""
        print(f"interrupted; the metrics so far are in {options.metrics_dir()}{kept}", file=sys.stderr)
        return 130
    return 0
