"""KL divergences: exact between categoricals, and along sampled completions. All in nats."""

from __future__ import annotations

from torch import Tensor


def categorical_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) = sum_a p(a) (log p(a) - log q(a)), with 0 log 0 = 0.

    Args: logp, logq (..., V) normalised log-probabilities. Returns: (...).
    """
    p = logp.exp()
    return (p * (logp - logq)).where(p != 0, 0.0).sum(-1)


def entropy(logp: Tensor) -> Tensor:
    """-sum_a p(a) log p(a). Args: logp (..., V). Returns: (...)."""
    p = logp.exp()
    return -(p * logp).where(p != 0, 0.0).sum(-1)


def sequence_kl(logp: Tensor, logq: Tensor, mask: Tensor) -> Tensor:
    """KL between autoregressive policies, exact per token along prefixes sampled from the first.

    By the chain rule KL(p || q) is the expectation, over prefixes drawn from p, of the sum over
    positions of the per-token KL. Summing the exact per-token KL instead of the sampled log-ratio
    (Rao-Blackwell) keeps the mean and removes the variance of the token itself.

    Args: logp, logq (..., L, V) on prefixes drawn from p; mask (..., L) bool.
    Returns: (...) nats per completion; unbiased for KL(p || q) in the mean over samples.
    """
    return (categorical_kl(logp, logq) * mask).sum(-1)
