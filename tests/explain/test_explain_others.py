"""python -m grpo_kernels.explain --support and --distill: numbers, width, and that a wrong result is noticed."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch

import reference
from grpo_kernels import distillation_loss, fused_grpo_loss, token_logprobs
from grpo_kernels.explain import __main__ as command
from grpo_kernels.explain import by_hand, distill_by_hand, kernel, support_by_hand

KEPT = support_by_hand.support_by_hand()
PAIR = distill_by_hand.distill_by_hand()
CLOSE = {"rtol": 0, "atol": 1e-12}


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("module", (support_by_hand, distill_by_hand), ids=lambda module: module.__name__)
def test_by_hand_is_arithmetic(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"math", "typing", "collections.abc", "grpo_kernels.explain.by_hand"}


# --- --support ------------------------------------------------------------------------------------


def test_the_kept_set_worked_by_hand():
    """e^0.9, e^0.8, e^0.4 are 2.4596, 2.2255, 1.4918 of 8.2821; now e^1, e^0.7, e^0.4: 2.7183, 2.0138, 1.4918."""
    assert KEPT.kept == ["5", "4", "6"]
    assert KEPT.share == pytest.approx(6.1769 / 8.2821, rel=1e-4)
    assert KEPT.old_logps == pytest.approx([math.log(2.4596 / 6.1769), math.log(2.2255 / 6.1769)], rel=1e-4)
    assert KEPT.logps == pytest.approx([1 - math.log(6.2239), 0.7 - math.log(6.2239)], rel=1e-4)
    assert KEPT.ratios[0] == pytest.approx((2.7183 / 6.2239) / (2.4596 / 6.1769), rel=1e-4)  # 1.0968
    assert KEPT.biased_ratios[0] == pytest.approx((2.7183 / 8.5505) / (2.4596 / 6.1769), rel=1e-4)  # 0.7984
    assert KEPT.ratios[0] > 1 > 1 - by_hand.EPSILON > KEPT.biased_ratios[0]  # what the text says of them
    assert KEPT.gradient[0] == pytest.approx([-0.3089, 0, 0.1774, 0.1315, 0], abs=1e-4)
    for row in (*KEPT.gradient, *KEPT.biased_gradient):
        assert sum(row) == pytest.approx(0, abs=1e-15)


def test_no_answer_is_clipped():
    """As the text says."""
    assert all(abs(ratio - 1) < by_hand.EPSILON for ratio in KEPT.ratios)


def test_the_kept_set_is_what_the_reference_computes():
    answers = support_by_hand.ANSWERS
    ids = torch.tensor([[by_hand.TOKENS.index(answer)] for answer in answers])
    lists = [[by_hand.TOKENS.index(token) for token in KEPT.kept]] * len(answers)
    old = reference.token_logprobs(tensor([[by_hand.LOGITS_OLD]] * 2), ids, support=lists).logps
    logits = tensor([[support_by_hand.LOGITS_NOW]] * 2).requires_grad_()
    now = reference.token_logprobs(logits, ids, support=lists)
    out = reference.grpo_loss(logits, ids, tensor(support_by_hand.ADVANTAGES), old_logps=old, support=lists,
                              epsilon=by_hand.EPSILON)  # fmt: skip
    out.loss.backward()
    for ours, theirs in (
        (KEPT.old_logps, old), (KEPT.logps, now.logps), ([KEPT.entropy] * 2, now.entropy), (KEPT.loss, out.loss),
        (KEPT.losses, out.per_token_loss), (KEPT.gradient, logits.grad),
    ):  # fmt: skip
        torch.testing.assert_close(tensor(ours).flatten(), theirs.detach().flatten(), **CLOSE)


# --- --distill ------------------------------------------------------------------------------------


def test_divergences_worked_by_hand():
    """Of "5": p = e^0.9/8.2821 = 0.29698; q = e^2.2/(9.0250 + 4.9530 + 0.6703 + 0.7408 + 0.3679) = 0.57275."""
    forward, reverse, mixed = (PAIR.divergences[beta] for beta in (0.0, 1.0, distill_by_hand.BETA))
    p, q = 0.29698, 9.0250 / 15.7570
    assert (PAIR.p[0], PAIR.q[0]) == pytest.approx((p, q), rel=1e-4)
    assert forward.terms[0] == pytest.approx(q * math.log(q / p), abs=1e-4)
    assert reverse.terms[0] == pytest.approx(p * math.log(p / q), abs=1e-4)
    m = 0.7 * p + 0.3 * q
    assert mixed.terms[0] == pytest.approx(0.3 * q * math.log(q / m) + 0.7 * p * math.log(p / m), abs=1e-4)
    assert forward.gradient[0] == pytest.approx(p - q, abs=1e-4)
    assert reverse.gradient[0] == pytest.approx(p * (math.log(p / q) - reverse.value), abs=1e-4)
    for each in (forward, reverse, mixed):
        assert each.value > 0 and sum(each.gradient) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("beta", PAIR.divergences)
def test_divergences_are_what_the_reference_computes(beta):
    logits = tensor([[distill_by_hand.STUDENT]]).requires_grad_()
    out = reference.distillation_loss(logits, tensor([[distill_by_hand.TEACHER]]), beta=beta)
    out.loss.backward()
    for ours, theirs in (
        (PAIR.divergences[beta].value, out.loss), (PAIR.divergences[beta].gradient, logits.grad),
        (PAIR.entropy, out.entropy), (PAIR.teacher_entropy, out.teacher_entropy),
    ):  # fmt: skip
        torch.testing.assert_close(tensor(ours).flatten(), theirs.detach().flatten(), **CLOSE)


# --- through the package --------------------------------------------------------------------------


def test_the_package_agrees():
    for compared, counts in (
        (kernel.support_through_the_kernel(KEPT),
         {"old log-probabilities": 2, "log-probabilities": 2, "entropies": 2, "mean ratio": 1, "losses": 2, "loss": 1,
          "gradient": 10}),
        (kernel.distillation_through_the_kernel(PAIR),
         {"D, β = 0": 1, "gradient, β = 0": 5, "D, β = 1": 1, "gradient, β = 1": 5, "D, β = 0.3": 1,
          "gradient, β = 0.3": 5, "entropy, student": 1, "entropy, teacher": 1}),
    ):  # fmt: skip
        assert [c.name for c in compared if not c.equal] == []
        assert {c.name: len(c.fused) for c in compared} == counts


def twice_the_gradient(out):
    return out._replace(loss=2 * out.loss - out.loss.detach())


@pytest.mark.parametrize(
    ("option", "name", "function", "changed", "wrong"),
    [
        ("--support", "fused_grpo_loss", fused_grpo_loss, {"support": None}, None),
        ("--support", "fused_grpo_loss", fused_grpo_loss, {"epsilon": 0.05}, None),
        ("--support", "fused_grpo_loss", fused_grpo_loss, {}, twice_the_gradient),
        ("--support", "token_logprobs", token_logprobs, {"support": None}, None),
        ("--distill", "distillation_loss", distillation_loss, {"beta": 0.5}, None),
        ("--distill", "distillation_loss", distillation_loss, {"temperature": 1.001}, None),
        ("--distill", "distillation_loss", distillation_loss, {}, twice_the_gradient),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_result_is_an_exit_status(option, name, function, changed, wrong, monkeypatch, capsys):
    def other(*args, **kwargs):
        out = function(*args, **kwargs | changed)
        return wrong(out) if wrong else out

    monkeypatch.setattr(kernel, name, other)
    assert command.main([option]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


# --- what is printed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "headings", "numbers"),
    [
        ("--support", 5, ("0.7458", "1.0968", "0.7984", "-0.3089", f"{KEPT.loss:.4f}")),
        ("--distill", 6, ("0.4656", "0.6262", "0.1013", "-0.2758", "-0.3810", "-0.0590")),
    ],
)
def test_text_fits_a_terminal_and_has_every_part(option, headings, numbers, capsys):
    assert command.main([option]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    assert re.findall(r"^(\d+)  \S.* -+$", text, re.MULTILINE) == [str(n) for n in range(1, headings + 1)]
    assert "Equal: no number differs by more than 1e-05." in text
    for number in numbers:
        assert number in text
    assert "-0.0000" not in text and "\n\n\n" not in text and "\x1b" not in text


def test_one_of_them_at_a_time(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--support", "--distill"])
    assert ended.value.code == 2 and "not allowed with" in capsys.readouterr().err
