"""``python -m grpo_kernels.trainer``: checks for the trainer's own requirements, then runs it."""

import importlib.util
import sys

# What the trainer needs besides the package's own requirements, by the name that pip and import share.
REQUIREMENTS = ("matplotlib", "rich", "tokenizers", "transformers")


def missing_requirements(find=importlib.util.find_spec) -> list[str]:
    """The requirements that are not installed; nothing is imported to find out."""
    return [name for name in REQUIREMENTS if find(name) is None]


def main(argv: list[str] | None = None) -> int:
    missing = missing_requirements()
    if missing:
        packages = " ".join(missing)
        print(
            f"error: the trainer needs {', '.join(missing)}. Install with: {sys.executable} -m pip install {packages}",
            file=sys.stderr,
        )
        return 1
    from grpo_kernels.trainer import cli

    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
