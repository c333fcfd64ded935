"""Derivatives of the policy terms in closed form, in plain numbers, for `term_table.py`; k has the knobs."""

import math

INF = math.inf


def widths(k) -> tuple[float, float]:
    return k.epsilon, k.epsilon if k.epsilon_high is None else k.epsilon_high


def clipped_slopes(k, rho, A, p, old):
    low, high = 1 - widths(k)[0], 1 + widths(k)[1]
    delta, dual = k.delta or INF, k.dual_clip or INF
    free, clip = min(rho, delta) * A, min(max(rho, low), high) * A
    if A < 0 and -min(free, clip) > -dual * A:
        return 0.0, 0.0
    moves = rho <= delta if free <= clip else low <= rho <= high
    return -rho * A * moves, 0.0


def up_slopes(k, rho, A, p, old):
    return (0.0, -A) if A > 0 else clipped_slopes(k, rho, A, p, old)


def sapo_slopes(k, rho, A, p, old):
    gate = 1 / (1 + math.exp(-(k.sapo_temperature_pos if A > 0 else k.sapo_temperature_neg) * (rho - 1)))
    return -4 * A * rho * gate * (1 - gate), 0.0


def dppo_tv_slopes(k, rho, A, p, old):
    low, high = widths(k)
    keep = p - old <= high if A > 0 else p - old >= -low
    return 0.0, -A * min(rho, k.dual_clip or 20) * keep


def dppo_kl_slopes(k, rho, A, p, old):
    low, high = widths(k)
    kl = old * math.log(old / p) + (1 - old) * math.log((1 - old + 1e-8) / (1 - p + 1e-8))
    keep = (kl <= high or p <= old) if A > 0 else (kl <= low or p >= old)
    return 0.0, -A * min(rho, k.dual_clip or 20) * keep


def vespo_slopes(k, w, r, A, weights):
    log_w = sum(r) + sum(map(math.log, weights))
    up, down = (k.vespo_k_pos, k.vespo_lambda_pos), (k.vespo_k_neg, k.vespo_lambda_neg)
    shape = [up if a >= 0 else down for a in A]
    phi = [math.exp(rate + power * log_w - rate * math.exp(log_w)) for power, rate in shape]
    return [-x * a * f for x, a, f in zip(w, A, phi)]


def gmpo_slopes(k, w, r, A, weights):
    """Of −Σ w·A·exp(mean δ + mean log weight)."""
    low, high = widths(k)
    delta = [min(x, high) if a > 0 else max(x, -low) if a < 0 else 0.0 for x, a in zip(r, A)]
    mean = (sum(delta) + sum(map(math.log, weights))) / max(len(r), 1)
    total = -sum(x * a for x, a in zip(w, A)) * math.exp(mean)
    return [total / len(r) * ((a > 0 and x <= high) or (a < 0 and x >= -low)) for x, a in zip(r, A)]


def fipo_influences(k, r, A, places):
    """W of each token of a sequence, r being its log ratios and places where they stand."""
    gamma = k.fipo_gamma or 0.5 ** (1 / k.fipo_decay_rate)
    width = k.fipo_clip_range or INF
    least, delta, unsafe = 1 - (0 if k.fipo_clip_high_only and k.fipo_clip_range else width), *map(
        lambda x: x or INF, (k.delta, k.fipo_safety_threshold))
    found = []
    for t, (at, a) in enumerate(zip(places, A)):
        rest = [gamma ** (place - at) * x for place, x in zip(places[t:], r[t:]) if math.exp(x) <= delta]
        weight = min(max(math.exp(sum(rest)), least), 1 + width)
        found.append(min(max(weight, 0.8), 1.0) if a < 0 and math.exp(r[t]) > unsafe else weight)
    return found
