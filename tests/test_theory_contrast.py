"""Lemma E.2's update, DPO's and IPO's weights and their resting points."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib import losses
from lib.theory import contrast
from lib.theory.dynamics import descend
from lib.theory.lemmas import tie
from tests.distributions import log_distributions, two_distributions

P = torch.tensor([0.1, 0.2, 0.4, 0.3], dtype=torch.float64).log()
SMALL = st.floats(0.0, 3.0)


def test_score_is_the_gradient_of_log_p():
    leaf = P.clone().requires_grad_()
    leaf.log_softmax(-1)[1].backward()
    torch.testing.assert_close(contrast.score(P, 1), leaf.grad)


@given(logp=log_distributions(2), c1=SMALL, c2=SMALL, rate=st.sampled_from([0.01, 1.0, 5.0]))
def test_independent_logits_raise_the_margin_for_every_pair(logp, c1, c2, rate):
    """c2 adds rate c2 (1 - p_l + p_w), exactly, to the margin."""
    with_, without = (descend(logp, contrast.pair_push(logp, 0, 1, c1, c), rate) for c in (c2, 0))
    extra = (with_[0] - with_[1]) - (without[0] - without[1])
    expected = rate * c2 * (1 - logp[1].exp() + logp[0].exp())
    assert float(extra) == pytest.approx(float(expected), abs=1e-9)
    formula = contrast.extra_margin(contrast.score(logp, 0), contrast.score(logp, 1), rate * c2)
    assert float(formula) == pytest.approx(float(expected), abs=1e-9)


def test_shared_parameters_can_lower_the_margin():
    """One parameter, g_w = 2 g_l: pushing y_l down pulls y_w down twice as far."""
    w, l = torch.tensor([2.0]), torch.tensor([1.0])  # noqa: E741
    assert contrast.extra_margin(w, l, 1.0) < 0
    assert contrast.printed_extra_margin(w, l, 10.0, 1.0) > 0  # what the proof prints misses it


@given(logp=log_distributions(2))
def test_lift_is_the_derivative_of_log_p_w(logp):
    step = 1e-6
    change = descend(logp, -contrast.score(logp, 1), step)[0] - logp[0]
    assert float(change / step) == pytest.approx(float(contrast.lift(logp, 0, 1)), abs=1e-4)


def test_lift_is_negative_for_two_unlikely_answers_of_a_peaked_policy():
    peaked = torch.tensor([0.01, 0.01, 0.98], dtype=torch.float64).log()
    assert contrast.lift(peaked, 0, 1) < 0 < contrast.lift(P, 0, 2)
    assert contrast.lift(tie(), 0, 1).abs() < 1e-15
    assert float((contrast.score(tie(), 0) * contrast.score(tie(), 1)).sum()) == pytest.approx(0)


@given(logp=log_distributions(3))
def test_freed_mass_adds_up_and_goes_first_to_the_mode(logp):
    gains = contrast.freed_mass(logp, 0)
    assert gains.sum().abs() < 1e-12 and gains[0] <= 1e-15
    mode = int(logp[1:].argmax()) + 1
    assert gains[mode] >= gains[1:].max() - 1e-12


def test_freed_mass_by_hand_and_shares():
    square = 0.01 + 0.04 + 0.16 + 0.09
    expected = [0.1 * (0.1 + 0.2 - square), -0.2 * (0.6 + square), 0.4 * (0.6 - square),
                0.3 * (0.5 - square)]  # fmt: skip
    assert contrast.freed_mass(P, 1).tolist() == pytest.approx(expected)
    assert float(contrast.mode_share(P, 1)) == pytest.approx(expected[2] / -expected[1])
    uniform = torch.zeros(5, dtype=torch.float64).log_softmax(-1)
    assert float(contrast.mode_share(uniform, 0)) == pytest.approx(1 / 4)


@given(logp=log_distributions(4), c=st.floats(0.01, 3), rate=st.floats(0.01, 3))
def test_equal_weights_leave_all_other_ratios_alone(logp, c, rate):
    after = descend(logp, contrast.pair_push(logp, 0, 1, c, c), rate)
    change = (after - logp)[2:]
    assert float(change.max() - change.min()) == pytest.approx(0, abs=1e-9)


@given(pair=two_distributions(), beta=st.floats(0.01, 2))
def test_weights_are_those_of_the_losses(pair, beta):
    logp, ref = pair
    prefer = torch.zeros(2, 2, dtype=torch.bool)
    prefer[0, 1] = True
    margin = (logp - ref)[0] - (logp - ref)[1]
    for loss, weight in ((losses.dpo, contrast.dpo_weight), (losses.ipo, contrast.ipo_weight)):
        leaf = logp.clone().requires_grad_()
        loss(leaf.log_softmax(-1)[:2], ref[:2], prefer, beta).sum().backward()
        c = weight(margin, beta)
        push = contrast.pair_push(logp, 0, 1, c, c)
        torch.testing.assert_close(push, -leaf.grad, rtol=1e-9, atol=1e-9)


def test_dpo_weight_stays_positive_and_ipo_weight_turns():
    margins = torch.tensor([-50.0, 0.0, 9.9, 10.1, 200.0], dtype=torch.float64)
    assert (contrast.dpo_weight(margins, 0.1) > 0).all()
    assert (contrast.ipo_weight(margins, 0.05) > 0).tolist() == [True, True, True, False, False]


@given(seed=st.integers(0, 10_000), n=st.integers(2, 7), tau=st.floats(0.02, 2))
def test_ipo_rests_within_one_over_tau(seed, n, tau):
    """The closed form is the least squares solution, and no two answers are further apart."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(n, n, generator=generator, dtype=torch.float64).triu(1)
    prefer = draw + (1 - draw.T).tril(-1) + torch.eye(n, dtype=torch.float64) / 2
    mu = torch.rand(n, generator=generator, dtype=torch.float64) + 0.01
    mu = mu / mu.sum()
    closed = contrast.ipo_rest(prefer, mu, tau)
    seen = prefer * mu[:, None] * mu * (1 - torch.eye(n, dtype=torch.float64))
    solved = contrast.pair_rest(seen, tau)
    torch.testing.assert_close(closed - closed.mean(), solved - solved.mean(), rtol=1e-6, atol=1e-6)
    assert closed.max() - closed.min() <= 1 / tau


def test_a_chain_of_neighbours_goes_beyond_the_bound():
    chain = torch.diag(torch.ones(4, dtype=torch.float64), -1)
    ratio = contrast.pair_rest(chain, 0.05)
    assert ratio.diff().tolist() == pytest.approx([10.0] * 4)
    assert ratio[-1] - ratio[0] > 1 / 0.05
