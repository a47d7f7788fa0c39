"""The objectives: pure functions from log-probabilities to one loss per item.

Shapes: `...` are leading dimensions (runs), P prompts, C completions of a prompt. Log-probabilities
are sums over completion tokens, in nats, except where a function says "per token". Every
function returns the loss of each item, to be minimised; whoever calls it divides the sum by the
number of items, once and globally, so that accumulation and ensembles change nothing. Temperatures
and weights are floats: runs of one stack share them. Chapter: methods.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def best_of_n(logp: Tensor, selected: Tensor) -> Tensor:
    """-log pi(y_best | x) on the selected completions (appendix I.2.1). Items: selected ones.

    Args: logp (..., P, C); selected (..., P, C) bool, the top K of each prompt.
    Returns: (..., P, C), zero where not selected.
    """
    return -logp * selected


def best_of_n_negative(logp: Tensor, selected: Tensor, beta: float, threshold: float) -> Tensor:
    """-log pi(y_best|x) + beta sum_{j != best} log pi(y_j|x), pushed down only while likely enough.

    Appendix I.2.1. Unbounded below without the threshold: a completion is pushed down only while
    pi(y_j|x) > threshold * pi(y_best|x). Items: prompts (the selected completions).

    Args: logp (..., P, C); selected (..., P, C) bool, one per prompt.
    Returns: (..., P, C).
    """
    best = (logp.detach() * selected).sum(-1, keepdim=True)
    floor = best + torch.tensor(threshold).log()
    pushed = ~selected & (logp.detach() > floor)
    return torch.where(selected, -logp, beta * logp * pushed)


def rwr(logp: Tensor, weight: Tensor) -> Tensor:
    """-w log pi(y|x) with w = exp(standardised reward / temperature) (appendix I.2.5).

    Args: logp (..., P, C); weight (..., P, C), non-negative. Items: completions.
    """
    return -weight * logp


def reinforce(logp: Tensor, advantage: Tensor) -> Tensor:
    """-A log pi(y|x) (appendix I.2.3; section 2.2 prints the opposite sign). Items: completions.

    Args: logp, advantage (..., P, C).
    """
    return -advantage * logp


def ppo(logp: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(r A, clip(r, 1 - eps, 1 + eps) A), r = exp(logp - old): Schulman et al. 2017, Eq. 7.

    Appendix I.2.4 prints a max, which would be the optimistic bound. Items: completions, or tokens
    where all arguments are per token.

    Args: logp, old, advantage: one shape, (..., P, C) or per token (..., P, C, L).
    """
    shift = logp - old
    # Where A >= 0 a ratio above 1 + eps is clipped, however large: it must not overflow before,
    # or 0 * inf makes the gradient NaN. exp(2 + eps) is above 1 + eps.
    ratio = torch.where(advantage >= 0, shift.clamp(max=2 + clip), shift).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def value(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((v - R)^2, (v_clipped - R)^2) / 2, v_clipped within `clip` of the old value.

    The value head's loss in PPO as TRL's trainer has it, on which the paper built (appendix G).
    Items: tokens.

    Args: values, old, returns (..., P, C, L), predicted now, when sampled, and observed.
    """
    near = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2


def pair_margin(logp: Tensor, ref: Tensor) -> Tensor:
    """h[i, j] = log pi/pi_ref(y_i) - log pi/pi_ref(y_j), for all C x C pairs from C log-ratios.

    Args: logp, ref (..., P, C). Returns: (..., P, C, C) nats.
    """
    ratio = logp - ref
    return ratio[..., :, None] - ratio[..., None, :]


def dpo(logp: Tensor, ref: Tensor, prefer: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta h) over preferred pairs: Rafailov et al. 2023, Eq. 7. Items: pairs.

    Args: logp, ref (..., P, C); prefer (..., P, C, C) bool, [i, j] True if y_i beats y_j; ties
        are False both ways and carry no loss.
    Returns: (..., P, C, C); ln 2 on each pair where pi = pi_ref.
    """
    return -logsigmoid(beta * pair_margin(logp, ref)) * prefer


def ipo(logp: Tensor, ref: Tensor, prefer: Tensor, tau: float) -> Tensor:
    """(h - 1 / (2 tau))^2 over preferred pairs: Eq. (20), appendix F.2. Items: pairs.

    Args and Returns as `dpo`; 1 / (4 tau^2) on each pair where pi = pi_ref.
    """
    target = 0.5 / logp.new_full((), tau)  # rounded as the margins are
    return (pair_margin(logp, ref) - target) ** 2 * prefer


def token_margin(logp: Tensor, ref: Tensor) -> Tensor:
    """h of `pair_margin` for each pair of tokens at one place of y_i and y_j.

    Args: logp, ref (..., P, C, L) per token. Returns: (..., P, C, C, L) nats.
    """
    ratio = logp - ref
    return ratio[..., :, None, :] - ratio[..., None, :, :]


def _over_places(loss: Tensor, mask: Tensor) -> Tensor:
    """(..., P, C, C) mean over the places at which both completions have a token."""
    both = mask[..., :, None, :] & mask[..., None, :, :]
    return (loss * both).sum(-1) / both.sum(-1).clamp(min=1)


def dpo_token(logp: Tensor, ref: Tensor, mask: Tensor, prefer: Tensor, beta: float) -> Tensor:
    """The released language-model code's DPO: -log sigmoid(beta h_t), averaged over places t.

    For the audit: tokens at one place of two completions have nothing to do with each other.

    Args: logp, ref, mask (..., P, C, L) per token; prefer as in `dpo`. Items: pairs.
    Returns: (..., P, C, C); ln 2 on each pair where pi = pi_ref.
    """
    return _over_places(-logsigmoid(beta * token_margin(logp, ref)), mask) * prefer


def ipo_token(logp: Tensor, ref: Tensor, mask: Tensor, prefer: Tensor, tau: float) -> Tensor:
    """The released language-model code's IPO: (tau h_t - 1 / (2 tau))^2, averaged over places t.

    Its optimum is h_t = 1 / (2 tau^2) on every token. Args and Returns as `dpo_token`;
    1 / (4 tau^2) on each pair where pi = pi_ref.
    """
    target = 0.5 / logp.new_full((), tau)
    return _over_places((tau * token_margin(logp, ref) - target) ** 2, mask) * prefer
