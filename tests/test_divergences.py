"""KL and its estimate along samples against enumeration of all completions of a small policy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy as scipy_entropy

from lib.divergences import categorical_kl, entropy, sequence_kl

TOKENS, LENGTH = 3, 3
SEQUENCES = list(product(range(TOKENS), repeat=LENGTH))


def autoregressive(seed):
    """{prefix: log-probabilities of the next token}: a random policy, different at each prefix."""
    generator = np.random.default_rng(seed)
    prefixes = [p for n in range(LENGTH) for p in product(range(TOKENS), repeat=n)]
    return {p: np.log(generator.dirichlet(np.ones(TOKENS))) for p in prefixes}


def along(policy):
    """(27, L, V) the policy's distributions along every completion."""
    return torch.tensor(np.array([[policy[s[:t]] for t in range(LENGTH)] for s in SEQUENCES]))


def totals(policy):
    """(27,) log-probability of every completion, one multiplication at a time."""
    return torch.tensor([sum(policy[s[:t]][s[t]] for t in range(LENGTH)) for s in SEQUENCES],
                        dtype=torch.float64)  # fmt: skip


@pytest.fixture(params=[(0, 1), (1, 0), (2, 3), (3, 2)], ids=str)
def policies(request):
    """Two policies far from each other, in both orders."""
    return tuple(autoregressive(seed) for seed in request.param)


@pytest.fixture
def exact(policies):
    p, q = map(totals, policies)
    kl = sum(p[i].exp() * (p[i] - q[i]) for i in range(len(SEQUENCES))).item()
    assert kl > 0.3  # away from zero
    return kl


def test_sequence_kl_is_unbiased(policies, exact):
    """Its mean over prefixes drawn from p, each completion with its probability, is the KL."""
    p, q = policies
    estimates = sequence_kl(along(p), along(q), torch.ones(27, LENGTH, dtype=torch.bool))
    assert (totals(p).exp() * estimates).sum().item() == pytest.approx(exact, rel=1e-12)


def test_sequence_kl_is_not_symmetric(policies, exact):
    p, q = policies
    estimates = sequence_kl(along(q), along(p), torch.ones(27, LENGTH, dtype=torch.bool))
    backward = (totals(q).exp() * estimates).sum().item()
    assert abs(backward - exact) > 0.01


def test_sequence_kl_leaves_masked_positions_out(policies):
    p, q = map(along, policies)
    mask = torch.ones(27, LENGTH, dtype=torch.bool)
    mask[:, 2:] = False
    short = sequence_kl(p[:, :2], q[:, :2], mask[:, :2])
    torch.testing.assert_close(sequence_kl(p, q, mask), short)


def test_rao_blackwell_has_less_variance_than_the_log_ratio(policies):
    p, q = policies
    weight = totals(p).exp()

    def variance(x):
        return (weight * x**2).sum() - (weight * x).sum() ** 2

    estimates = sequence_kl(along(p), along(q), torch.ones(27, LENGTH, dtype=torch.bool))
    assert variance(estimates) < variance(totals(p) - totals(q))


DISTRIBUTIONS = arrays(np.float64, (2, 5), elements=st.floats(0.01, 1)).map(
    lambda x: x / x.sum(-1, keepdims=True)
)


@given(DISTRIBUTIONS)
def test_categorical_kl_and_entropy_agree_with_scipy(pair):
    p, q = torch.from_numpy(pair).log()
    assert categorical_kl(p, q).item() == pytest.approx(scipy_entropy(*pair), abs=1e-12)
    assert categorical_kl(p, q).item() >= -1e-12
    assert entropy(p).item() == pytest.approx(scipy_entropy(pair[0]), abs=1e-12)


def test_zero_probability_contributes_nothing():
    p, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.25, 0.75]).log()
    assert categorical_kl(p, q).item() == pytest.approx(np.log(4))
    assert entropy(p).item() == 0
    assert categorical_kl(q, p).item() == np.inf  # mass where the other has none


def test_a_policy_of_nan_stays_nan():
    """0 would read as a policy that never moved."""
    broken = torch.full((4,), torch.nan)
    uniform = torch.full((4,), 0.25).log()
    assert categorical_kl(broken, uniform).isnan()
    assert categorical_kl(uniform, broken).isnan()
    assert entropy(broken).isnan()
