"""`python -m grpo_kernels.explain`."""

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from grpo_kernels.explain.by_hand import ANSWERS, QUESTION, by_hand
from grpo_kernels.explain.kernel import through_the_kernel
from grpo_kernels.explain.text import Page, text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_kernels.explain",
        description=f'One step of GRPO on "{QUESTION}" with {len(ANSWERS)} answers, worked out by hand and printed '
        "with every number; then the same through fused_grpo_loss. Exit status 1 if they differ.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where fused_grpo_loss runs; cuda: the Triton kernel (default: cpu)")  # fmt: skip
    parser.add_argument("--no-color", action="store_true", help="plain text (as with NO_COLOR set, or into a file)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device; leave it out for the CPU path")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the step; returns the exit status, 1 if the kernel's numbers are not those by hand."""
    arguments = parse(argv)
    colours = sys.stdout.isatty() and not arguments.no_color and not os.environ.get("NO_COLOR")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Greek letters shows question marks
    step = by_hand()
    compared = through_the_kernel(step, arguments.device)
    for line in text(step, compared, Page(colours)):
        print(line)
    return 0 if all(c.equal for c in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
