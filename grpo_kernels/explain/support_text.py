"""What ``--support`` prints."""

from collections.abc import Iterator, Sequence

from grpo_kernels.explain.by_hand import EPSILON, LOGITS_OLD, QUESTION, TOKENS
from grpo_kernels.explain.kernel import Compared
from grpo_kernels.explain.support_by_hand import ADVANTAGES, ANSWERS, LOGITS_NOW, TOP_K, Kept
from grpo_kernels.explain.text import Page, comparison, spaced


def support_text(row: Kept, compared: Sequence[Compared], page: Page) -> Iterator[str]:
    """Everything that is printed, line by line."""
    return spaced(parts(row, compared, page))


def parts(row: Kept, compared: Sequence[Compared], page: Page) -> Iterator[str]:
    yield from page.title(f'A sampler that keeps {TOP_K} tokens, on "{QUESTION}"')
    yield from page.prose(f"""
        Samplers often leave out what is unlikely: top-k, top-p, min-p. Then a token is drawn from a set S, and
        its probability is over S. The trainer has to compute with the same set. Below the model knows
        {len(TOKENS)} tokens, and the sampler keeps the {TOP_K} likeliest (top-k, k = {TOP_K}).""")
    yield from set_part(row, page)
    yield from probability_part(row, page)
    yield from ratio_part(row, page)
    yield from gradient_part(row, page)
    yield from page.heading("5  The same through fused_grpo_loss")
    yield from page.prose("""
        `support=` takes the ids of S, a list for each token that was sampled. Of a row only these logits are
        read. Where there are several numbers the first is shown, and the largest gap between any two.""")
    yield from page.formula(
        f"support = Support.from_lists([{[TOKENS.index(token) for token in row.kept]}] * {len(ANSWERS)})",
        "old = token_logprobs(logits_old, ids, support=support).logps",
        f"out = fused_grpo_loss(logits, ids, A, old_logps=old, epsilon={EPSILON:g},",
        "                      support=support)",
        "out.loss.backward()",
    )
    yield from comparison(compared, page)


def marks(row: Kept) -> list[str]:
    return ["yes" if token in row.kept else "no" for token in TOKENS]


def set_part(row: Kept, page: Page) -> Iterator[str]:
    yield from page.heading("1  The set that the sampler kept")
    yield from page.prose("""
        The old policy has logits x for all tokens. The sampler keeps S, and divides by Z, the probability of
        S, so that what is left adds up to 1.""")
    z = " + ".join(f"{p:.4f}" for token, p in zip(TOKENS, row.p_old) if token in row.kept)
    yield from page.formula("p = eˣ / Σeˣ        p_S = p / Z in S, 0 outside", f"Z = {z} = {row.share:.4f}")
    old = [f"{x:.1f}" for x in LOGITS_OLD]
    rows = [list(each) for each in zip(TOKENS, old, row.p_old, marks(row), row.p_old_kept)]
    rows.append(["sum", "", sum(row.p_old), "", sum(row.p_old_kept)])
    yield from page.table(("token", "x old", "p old", "kept", "p_S old"), rows, left=(0, 3))


def probability_part(row: Kept, page: Page) -> Iterator[str]:
    yield from page.heading("2  Log-probabilities over the set")
    yield from page.prose("""
        The model has learned since, and has other logits now. Its probabilities are taken over the same S,
        whatever it would keep today. y is the token that was sampled.""")
    yield from page.formula("lp = x_y − ln Σ eˣ over S        (in nats)")
    now = [f"{x:.1f}" for x in LOGITS_NOW]
    rows = [list(each) for each in zip(TOKENS, now, row.p_now, marks(row), row.p_now_kept)]
    rows.append(["sum", "", sum(row.p_now), "", sum(row.p_now_kept)])
    yield from page.table(("token", "x now", "p now", "kept", "p_S now"), rows, left=(0, 3))
    yield ""
    rows = [list(each) for each in zip(ANSWERS, row.logps, row.old_logps)]
    yield from page.table(("answer", "lp over S", "old over S"), rows, left=(0,))


def ratio_part(row: Kept, page: Page) -> Iterator[str]:
    yield from page.heading("3  Ratios")
    yield from page.prose(f"""
        How much likelier has an answer become? Both probabilities have to be over S. The last column is what
        a trainer gets that knows nothing of S: its own probability is over all tokens, and the sampler's is
        not. Before anything has moved that ratio is Z = {row.share:.4f} for every token, and not 1.""")
    yield from page.formula("ρ = exp(lp − old)")
    rows = [list(each) for each in zip(ANSWERS, row.logps, row.old_logps, row.ratios, row.biased_ratios)]
    yield from page.table(("answer", "lp", "old", "ρ", "p now / p_S old"), rows, left=(0,))
    yield ""
    yield from page.prose(f"""
        "{ANSWERS[0]}" has become likelier: ρ = {row.ratios[0]:.4f}. The biased ratio,
        {row.biased_ratios[0]:.4f}, says the opposite.""")


def gradient_part(row: Kept, page: Page) -> Iterator[str]:
    count = len(ANSWERS)
    yield from page.heading("4  The loss, and its gradient")
    yield from page.prose(f"""
        The loss is the clipped one, with ε = {EPSILON:g}: ℓ = −min(ρ·A, clip(ρ)·A). No answer is clipped here. A
        token outside of S could not have been drawn, and its gradient is exactly 0. Over all tokens a
        good answer would lower it, and a bad one raise it: the last column, for the same g.""")
    yield from page.formula(
        f"g = ∂loss/∂lp = −ρ·A / {count}",
        "∂loss/∂x = g·([token = y] − p_S) in S, 0 outside",
        f"loss = Σℓ / {count} = {row.loss:.4f}",
    )
    rows = [list(each) for each in zip(ANSWERS, ADVANTAGES, row.ratios, row.losses, row.slopes)]
    yield from page.table(("answer", "A", "ρ", "ℓ", "g"), rows, left=(0,))
    for answer, gradient, biased in zip(ANSWERS, row.gradient, row.biased_gradient):
        yield ""
        rows = [list(each) for each in zip(TOKENS, marks(row), row.p_now_kept, gradient, biased)]
        rows.append(["sum", "", sum(row.p_now_kept), sum(gradient), sum(biased)])
        titles = (f'for "{answer}"', "kept", "p_S now", "∂loss/∂x", "over all tokens")
        yield from page.table(titles, rows, left=(0, 1))
