"""What ``--distill`` prints."""

import math
from collections.abc import Iterator, Sequence

from grpo_kernels.explain.by_hand import QUESTION, TOKENS, softmax
from grpo_kernels.explain.distill_by_hand import BETA, STUDENT, TEACHER, Pair
from grpo_kernels.explain.kernel import Compared
from grpo_kernels.explain.text import Page, comparison, spaced


def distill_text(row: Pair, compared: Sequence[Compared], page: Page) -> Iterator[str]:
    """Everything that is printed, line by line."""
    return spaced(parts(row, compared, page))


def parts(row: Pair, compared: Sequence[Compared], page: Page) -> Iterator[str]:
    yield from page.title(f'A student and its teacher, on "{QUESTION}"')
    yield from page.prose(f"""
        A reward says one number for a whole answer. A teacher, which is a larger model, says at every token
        how likely it finds each of them. The student is pulled towards that. Below is one token, and the
        models know {len(TOKENS)}. In an answer every token goes through the same, and the mean counts.""")
    yield from page.heading("1  Two rows of probabilities")
    yield from page.prose("""
        Both models give every token a score, the logit: x the student, z the teacher. Softmax makes
        probabilities of them, p and q. Here the teacher is sure of two answers that are right.""")
    yield from page.formula("p = eˣ / Σeˣ        q = eᶻ / Σeᶻ")
    ln_p, ln_q = ([math.log(a) for a in each] for each in (row.p, row.q))
    scores = ([f"{a:.1f}" for a in each] for each in (STUDENT, TEACHER))
    x, z = scores
    rows = [list(each) for each in zip(TOKENS, x, row.p, ln_p, z, row.q, ln_q)]
    rows.append(["sum", "", sum(row.p), "", "", sum(row.q), ""])
    yield from page.table(("token", "x", "p", "ln p", "z", "q", "ln q"), rows, left=(0,))
    yield from divergence_parts(row, page)
    yield from step_part(row, page)
    yield from page.heading("6  The same through distillation_loss")
    yield from page.prose("""
        One call reads both rows and writes the gradient, in 32-bit arithmetic. Where there are several
        numbers the first is shown, and the largest gap between any two.""")
    yield from page.formula("out = distillation_loss(logits, teacher, beta=β)", "out.loss.backward()")
    yield from comparison(compared, page)


def divergence_parts(row: Pair, page: Page) -> Iterator[str]:
    forward, reverse, mixed = row.divergences.values()
    yield from page.heading("2  Forward: β = 0")
    yield from page.prose("""
        KL(q ‖ p) asks at every token that the teacher might say: does the student say it, too? Missing one
        costs most. The student learns to cover all of them. The unit is nats.""")
    yield from page.formula("D = Σ q·(ln q − ln p)        ∂D/∂x = p − q")
    yield from one(page, forward, ("p", row.p), ("q", row.q))
    yield from page.heading("3  Reverse: β = 1")
    yield from page.prose("""
        KL(p ‖ q) asks at every token that the student might say: would the teacher say it, too? Saying what
        the teacher would not costs most. The student may leave out some of what the teacher says. It is the
        usual choice on the student's own samples (arXiv:2306.08543).""")
    yield from page.formula("D = Σ p·(ln p − ln q)        ∂D/∂x = p·(ln p − ln q − D)")
    yield from one(page, reverse, ("p", row.p), ("q", row.q))
    yield from page.heading(f"4  Mixed: β = {BETA:g}")
    yield from page.prose("""
        Between 0 and 1 both are compared with their mixture m (arXiv:2306.13649). No divergence from m is
        ever infinite, even where one model bans what the other says.""")
    yield from page.formula(
        f"m = (1 − β)·p + β·q = {1 - BETA:g}·p + {BETA:g}·q",
        "D = β·Σ q·(ln q − ln m) + (1 − β)·Σ p·(ln p − ln m)",
        "∂D/∂x = (1 − β)·p·(ln p − ln m − Σ p·(ln p − ln m))",
    )
    yield from one(page, mixed, ("p", row.p), ("q", row.q), ("m", row.m))


def one(page: Page, divergence, *columns: tuple[str, Sequence[float]]) -> list[str]:
    names, values = zip(*columns)
    rows = [list(each) for each in zip(TOKENS, *values, divergence.terms, divergence.gradient)]
    rows.append(["sum", *map(sum, values), divergence.value, sum(divergence.gradient)])
    return page.table(("token", *names, "term of D", "∂D/∂x"), rows, left=(0,))


def step_part(row: Pair, page: Page) -> Iterator[str]:
    yield from page.heading("5  A step against each gradient")
    yield from page.prose("""
        Where the gradient is negative, descent makes the token likelier. The last columns are the student's
        probabilities after a step of size 1, x' = x − ∂D/∂x. All three move it towards the teacher. They
        differ in where they pull hardest.""")
    yield ""
    after = [softmax([x - g for x, g in zip(STUDENT, each.gradient)]) for each in row.divergences.values()]
    rows = [list(each) for each in zip(TOKENS, row.q, row.p, *after)]
    yield from page.table(("token", "q", "p", *(f"p', β = {beta:g}" for beta in row.divergences)), rows, left=(0,))
