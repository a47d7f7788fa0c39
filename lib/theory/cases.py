"""Checks of section E.2: Lemma E.4, the cases of Theorem 5.2, the special case, early stopping.

Each takes a number of random cases and a seed and returns what it `Found`; `CHECKS` has it by its
id in `data/theory_checks.csv`. Chapter: theory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lib.theory import draws, dynamics, regions
from lib.theory.found import Found, equal, positive, same_sign, together

BETAS, DELTAS = (0.01, 0.1, 0.3, 0.5, 0.9), (0.01, 0.05)  # constants that a statement is tried with
C1 = (0.9, 0.1, 1e-3, 1e-12, 1e-100)
RATES = (0.01, 1.0, 10.0)  # a step can be of any size: the lemma is exact


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _uniform(n: int, low, high, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)


# Lemma E.4


def _updates(objective: str, n: int, seed: int) -> Found:
    """The closed form against autograd, and one real step against it up to a constant."""
    parts = []
    for logp, logq in draws.pairs(n, seed):
        push = dynamics.push_of(objective)(logp, logq)
        auto = dynamics.autograd_push(objective, logp, logq)
        parts.append(equal(push, auto, p=logp.exp(), q=logq.exp()))
        for rate in RATES:
            change = (logp + rate * auto).log_softmax(-1) - logp - rate * push
            parts.append(equal(change - change[..., :1], torch.zeros_like(change)))
    return together(*parts)


def _lines(printed: bool, n: int, seed: int) -> Found:
    """The proof's second line, exp(f) - rate * gradient, or exp(f - rate * gradient), normalised.

    f = log p, rate 1, as a share of their sum over categories.
    """
    parts = []
    for logp, logq in draws.pairs(n, seed):
        push = dynamics.autograd_push("reverse", logp, logq)
        mass = logp.exp() + push if printed else (logp + push).exp()
        after = dynamics.descend(logp, dynamics.reverse_push(logp, logq), 1.0).exp()
        share = mass / mass.sum(-1, keepdim=True)
        parts.append(equal(share, after, p=logp.exp(), q=logq.exp(), printed=share))
    return together(*parts)


# Theorem 5.2, case 1


def two_and_rest(a: Tensor, b: Tensor, rest: Tensor) -> Tensor:
    """(n, 4) logs: masses a, b, and what is left in the proportions rest : 1 - rest."""
    left = (1 - a - b).clamp(min=0)
    mass = torch.stack([a, b, left * rest, left * (1 - rest)], -1)
    return mass.clamp(min=draws.SMALLEST).log()


def _equal_p(n: int, seed: int, low) -> Iterator[tuple]:
    """p1 = p2 in [low(beta), 1/2), q1 - q2 >= beta: (logp, logq) for each beta."""
    generator = _generator(seed)
    for beta in BETAS:
        share = -(-n // len(BETAS))
        p = _uniform(share, low(beta), 0.5, generator)
        d = beta + (1 - beta) * _uniform(share, 0.0, 1.0, generator) ** 3  # mostly near beta
        q2 = (1 - d) / 2 * (1 - _uniform(share, 0.0, 1.0, generator) ** 3)  # mostly q1 + q2 near 1
        rest = _uniform(2 * share, 0.01, 0.99, generator)
        yield two_and_rest(p, p, rest[:share]), two_and_rest(q2 + d, q2, rest[share:])


def case1_constants(n: int, seed: int) -> Found:
    """delta1 = beta / (2 artanh beta)."""
    found = [positive(regions.gap(*pair), p=pair[0].exp(), q=pair[1].exp())
             for pair in _equal_p(n, seed, regions.smallest_delta1)]  # fmt: skip
    return together(*found)


def case1_free_delta(n: int, seed: int) -> Found:
    """p1 = p2 anywhere between a tenth of that and one half."""
    found = [positive(regions.gap(*pair), p=pair[0].exp(), q=pair[1].exp())
             for pair in _equal_p(n, seed, lambda beta: 0.1 * regions.smallest_delta1(beta))]
    return together(*found)  # fmt: skip


def case1_region(n: int, seed: int) -> Found:
    parts = []
    for logp, logq in draws.pairs(n, seed):
        logp, logq = draws.tied(logp), draws.ordered(logq)
        parts.append(same_sign(regions.gap(logp, logq), regions.case1(logp, logq),
                               logq[..., 0] > logq[..., 1], p=logp.exp(), q=logq.exp()))
    return together(*parts)  # fmt: skip


# Cases 2 and 3


def _risen(n: int, seed: int, c0: float) -> Iterator[tuple]:
    """Random p, and q = p except that categories 0 and 1 both get c p1, c > c0."""
    generator = _generator(seed)
    for logp, _ in draws.pairs(n, seed, (3, 4, 8, 32)):
        logp = draws.ordered(logp)
        p = logp.exp()
        fits = (c0 * p[..., 0] < 0.499) & (p[..., 0] > p[..., 1])
        room = (0.499 / p[..., 0]).clamp(min=c0)
        c = c0 * (room / c0) ** (_uniform(len(p), 0.0, 1.0, generator) ** 3) * (1 + 1e-9)
        q12 = (c * p[..., 0]).clamp(max=0.4999)
        others = (1 - 2 * q12)[:, None].log() + logp[..., 2:].log_softmax(-1)
        yield logp, torch.cat([q12[:, None].log().expand(-1, 2), others], -1), fits


def _case2(c0: float, value: Callable, n: int, seed: int) -> Found:
    """Where both of q* are c0 times p1 or more, a value is positive."""
    parts = [positive(value(logp, logq), fits, p=logp.exp(), q=logq.exp())
             for logp, logq, fits in _risen(n, seed, c0)]  # fmt: skip
    return together(*parts)


def _reverse_delta(logp: Tensor, logq: Tensor) -> Tensor:
    return dynamics.contrast(dynamics.reverse_push(logp, logq))


def case2_region(n: int, seed: int) -> Found:
    """Cases 2 and 3: the signs of Delta_r - Delta_f and of Delta_r."""
    parts = []
    for logp, logq in draws.pairs(n, seed):
        logp, logq = draws.ordered(logp), draws.tied(logq)
        apart = logp[..., 0] > logp[..., 1]
        margin, shown = regions.case2(logp, logq), {"p": logp.exp(), "q": logq.exp()}
        parts.append(same_sign(regions.gap(logp, logq), margin, apart, **shown))
        parts.append(same_sign(_reverse_delta(logp, logq), margin - 1, apart, **shown))
    return together(*parts)


def _refutations() -> tuple[Tensor, Tensor, Tensor]:
    """A built counterexample for every triple of constants: log p, log q (n, 4), c1 (n,)."""
    grid = [(b, d, c) for b in BETAS for d in DELTAS for c in C1]
    built = [regions.breaks_case3(*constants) for constants in grid]
    logp, logq = (torch.stack(side) for side in zip(*built, strict=True))
    return logp, logq, torch.tensor([c for _, _, c in grid], dtype=torch.float64)


def case3_statement(n: int, seed: int) -> Found:
    """Delta_r < Delta_f, tried on each triple of constants with a distribution built against it."""
    logp, logq, c1 = _refutations()
    return positive(-regions.gap(logp, logq), p=logp.exp(), q=logq.exp(), c1=c1)


def case3_proof(n: int, seed: int) -> Found:
    """The last step, log c1 + log c'' - 1 - log c'' <= alpha_0 / (p1 - p2) = -(1 + K)."""
    logp, logq, c1 = _refutations()
    kl = dynamics.categorical_kl(logp, logq)
    return positive(-(1 + kl) - (torch.log(c1) - 1), c1=c1, K=kl)


def case3_bounded(n: int, seed: int) -> Found:
    """q1 = q2 < exp(-K) p2 implies Delta_r < Delta_f: (eq-case-3)."""
    parts = []
    for logp, logq in draws.pairs(n, seed, (3, 4, 8, 32)):
        logp, logq = draws.ordered(logp), draws.tied(logq)
        kl = dynamics.categorical_kl(logp, logq)
        premises = (logq[..., 0] < logp[..., 1] - kl) & (logp[..., 0] > logp[..., 1])
        parts.append(positive(-regions.gap(logp, logq), premises, p=logp.exp(), q=logq.exp()))
    return together(*parts)


def case3_three(n: int, seed: int) -> Found:
    """Three categories, delta2 > (1 - beta) / 2, c1 = inf q* / p2 over the premises."""
    generator, parts = _generator(seed), []
    for beta in (0.1, 0.3, 0.5):
        delta2 = (1 - beta) / 2 + 0.01
        share, top = n // 3, 1 - delta2
        p2 = _uniform(share, 1e-9, top - beta, generator)
        p1 = p2 + beta + (top - beta - p2) * _uniform(share, 0.0, 1.0, generator) ** 0.2
        q = 0.999 * regions.largest_c1(beta, delta2) * p2 * _uniform(share, 0.0, 1.0, generator)
        logp, logq = (torch.stack([a, b, 1 - a - b], -1).log() for a, b in ((p1, p2), (q, q)))
        parts.append(positive(-regions.gap(logp, logq), p=logp.exp(), q=logq.exp()))
    return together(*parts)


def special(n: int, seed: int) -> Found:
    """q - p alike for two categories: Delta_f = 0 and Delta_r has the sign of p1 - p2.

    (eq-special): with q = p + d the reverse push rises with p.
    """
    parts, generator = [], _generator(seed)
    for logp, logq in draws.pairs(n, seed, (3, 4, 8, 32)):
        p, q = draws.ordered(logp).exp(), logq.exp()
        high = q[:, 2:].sum(-1)  # the pair may take this from the others, or give them 2 p2
        low = -p[:, 1] * (1 - 1e-9)
        d = low + (high / 2 - low) * torch.rand(len(p), generator=generator, dtype=p.dtype)
        rest = (1 - p[:, :2].sum(-1) - 2 * d)[:, None]
        q = torch.cat([p[:, :2] + d[:, None], q[:, 2:] / high[:, None] * rest], -1)
        fits = (rest[:, 0] > 1e-12) & (p[:, 0] > p[:, 1]) & (q > 0).all(-1)
        logp, logq = p.log(), q.clamp(min=draws.SMALLEST).log()
        delta = dynamics.contrast(dynamics.forward_push(logp, logq))
        parts.append(positive(_reverse_delta(logp, logq), fits, p=p, q=q))
        parts.append(equal(delta.where(fits, 0.0), torch.zeros_like(delta)))
    return together(*parts)


CHECKS = {f.__name__.replace("_", "-"): f for f in (
    case1_constants, case1_free_delta, case1_region, case2_region,
    case3_statement, case3_proof, case3_bounded, case3_three, special,
)} | {
    "updates-forward": partial(_updates, "forward"),
    "updates-reverse": partial(_updates, "reverse"),
    "updates-line": partial(_lines, True),
    "updates-line-corrected": partial(_lines, False),
    "case2-statement": partial(_case2, 1.0, regions.gap),
    "case2-proof": partial(_case2, 1.1, _reverse_delta),
    "case2-proof-e": partial(_case2, math.e, _reverse_delta),
}  # fmt: skip
