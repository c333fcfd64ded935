"""``python -m grpo_kernels.trainer plot DIR... [--out FILE]``: the curves of several runs in one picture."""

import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_kernels.trainer.arguments import Parser
from grpo_kernels.trainer.plots import PlotError, save_overlay
from grpo_kernels.trainer.records import Rows, read_rows

FORMATS = (".png", ".pdf", ".svg")


def rows_of(directory: Path) -> Rows:
    """The metrics of a run, by its output directory, the one of its metrics, or the file.

    Raises:
        PlotError: there are none.
    """
    for path in (directory / "grpo_metrics" / "metrics.jsonl", directory / "metrics.jsonl", directory):
        if path.is_file():
            try:
                rows = Rows(read_rows(path))
            except (OSError, ValueError) as error:
                raise PlotError(f"plot: {path} is not readable: {error}") from error
            if not rows.series("loss")[0]:
                raise PlotError(f"plot: {path} has no GRPO step yet. Leave it out, or wait for its first.")
            return rows
    raise PlotError(f"plot: {directory} has no metrics.jsonl. Name the --output-dir of a run.")


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = Parser(prog="python -m grpo_kernels.trainer plot", description="Overlay the curves of several runs.",
                    allow_abbrev=False)  # fmt: skip
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="--output-dir of a run")
    parser.add_argument("--out", type=Path, default=Path("overlay.png"), help="picture (default: %(default)s)")
    given = parser.parse_args(argv)
    try:
        if given.out.suffix not in FORMATS:
            raise PlotError(f"--out {given.out} must end in {', '.join(FORMATS)}.")
        save_overlay({str(path): rows_of(path) for path in given.dirs}, given.out)
    except (PlotError, OSError) as error:
        reason = f"--out {given.out}: {error.strerror}. Choose another." if isinstance(error, OSError) else error
        print(f"error: {reason}", file=sys.stderr)
        return 2
    print(given.out)
    return 0
