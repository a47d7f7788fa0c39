"""Algorithm 1: order, staleness, counts, identities and runs that go non-finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.controllers import AdaptiveKL
from lib.finetune import Diverged, Schedule, State, fine_tune
from lib.methods import METHODS
from tests.tabular import TabularPolicy, TabularProblem

REINFORCE, DPO = METHODS["reinforce"], METHODS["dpo"]


def training(schedule, method=REINFORCE, policy=None, problem=None, **overrides):
    """State, problem and the iterator over updates, for groups of 4 completions."""
    policy = policy or TabularPolicy()
    problem = problem or TabularProblem(schedule.batch // schedule.completions)
    state = State(policy, policy.frozen())
    rows = fine_tune(state, problem, method, schedule, method.resolve(overrides))
    return state, problem, rows


# Counts


@pytest.mark.parametrize("name", ["iterations", "batch", "minibatch", "completions", "inner_steps"])
def test_counts_below_1_are_refused(name):
    counts = dict(iterations=1, batch=8, minibatch=8, completions=4, inner_steps=1)
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Schedule(**(counts | {name: 0}))


@pytest.mark.parametrize(
    ("batch", "minibatch", "completions", "message"),
    [(10, 4, 2, "batch in minibatches: 10 is not a multiple of 4"),
     (8, 4, 3, "minibatch in completions of a prompt: 4 is not a multiple of 3"),
     (4, 8, 4, "batch in minibatches: 4 is not a multiple of 8")],
)  # fmt: skip
def test_counts_that_do_not_divide_are_refused(batch, minibatch, completions, message):
    with pytest.raises(ValueError, match=message):
        Schedule(1, batch, minibatch, completions)


@given(*[st.integers(1, 5)] * 5)
def test_updates_are_iterations_times_minibatches_times_passes(n, k, groups, count, passes):
    minibatch = groups * count
    schedule = Schedule(n, k * minibatch, minibatch, count, passes)
    assert (schedule.minibatches, schedule.steps) == (k, k * passes)
    assert schedule.updates == n * k * passes


# Order and staleness


def test_a_sampling_is_planned_once_and_not_at_every_update():
    state, _, rows = training(Schedule(2, 16, 8, 4, inner_steps=3))
    assert len(list(rows)) == 12 and state.policy.plans == 2


def test_b_equal_to_m_is_fully_on_policy():
    """A fresh sampling for every update, each from the policy of that moment."""
    state, problem, rows = training(Schedule(3, 8, 8, 4))
    tables = []
    for _ in rows:
        tables.append(state.policy.table.clone())
    assert state.policy.seen == [[0, 1], [100, 101], [200, 201]]
    assert (state.updates, state.samples) == (3, 24)
    torch.testing.assert_close(problem.behaviours[1:], tables[:-1], rtol=0, atol=0)
    assert not torch.equal(tables[0], tables[1])


def test_larger_b_is_consumed_in_minibatches_once_each():
    state, problem, rows = training(Schedule(2, 24, 8, 4))
    list(rows)
    assert state.policy.seen == [[0, 1], [2, 3], [4, 5], [100, 101], [102, 103], [104, 105]]
    assert (len(problem.behaviours), state.samples, state.updates) == (2, 48, 6)


def test_t_passes_go_over_the_whole_sampling_in_turn():
    state, problem, rows = training(Schedule(2, 16, 8, 4, inner_steps=2))
    list(rows)
    assert state.policy.seen == [[0, 1], [2, 3]] * 2 + [[100, 101], [102, 103]] * 2
    assert (len(problem.behaviours), state.samples) == (2, 32)


def test_behaviour_is_a_snapshot_of_the_start_of_the_iteration():
    """pi_gen stays while the policy moves, and is replaced at the next sampling."""
    state, _, rows = training(Schedule(2, 16, 8, 4, inner_steps=2))
    first = state.policy.table.clone()
    for i, _ in enumerate(rows):
        assert torch.equal(state.behaviour.table, first) == (i < 4)
        assert not torch.equal(state.policy.table, state.behaviour.table)
        assert torch.equal(state.reference.table, first)


def test_offline_is_one_sampling_and_all_updates_on_it():
    state, problem, rows = training(Schedule(1, 8, 8, 4, inner_steps=6), METHODS["dpo_offline"])
    list(rows)
    assert state.policy.seen == [[0, 1]] * 6
    assert (len(problem.behaviours), state.samples, state.updates) == (1, 8, 6)


def test_labels_are_prepared_once_per_sampling_over_all_of_it():
    """Standardised over B, not over M: the advantages of a minibatch need not have mean 0."""
    prepared = []

    def prepare(rollout, hyper):
        prepared.append(rollout.groups)
        return REINFORCE.prepare(rollout, hyper)

    _, _, rows = training(Schedule(2, 16, 8, 4, inner_steps=3), replace(REINFORCE, prepare=prepare))
    list(rows)
    assert prepared == [4, 4]


def test_items_are_those_of_the_minibatch():
    state, _, rows = training(Schedule(1, 16, 8, 4))
    list(rows)
    assert state.policy.items == [[8, 8], [8, 8]]


def test_a_kl_coefficient_follows_the_samples_and_counts_from_the_next_sampling_on():
    """KL to a reference that is 0.5 nats a token less sure: 1 nat a completion of 2 tokens."""
    used = []

    def prepare(rollout, hyper):
        used.append(hyper["kl_coefficient"])
        return REINFORCE.prepare(rollout, hyper)

    policy, problem = TabularPolicy(), TabularProblem(2, drift=-0.5)
    policy.breaks = frozenset({"reference"})
    method = replace(REINFORCE, prepare=prepare)
    state, _, rows = training(Schedule(2, 8, 8, 4), method, policy, problem)
    state.controller = AdaptiveKL(0.2, target=0.5, horizon=80.0)
    list(rows)
    # 2 runs x 2 prompts x 4 completions = 16 of them; twice the target and more counts as 0.2
    assert used == pytest.approx([0.2, 0.2 * (1 + 0.2 * 16 / 80)])


def test_rewards_are_added_to_the_moments_once_a_sampling_and_where_they_are_asked_for():
    schedule = Schedule(3, 8, 8, 4, inner_steps=2)
    state, problem, rows = training(schedule)
    list(rows)
    assert state.moments.sums is None
    drawn = []
    collect = problem.collect
    problem.collect = lambda *args: drawn.append(collect(*args).rewards) or collect(*args)
    state, _, rows = training(schedule, problem=problem, standardise="running")
    losses = [next(rows)["loss"] for _ in range(3)]  # in the midst of the second sampling
    hyper = REINFORCE.resolve({"standardise": "running"})
    losses += [row["loss"] for row in fine_tune(state, problem, REINFORCE, schedule, hyper)]
    assert len(drawn) == 4  # the second one twice
    everything = torch.stack([drawn[0], drawn[1], drawn[3]]).double().flatten(-2)
    everything = everything.transpose(0, 1).flatten(1)
    mean, std = state.moments.mean_and_std()
    torch.testing.assert_close(mean, everything.mean(1))
    torch.testing.assert_close(std, everything.std(1))
    _, _, rows = training(schedule, standardise="running")
    torch.testing.assert_close(losses, [row["loss"] for row in rows], rtol=0, atol=0)


def test_a_stopped_iterator_continues_where_it_was():
    """A new loop over the same state, at any update, goes on with the same numbers."""
    schedule = Schedule(2, 16, 8, 4, inner_steps=2)
    whole, _, rows = training(schedule)
    losses = [row["loss"] for row in rows]
    for stop in range(1, schedule.updates + 1):
        state, problem, rows = training(schedule)
        part = [next(rows)["loss"] for _ in range(stop)]
        rest = fine_tune(state, problem, REINFORCE, schedule, REINFORCE.hyper)
        part += [row["loss"] for row in rest]
        torch.testing.assert_close(part, losses, rtol=0, atol=0)
        assert torch.equal(state.policy.table, whole.policy.table)
        assert (state.updates, state.samples) == (whole.updates, whole.samples)


# Identities


def test_recomputed_log_probability_that_is_off_stops_the_run():
    _, _, rows = training(Schedule(1, 8, 8, 4), policy=TabularPolicy(error=0.01))
    with pytest.raises(AssertionError, match="reinforce: identity 'recomputed' is off by 0.01"):
        next(rows)


def test_identities_are_checked_at_every_sampling():
    state, _, rows = training(Schedule(3, 8, 8, 4))
    next(rows)
    state.policy.error = 0.01
    with pytest.raises(AssertionError, match="'recomputed'"):
        next(rows)


def test_what_a_trained_policy_recomputes_is_held_on_average():
    """Of eight tokens one may be off by eight times 1.5e-5, which the tolerance makes here."""
    one = torch.eye(8)[0].view(1, 2, 4, 1)
    with pytest.raises(AssertionError, match="'recomputed'"):
        next(training(Schedule(4, 8, 8, 4), policy=TabularPolicy(error=1e-4 * one))[2])
    state, _, rows = training(Schedule(4, 8, 8, 4))
    next(rows)
    state.policy.error = 1e-4 * one
    next(rows)
    state.policy.error = 2e-4 * one
    with pytest.raises(AssertionError, match="'recomputed'"):
        next(rows)


def test_recomputed_is_checked_on_fresh_data_only():
    """After the first update on a sampling, the policy has moved: that is what T is for."""
    _, _, rows = training(Schedule(1, 8, 8, 4, inner_steps=3), policy=TabularPolicy(rate=1.0))
    assert len(list(rows)) == 3


def test_rounding_passes():
    _, _, rows = training(Schedule(2, 8, 8, 4), policy=TabularPolicy(error=1e-6))
    assert len(list(rows)) == 2


def test_a_reference_that_is_not_the_first_policy_stops_the_run():
    problem = TabularProblem(2, drift=0.01)
    _, _, rows = training(Schedule(1, 8, 8, 4), problem=problem)
    with pytest.raises(AssertionError, match="identity 'reference' is off by 0.01"):
        next(rows)


def test_a_first_loss_that_is_not_the_methods_stops_the_run():
    wrong = replace(DPO, first_loss=lambda hyper: 0.7)
    _, _, rows = training(Schedule(1, 8, 8, 4), wrong)
    with pytest.raises(AssertionError, match="identity 'first loss' is off by 0.00979"):
        next(rows)


def test_a_tied_batch_has_no_first_loss_to_check():
    problem = TabularProblem(2)
    problem.values = torch.full((4,), 0.5)
    _, _, rows = training(Schedule(1, 8, 8, 4), DPO, problem=problem)
    assert next(rows)["loss"].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["recomputed", "reference", "first loss"])
def test_a_declared_break_passes_and_only_that(name):
    policy = TabularPolicy(error=0.01 if name == "recomputed" else 0.0)
    problem = TabularProblem(2, drift=0.01 if name == "reference" else 0.0)
    method = replace(DPO, first_loss=lambda hyper: 0.7) if name == "first loss" else REINFORCE
    policy.breaks = frozenset({name})
    _, _, rows = training(Schedule(1, 8, 8, 4), method, policy, problem)
    next(rows)
    policy.breaks = frozenset({"recomputed", "reference", "first loss"} - {name})
    _, _, rows = training(Schedule(1, 8, 8, 4), method, policy, problem)
    with pytest.raises(AssertionError, match=name):
        next(rows)


# Runs that go non-finite


def test_a_run_that_goes_non_finite_freezes_while_its_neighbour_goes_on():
    schedule = Schedule(6, 8, 8, 4)
    alone, _, rows = training(schedule)
    list(rows)
    state, _, rows = training(schedule)
    next(rows)
    state.policy.table[0, 0] = torch.nan
    broken = state.policy.table[0].clone()
    frozen = state.policy.frozen  # sampling refuses NaN: let the broken run sample from something
    state.policy.frozen = lambda: _without_nan(frozen())
    list(rows)
    assert state.policy.alive.tolist() == [False, True]
    torch.testing.assert_close(state.policy.table[0], broken, equal_nan=True)
    assert state.updates == 6
    assert torch.equal(state.policy.table[1], alone.policy.table[1])


def _without_nan(policy):
    policy.table = policy.table.nan_to_num(0.0)
    return policy


def test_every_run_non_finite_is_an_error():
    state, _, rows = training(Schedule(6, 8, 8, 4, inner_steps=2))
    next(rows)
    state.policy.table[:] = torch.nan
    next(rows)
    with pytest.raises(Diverged, match="every run is non-finite after 2 updates"):
        next(rows)


def test_a_state_restored_where_every_run_is_non_finite_ends_before_it_draws():
    schedule = Schedule(6, 8, 8, 4, inner_steps=2)
    state, problem, rows = training(schedule)
    next(rows)
    state.policy.table[:] = torch.nan
    next(rows)
    with pytest.raises(Diverged, match="after 2 updates"):
        next(fine_tune(state, problem, REINFORCE, schedule, REINFORCE.hyper))
    assert (len(problem.behaviours), state.samples) == (1, 8)
    assert state.behaviour.table.isfinite().all()


def test_non_finite_before_the_first_update_is_an_error():
    """Also for one run of many, and where every identity is declared broken."""
    policy = TabularPolicy()
    policy.breaks = frozenset({"recomputed", "reference", "first loss"})
    problem = TabularProblem(2)
    problem.values = torch.tensor([0.0, torch.nan, 1.0, 1.0])
    state, _, rows = training(Schedule(2, 8, 8, 4), policy=policy, problem=problem)
    with pytest.raises(FloatingPointError, match="reinforce: .* not finite at the first update"):
        next(rows)
    assert state.updates == 0
