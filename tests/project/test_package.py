"""The package as a user meets it: it imports and works without Triton, and shows its version."""

import os
import subprocess
import sys
import textwrap

import pytest

import grpo_kernels


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    return python("-c", textwrap.dedent(code), **env)


def python(*args: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *args], env={**clean, **env}, capture_output=True, text=True)


def test_works_without_triton():
    """As where Triton has no wheel: the import of it fails."""
    done = run(
        """
        import sys
        sys.modules["triton"] = None
        import torch
        from grpo_kernels import TopK, distillation_loss, fused_grpo_loss, token_logprobs
        logits = torch.randn(2, 3, 11, requires_grad=True)
        ids = torch.randint(0, 11, (2, 3))
        out = fused_grpo_loss(logits, ids, rewards=torch.tensor([0., 1.]), num_generations=2)
        out.loss.backward()
        assert logits.grad.abs().max() > 0 and token_logprobs(logits, ids).logps.shape == (2, 3)
        logps, top = torch.log_softmax(torch.randn(2, 3, 11), -1).topk(4)
        assert distillation_loss(logits, TopK(top, logps)).loss > 0
        try:
            fused_grpo_loss(logits, ids, torch.ones(2), backend="triton")
        except ValueError as error:
            assert "pip install triton" in str(error), error
        else:
            raise AssertionError("backend='triton' without Triton must raise")
        """
    )
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    """Importing the library pulls in neither transformers nor matplotlib nor the kernels."""
    done = run(
        """
        import sys
        import grpo_kernels
        assert grpo_kernels.metrics.combine  # as README names it
        heavy = {"transformers", "matplotlib", "trl", "grpo_kernels.triton_backend.row_kernels"} & set(sys.modules)
        assert not heavy, heavy
        """
    )
    assert done.returncode == 0, done.stderr


def test_cpu_path_without_the_interpreter():
    done = run(
        """
        import torch
        from grpo_kernels import fused_grpo_loss
        logits = torch.randn(2, 3, 11, requires_grad=True)
        fused_grpo_loss(logits, torch.randint(0, 11, (2, 3)), torch.ones(2)).loss.backward()
        try:
            fused_grpo_loss(logits, torch.zeros(2, 3, dtype=torch.long), torch.ones(2), backend="triton")
        except ValueError as error:
            assert "TRITON_INTERPRET=1" in str(error), error
        else:
            raise AssertionError("compiled kernels cannot run on CPU tensors")
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("interpret", ("0", "1"))
def test_environment_report(interpret):
    done = python("-m", "grpo_kernels.env", **({"TRITON_INTERPRET": "1"} if interpret == "1" else {}))
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert facts["grpo_kernels"] == grpo_kernels.__version__
    assert ("interpreted" in facts["backend"]) == (interpret == "1")


def test_the_environment_report_takes_no_arguments():
    assert python("-m", "grpo_kernels.env", "junk").returncode == 2


COMMANDS = (("env",), ("explain",), ("explain", "--support"), ("explain", "--distill"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_whose_reader_leaves(command):
    """As ``| head -1`` does."""
    name, *options = command
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, "-m", f"grpo_kernels.{name}", *options], stdout=write,
                              stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


SMALL = ("trainer", "--hidden-size", "16", "--warmup-steps", "0", "--steps", "1", "--output-dir", os.devnull)


@pytest.mark.parametrize("command", (*COMMANDS[1:], SMALL), ids=lambda command: " ".join(command[:2]))
def test_a_setting_without_a_meaning_is_one_line(command):
    name, *options = command
    done = python("-m", f"grpo_kernels.{name}", *options, GRPO_KERNELS_VALIDATE="abc")
    assert done.returncode == 2
    assert done.stderr == "error: GRPO_KERNELS_VALIDATE must be 0 or 1, got 'abc'.\n"


def test_bytes_that_are_no_number_are_one_line():
    done = python("-m", "grpo_kernels.trainer", *SMALL[1:], GRPO_KERNELS_CHUNK_BYTES="abc")
    assert done.returncode == 2
    assert done.stderr == "error: GRPO_KERNELS_CHUNK_BYTES must be a whole number of bytes, got 'abc'.\n"
