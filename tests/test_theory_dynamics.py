"""Lemma E.4 against automatic differentiation, hand-computed numbers and its own fixed point."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.theory import dynamics
from tests.distributions import two_distributions

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()


def test_pushes_are_the_hand_computed_ones():
    assert dynamics.forward_push(P, Q).tolist() == pytest.approx([-0.3, 0.0, 0.3])
    kl = 0.5 * math.log(2.5) + 0.2 * math.log(0.4)
    expected = [0.5 * (math.log(0.4) + kl), 0.3 * kl, 0.2 * (math.log(2.5) + kl)]
    assert dynamics.reverse_push(P, Q).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("objective", dynamics.OBJECTIVES)
@given(pair=two_distributions())
def test_pushes_are_minus_the_gradients(objective, pair):
    push, auto = dynamics.push_of(objective)(*pair), dynamics.autograd_push(objective, *pair)
    torch.testing.assert_close(push, auto, rtol=1e-10, atol=1e-10)
    assert float(push.sum()) == pytest.approx(0, abs=1e-9)  # a constant logit shift does nothing


@pytest.mark.parametrize("objective", dynamics.OBJECTIVES)
@given(pair=two_distributions(), rate=st.sampled_from([0.01, 1.0, 20.0]))
def test_a_step_changes_log_p_by_the_push_and_a_shared_constant(objective, pair, rate):
    logp, logq = pair
    push = dynamics.push_of(objective)(logp, logq)
    rest = dynamics.descend(logp, push, rate) - logp - rate * push
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=1e-9, atol=1e-9)


def test_a_category_without_mass_is_not_pushed_by_reverse_kl():
    logp = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64).log()
    push = dynamics.reverse_push(logp, Q)
    assert push.isfinite().all() and push[2] == 0
    assert dynamics.forward_push(logp, Q)[2] == pytest.approx(0.5)


@pytest.mark.parametrize("objective", dynamics.OBJECTIVES)
def test_trajectories_end_at_the_target(objective):
    path = dynamics.trajectory(P, Q, objective, 0.5, 400)
    assert path.shape == (401, 3) and torch.equal(path[0], P)
    assert dynamics.distance(path[-1], Q) < 1e-6
    assert (dynamics.distance(path, Q).diff() <= 1e-12).all()


def test_halfway_is_the_first_step_past_half():
    left = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    path = torch.stack([0.5 + left, 0.5 - left], -1).log()
    flat = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    half = dynamics.halfway(path, flat)
    assert half.reached and half.steps == 2
    assert torch.equal(half.logp, path[2])
    never = dynamics.halfway(path[:2], flat)
    assert not never.reached and never.steps == 1


def test_progress_is_the_share_of_the_way():
    middle = ((P.exp() + Q.exp()) / 2).log()
    done = dynamics.progress(middle, P, Q)
    assert done[[0, 2]].tolist() == pytest.approx([0.5, 0.5]) and done[1].isnan()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'sideways'"):
        dynamics.push_of("sideways")
    with pytest.raises(ValueError, match="rate must be positive"):
        dynamics.trajectory(P, Q, "forward", rate=0.0)
    with pytest.raises(ValueError, match="steps at least 1"):
        dynamics.trajectory(P, Q, "forward", steps=0)
