"""`python -m grpo_kernels.explain`."""

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from grpo_kernels.env import print_lines
from grpo_kernels.explain.by_hand import ANSWERS, QUESTION, by_hand
from grpo_kernels.explain.distill_by_hand import distill_by_hand
from grpo_kernels.explain.distill_text import distill_text
from grpo_kernels.explain.kernel import distillation_through_the_kernel, support_through_the_kernel, through_the_kernel
from grpo_kernels.explain.support_by_hand import support_by_hand
from grpo_kernels.explain.support_text import support_text
from grpo_kernels.explain.text import Page, text

STEP = (by_hand, through_the_kernel, text)  # the numbers, the same through the package, what is printed
SUPPORT = (support_by_hand, support_through_the_kernel, support_text)
DISTILLATION = (distill_by_hand, distillation_through_the_kernel, distill_text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_kernels.explain",
        description=f'One step of GRPO on "{QUESTION}" with {len(ANSWERS)} answers, worked out by hand and printed '
        "with every number; then the same through fused_grpo_loss. Exit status 1 if they differ.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--support", dest="which", action="store_const", const=SUPPORT, default=STEP,
                       help="instead: log-probabilities, ratio, gradient over the set that a sampler kept")  # fmt: skip
    which.add_argument("--distill", dest="which", action="store_const", const=DISTILLATION,
                       help="instead: the divergences of a student from its teacher, and their gradients")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where the package's function runs; cuda: the Triton kernel (default: cpu)")  # fmt: skip
    parser.add_argument("--no-color", action="store_true", help="plain text (as with NO_COLOR set, or into a file)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device; leave it out for the CPU path")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the step; returns the exit status, 1 if the kernel's numbers are not those by hand.

    A setting in the environment that the kernel refuses is one line on standard error, and status 2.
    """
    arguments = parse(argv)
    colours = sys.stdout.isatty() and not arguments.no_color and not os.environ.get("NO_COLOR")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Greek letters shows question marks
    work_out, through, printed = arguments.which
    numbers = work_out()
    try:
        compared = through(numbers, arguments.device)
    except ValueError as error:  # the arguments are the step's own: only a setting can be wrong
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_lines(printed(numbers, compared, Page(colours)))
    return 0 if all(c.equal for c in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
