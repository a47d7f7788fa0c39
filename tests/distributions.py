"""Hypothesis strategies for small distributions, near-zero masses and ties among them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

LOGITS = st.one_of(
    st.floats(-3, 3), st.floats(-300, 0), st.sampled_from([0.0, 0.0, -1.0, -600.0])
)


def log_distributions(least: int = 2, most: int = 6):
    """log-probabilities (V,) in float64."""
    return st.lists(LOGITS, min_size=least, max_size=most).map(normalised)


def two_distributions(least: int = 2, most: int = 6):
    """Pairs (log p, log q) over the same categories."""
    return st.integers(least, most).flatmap(
        lambda v: st.tuples(*[log_distributions(v, v) for _ in "pq"])
    )


def normalised(logits) -> torch.Tensor:
    return torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
