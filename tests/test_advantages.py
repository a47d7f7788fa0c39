"""Standardisation, selection, pairs and RWR's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lib.advantages import (
    MAX_WEIGHT,
    Moments,
    exponential_weights,
    gae,
    preferences,
    select_best,
    standardise,
    token_rewards,
    whiten,
)

REWARDS = arrays(np.float32, (2, 3, 4), elements=st.floats(0, 1, width=32))


def test_standardise_by_hand_divides_by_b_minus_1():
    # mean 2.5, deviations -1.5 -.5 .5 1.5, sum of squares 5, variance 5 / 3
    got = standardise(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    expected = torch.tensor([[[-1.5, -0.5], [0.5, 1.5]]]) / (5 / 3) ** 0.5
    torch.testing.assert_close(got, expected)


def test_standardise_per_prompt_sees_one_prompt():
    rewards = torch.tensor([[[1.0, 3.0], [100.0, 200.0]]])
    half = 0.5**0.5
    got = standardise(rewards, "prompt")
    torch.testing.assert_close(got, torch.tensor([[[-half, half], [-half, half]]]))
    assert not torch.allclose(got, standardise(rewards, "batch"))


def test_standardise_keeps_runs_apart():
    rewards = torch.rand(3, 2, 5)
    rewards[1] *= 1000
    torch.testing.assert_close(standardise(rewards)[2], standardise(rewards[2:])[0])


def moments(*samplings):
    """Those of a run that has drawn these rewards."""
    made = Moments()
    for rewards in samplings:
        made.add(rewards)
    return made


def test_running_standardisation_counts_all_that_was_drawn():
    """Two runs of a stack, three samplings: the mean and deviation of all 18 rewards of each."""
    drawn = torch.rand(3, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    got = standardise(drawn[2], "running", moments(*drawn))
    for run in range(2):
        own = drawn[:, run].double().numpy()
        expected = (own[2] - own.mean()) / own.std(ddof=1)
        np.testing.assert_allclose(got[run].numpy(), expected, rtol=1e-5, atol=1e-6)
    first = standardise(drawn[0], "running", moments(drawn[0]))
    torch.testing.assert_close(first, standardise(drawn[0]))
    assert not torch.allclose(got, standardise(drawn[2]), atol=0.1)


def test_without_standardisation_rewards_stay_as_they_are():
    rewards = torch.tensor([[[3.0, -700.0]]])
    assert torch.equal(standardise(rewards, "none"), rewards)


@pytest.mark.parametrize("value", [0.1, 0.7000001, 1 / 3, 0.9183, 40.1])
@pytest.mark.parametrize("over", ["batch", "prompt", "running"])
def test_equal_rewards_stay_a_tie(value, over):
    """Ten equal float32 rewards: their mean differs from them by rounding, their ranks do not."""
    rewards = torch.full((1, 1, 10), value)
    assert standardise(rewards, over, moments(rewards, rewards)).abs().max() < 1e-6


def test_standardise_is_in_float64():
    """Rewards that differ in the last bits of float32 around a large mean."""
    rewards = torch.tensor([[[1000.0, 1000.0001, 1000.0002]]])
    wide = rewards.double().numpy()
    expected = (wide - wide.mean()) / (wide.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(standardise(rewards).numpy(), expected, rtol=1e-5, atol=1e-6)


@given(REWARDS)
def test_standardised_has_mean_0_and_variance_1(rewards):
    got = standardise(torch.from_numpy(rewards)).double()
    assert got.mean((1, 2)).abs().max() < 1e-5
    for row, original in zip(got, rewards, strict=True):
        if original.std() > 1e-3:
            assert row.std(correction=1).item() == pytest.approx(1, abs=1e-4)


def test_select_best_takes_the_first_on_ties():
    rewards = torch.tensor([[0.5, 0.9, 0.9, 0.1], [0.3, 0.3, 0.3, 0.3]])
    assert select_best(rewards).tolist() == [
        [False, True, False, False], [True, False, False, False]]  # fmt: skip
    assert select_best(rewards, 3).tolist() == [
        [True, True, True, False], [True, True, True, False]]  # fmt: skip


@given(REWARDS, st.integers(1, 4))
def test_selected_are_k_and_none_better_is_left(rewards, k):
    rewards = torch.from_numpy(rewards)
    selected = select_best(rewards, k)
    assert (selected.sum(-1) == k).all()
    worst = rewards.masked_fill(~selected, torch.inf).amin(-1)
    left = rewards.masked_fill(selected, -torch.inf).amax(-1)
    assert (worst >= left).all()


def test_preferences_and_gap_by_hand():
    rewards = torch.tensor([0.5, 0.2, 0.5])
    assert preferences(rewards).tolist() == [
        [False, True, False], [False, False, False], [False, True, False]]  # fmt: skip
    assert not preferences(rewards, gap=0.4).any()
    assert preferences(rewards, gap=0.2).sum() == 2


@given(REWARDS)
def test_every_untied_pair_is_preferred_one_way(rewards):
    rewards = torch.from_numpy(rewards)
    prefer = preferences(rewards)
    untied = rewards[..., :, None] != rewards[..., None, :]
    assert ((prefer ^ prefer.transpose(-1, -2)) == untied).all()
    assert not (prefer & prefer.transpose(-1, -2)).any()


def test_raw_weights_are_the_printed_formula():
    advantage = torch.tensor([[[-0.1, 0.0, 0.2]]])
    expected = torch.tensor([[[-1.0, 0.0, 2.0]]]).exp()
    torch.testing.assert_close(exponential_weights(advantage, 0.1, "raw"), expected)


def test_normalised_weights_have_the_raw_direction_and_mean_1():
    advantage = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    raw = exponential_weights(advantage, 0.7, "raw")
    normalised = exponential_weights(advantage, 0.7, "normalised")
    torch.testing.assert_close(normalised, raw / raw.mean((1, 2), keepdim=True))
    torch.testing.assert_close(normalised.mean((1, 2)), torch.ones(2))


def test_weights_do_not_overflow():
    advantage = torch.tensor([[[1e6, 0.0], [-1e6, 1e6]]])
    normalised = exponential_weights(advantage, 0.01, "normalised")
    assert normalised.tolist() == [[[2.0, 0.0], [0.0, 2.0]]]
    clipped = exponential_weights(advantage, 0.01, "clipped")
    assert clipped.tolist() == [[[MAX_WEIGHT, 1.0], [0.0, MAX_WEIGHT]]]
    assert MAX_WEIGHT == 20
    raw = exponential_weights(advantage, 0.01, "raw")  # up to where float32 ends
    assert raw.isfinite().all()
    assert raw[0, 0].tolist() == pytest.approx([np.exp(80.0), 1.0], rel=1e-5)


def test_clipped_weights_are_raw_below_20():
    advantage = torch.tensor([[[2.9, 3.0]]])  # e^2.9 = 18.2, e^3 = 20.1
    weights = exponential_weights(advantage, 1.0, "clipped")[0, 0].tolist()
    assert weights == pytest.approx([18.174145, 20.0])


@pytest.mark.parametrize(
    "call",
    [lambda: standardise(torch.ones(1, 1, 2), "run"),
     lambda: exponential_weights(torch.ones(1, 1, 2), 1.0, "run")],
)  # fmt: skip
def test_unknown_option_is_named_with_the_allowed(call):
    with pytest.raises(ValueError, match=r"\('.*', .*got 'run'"):
        call()


def test_token_rewards_by_hand():
    mask = torch.tensor([[[True, True, False], [True, True, True]]])
    score, ratio = torch.tensor([[2.0, -1.0]]), torch.tensor([[[0.5, -0.5, 9.0], [0.0, 1.0, 2.0]]])
    found = token_rewards(score, ratio, mask, 0.1)
    expected = [[[-0.05, 2.05, 0.0], [0.0, -0.1, -1.2]]]
    torch.testing.assert_close(found, torch.tensor(expected))


def enumerated_advantage(rewards, values, gamma, lam, t):
    """The exponential average of the k-step advantages, written out: Schulman 2016, Eq. 16."""
    n = len(rewards)
    steps = [
        sum(gamma**i * rewards[t + i] for i in range(k))
        + (gamma**k * values[t + k] if t + k < n else 0.0) - values[t]
        for k in range(1, n - t + 1)
    ]  # fmt: skip
    weights = [(1 - lam) * lam ** (k - 1) for k in range(1, n - t)] + [lam ** (n - t - 1)]
    return sum(w * s for w, s in zip(weights, steps, strict=True))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_average_of_all_k_step_advantages(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    lengths = (6, 4, 1)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    found = gae(rewards * mask, values, mask, gamma, lam)
    for row, n in enumerate(lengths):
        expected = [
            enumerated_advantage(rewards[row, :n].tolist(), values[row, :n].tolist(), gamma, lam, t)
            for t in range(n)
        ]
        assert found[row, :n].tolist() == pytest.approx(expected)
        assert (found[row, n:] == 0).all()


def test_whiten_reads_only_what_counts_and_keeps_runs_apart():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5, 3, 1, 4]] * 3)[..., None]
    mask = mask.expand_as(x)
    found = whiten(x * 100 + 7, mask, lead=1)
    for run in found.unbind():
        kept = run[mask[0]]
        assert kept.mean().abs() < 1e-9 and kept.std() == pytest.approx(1.0, rel=1e-6)
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found[:1], whiten((x * 100 + 7)[:1], mask[:1], lead=1))
