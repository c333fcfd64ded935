"""What is printed: per step what is done and why, the formula, and the numbers."""

import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from grpo_kernels.explain.by_hand import (
    ANSWERS,
    BETA,
    EASY,
    EPSILON,
    HARD,
    LOGITS_NOW,
    LOGITS_OLD,
    LOGITS_REFERENCE,
    QUESTION,
    REWARDS,
    STD_EPSILON,
    TOKENS,
    Step,
    advantages_of,
    mean_and_std,
    softmax,
)
from grpo_kernels.explain.kernel import TOLERANCE, Compared

WIDTH = 80


class Page:
    """Lines of at most `WIDTH` columns; colours are put around whole lines, so that columns stay aligned."""

    def __init__(self, colours: bool) -> None:
        self.colours = colours

    def _painted(self, line: str, code: str) -> str:
        return f"\x1b[{code}m{line}\x1b[0m" if self.colours else line

    def title(self, text: str) -> list[str]:
        return [self._painted(text, "1"), self._painted("=" * len(text), "1")]

    def heading(self, text: str) -> list[str]:
        return ["", self._painted(f"{text} ".ljust(WIDTH, "-"), "1")]

    def prose(self, text: str) -> list[str]:
        glued = re.sub(r" ([<>=]) ", "\u00a0\\1\u00a0", " ".join(text.split()))  # no line ends inside "A > 0"
        return [line.replace("\u00a0", " ") for line in textwrap.wrap(glued, WIDTH)]

    def formula(self, *lines: str) -> list[str]:
        return ["", *(self._painted(f"    {line}", "36") for line in lines), ""]

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[object]], left: Sequence[int] = ()) -> list[str]:
        """Columns as wide as they must be; numbers to the right, the columns in `left` to the left."""
        cells = [list(titles), *([number(cell) for cell in row] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
        lines = []
        for row in cells:
            padded = (cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            lines.append(("  " + "  ".join(padded)).rstrip())
        return [self._painted(lines[0], "4"), *lines[1:]]


def number(cell: object) -> str:
    """Floats with four digits behind the point, and no sign where that leaves nothing but zeros."""
    if not isinstance(cell, float):
        return str(cell)
    text = f"{cell:.4f}"
    return text.lstrip("-") if float(text) == 0 else text


def direction(policy_slope: float, kl_slope: float) -> str:
    slope = policy_slope + kl_slope
    effect = "likelier" if slope < 0 else "less likely" if slope > 0 else "as it is"
    return effect if policy_slope else f"{effect} (KL)"


def numbered(*columns: Sequence[object]) -> list[list[object]]:
    """One row per answer: its number, the answer, and the columns."""
    return [[i, answer, *cells] for i, (answer, *cells) in enumerate(zip(ANSWERS, *columns), 1)]


def spaced(lines: Iterable[str]) -> Iterator[str]:
    """One empty line at a time."""
    for line, run in itertools.groupby(lines):
        yield from [line] if line == "" else run


def text(step: Step, compared: Sequence[Compared], page: Page) -> Iterator[str]:
    """Everything that is printed, line by line."""
    return spaced(parts(step, compared, page))


def parts(step: Step, compared: Sequence[Compared], page: Page) -> Iterator[str]:
    yield from page.title(f'One step of GRPO on "{QUESTION}"')
    yield from page.prose(f"""
        GRPO teaches a language model from rewards alone. It asks the same question several times, compares
        the answers with each other, and makes the better ones likelier. Below is one such step with
        {len(ANSWERS)} answers, in arithmetic that a pocket calculator can follow. To keep it short, the model
        knows {len(TOKENS)} tokens, and an answer is one token. In longer answers every token goes through
        steps 5 to 9, with the advantage of its answer.""")
    yield from reward_part(step, page)
    yield from other_questions(page)
    yield from probability_part(step, page)
    yield from objective_part(step, page)
    yield from gradient_part(step, page)
    yield from kernel_part(compared, page)


def reward_part(step: Step, page: Page) -> Iterator[str]:
    yield from page.heading("1  Rewards")
    worth = ", ".join(f'"{answer}" gets {reward:g}' for answer, reward in REWARDS.items())
    yield from page.prose(f"""
        The model as it was, the "old policy", has sampled {len(ANSWERS)} answers: a group. A program checks
        each of them and gives a reward R, in points: {worth}, and any other answer 0. Nothing else tells
        the model what is right.""")
    yield from page.heading("2  Mean and standard deviation of the group")
    yield from page.prose("""
        How good is a reward? That depends on the question. GRPO's measure is the other answers to the same
        question: their mean is what this model usually gets for it. (PPO trains a second network to know
        that.)""")
    count = len(ANSWERS)
    squares = sum((reward - step.mean) ** 2 for reward in step.rewards)
    yield from page.formula(
        f"mean = ΣR / {count} = {sum(step.rewards):g} / {count} = {step.mean:.4f}",
        f"std  = √(Σ(R − mean)² / {count - 1}) = √({squares:.4f} / {count - 1}) = {step.std:.4f}",
    )
    yield from page.heading("3  Advantages")
    yield from page.prose("""
        The advantage A says by how many standard deviations an answer is better (A > 0) or worse (A < 0)
        than the group. It has no unit. The small number keeps the division safe where all rewards are the
        same; then every A is 0, and the group teaches nothing.""")
    yield from page.formula(f"A = (R − mean) / (std + {STD_EPSILON:g})")
    deviations = [reward - step.mean for reward in step.rewards]
    rows = numbered(step.rewards, deviations, step.advantages)
    yield from page.table(("#", "answer", "R", "R − mean", "A"), rows, left=(1,))


def other_questions(page: Page) -> Iterator[str]:
    yield from page.heading("4  The same for a hard and an easy question")
    yield from page.prose("""
        Only the comparison within the group counts. Take answers that get points out of 100. On a hard
        question 12 is a low score, and yet the best of its group: it is rewarded. On an easy one 90 is a
        high score, and yet the worst of its group: it is discouraged.""")
    yield ""
    for name, rewards in (("hard", HARD), ("easy", EASY)):
        mean, std = mean_and_std(rewards)
        odd = max(range(len(rewards)), key=lambda i: abs(rewards[i] - mean))
        rest = (odd + 1) % len(rewards)
        A = advantages_of(rewards)
        yield f"  {name}: R = {'  '.join(f'{reward:g}' for reward in rewards)}"
        yield f"        mean {mean:.4f}, std {std:.4f}"
        for i, who in ((odd, f"the {rewards[odd]:g}"), (rest, f"the {rewards[rest]:g}s")):
            effect = "A > 0, likelier" if A[i] > 0 else "A < 0, less likely"
            quotient = f"({rewards[i]:g} − {mean:g}) / {std + STD_EPSILON:.4f}"
            yield f"        {who:<8}A = {quotient:<20} = {A[i]:7.4f}   {effect}"
        yield ""
    yield from page.prose("""
        Both are about equally far out, though the distances were 2 and 5 points: the std divides the scale
        away.""")


def probability_part(step: Step, page: Page) -> Iterator[str]:
    yield from page.heading("5  Log-probabilities")
    yield from page.prose("""
        A language model gives every token a score, the logit x; softmax turns scores into probabilities,
        and their natural logarithm lp (in nats) is what one computes with. Three versions of the model
        matter: "old", which sampled the answers; "now", which is being trained and has already taken a
        step or two on them; and "ref", the reference, which it started from and should not forget.""")
    yield from page.formula("p = eˣ / Σeˣ        lp = ln p")
    now, old, ref = (softmax(logits) for logits in (LOGITS_NOW, LOGITS_OLD, LOGITS_REFERENCE))
    powers = [math.exp(x) for x in LOGITS_NOW]
    rows = [
        [token, f"{x:.1f}", power, *ps, math.log(ps[0])]
        for token, x, power, *ps in zip(TOKENS, LOGITS_NOW, powers, now, old, ref)
    ]
    rows.append(["sum", "", sum(powers), sum(now), sum(old), sum(ref), ""])
    titles = ("token", "x now", "eˣ now", "p now", "p old", "p ref", "lp now")
    yield from page.table(titles, rows, left=(0,))
    yield from page.heading("6  Ratios")
    yield from page.prose("""
        How much likelier has an answer become since it was sampled? The ratio ρ is 1 if nothing changed,
        2 if it is twice as likely.""")
    yield from page.formula("ρ = p now / p old = exp(lp − old)")
    rows = numbered(step.logps, step.old_logps, step.ratios)
    yield from page.table(("#", "answer", "lp", "old", "ρ"), rows, left=(1,))


def objective_part(step: Step, page: Page) -> Iterator[str]:
    low, high = 1 - EPSILON, 1 + EPSILON
    yield from page.heading("7  The clipped objective")
    yield from page.prose(f"""
        ρ·A is large where good answers became likelier and bad ones less likely. But the answers were
        sampled by the old model, and say little about a model far from it. So ρ earns nothing beyond
        {low:g} and {high:g}: the smaller of ρ·A and clip(ρ)·A counts. An answer with A > 0 and ρ > {high:g}
        is likely enough for now, one with A < 0 and ρ < {low:g} is rare enough. An answer that moved the
        wrong way is never clipped: it has to come back.""")
    yield from page.formula(f"objective = min(ρ·A, clip(ρ, {low:g}, {high:g})·A)")
    chosen = [min(f, b) for f, b in zip(step.free, step.bounded)]

    def verdict(clipped: bool, ratio: float) -> str:
        return "clipped" if clipped else "inside" if low <= ratio <= high else "wrong way"

    verdicts = [verdict(*each) for each in zip(step.is_clipped, step.ratios)]
    rows = numbered(step.advantages, step.ratios, step.free, step.bounded, chosen, verdicts)
    yield from page.table(("#", "answer", "A", "ρ", "ρ·A", "clip(ρ)·A", "min", ""), rows, left=(1, 7))
    yield from page.heading("8  KL to the reference, and the loss")
    yield from page.prose(f"""
        A model that chases rewards may forget how to write. The KL term, times β = {BETA:g}, holds it near
        the reference. The estimate named k3 is never negative, and 0 where both agree. The loss is what
        gradient descent makes small, hence the minus before the objective. The answers are averaged; in
        longer ones, their tokens first.""")
    yield from page.formula(
        "u  = ref − lp        kl = eᵘ − u − 1   (in nats)",
        f"ℓ  = −objective + {BETA:g}·kl",
        f"loss = Σℓ / {len(ANSWERS)}",
    )
    u = [ref - lp for ref, lp in zip(step.ref_logps, step.logps)]
    rows = numbered(step.ref_logps, step.logps, u, step.kl, chosen, step.losses)
    rows.append(["", "mean", "", "", "", sum(step.kl) / len(ANSWERS), sum(chosen) / len(ANSWERS), step.loss])
    yield from page.table(("#", "answer", "ref", "lp", "u", "kl", "objective", "ℓ"), rows, left=(1,))
    yield ""
    yield from page.prose(f"""
        The loss is {step.loss:.4f}. Its value says nothing about how good the model is: if nothing had
        moved yet, all ρ would be 1, and the objective the mean of the A, which is 0. Its gradient is what
        teaches.""")


def gradient_part(step: Step, page: Page) -> Iterator[str]:
    count = len(ANSWERS)
    yield from page.heading("9  The gradient, and its sign")
    yield from page.prose("""
        How does the loss change with the lp of an answer? Where the slope g is negative, descent makes the
        answer likelier; where it is positive, less likely. A clipped answer's objective does not change
        with ρ: exactly 0 comes from it, and the small rest is the KL.""")
    yield from page.formula(
        "g = ∂loss/∂lp = g_obj + g_kl",
        f"g_obj = −ρ·A / {count}, 0 if clipped        g_kl = {BETA:g}·(1 − eᵘ) / {count}",
    )
    slopes = [a + b for a, b in zip(step.policy_slopes, step.kl_slopes)]
    rows = numbered(
        step.advantages, ["yes" if clipped else "no" for clipped in step.is_clipped], step.policy_slopes,
        step.kl_slopes, slopes, [direction(*both) for both in zip(step.policy_slopes, step.kl_slopes)],
    )  # fmt: skip
    yield from page.table(("#", "answer", "A", "clipped", "g_obj", "g_kl", "g", "descent"), rows, left=(1, 7))
    yield ""
    yield from page.prose("""
        The model has logits, not lp. An answer pulls at its own token, and the other way at all tokens by
        their probability. All answers are to one question, so that their pulls on a logit add up. The last
        columns take a step of size 1 against the gradient. Clipped tokens move a little too: probabilities
        add up to 1, and what one loses the others share.""")
    yield from page.formula("∂loss/∂x = Σ g·([token = answer] − p)        x' = x − ∂loss/∂x")
    total = [sum(row[i] for row in step.gradient) for i in range(len(TOKENS))]
    moved = [x - slope for x, slope in zip(LOGITS_NOW, total)]
    before, after = softmax(LOGITS_NOW), softmax(moved)
    rows = [
        [token, slope, f"{x:.1f}", y, p, q]
        for token, slope, x, y, p, q in zip(TOKENS, total, LOGITS_NOW, moved, before, after)
    ]
    yield from page.table(("token", "∂loss/∂x", "x", "x'", "p", "p'"), rows, left=(0,))


def kernel_part(compared: Sequence[Compared], page: Page) -> Iterator[str]:
    yield from page.heading("10  The same through fused_grpo_loss")
    yield from page.prose(f"""
        One call takes logits ({len(ANSWERS)}, 1, {len(TOKENS)}) (answers, tokens of an answer, vocabulary),
        the answers' tokens and the rewards, and does steps 2 to 9, in 32-bit arithmetic. Where there are
        several numbers the first is shown, and the largest gap between any two.""")
    yield from page.formula(
        "out = fused_grpo_loss(logits, ids, rewards=rewards,",
        f"                      num_generations={len(ANSWERS)}, old_logps=old,",
        f"                      ref_logps=ref, epsilon={EPSILON:g}, beta={BETA:g})",
        "out.loss.backward()",
    )
    yield from comparison(compared, page)


def comparison(compared: Sequence[Compared], page: Page) -> Iterator[str]:
    """The table of both, and whether they are equal."""
    rows = [[c.name, c.call, len(c.hand), c.hand[0], c.fused[0], f"{c.difference:.0e}"] for c in compared]
    yield from page.table(("what", "from", "n", "by hand", "fused", "largest gap"), rows, left=(0, 1))
    yield ""
    wrong = [c.name for c in compared if not c.equal]
    if wrong:
        yield from page.prose(f"NOT EQUAL: {', '.join(wrong)} differ by more than {TOLERANCE:g}.")
    else:
        yield from page.prose(f"Equal: no number differs by more than {TOLERANCE:g}.")
