"""Lemmas E.1 and E.3 by enumeration: values, gradients, and what is false as printed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.divergences import categorical_kl
from lib.theory import identities as ids
from lib.theory.dynamics import reverse_push
from tests.distributions import two_distributions

REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
REWARD = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@given(pair=two_distributions(), beta=st.floats(0.02, 5), data=st.data())
def test_rl_is_reverse_kl_up_to_log_z(pair, beta, data):
    (logp, ref), v = pair, len(pair[0])
    reward = torch.tensor(data.draw(st.lists(st.floats(-2, 2), min_size=v, max_size=v))).double()
    close(ids.rl_objective(logp, ref, reward, beta), ids.rl_as_reverse_kl(logp, ref, reward, beta))
    best, _ = ids.optimal_policy(ref, reward, beta)
    objective = ids.rl_objective(best, ref, reward, beta)
    assert objective >= ids.rl_objective(logp, ref, reward, beta) - 1e-9


def test_printed_equation_6_rewards_distance():
    far = torch.tensor([0.001, 0.001, 0.998], dtype=torch.float64).log()
    best, _ = ids.optimal_policy(REF, REWARD, 1.0)
    assert ids.rl_objective(best, REF, REWARD, 1.0) > ids.rl_objective(far, REF, REWARD, 1.0)
    assert ids.printed_loss(far, REF, REWARD, 1.0) < ids.printed_loss(best, REF, REWARD, 1.0)


def test_weighted_likelihood_does_not_rest_where_reverse_kl_does():
    best, _ = ids.optimal_policy(REF, REWARD, 0.5)
    assert reverse_push(best, best).abs().max() < 1e-15
    push = ids.weighted_likelihood_push(best, (REWARD / 0.5).exp())
    assert push[2] > 0.5 and push[0] < -0.1
    assert ids.weighted_likelihood_push(best, torch.full_like(REWARD, 3.0)).abs().max() < 1e-15


def test_weighted_likelihood_push_is_that_of_its_loss_on_own_samples():
    leaf = REF.clone().requires_grad_()
    logp = leaf.log_softmax(-1)
    (logp.detach().exp() * REWARD * logp).sum().backward()
    close(ids.weighted_likelihood_push(REF, REWARD), leaf.grad)


def test_full_fits_walk_through_the_regularised_optima():
    policy = REF
    for k in range(1, 5):
        policy = ids.next_policy(policy, (REWARD / 0.8).exp())
        close(policy, ids.optimal_policy(REF, REWARD, 0.8 / k)[0])


@given(pair=two_distributions(), data=st.data())
def test_offline_weighted_likelihood_is_reweighted_forward_kl(pair, data):
    (logp, ref), v = pair, len(pair[0])
    weight = data.draw(st.lists(st.floats(1e-3, 5), min_size=v, max_size=v))
    weight = torch.tensor(weight, dtype=torch.float64)
    close(ids.offline_loss(logp, ref, weight), ids.offline_as_forward_kl(logp, ref, weight))


def test_a_zero_weight_is_no_trouble_but_a_zero_z_is():
    weight = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    target, log_z = ids.reweighted(REF, weight)
    assert target.exp().tolist() == pytest.approx([0, 3 / 7, 4 / 7])
    assert log_z.exp() == pytest.approx(0.7)
    close(ids.offline_loss(REF, REF, weight), ids.offline_as_forward_kl(REF, REF, weight))
    ref = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    with pytest.raises(ValueError, match="Z = sum_y ref"):
        ids.reweighted(ref, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="must not be negative"):
        ids.reweighted(REF, -weight)


def test_prompts_are_weighted_by_their_z():
    """Two prompts: the loss is the sum of Z-weighted divergences, so a large Z counts more."""
    ref = torch.stack([REF, REF.flip(0)])
    weight = torch.tensor([[1.0, 1.0, 1.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
    logp = torch.full((2, 3), 1 / 3, dtype=torch.float64).log()
    _, log_z = ids.reweighted(ref, weight)
    assert log_z.exp().tolist() == pytest.approx([1.0, 9.0])
    loss = ids.offline_loss(logp, ref, weight)
    extra = loss - ids.offline_loss(ref, ref, weight)  # above the entropy
    close(extra, log_z.exp() * categorical_kl(ref, logp))
