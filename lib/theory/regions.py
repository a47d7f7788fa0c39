"""Where each case of Theorem 5.2 holds, in closed form, and the constants that make it true.

Write Delta for the change of log(p1 / p2) in one step. For categories 1 and 2 of any p and q

    (Delta_r - Delta_f) / rate = p1 (log(q1/p1) + K) - p2 (log(q2/p2) + K) - (q1 - q2) + (p1 - p2)

with K = KL(p || q). Its sign is decided by two classical means: the logarithmic mean L of q1 and q2
when p1 = p2, and the identric mean I of p1 and p2 when q1 = q2. Tensors in float64, elementwise.
Chapter: theory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lib.divergences import categorical_kl
from lib.theory.dynamics import contrast, forward_push, reverse_push

TIED = 1e-6  # relative difference below which the means are expanded around the tie


def gap(logp: Tensor, logq: Tensor) -> Tensor:
    """(Delta_r - Delta_f) / rate for categories 0 and 1, (eq-gap-52). (..., V) -> (...)."""
    return contrast(reverse_push(logp, logq) - forward_push(logp, logq))


def log_mean(a: Tensor, b: Tensor) -> Tensor:
    """L(a, b) = (a - b) / (log a - log b), a where a = b: (eq-log-mean). Positive arguments."""
    ratio = torch.log(a) - torch.log(b)
    tied = ratio.abs() < TIED
    middle = torch.sqrt(a) * torch.sqrt(b)  # L = sqrt(ab) sinh(x/2) / (x/2), x = log a/b
    return torch.where(tied, middle, (a - b) / ratio.where(~tied, 1.0))


def log_identric(a: Tensor, b: Tensor) -> Tensor:
    """log I(a, b) = (a log a - b log b) / (a - b) - 1: (eq-identric); log a where a = b.

    Positive arguments; `a log a` is 0 at 0, so that I(a, 0) = a / e.
    """
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    x = low / high
    tied = 1 - x < TIED
    safe = x.where(~tied, 0.5)
    slope = -torch.special.xlogy(safe, safe) / (1 - safe)  # r log(1/r) / (1 - r)
    return torch.log(high) + torch.where(tied, -(1 - x) / 2, slope - 1)


def case1(logp: Tensor, logq: Tensor) -> Tensor:
    """Margin of case 1, p1 = p2: log p1 - log L(q1, q2); Delta_r > Delta_f iff positive."""
    q = logq.exp()
    return logp[..., 0] - torch.log(log_mean(q[..., 0], q[..., 1]))


def case2(logp: Tensor, logq: Tensor) -> Tensor:
    """Margin of cases 2 and 3, q1 = q2, p1 > p2: log q1 + K - log I(p1, p2), (eq-case-2).

    Delta_r > Delta_f iff positive; Delta_r > 0 iff it is above 1 (the proof of case 2).
    """
    p = logp.exp()
    return logq[..., 0] + categorical_kl(logp, logq) - log_identric(p[..., 0], p[..., 1])


def smallest_delta1(beta: float) -> float:
    """The least delta1 for which case 1 is true: beta / (2 artanh beta), (eq-delta1).

    L(q1, q2) is largest, at a given q1 - q2 = beta, when nothing is left for other categories.
    Raises: ValueError unless 0 < beta < 1.
    """
    check_open("beta", beta, 1.0)
    return beta / (2 * math.atanh(beta))


def threshold(p1: Tensor, p2: Tensor, extra: float = 0.0) -> Tensor:
    """q*: with q1 = q2 = q above it, log q + K > log I(p1, p2) + extra for every rest of q.

    K is least when q copies p's proportions outside the pair. With s = 1 - p1 - p2 and H the
    entropy of (p1, p2, s): q* = R / (1 + 2 R), log R = (log I + extra + H) / s, (eq-threshold).
    Needs p1 + p2 < 1.
    """
    s = 1 - p1 - p2
    entropy = -sum(torch.special.xlogy(x, x) for x in (p1, p2, s))
    odds = (log_identric(p1, p2) + extra + entropy) / s
    return torch.sigmoid(odds + math.log(2)) / 2  # R / (1 + 2 R)


def bounded_by(beta: float, delta2: float) -> None:
    """Raises: ValueError unless some p1 satisfies p2 + beta <= p1 <= 1 - delta2."""
    check_open("beta", beta, 1.0)
    check_open("delta2", delta2, 1.0 - beta)


def breaks_case3(beta: float, delta2: float, c1: float) -> tuple[Tensor, Tensor]:
    """log p and log q of four categories that satisfy case 3's premises and refute its conclusion.

    p puts mass on the third category and q next to none, so K = KL(p || q) is as large as wanted
    while q1 = q2 < c1 p2 stays as small as wanted: (eq-break-3). No constant c1 survives that.
    Raises: ValueError for constants that no distribution can satisfy, or c1 outside (0, 1).
    """
    bounded_by(beta, delta2)
    check_open("c1", c1, 1.0)
    p1 = (1 - delta2 + beta) / 2
    p2 = min((p1 - beta) / 2, (1 - p1) / 2)
    rest = (1 - p1 - p2) / 2
    logp = torch.tensor([p1, p2, rest, rest], dtype=torch.float64).log()
    log_q = math.log(c1 * p2 / 2)
    log_q3 = -(2.0 - log_q) / rest - 2.0  # then K > 1 - log q1, whatever the other terms are
    fourth = math.log1p(-2 * math.exp(log_q) - math.exp(log_q3))
    return logp, torch.tensor([log_q, log_q, log_q3, fourth], dtype=torch.float64)


def smallest_c0(beta: float, delta2: float = 0.01, extra: float = 0.0, points: int = 600) -> float:
    """The least c0 for which case 2 is true: sup q* / p1 over p2 + beta <= p1 <= 1 - delta2.

    Below 1, and near 1 - beta for a small beta. With extra = 1 for the proof's Delta_r > 0: below
    e, and it tends to e as beta -> 0. On a grid, so that it is a lower bound near the true value.
    """
    bounded_by(beta, delta2)
    share = torch.linspace(0, 1, points, dtype=torch.float64)
    p1 = beta + (1 - delta2 - beta) * share[1:, None]
    p2 = torch.minimum(p1 - beta, 1 - p1 - 1e-9) * share[1:]
    return float((threshold(p1, p2, extra) / p1).max())


def largest_c1(beta: float, delta2: float, points: int = 400) -> float:
    """With exactly three categories, the largest c1 for which case 3 is true: inf q* / p2.

    0, so that no c1 exists, unless delta2 > (1 - beta) / 2: only then is mass that p keeps outside
    the pair bounded below. On a grid of (p1, p2), so that it is an upper bound near the true value.
    """
    bounded_by(beta, delta2)
    if delta2 <= (1 - beta) / 2:
        return 0.0
    top = 1 - delta2
    share = torch.linspace(0, 1, points, dtype=torch.float64)
    p2 = (top - beta) * share[1:, None]
    p1 = p2 + beta + (top - beta - p2) * share
    return float((threshold(p1, p2) / p2).clamp(max=1).min())


def check_open(name: str, value: float, high: float) -> None:
    """Raises: ValueError unless 0 < value < high."""
    if not 0 < value < high:
        raise ValueError(f"{name} must be between 0 and {high:g} (exclusive), got {value!r}")
