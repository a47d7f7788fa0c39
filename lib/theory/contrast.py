"""Lemma E.2's update, DPO's and IPO's weights in it, and where the mass taken from y_l goes.

For a softmax with independent logits grad log p(y) is e_y - p, so the update (7) is a push
c1 (e_w - p) - c2 (e_l - p) on the logits. Tensors (..., V) in float64; w and l are indices.
Chapter: theory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def score(logp: Tensor, index: int) -> Tensor:
    """grad_f log p(y) = e_y - p for independent logits. (..., V) -> (..., V)."""
    found = -logp.exp()
    found[..., index] += 1
    return found


def pair_push(logp: Tensor, w: int, l: int, c1, c2) -> Tensor:  # noqa: E741 (y_l, as printed)
    """c1 grad log p(y_w) - c2 grad log p(y_l): Eq. (7), (eq-contrastive). c1, c2 (...) or float."""
    weights = [torch.as_tensor(c, dtype=logp.dtype)[..., None] for c in (c1, c2)]
    return weights[0] * score(logp, w) - weights[1] * score(logp, l)


def extra_margin(score_w: Tensor, score_l: Tensor, c2) -> Tensor:
    """What c2 > 0 adds to the margin's first-order change: c2 (|g_l|^2 - g_l . g_w), (eq-extra).

    The proof of Lemma E.2 prints c1 |g_l|^2 - c2 g_l . g_w. Args: gradients (..., parameters).
    """
    return c2 * (score_l * (score_l - score_w)).sum(-1)


def printed_extra_margin(score_w: Tensor, score_l: Tensor, c1, c2) -> Tensor:
    """The same as the proof prints it: c1 |g_l|^2 - c2 g_l . g_w."""
    return c1 * (score_l**2).sum(-1) - c2 * (score_l * score_w).sum(-1)


def lift(logp: Tensor, w: int, l: int) -> Tensor:  # noqa: E741
    """d log p(y_w) per unit of push on y_l alone: p_w + p_l - sum_k p_k^2, (eq-lift). (...)."""
    p = logp.exp()
    return p[..., w] + p[..., l] - (p**2).sum(-1)


def freed_mass(logp: Tensor, l: int) -> Tensor:  # noqa: E741
    """dp_k per unit of push on y_l alone, (eq-freed): (..., V), its sum is 0.

    p_k (p_k + p_l - sum_j p_j^2) for k != l; what y_l loses is p_l (1 - 2 p_l + sum_j p_j^2).
    """
    p = logp.exp()
    push = -score(logp, l)
    return p * (push - (p * push).sum(-1, keepdim=True))


def mode_share(logp: Tensor, l: int) -> Tensor:  # noqa: E741
    """The likeliest other category's gain as a share of what y_l loses: (...); can exceed 1."""
    gains = freed_mass(logp, l)
    others = logp.clone()
    others[..., l] = -torch.inf
    mode = others.argmax(-1, keepdim=True)
    return gains.gather(-1, mode)[..., 0] / -gains[..., l]


def dpo_weight(margin: Tensor, beta: float) -> Tensor:
    """c1 = c2 = beta sigmoid(-beta h), positive for every margin h: E.1.4, (eq-dpo-weight)."""
    return beta * torch.sigmoid(-beta * margin)


def ipo_weight(margin: Tensor, tau: float) -> Tensor:
    """c1 = c2 = 2 (1 / (2 tau) - h), negative once h > 1 / (2 tau): E.1.4, (eq-ipo-weight)."""
    return 2 * (0.5 / tau - margin)


def ipo_rest(prefer: Tensor, sampled: Tensor, tau: float) -> Tensor:
    """IPO's optimal log-ratios for pairs drawn independently from `sampled`, (eq-rest): (V,).

    log pi / pi_ref = p_mu(y) / tau + constant, p_mu(y) = sum_y' mu(y') P(y beats y'), so that two
    completions part by at most 1 / tau. Args: prefer (V, V), P + P^T = 1; sampled (V,) mu.
    """
    return prefer @ sampled / tau


def pair_rest(pairs: Tensor, tau: float) -> Tensor:
    """IPO's optimal log-ratios for any set of pairs, least squares of smallest norm: (V,).

    Args: pairs (V, V), how often (i, j) is in the data with i preferred. For pairs that compare
    neighbours only, a chain of V completions is V - 1 steps of 1 / (2 tau) long.
    """
    i, j = pairs.nonzero(as_tuple=True)
    root = pairs[i, j].sqrt()
    rows = torch.zeros(len(i), len(pairs), dtype=pairs.dtype)
    at = torch.arange(len(i))
    rows[at, i], rows[at, j] = root, -root
    return torch.linalg.lstsq(rows, root[:, None] * 0.5 / tau, driver="gelsd").solution[:, 0]
