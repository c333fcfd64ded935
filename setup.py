"""Build entry point. All metadata is in pyproject.toml; the version is `grpo_kernels.__version__`."""

from setuptools import setup

setup()
