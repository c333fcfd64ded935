"""What the law tests count, and the mark of tests that can only count under Triton's interpreter."""

import os

import pytest

from benchmarks.counting import Device, HostSync, Launch, bare_ops, launches
from pretend_gpu import pretended

__all__ = ["INTERPRETED", "Device", "HostSync", "Launch", "bare_ops", "interpreted", "launches"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not pretended()
interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter does: TRITON_INTERPRET=1")
