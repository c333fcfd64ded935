"""What a policy term loses by its own arithmetic in fp32, where moving its inputs does not show it.

Most operations of a term are among the 8 roundings that `tolerance.py` allows every result. **Exponentials** are not:
e^x passes on each rounding of what x is the sum of, at its absolute size, and is off relatively by as many u as those
sizes add up to; also where x is held at a bound, and no input moves it. x itself is rounded 3 times: as it is written,
and scaled by log₂ e, itself rounded; what is left is good to two units in the last place, 4 u. Relative, in u, and no
term is given the benefit of its sign::

    ρ = e^r̂                    3·|r̂| + 4 =: q
    log of a weight e^d         of the weight 3·|d| + 4, of the logarithm as much: 6·|d| + 8 =: q_d, absolute
    the same, for A ≤ 0        up. For A > 0 ℓ is −A: 0
    the same, and W = e^F      fipo. Of F: of each r_k 1, of its γ^k the rounding of log₂ γ, k·|log γ|, all times
                               γ^k·|r_k|; F itself 1; adding up is in fp64: d_F. Of W d_F + 3·|F| + 4, its bounds 1;
                               only the bounds' where F lies beyond them by more than d_F
    e^x, x = log w·k + λ − λ·w  vespo. Of k·log w: k, log w, the product; of λ: 1; of λ·w: λ, the product, w as of ρ.
                                λ + k·log w rounds once more, then 3 of all as of each x:
                                7·k·|log w| + 5·λ + (9 + 3·|log w|)·λ·w + 4,
                                and |k − λ·w|·Σ(q_d + |d| + |r|) for weights in w, unless w is held
    e^x, x = mean(δ + d)        gmpo. |δ| ≤ |r|. Of each δ 1, of each weight q_d, 1 for adding them, 2 for the mean, 3:
                                mean(7·|r|) + mean(q_d + 6·|d|) + 4
    σ(z), z = τ·(ρ − 1)         sapo. Of z: δz = τ·ρ·q + 3·|z|; of e^∓z 2·|z| + 4; 1 for adding, 4 for dividing.
      the value, 4·σ(z)/τ       σ(−z)·(δz + 2·|z| + 4) + 5
      the slope, 4·ρ·σ·σ(−z)    q + (δz + 2·|z| + 4) + 2·5

vespo's log w is held at log 10⁻⁸ = −18.4, which one weight of 0 does: with k = 2.5 the exponent is −46, no input moves
it, and 7·46 + 9 u are 2.0e-5 of the slope. reinforce and dro take no exponential. A term that is not listed counts as
one of e^r̂. The KL estimators need nothing: k3's exponent moves with log π by more than its own roundings wherever k3
has a slope.

**A bound** moves a token to its other side. What is compared with ε is the difference of numbers up to 1, of which the
binary KL of dppo_kl is rounded most: (1 − p)·log((1 − p_old)/(1 − p)), 2 of each difference, 4 of the quotient, 4 of
the logarithm. Where p and p_old lie near to each other no error of theirs is as large. ε is off by 12 u.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import reference
from reference.knobs import Knobs
from reference.tensors import gradient_of, masked_mean, masked_sum, sequence_mean
from reference.terms import LOG_FLOOR, Tokens, future_of, policy_term, vespo_log_w, vespo_phi

U = 2.0**-24  # unit roundoff of fp32
OF_A_BOUND = 12 * U
PHI = "vespo/phi_seq_mean"
FUTURE, INFLUENCE = "fipo/future_kl", "fipo/influence_weight"


class Roundings(NamedTuple):
    """Relative, in u, (B, T) or (B, 1) each."""

    value: Tensor
    slope: Tensor


def of_exp(x: Tensor) -> Tensor:
    return 3 * x.abs() + 4


def of_ratio(x: Tokens, k: Knobs) -> Roundings:
    return Roundings(of_exp(x.r), of_exp(x.r))


def of_up(x: Tokens, k: Knobs) -> Roundings:
    size = torch.where(x.A > 0, 0, of_exp(x.r))
    return Roundings(size, size)


def of_future(x: Tokens, k: Knobs) -> Tensor:
    """d_F, absolute."""
    gamma = 0.5 ** (1 / k.fipo_decay_rate) if k.fipo_gamma is None else k.fipo_gamma
    sizes = torch.where(x.mask, (x.lp - x.old).abs(), 0).nan_to_num(0, 0, 0)
    T = sizes.shape[1]
    steps = (torch.arange(T) - torch.arange(T)[:, None]).double()  # [t, k]
    powers = torch.where(steps < 0, 0, gamma ** steps.clamp(min=0) * (1 + steps * abs(math.log(gamma))))
    return sizes.double() @ powers.T + future_of(x, k).kl.abs()


def of_influence(x: Tokens, k: Knobs) -> Tensor:
    """Of W, relative."""
    F, d_F = future_of(x, k).kl, of_future(x, k)
    size = d_F + 3 * F.abs() + 4
    if k.fipo_clip_range:
        most, least = math.log1p(k.fipo_clip_range), 0.0 if k.fipo_clip_high_only else -math.inf
        if not k.fipo_clip_high_only and k.fipo_clip_range < 1:
            least = math.log1p(-k.fipo_clip_range)
        size = torch.where((F > most + U * size) | (F < least - U * size), 1, size)
    return size


def of_fipo(x: Tokens, k: Knobs) -> Roundings:
    size = of_exp(x.r) + of_influence(x, k)
    return Roundings(size, size)


def of_nothing(x: Tokens, k: Knobs) -> Roundings:
    return Roundings(torch.zeros_like(x.r), torch.zeros_like(x.r))


def by_sign(x: Tokens, pos: float, neg: float) -> Tensor:
    return torch.where(x.A >= 0, x.A.new_tensor(pos), neg)


def logs(x: Tokens) -> Tensor:
    """|d| of the importance weights, up to |log 10⁻⁸|: beyond they are held, or 0."""
    return x.is_weights.log().abs().clamp(max=-LOG_FLOOR)


def of_gmpo(x: Tokens, k: Knobs) -> Roundings:
    size = sequence_mean(7 * (x.lp - x.old).abs(), x.mask) + 4
    if x.is_weights is not None:
        size = size + sequence_mean((12 * logs(x) + 8).expand(x.mask.shape), x.mask)
    return Roundings(size, size)


def of_vespo(x: Tokens, k: Knobs) -> Roundings:
    power = by_sign(x, k.vespo_k_pos, k.vespo_k_neg)
    rate = by_sign(x, k.vespo_lambda_pos, k.vespo_lambda_neg).clamp(min=1e-4)
    log_w = vespo_log_w(x)
    size, falling = log_w.abs(), rate * log_w.exp()
    total = 7 * power.abs() * size + 5 * rate + (9 + 3 * size) * falling + 4
    if x.is_weights is not None:
        own = 7 * logs(x) + 8
        own = own if own.shape[1] == 1 else masked_sum(own + (x.lp - x.old).abs(), x.mask)
        free = (log_w > LOG_FLOOR) & (log_w < 20)
        total = total + torch.where(free, own * (power - falling).abs(), 0)
    return Roundings(total, total)


def of_sapo(x: Tokens, k: Knobs) -> Roundings:
    tau = torch.where(x.A > 0, x.A.new_tensor(k.sapo_temperature_pos), k.sapo_temperature_neg)
    rho, q = x.r.exp(), of_exp(x.r)
    z = tau * (rho - 1)
    gate = tau * rho * q + 5 * z.abs() + 4
    return Roundings(torch.sigmoid(-z) * gate + 5, q + gate + 10)


TERM_ROUNDINGS = {
    "reinforce": of_nothing, "dro": of_nothing, "gmpo": of_gmpo, "vespo": of_vespo, "sapo": of_sapo,
    "up": of_up, "fipo": of_fipo,
}  # fmt: skip


def roundings(x: Tokens, k: Knobs) -> Roundings:
    """Of the term's value and slope; 0 where a ratio is infinite or NaN, and so they are infinite, NaN, or held."""
    x = x._replace(r=x.r.detach(), lp=x.lp.detach())
    return Roundings(*(size.nan_to_num(0, 0, 0) for size in TERM_ROUNDINGS.get(k.term, of_ratio)(x, k)))


@contextlib.contextmanager
def term_off(by: Tensor) -> Iterator[list]:
    """The reference's policy term is off by its own roundings times `by`, (B, 1), within ±1; B sequences.

    Yields a list, which will hold (tokens, knobs) that the term was given.
    """
    seen = []

    def term(x: Tokens, k: Knobs, keep: Tensor | None = None) -> Tensor:
        seen.append((x, k))
        loss, own = policy_term(x, k, keep), roundings(x, k)
        return loss * (1 + U * by * own.value) + U * by * (own.slope - own.value) * gradient_of(loss)

    with mock.patch.object(reference.grpo, "policy_term", term):
        yield seen


def policy_loss_off(by: Tensor, logps: Tensor, **kwargs):
    """`reference.policy_loss`, its term, what it shows of the term and its bounds ε off by their own roundings."""
    by = by.detach()
    if by.numel():
        for name in ("epsilon", "epsilon_high"):
            if (bound := kwargs.get(name, getattr(Knobs, name))) is not None:
                off = math.copysign(OF_A_BOUND, by[0, 0].item())  # all of it: a part would miss what lies beyond
                kwargs[name] = max(bound + off, 0.0)
    with term_off(by) as seen:
        out = reference.policy_loss(logps, **kwargs)
    if PHI in out.metrics and by.numel():  # a mean
        ((x, k),) = seen
        off = vespo_phi(vespo_log_w(x), x.A, k).mul(roundings(x, k).value).nan_to_num(0, 0, 0)
        out.metrics[PHI] = out.metrics[PHI] + U * by[0, 0] * (off.max() if off.numel() else 0.0)
    if FUTURE in out.metrics and by.numel():
        ((x, k),) = seen
        for name, off in ((FUTURE, of_future(x, k)), (INFLUENCE, future_of(x, k).influence * of_influence(x, k))):
            out.metrics[name] = out.metrics[name] + U * by[0, 0] * masked_mean(off.nan_to_num(0, 0, 0), x.mask)
    return out
