"""The identities behind Lemmas E.1 and E.3, by enumeration of a small set of completions.

Distributions are (..., V) log-probabilities over all completions of a prompt, rewards and weights
(..., V); values are in nats, or in units of reward. Chapter: theory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.divergences import categorical_kl, entropy


def expected(logp: Tensor, values: Tensor) -> Tensor:
    """E_p[values], 0 where p has no mass. (..., V) -> (...)."""
    p = logp.exp()
    return (p * values).where(p != 0, 0.0).sum(-1)


def rl_objective(logp: Tensor, ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """E_p[r] - beta KL(p || ref), to be maximised: Eq. (2), and (6) with its bracket put right."""
    return expected(logp, reward) - beta * categorical_kl(logp, ref)


def printed_loss(logp: Tensor, ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """Eq. (6) as printed: -E_p[r] - beta KL(p || ref). Minimising it *rewards* distance."""
    return -expected(logp, reward) - beta * categorical_kl(logp, ref)


def optimal_policy(ref: Tensor, reward: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log pi*, pi* = ref exp(r / beta) / Z, and log Z: (eq-optimal-policy)."""
    tilted = ref + reward / beta
    return tilted.log_softmax(-1), tilted.logsumexp(-1)


def rl_as_reverse_kl(logp: Tensor, ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """beta log Z - beta KL(p || pi*): equals `rl_objective`, (eq-rl-reverse)."""
    best, log_z = optimal_policy(ref, reward, beta)
    return beta * log_z - beta * categorical_kl(logp, best)


def weighted_likelihood_push(logp: Tensor, weight: Tensor) -> Tensor:
    """Logit push of weighted likelihood on the policy's own samples: p (F - E_p F), (eq-wl-push).

    The gradient of E_{y ~ p}[F(y) log p(y)] with the sampling distribution and F held fixed.
    """
    return logp.exp() * (weight - expected(logp, weight)[..., None])


def next_policy(logp: Tensor, weight: Tensor) -> Tensor:
    """log of p F / E_p F: what weighted likelihood on p's samples fits if it is run to its end."""
    return (logp + weight.log()).log_softmax(-1)


def offline_loss(logp: Tensor, ref: Tensor, weight: Tensor) -> Tensor:
    """-E_{y ~ ref}[F(y) log p(y)], one prompt: Eq. (11)."""
    return -expected(ref, weight * logp)


def reweighted(ref: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """log of ref F / Z, and log Z = log E_ref F: (eq-reweighted).

    Raises: ValueError where Z = 0. Lemma E.3 asks for sum_y F > 0, which does not prevent it.
    """
    if (weight < 0).any():
        raise ValueError(f"weights must not be negative, got {weight.min().item()}")
    mass = ref + weight.log()
    log_z = mass.logsumexp(-1)
    if (log_z == -torch.inf).any():
        raise ValueError("Z = sum_y ref(y) F(y) is 0: F is positive only where ref has no mass")
    return mass - log_z[..., None], log_z


def offline_as_forward_kl(logp: Tensor, ref: Tensor, weight: Tensor) -> Tensor:
    """Z KL(ref F / Z || p) + Z H(ref F / Z): equals `offline_loss`, (eq-offline-forward)."""
    target, log_z = reweighted(ref, weight)
    return log_z.exp() * (categorical_kl(target, logp) + entropy(target))
