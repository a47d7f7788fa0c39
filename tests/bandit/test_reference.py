"""The histogram, the reward tables and the network fitted to the histogram."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.bandit import reference
from lib.bandit.network import GPT_NANO, logits
from lib.bandit.reference import fit, histogram, load, reward_table
from lib.divergences import categorical_kl


@pytest.mark.parametrize("kind", ["squashed", "clipped"])
def test_histogram_is_a_distribution_without_zeros(kind):
    p = histogram(kind)
    assert p.shape == (100,)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (p > 0).all()
    np.testing.assert_array_equal(p, histogram(kind))


def cauchy_below(x):
    """P(Cauchy(-0.7, 0.4) < x)."""
    return 0.5 + np.arctan((x + 0.7) / 0.4) / np.pi


def test_clipping_piles_the_tails_onto_the_ends():
    p = histogram("clipped")
    assert p[0] == pytest.approx(cauchy_below(-0.98), abs=0.015)  # 31%
    assert p[99] == pytest.approx(1 - cauchy_below(0.98), abs=0.01)  # 7%
    assert (round(p[0], 2), round(p[99], 2)) == (0.31, 0.07)


def test_squashing_does_so_less():
    p = histogram("squashed")
    assert p[0] == pytest.approx(cauchy_below(np.arctanh(-0.98)), abs=0.01)  # 8%
    assert p[99] == pytest.approx(1 - cauchy_below(np.arctanh(0.98)), abs=0.01)  # 4%
    assert (round(p[0], 2), round(p[99], 2)) == (0.08, 0.04)


def test_histogram_follows_the_law_of_the_draws():
    """Bin by bin against the distribution function, within the noise of 10,000 draws."""
    edges = np.linspace(-1, 1, 101)
    with np.errstate(divide="ignore"):
        expected = np.diff(cauchy_below(np.arctanh(edges)))
    error = np.sqrt(expected * (1 - expected) / 10_000)
    assert (np.abs(histogram("squashed") - expected) < 4.5 * error + 1e-4).all()


@pytest.mark.parametrize(("name", "peak"), [("R1", 70), ("R2", 20)])
def test_reward_table(name, peak):
    table = reward_table(name)
    assert table.argmax() == peak and table[peak] == 1
    assert table[peak + 10].item() == pytest.approx(np.exp(-1))
    assert table[peak - 5].item() == pytest.approx(np.exp(-0.25))
    assert ((0 <= table) & (table <= 1)).all()


def test_r1_peaks_where_the_reference_is_unlikely_and_r2_where_it_is_likely():
    p = histogram()
    assert p[15:26].mean() > 5 * p[65:76].mean()


@pytest.mark.parametrize("kind", ["squashed", "clipped"])
def test_shipped_network_fits_the_histogram_at_every_position(kind):
    parameters = load(kind, 0)
    assert {k: tuple(v.shape) for k, v in parameters.items()} == {
        k: (1, *shape) for k, shape in GPT_NANO.shapes().items()
    }
    target = torch.tensor(histogram(kind), dtype=torch.float32)
    generator = torch.Generator().manual_seed(99)
    tokens = torch.multinomial(target, 2000, True, generator=generator).view(1, 200, 10)
    logp = logits(parameters, tokens).log_softmax(-1)
    kl = categorical_kl(target.log(), logp)[0]
    assert kl.mean(0).max() < 0.01  # nats a token, at each position


def test_fit_lowers_its_loss_and_follows_its_seed(monkeypatch):
    monkeypatch.setattr(reference, "FIT_STEPS", 12)
    (first, losses), (again, _), (other, _) = (
        fit("clipped", 1),
        fit("clipped", 1),
        fit("clipped", 2),
    )
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
    assert torch.equal(first["head.weight"], again["head.weight"])
    assert not torch.equal(first["head.weight"], other["head.weight"])
