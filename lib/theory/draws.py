"""Random distributions, the hard corners among them: near-zero mass, ties, two categories."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CATEGORIES = (2, 3, 4, 8, 32)  # of the random distributions that a check is tried on
CONCENTRATIONS = (0.01, 10.0)  # of the Dirichlet they come from: nearly one-hot to nearly uniform
SMALLEST = 1e-300


def distributions(n: int, categories: int, generator: torch.Generator) -> Tensor:
    """(n, categories) log-probabilities: Dirichlet, its concentration log-uniform per row."""
    low, high = map(math.log, CONCENTRATIONS)
    alpha = torch.rand(n, 1, generator=generator, dtype=torch.float64) * (high - low) + low
    shape = alpha.exp().expand(-1, categories)
    drawn = torch._standard_gamma(shape, generator=generator)
    return drawn.clamp(min=SMALLEST).log().log_softmax(-1)


def pairs(n: int, seed: int, categories: tuple[int, ...] = CATEGORIES) -> list[tuple]:
    """n random (p, q) in equal parts for each number of categories, as pairs of (m, V) logs."""
    generator = torch.Generator().manual_seed(seed)
    share = -(-n // len(categories))
    return [tuple(distributions(share, v, generator) for _ in "pq") for v in categories]


def tied(logp: Tensor) -> Tensor:
    """The same, with the mass of categories 0 and 1 shared equally between them."""
    both = torch.logaddexp(logp[..., 0], logp[..., 1]) - math.log(2)
    return torch.cat([torch.stack([both, both], -1), logp[..., 2:]], -1)


def ordered(logp: Tensor) -> Tensor:
    """The same, with categories 0 and 1 swapped where needed so that 0 is the likelier."""
    first = torch.maximum(logp[..., 0], logp[..., 1])
    second = torch.minimum(logp[..., 0], logp[..., 1])
    return torch.cat([torch.stack([first, second], -1), logp[..., 2:]], -1)
