"""One run from options to files: build, warm up, train, save; and the command line around it."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from grpo_kernels.trainer.console import Reporter
from grpo_kernels.trainer.loop import Row, train
from grpo_kernels.trainer.model import tiny_qwen2
from grpo_kernels.trainer.options import OptionError, Options, parse
from grpo_kernels.trainer.plots import save_curves
from grpo_kernels.trainer.records import Records
from grpo_kernels.trainer.task import addition
from grpo_kernels.trainer.tokenizer import character_tokenizer
from grpo_kernels.trainer.warmup import warm_up


class Result(NamedTuple):
    """What `run` did."""

    accuracy_before: float  # on the held-out problems, after the warm-up
    accuracy_after: float  # the same, after GRPO
    metrics: Path
    curves: Path
    model: Path


def run(options: Options, console: Console | None = None) -> Result:
    """Warms a tiny model up, trains it with GRPO, and writes metrics, curves and model.

    Args:
        console: where progress goes; None: standard output.

    Raises:
        OptionError: the device or the output directory is not usable; nothing was trained.
    """
    device = options.torch_device()
    metrics, curves = options.metrics_dir() / "metrics.jsonl", options.metrics_dir() / "curves.png"
    try:
        options.model_dir().mkdir(parents=True, exist_ok=True)
        records = Records(metrics)
    except OSError as error:
        raise OptionError(
            f"--output-dir {options.output_dir} is not usable: {error.strerror}: {error.filename}. Choose another."
        ) from error

    torch.manual_seed(options.seed)
    task = addition()
    tokenizer = character_tokenizer(task.alphabet)
    policy = tiny_qwen2(tokenizer, task.max_completion_length).to(device)
    start = time.perf_counter()
    with Reporter(options, console) as reporter:

        def log(row: Row) -> None:
            records.write(row)
            reporter.row(row)

        try:
            reporter.header(task, policy.num_parameters(), device, len(tokenizer))
            reporter.warmed_up(warm_up(policy, tokenizer, task, options, reporter.warming_up))
            warmed_up = time.perf_counter()
            train(policy, tokenizer, task, options, log)
            trained = time.perf_counter()
        finally:
            records.close()
        save_curves(records, options, task.name, curves)
        policy.save_pretrained(options.model_dir())
        tokenizer.save_pretrained(options.model_dir())
        seconds = {"warm-up": warmed_up - start, "GRPO": trained - warmed_up}
        files = {"metrics": metrics, "curves": curves, "model": options.model_dir()}
        reporter.summary(records, seconds, files)
    accuracy = records.series("eval/accuracy")[1]
    return Result(accuracy[0], accuracy[-1], **files)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    try:
        run(options)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the metrics so far are in {options.metrics_dir()}", file=sys.stderr)
        return 130
    return 0
