"""python -m grpo_kernels.explain: its numbers are right, it fits a terminal, and it notices a wrong loss."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reference
from grpo_kernels import fused_grpo_loss
from grpo_kernels.explain import __main__ as command
from grpo_kernels.explain import by_hand as hand
from grpo_kernels.explain import kernel

STEP = hand.by_hand()
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def printed(capsys, *argv: str) -> str:
    assert command.main(argv) == 0
    return capsys.readouterr().out


# --- the numbers ----------------------------------------------------------------------------------


def test_rewards_and_advantages_worked_by_hand():
    # Three answers of 1, one of 0.5, four of 0: 3.5/8. Squares: 3·0.5625² + 0.0625² + 4·0.4375² = 1.71875.
    assert STEP.rewards == [1, 0, 0.5, 1, 0, 0, 1, 0]
    assert STEP.mean == 0.4375
    assert STEP.std == pytest.approx((1.71875 / 7) ** 0.5, rel=1e-12)  # 0.495516
    by_reward = {1.0: 1.13495, 0.5: 0.12611, 0.0: -0.88274}  # (R − 0.4375) / 0.495616
    assert STEP.advantages == pytest.approx([by_reward[reward] for reward in STEP.rewards], abs=1e-5)


def test_hard_and_easy_question_worked_by_hand():
    # 12 among seven 10s: mean 10.25, squares 1.75² + 7·0.25² = 3.5, std √0.5, A = 1.75/0.707207.
    assert hand.advantages_of(hand.HARD) == pytest.approx([-0.353503] * 3 + [2.474523] + [-0.353503] * 4, abs=1e-6)
    # 90 among seven 95s: mean 94.375, squares 4.375² + 7·0.625² = 21.875, std √3.125, A = −4.375/1.767867.
    assert hand.advantages_of(hand.EASY) == pytest.approx([0.353533] * 2 + [-2.474734] + [0.353533] * 5, abs=1e-6)


def test_one_answer_worked_by_hand():
    """The first answer, "5": e^1.4/Σ = 4.0552/9.8444 now, e^0.9/Σ = 2.4596/8.2821 when it was sampled."""
    assert STEP.ratios[0] == pytest.approx((4.0552 / 9.8444) / (2.4596 / 8.2821), rel=1e-4)  # 1.38706
    assert STEP.free[0] == pytest.approx(1.38706 * 1.13495, rel=1e-4)
    assert STEP.bounded[0] == pytest.approx(1.2 * 1.13495, rel=1e-5)
    assert STEP.is_clipped[0]
    # e^0.6 / (e^0.6 + e^0.2 + e^0.7 + e^0.5 + e^0.3) = 1.8221/8.0558, eᵘ = 0.22619/0.41193 = 0.54909
    assert STEP.kl[0] == pytest.approx(0.54909 + 0.59949 - 1, abs=1e-4)
    assert STEP.losses[0] == pytest.approx(-1.361940 + 0.04 * 0.14858, abs=1e-5)
    assert STEP.kl_slopes[0] == pytest.approx(0.04 * (1 - 0.54909) / 8, abs=1e-7)


def test_everything_is_what_the_reference_computes():
    logits = tensor([[hand.LOGITS_NOW]] * 8).requires_grad_()
    ids = torch.tensor([[hand.TOKENS.index(answer)] for answer in hand.ANSWERS])
    old, ref = (
        reference.token_logprobs(tensor([[x]] * 8), ids).logps for x in (hand.LOGITS_OLD, hand.LOGITS_REFERENCE)
    )
    out = reference.grpo_loss(
        logits, ids, rewards=tensor(STEP.rewards), num_generations=8, old_logps=old, ref_logps=ref, beta=hand.BETA,
        epsilon=hand.EPSILON, advantage_eps=hand.STD_EPSILON,
    )  # fmt: skip
    out.loss.backward()
    close = {"rtol": 1e-12, "atol": 1e-12}
    for ours, theirs in (
        (STEP.logps, out.logps), (STEP.old_logps, old), (STEP.ref_logps, ref), (STEP.advantages, out.advantages),
        (STEP.losses, out.per_token_loss), (STEP.kl, out.kl), (STEP.loss, out.loss), (STEP.gradient, logits.grad),
    ):  # fmt: skip
        torch.testing.assert_close(tensor(ours).flatten(), theirs.detach().flatten(), **close)


def test_every_case_of_the_clip_is_there():
    low, high = 1 - hand.EPSILON, 1 + hand.EPSILON
    seen = set()
    for A, ratio, clipped, slope in zip(STEP.advantages, STEP.ratios, STEP.is_clipped, STEP.policy_slopes):
        where = "below" if ratio < low else "above" if ratio > high else "inside"
        seen.add((A > 0, where))
        assert clipped == ((A > 0 and where == "above") or (A < 0 and where == "below"))
        if clipped:
            assert slope == 0.0
        else:
            assert (slope < 0) == (A > 0) and slope != 0
    assert seen >= {(True, "above"), (False, "below"), (False, "inside"), (True, "below"), (False, "above")}


def test_by_hand_is_arithmetic():
    tree = ast.parse(Path(hand.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"math", "typing", "collections.abc"}


# --- through the kernel ---------------------------------------------------------------------------


def test_kernel_agrees():
    compared = kernel.through_the_kernel(STEP)
    assert [c.name for c in compared if not c.equal] == []
    assert {c.name: len(c.fused) for c in compared} == {
        "advantages": 8, "log-probabilities": 8, "mean ratio": 1, "share clipped": 1, "mean KL": 1, "losses": 8,
        "loss": 1, "gradient": 40,
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: out._replace(loss=-out.loss),
        lambda out: out._replace(loss=out.loss * 1.0001),
        lambda out: out._replace(loss=out.loss * float("nan")),
    ],
    ids=("sign", "a ten-thousandth", "nan"),
)
def test_a_wrong_loss_is_an_exit_status(wrong, monkeypatch, capsys):
    monkeypatch.setattr(kernel, "fused_grpo_loss", lambda *args, **kwargs: wrong(fused_grpo_loss(*args, **kwargs)))
    assert command.main([]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


@pytest.mark.parametrize("changed", [{"epsilon": 0.3}, {"beta": 0.05}, {"kl_estimator": "k2"}], ids=str)
def test_another_loss_is_an_exit_status(changed, monkeypatch):
    monkeypatch.setattr(kernel, "fused_grpo_loss", lambda *args, **kwargs: fused_grpo_loss(*args, **kwargs | changed))
    assert command.main([]) == 1


def test_a_wrong_gradient_is_an_exit_status(monkeypatch, capsys):
    """Though every value is right."""

    def twice(*args, **kwargs):
        out = fused_grpo_loss(*args, **kwargs)
        return out._replace(loss=2 * out.loss - out.loss.detach())

    monkeypatch.setattr(kernel, "fused_grpo_loss", twice)
    assert command.main([]) == 1
    assert "NOT EQUAL: gradient differ" in capsys.readouterr().out


# --- what is printed ------------------------------------------------------------------------------


def test_text_fits_a_terminal_and_has_every_step(capsys):
    text = printed(capsys)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert not ANSI.search(text)
    assert re.findall(r"^(\d+)  \S.* -+$", text, re.MULTILINE) == [str(n) for n in range(1, 11)]
    assert "Equal: no number differs by more than 1e-05." in text
    for number in ("0.4375", "0.4955", "1.1350", "-0.8827", "2.4745", "-2.4747", "1.3871", f"{STEP.loss:.4f}"):
        assert number in text
    assert "-0.0000" not in text
    assert text == printed(capsys)


def test_columns_are_aligned(capsys):
    lines = printed(capsys).splitlines()
    start = next(i for i, line in enumerate(lines) if "clip(ρ)·A" in line and "min" in line and "#" in line)
    end_of = [[m.end() for m in re.finditer(r"\S+", line)][:7] for line in lines[start + 1 : start + 9]]
    assert len({tuple(ends[2:7]) for ends in end_of}) == 1


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = printed(capsys)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = printed(capsys)
    assert ANSI.search(coloured) and ANSI.sub("", coloured) == plain
    assert printed(capsys, "--no-color") == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(capsys) == plain


def test_command_line():
    """From a shell, without rich, and where standard output knows no Greek."""
    code = "import sys; sys.modules['rich'] = None; from grpo_kernels.explain.__main__ import main; sys.exit(main([]))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"Equal: no number differs" in done.stdout
    assert done.stderr == b""


def test_help_and_a_device_that_is_not_there(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0 and "--no-color" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        command.main(["--device", "cuda"])
    assert ended.value.code == 2 and "sees no CUDA device" in capsys.readouterr().err
