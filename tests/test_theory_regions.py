"""The closed regions of Theorem 5.2 against the updates themselves, and their constants' edges."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lib.theory import draws, dynamics, regions
from tests.distributions import two_distributions

POSITIVE = st.floats(1e-12, 1.0)
CLEAR = 1e-10  # below this a sign is rounding


def t(x):
    return torch.tensor(x, dtype=torch.float64)


def sides(value, margin):
    assume(abs(float(value)) > CLEAR and abs(float(margin)) > CLEAR)
    return float(value) > 0, float(margin) > 0


@given(a=POSITIVE, b=POSITIVE)
def test_both_means_lie_between_their_arguments_and_are_symmetric(a, b):
    low, high, slack = min(a, b), max(a, b), 1 + 1e-9
    for mean in (regions.log_mean, lambda x, y: regions.log_identric(x, y).exp()):
        value = float(mean(t(a), t(b)))
        assert low / slack <= value <= high * slack
        assert value == pytest.approx(float(mean(t(b), t(a))), rel=1e-9)
    assert math.sqrt(a * b) / slack <= float(regions.log_mean(t(a), t(b))) <= (a + b) / 2 * slack


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-9, 1e-7, 1e-5, 1e-3])
def test_means_are_continuous_at_a_tie(gap):
    a, b = t(0.3), t(0.3 * (1 - gap))
    assert float(regions.log_mean(a, b)) == pytest.approx(0.3 * (1 - gap / 2), rel=1e-6)
    assert float(regions.log_identric(a, b).exp()) == pytest.approx(0.3 * (1 - gap / 2), rel=1e-6)


def test_means_known_values():
    assert float(regions.log_mean(t(math.e), t(1.0))) == pytest.approx(math.e - 1)
    assert float(regions.log_identric(t(1.0), t(0.0))) == pytest.approx(-1.0)
    assert float(regions.log_identric(t(4.0), t(1.0)).exp()) == pytest.approx(4 ** (4 / 3) / math.e)


def test_gap_is_the_difference_of_two_real_steps():
    logp, logq = t([0.5, 0.2, 0.3]).log(), t([0.1, 0.3, 0.6]).log()
    delta = {}
    for name, push in dynamics.OBJECTIVES.items():
        change = dynamics.descend(logp, push(logp, logq), 0.7) - logp
        delta[name] = change[0] - change[1]
    assert float(regions.gap(logp, logq)) == pytest.approx(
        float(delta["reverse"] - delta["forward"]) / 0.7
    )


@given(pair=two_distributions())
def test_case_1_region(pair):
    logp, logq = draws.tied(pair[0]), draws.ordered(pair[1])
    assume(logq[0] > logq[1])
    value, margin = sides(regions.gap(logp, logq), regions.case1(logp, logq))
    assert value == margin


@given(pair=two_distributions())
def test_case_2_and_3_region(pair):
    logp, logq = draws.ordered(pair[0]), draws.tied(pair[1])
    assume(logp[0] > logp[1])
    margin = regions.case2(logp, logq)
    value, predicted = sides(regions.gap(logp, logq), margin)
    assert value == predicted
    moved = dynamics.contrast(dynamics.reverse_push(logp, logq))
    value, predicted = sides(moved, margin - 1)
    assert value == predicted


@given(
    q=st.floats(1e-12, 0.49), share=st.floats(1e-9, 1.0), ratio=st.floats(1e-9, 0.999),
    rest=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)),
)  # fmt: skip
def test_case_2_holds_from_c0_of_1(q, share, ratio, rest):
    p1, (left, other) = share * q, rest
    free = 1 - p1 * (1 + ratio)
    logp = t([p1, ratio * p1, left * free, (1 - left) * free]).log()
    logq = t([q, q, other * (1 - 2 * q), (1 - other) * (1 - 2 * q)]).log()
    assert regions.gap(logp, logq) > -CLEAR


@given(
    p1=st.floats(0.01, 0.3), ratio=st.floats(0.01, 0.99), drop=st.floats(0.0, 8.0),
    rest=st.floats(0.1, 0.9),
)  # fmt: skip
def test_case_3_holds_below_exp_of_minus_kl(p1, ratio, drop, rest):
    p2 = ratio * p1
    q, left = p2 * math.exp(-drop), 1 - p1 - p2
    logp = t([p1, p2, left / 2, left / 2]).log()
    logq = t([q, q, rest * (1 - 2 * q), (1 - rest) * (1 - 2 * q)]).log()
    assume(logq[0] < logp[1] - dynamics.categorical_kl(logp, logq))
    assert regions.gap(logp, logq) < CLEAR


@given(p=st.tuples(POSITIVE, POSITIVE, POSITIVE), d=st.floats(-0.9, 0.4))
def test_equal_differences_favour_the_likelier(p, d):
    mass = t(sorted(p, reverse=True)) / sum(p)
    mass = torch.stack([mass[0], mass[1], mass[2]])
    moved = d * (mass[2] / 2 if d > 0 else mass[1])
    target = mass + torch.stack([moved, moved, -2 * moved])
    assume(mass[0] > mass[1] and (target > 1e-300).all())
    logp, logq = mass.log(), target.log()
    assert dynamics.contrast(dynamics.forward_push(logp, logq)).abs() < 1e-12
    assert dynamics.contrast(dynamics.reverse_push(logp, logq)) > -CLEAR


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.9])
def test_the_constant_of_case_1_is_the_smallest(beta):
    """Just above it the worst target is harmless; just below it is a counterexample."""
    least = regions.smallest_delta1(beta)
    assert beta / 2 < least < 0.5 or beta > 0.6
    q = t([(1 + beta) / 2 - 1e-9, (1 - beta) / 2 - 1e-9, 2e-9])
    for share, sign in ((1.001, 1), (0.999, -1)):
        p = t([share * least, share * least, 1 - 2 * share * least])
        if p[2] > 0:
            assert sign * regions.gap(p.log(), q.log()) > 0


@given(beta=st.floats(0.001, 0.9), room=st.floats(0.01, 0.99), log_c1=st.floats(-600, -1e-3))
def test_no_constant_saves_case_3(beta, room, log_c1):
    delta2, c1 = room * (1 - beta), math.exp(log_c1)
    logp, logq = regions.breaks_case3(beta, delta2, c1)
    p, q = logp.exp(), logq.exp()
    assert p.sum() == pytest.approx(1) and q.sum() == pytest.approx(1)
    assert p[1] + beta <= p[0] <= 1 - delta2 and q[0] == q[1] < c1 * p[1]
    assert regions.gap(logp, logq) > 0
    change = [dynamics.descend(logp, push(logp, logq), 0.1) - logp
              for push in dynamics.OBJECTIVES.values()]  # fmt: skip
    forward, reverse = (float(c[0] - c[1]) for c in change)
    assert reverse > forward


def three(p1, p2, q):
    return t([p1, p2, 1 - p1 - p2]).log(), t([q, q, 1 - 2 * q]).log()


@given(p1=st.floats(0.05, 0.9), ratio=st.floats(0.01, 0.95), extra=st.sampled_from([0.0, 1.0]))
def test_threshold_is_where_three_categories_turn(p1, ratio, extra):
    p2 = ratio * p1
    assume(p1 + p2 < 0.97)
    edge = float(regions.threshold(t(p1), t(p2), extra))
    assume(1e-12 < edge < 0.49)
    for share, sign in ((1.001, 1), (0.999, -1)):
        margin = regions.case2(*three(p1, p2, share * edge)) - extra
        assert sign * margin > 0


@given(p1=st.floats(0.05, 0.6), ratio=st.floats(0.01, 0.95), rest=st.floats(1e-6, 1 - 1e-6))
def test_above_the_threshold_the_other_categories_do_not_matter(p1, ratio, rest):
    p2 = ratio * p1
    assume(p1 + p2 < 0.97)
    q = min(1.001 * float(regions.threshold(t(p1), t(p2))), 0.4999)
    left, other = (1 - p1 - p2) / 2, 1 - 2 * q
    logp, logq = t([p1, p2, left, left]).log(), t([q, q, rest * other, (1 - rest) * other]).log()
    assert regions.gap(logp, logq) > -CLEAR


def test_three_categories_have_a_constant_exactly_beyond_the_bound():
    assert regions.largest_c1(0.5, 0.25) == 0.0
    c1 = regions.largest_c1(0.5, 0.26)
    assert 0 < c1 < 0.1
    p1, p2 = 0.74, 0.24  # the corner where the bound is tight
    for share, sign in ((0.9, -1), (1.1, 1)):
        assert sign * regions.gap(*three(p1, p2, share * c1 * p2)) > 0


@pytest.mark.parametrize("c1", [0.5, 1e-3, 1e-30])
def test_three_categories_have_no_constant_up_to_it(c1):
    """With little mass outside the pair, q = c1 p2 / 2 is above the threshold."""
    p1, rest = 0.8, 1e-4  # beta = 0.1, delta2 = 0.2
    p2 = 1 - p1 - rest
    assert p2 + 0.1 <= p1
    assert regions.gap(*three(p1, p2, c1 * p2 / 2)) > 0


@pytest.mark.parametrize(("beta", "extra"), [(0.1, 0.0), (0.1, 1.0), (0.3, 1.0), (0.001, 1.0)])
def test_smallest_c0_separates(beta, extra):
    """Above it no random pair violates; it is no more than the simple bounds 1 and e."""
    c0 = regions.smallest_c0(beta, extra=extra)
    assert c0 < math.exp(extra)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 20_000, generator=generator, dtype=torch.float64)
    p1 = beta + (0.98 - beta) * x[0]
    p2 = torch.minimum(p1 - beta, 1 - p1 - 1e-9) * x[1]
    worst = float((regions.threshold(p1, p2, extra) / p1).max())
    assert worst < c0 * 1.01


def test_bad_constants_are_named():
    with pytest.raises(ValueError, match="beta must be between 0 and 1"):
        regions.smallest_delta1(1.0)
    with pytest.raises(ValueError, match="delta2 must be between 0 and 0.7"):
        regions.breaks_case3(0.3, 0.8, 0.5)
    with pytest.raises(ValueError, match="c1 must be between 0 and 1"):
        regions.breaks_case3(0.3, 0.1, 1.0)
