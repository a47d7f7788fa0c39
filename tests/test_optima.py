"""Optima against enumeration, simulation, known formulas and the gradients of lib.losses."""

import numpy as np
import pytest
import torch

from lib import losses, optima
from lib.bandit.reference import histogram, reward_table

REWARDS = ("R1", "R2")


@pytest.mark.parametrize("reward", REWARDS)
def test_law_of_two_tokens_matches_enumeration(reward):
    policy, table = histogram(), reward_table(reward).double().numpy()
    mass, scores = np.outer(policy, policy).ravel(), np.add.outer(table, table).ravel() / 2
    law = optima.reward_law(reward, 2)
    assert law.mass.sum() == pytest.approx(1)
    assert law.mass @ law.scores == pytest.approx(mass @ scores, abs=1e-4)
    for level in (0.11, 0.52, 0.83):
        assert law.mass[law.scores <= level].sum() == pytest.approx(
            mass[scores <= level].sum(), abs=2e-3
        )


@pytest.mark.parametrize("length", [1, 9])
def test_kl_of_best_of_n_is_the_known_formula(length):
    """ln N - (N - 1) / N, for a reward without ties."""
    law = optima.reward_law("R1", length)
    n = 3 if length == 1 else 10  # one token has atoms: only roughly continuous
    known = np.log(n) - (n - 1) / n
    assert law.summary(law.best_of(n))[1] == pytest.approx(known, rel=0.05 if length == 1 else 0.01)


@pytest.mark.parametrize("reward", REWARDS)
def test_best_of_n_matches_simulation(reward):
    table, rng = reward_table(reward).double().numpy(), np.random.default_rng(0)
    draws = rng.choice(100, size=(40_000, 10, 9), p=histogram())
    best = table[draws].mean(-1).max(-1)
    law = optima.reward_law(reward, 9)
    found = law.summary(law.best_of(10))[0]
    assert found == pytest.approx(best.mean(), abs=4 * best.std() / 200)


@pytest.mark.parametrize("reward", REWARDS)
def test_win_ratio_matches_simulation(reward):
    table, rng = reward_table(reward).double().numpy(), np.random.default_rng(0)
    draws = rng.choice(100, size=(40_000, 10, 9), p=histogram())
    best = draws[np.arange(len(draws)), table[draws].mean(-1).argmax(-1)]
    ratio = optima.win_ratio(reward, 9)
    peak = {"R1": 70, "R2": 20}[reward]
    near = np.isin(np.arange(100), range(peak - 2, peak + 3))
    expected = (ratio * histogram())[near].sum() / histogram()[near].sum()
    found = np.isin(best, np.flatnonzero(near)).mean() / histogram()[near].sum()
    assert found == pytest.approx(expected, rel=0.05)
    assert ratio @ histogram() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("reward", REWARDS)
def test_ipo_optimum_has_no_gradient_in_the_books_own_loss(reward):
    """Population loss of one token: all 100 as one group, pairs weighted by pi_ref."""
    policy = torch.tensor(histogram())
    scores = reward_table(reward).double()
    law = optima.reward_law(reward, 1)
    beaten = torch.tensor(law.beaten[np.searchsorted(law.scores, scores.numpy())])
    logp = (policy.log() + 20 * beaten).log_softmax(-1).requires_grad_()
    prefer = scores[:, None] > scores[None, :]
    loss = losses.ipo(logp[None], policy.log()[None], prefer[None], 0.05)[0]
    (loss * policy[:, None] * policy[None, :]).sum().backward()
    assert logp.grad.abs().max() < 1e-9


def test_break_even_is_where_the_books_own_loss_changes_sign():
    """A completion that is best in a share s of its draws: pull s, push beta (1 - s)."""
    for beta in (1.0, 0.1):
        share = optima.break_even(beta, 10) / 10
        logp = torch.zeros(2, requires_grad=True, dtype=torch.float64)
        selected = torch.tensor([[True, False], [False, True]])
        item = losses.best_of_n_negative(logp.expand(2, 2), selected, beta, 0.01)
        (torch.tensor([share, 1 - share])[:, None] * item)[:, 0].sum().backward()
        assert logp.grad[0].item() == pytest.approx(0, abs=1e-12)
    assert optima.break_even(1.0, 10) == 5


@pytest.mark.parametrize("reward", REWARDS)
def test_rwrs_optimum_is_the_product_of_its_tokens(reward):
    """Its weight exp(r / deviation / temperature) is a product over tokens, and so is the policy:
    q(a) proportional to pi_ref(a) exp(R(a) / (9 deviation temperature)), here without any grid."""
    policy, table = histogram(), reward_table(reward).double().numpy()
    variance = (policy @ table**2 - (policy @ table) ** 2) / 9  # of a mean of 9 tokens
    tilted = policy * np.exp(table / (9 * np.sqrt(variance) * 0.1))
    tilted /= tilted.sum()
    row = optima.optima(9).set_index(["method", "reward_function"]).loc["rwr_offline", reward]
    assert row["reward"] == pytest.approx(tilted @ table, abs=1e-3)
    assert row["kl"] == pytest.approx(9 * tilted @ np.log(tilted / policy), abs=0.02)


def test_optima_table_is_ordered_and_finite():
    table = optima.optima(9)
    assert len(table) == 6 and np.isfinite(table[["reward", "kl"]]).all(axis=None)
    assert table["reward"].between(0, 1).all() and (table["kl"] > 0).all()


@pytest.mark.parametrize("n", [2, 5, 10])
def test_ipo_floor_is_the_least_squares_residual(n):
    better, worse = np.triu_indices(n, 1)
    design = np.zeros((len(better), n))
    design[np.arange(len(better)), better], design[np.arange(len(better)), worse] = 1, -1
    ratios = np.linalg.lstsq(design, np.full(len(better), 10.0), rcond=None)[0]
    assert ((design @ ratios - 10) ** 2).mean() == pytest.approx(optima.ipo_floor(n, 0.05))


@pytest.mark.parametrize("tau", [0.05, 0.2])
def test_ipo_at_rest_lies_at_the_same_kl_on_either_reward(tau):
    """In closed form, where ties are rare: ln(1/tau) - 1 offline, 1/(2 tau) - ln(1/tau) on-policy.

    Both up to terms of the order of exp(-1/tau).
    """
    found = optima.ipo_optima(tau).groupby("pairs from")["kl"]
    small = 2 * np.exp(-1 / tau) / tau
    expected = {"pi_ref": np.log(1 / tau) - 1, "the policy": 0.5 / tau - np.log(1 / tau)}
    for source, kl in found:
        assert kl.to_numpy() == pytest.approx(expected[source], abs=0.01 + small)


def test_the_self_ranked_law_is_the_one_its_own_ranks_imply():
    law = optima.reward_law("R1")
    at_rest = law.self_ranked(0.05)
    share_beaten = np.cumsum(at_rest) - at_rest / 2
    assert np.abs(law.tilted(share_beaten / 0.05) - at_rest).sum() < 1e-3


def test_distance_of_writing_only_the_peak():
    peak = optima.histogram("squashed")[70]
    assert optima.peak_distance("R1") == pytest.approx(-9 * np.log(peak))


@pytest.mark.parametrize("n", [2, 10])
def test_ipo_moves_match_the_law_of_the_bandit(n):
    law = optima.reward_law("R2", 9)
    ratio = np.log(law.tilted(law.beaten / 0.05)[law.mass > 1e-12] / law.mass[law.mass > 1e-12])
    mass, best = law.mass[law.mass > 1e-12], law.best_of(n)[law.mass > 1e-12]
    moves = optima.ipo_moves(n)
    assert -(mass @ ratio) == pytest.approx(moves["forward_kl"], rel=0.01)
    assert best @ ratio == pytest.approx(moves["chosen"], abs=0.05)
    others = (n * (mass @ ratio) - best @ ratio) / (n - 1)
    assert best @ ratio - others == pytest.approx(moves["margin"], rel=0.01)


def test_best_of_one_is_the_reference_and_more_is_better():
    law = optima.reward_law("R1", 9)
    assert optima.best_of(1, "R1") == pytest.approx(law.mass @ law.scores)
    assert optima.best_of(1, "R1") < optima.best_of(10, "R1") < optima.best_of(100, "R1") < 1


def test_uniform_reward_on_one_token_is_its_reward():
    assert optima.uniform_reward("R1", 70, 70) == 1
    assert optima.uniform_reward("R2", 20, 29) < 1
