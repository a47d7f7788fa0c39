"""[C1], [C2] and the frontier against enumeration of a shortened bandit and known limits."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from lib import geometry
from lib.bandit.config import REWARD_FUNCTIONS
from lib.bandit.reference import histogram, reward_table


def enumerated(name: str, temperature: float, length: int):
    """Log-probabilities of exp(r / temperature) and of the histogram over all completions."""
    rewards, reference = reward_table(name).double().numpy(), np.log(histogram())
    mean = np.array([np.mean(c) for c in product(rewards, repeat=length)])
    logp = np.array([np.sum(c) for c in product(reference, repeat=length)])
    score = mean / temperature
    return score - np.logaddexp.reduce(score), logp, mean


@pytest.mark.parametrize("name", REWARD_FUNCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_alignment_is_that_of_all_completions(name, temperature):
    target, reference, rewards = enumerated(name, temperature, length=2)
    table = geometry.alignment([temperature], length=2).set_index("reward_function").loc[name]
    forward = np.exp(reference) @ (reference - target)
    reverse = np.exp(target) @ (target - reference)
    assert table["from_reference"] == pytest.approx(forward, rel=1e-9)
    assert table["to_target"] == pytest.approx(reverse, rel=1e-9)
    assert table["reward"] == pytest.approx(np.exp(target) @ rewards, rel=1e-9)


@pytest.mark.parametrize("name", REWARD_FUNCTIONS)
def test_frontier_is_the_optimum_over_all_completions(name):
    """exp(r / beta) pi_ref maximises reward - beta KL: no tilt of all completions does better."""
    beta = 0.05
    _, reference, rewards = enumerated(name, beta, length=2)
    tilted = reference + rewards / beta
    tilted -= np.logaddexp.reduce(tilted)
    row = geometry.frontier([beta], length=2).set_index("reward_function").loc[name]
    assert row["reward"] == pytest.approx(np.exp(tilted) @ rewards, rel=1e-9)
    assert row["kl"] == pytest.approx(np.exp(tilted) @ (tilted - reference), rel=1e-9)
    best = row["reward"] - beta * row["kl"]
    assert best == pytest.approx(beta * np.logaddexp.reduce(reference + rewards / beta), rel=1e-9)


def test_frontier_rises_from_the_reference_to_the_peak():
    table = geometry.frontier(np.geomspace(100, 1e-5, 40))
    for name, rows in table.groupby("reward_function"):
        rows, far = rows.sort_values("kl"), geometry.distances().loc[name]
        assert (rows["reward"].diff().dropna() > -1e-12).all()
        assert rows["reward"].iloc[0] == pytest.approx(far["mean"], abs=1e-3)
        assert rows["kl"].iloc[-1] == pytest.approx(far["nats"], rel=1e-6)


def test_distances_of_the_peaks():
    table = geometry.distances()
    policy = histogram()
    assert table.loc["R1", "nats"] == pytest.approx(-9 * np.log(policy[70]))
    assert table.loc["R2", "nats"] == pytest.approx(-9 * np.log(policy[20]))
    near = policy[12:29].sum()  # |a - 20| <= 8: exp(-0.64) > 1/2 > exp(-0.81)
    assert table.loc["R2", "near"] == pytest.approx(near)
    assert table.loc["R2", "seen"] == pytest.approx(1 - (1 - near) ** 10)


def test_the_network_fits_the_histogram():
    fit = geometry.fit()
    assert 0 < fit["from_network"] < 1e-3
    assert fit["from_network"] == pytest.approx(9 * fit["per_token"], rel=1e-5)
    assert fit["per_token"] <= fit["worst"]


def test_coverage_is_of_the_data_that_runs_train_on():
    table = geometry.coverage([5, 6])
    assert table[["reward_function", "seed"]].values.tolist() == [
        ["R1", 5], ["R1", 6], ["R2", 5], ["R2", 6]]  # fmt: skip
    assert (table["chosen_reward"] > table["rejected_reward"]).all()
    (problem,) = geometry._problems("R1", [5])
    data = problem.fixed
    total = data.ref.sum(-1)[0]
    best = data.rewards[0].argmax(-1)
    chosen = total.gather(-1, best[:, None]).mean().item()
    assert table["chosen_logp"][0] == pytest.approx(chosen, rel=1e-5)
    mean = (0.1 * table["chosen_logp"] + 0.9 * table["rejected_logp"])[0]
    assert mean == pytest.approx(total.mean().item(), rel=1e-5)


def test_both_rewards_see_the_same_completions():
    data = geometry.coverage([5])
    mean = 0.1 * data["chosen_logp"] + 0.9 * data["rejected_logp"]
    assert mean[0] == pytest.approx(mean[1], rel=1e-5)
    table = geometry.examples(5)
    tokens = torch.tensor([list(map(int, text.split())) for text in table["completion"]])
    assert tokens.shape == (10, 9)
    for name in REWARD_FUNCTIONS:
        assert table[name].tolist() == pytest.approx(
            reward_table(name)[tokens].mean(-1).tolist(), rel=1e-5)  # fmt: skip
