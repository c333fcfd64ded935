"""`benchmarks.interpreter.hasten` makes Triton's interpreter quicker, and no number other than it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from triton.runtime.errors import InterpreterError

from interpreter_bits import CASES, TOO_LARGE, digest

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")


@pytest.fixture(scope="module")
def plain():
    """name -> digest, from a process that has Triton's interpreter as it is."""
    program = Path(__file__).with_name("interpreter_bits.py")
    done = subprocess.run([sys.executable, program, "--plain"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ") for line in done.stdout.splitlines())


@pytest.mark.unshifted
@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_tritons_own(name, plain):
    assert digest(CASES[name]) == digest(CASES[name]) == plain[name]  # and what is kept does not change


@pytest.mark.parametrize("name", TOO_LARGE)
def test_overflow_raises(name):
    with pytest.raises(InterpreterError, match="overflow detected"):
        digest(TOO_LARGE[name])
