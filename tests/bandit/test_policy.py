"""Sampling, scoring, Adam and the stack against the loop of single runs that it replaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chisquare

from lib import losses
from lib.bandit import policy
from lib.bandit.network import GPT_NANO
from lib.bandit.policy import Scorer, StackedAdam, StackedPolicy, flat_groups, invert_cdf
from lib.bandit.problem import BanditProblem
from lib.bandit.reference import load
from lib.methods import METHODS
from lib.rollouts import sequence_logp, token_logp
from tests.bandit.helpers import PlainGPT, random_parameters, small

BELOW_1 = float(np.nextafter(np.float32(1), np.float32(0)))


def draw(probabilities, u):
    return invert_cdf(torch.tensor(probabilities), torch.tensor(u)).item()


@pytest.mark.parametrize(
    ("u", "token"), [(0.0, 0), (0.2499, 0), (0.25, 1), (0.7499, 1), (0.75, 2), (BELOW_1, 2)]
)
def test_invert_cdf_at_its_thresholds(u, token):
    assert draw([0.25, 0.5, 0.25], u) == token


@pytest.mark.parametrize(
    ("u", "token"), [(0.0, 1), (0.4999, 1), (0.5, 3), (0.9999, 3), (BELOW_1, 3)]
)
def test_tokens_without_probability_are_never_drawn(u, token):
    assert draw([0.0, 0.5, 0.0, 0.5, 0.0], u) == token


def test_a_sum_that_rounds_below_u_draws_the_last_possible_token():
    probabilities = [0.5, 0.4999999, 0.0, 0.0]
    assert sum(np.float32(probabilities)) < BELOW_1
    assert draw(probabilities, BELOW_1) == 1


def test_a_policy_of_nan_draws_a_token():
    """What to make of it is for the freezing of runs; an index out of range would be a crash."""
    assert 0 <= draw([float("nan")] * 4, 0.5) < 4


def test_invert_cdf_is_exact_on_a_grid_of_numbers():
    probabilities = np.array([0.11, 0.0, 0.29, 0.6])
    u = (torch.arange(1000) + 0.5) / 1000
    drawn = invert_cdf(torch.tensor(probabilities).expand(1000, 4), u.double())
    assert torch.bincount(drawn, minlength=4).tolist() == [110, 0, 290, 600]


@given(
    arrays(np.float32, 6, elements=st.floats(0, 1, width=32)).filter(lambda x: x.sum() > 0.1),
    st.floats(0, BELOW_1, width=32),
    st.floats(0, BELOW_1, width=32),
)
def test_drawn_tokens_are_possible_and_grow_with_u(weights, u, v):
    p = torch.from_numpy(weights / weights.sum())
    low, high = invert_cdf(p, torch.tensor(min(u, v))), invert_cdf(p, torch.tensor(max(u, v)))
    assert low <= high
    assert p[low] > 0 and p[high] > 0


# Sampling and scoring


@pytest.fixture(scope="module")
def scorer():
    return Scorer({k: 0.5 * v for k, v in random_parameters(2).items()}, 2, GPT_NANO)


def test_sampled_frequencies_are_the_policys(scorer):
    """At the first position, and at the second given the first: chi-square on 20,000 draws."""
    count = 20_000
    numbers = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(0))
    prompts = torch.full((2, count), 42)
    completions = scorer.sample(prompts, numbers).completions[0]
    first = completions[:, 0]
    likely = first.mode().values.item()
    chosen = completions[first == likely][:, 1]
    prefix = torch.full((2, 1), likely)
    distributions = scorer.distributions(prompts[:, :1], torch.stack([prefix, prefix], -1))
    for drawn, logp in zip((first, chosen), distributions[0, 0], strict=True):
        expected = logp.exp().double().numpy()
        observed = np.bincount(drawn, minlength=100)
        assert chisquare(observed, expected / expected.sum() * len(drawn)).pvalue > 1e-3


def test_samples_carry_their_log_probabilities_and_scale(scorer):
    numbers = torch.rand(2, 6, 9, generator=torch.Generator().manual_seed(0))
    prompts = torch.arange(12).view(2, 6)
    samples = scorer.sample(prompts, numbers, keep=True)
    scored = scorer.score(prompts, samples.completions)
    torch.testing.assert_close(samples.logp, scored, rtol=1e-4, atol=1e-4)
    along = scorer.distributions(prompts, samples.completions)
    torch.testing.assert_close(samples.distributions, along, rtol=1e-4, atol=1e-4)
    picked = along.gather(-1, samples.completions[..., None])[..., 0]
    torch.testing.assert_close(scored, picked, rtol=1e-5, atol=1e-5)
    assert (samples.scale > 0).all()
    assert scorer.sample(prompts, numbers).distributions is None  # only when asked


def test_a_sample_does_not_depend_on_what_is_beside_it(scorer):
    numbers = torch.rand(2, 6, 9, generator=torch.Generator().manual_seed(0))
    prompts = torch.arange(12).view(2, 6)
    whole = scorer.sample(prompts, numbers).completions
    part = scorer.sample(prompts[:, 2:4], numbers[:, 2:4]).completions
    assert torch.equal(whole[:, 2:4], part)


def test_without_the_shift_tokens_are_scored_by_logits_that_have_read_them(scorer):
    """The switch breaks 'recomputed': the score of a sample is not what it was sampled with."""
    unshifted = Scorer(scorer.parameters, 2, GPT_NANO, shift=False)
    numbers = torch.rand(2, 6, 9, generator=torch.Generator().manual_seed(0))
    prompts = torch.arange(12).view(2, 6)
    samples = unshifted.sample(prompts, numbers)
    assert torch.equal(samples.completions, scorer.sample(prompts, numbers).completions)
    scored = unshifted.score(prompts, samples.completions)
    assert scored.shape == samples.logp.shape
    assert (scored - samples.logp).abs().max() > 0.1
    tokens = torch.cat([prompts[0, :1], samples.completions[0, 0]])
    logp = PlainGPT(scorer.parameters, 0)(tokens[None])[0].log_softmax(-1)
    expected = [logp[t, tokens[t]].item() for t in range(1, 10)]
    assert scored[0, 0].tolist() == pytest.approx(expected, abs=1e-4)


# Adam


def test_stacked_adam_is_adam_with_a_rate_per_run():
    rates = [0.1, 0.003, 1e-5]
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(3, 50, generator=generator)
    singles = [flat[i].clone().requires_grad_() for i in range(3)]
    optimisers = [torch.optim.Adam([x], lr=r) for x, r in zip(singles, rates, strict=True)]
    adam = StackedAdam(3, 50, torch.tensor(rates))
    for step in range(20):
        gradient = torch.randn(3, 50, generator=generator) * 10.0 ** (step % 5 - 2)
        adam.step(flat, gradient, torch.ones(3, dtype=torch.bool))
        for i, (single, optimiser) in enumerate(zip(singles, optimisers, strict=True)):
            single.grad = gradient[i]
            optimiser.step()
        torch.testing.assert_close(flat, torch.stack(singles).detach(), rtol=1e-6, atol=1e-6)


def test_adam_leaves_a_dead_run_as_it_was():
    flat = torch.zeros(2, 3)
    adam = StackedAdam(2, 3, torch.tensor([0.1, 0.1]))
    alive = torch.tensor([True, False])
    adam.step(flat, torch.tensor([[1.0] * 3, [torch.nan] * 3]), alive)
    adam.step(flat, torch.tensor([[1.0] * 3, [torch.inf] * 3]), alive)
    assert flat[0].tolist() == pytest.approx([-0.2] * 3)
    assert flat[1].tolist() == [0.0] * 3


# The stack against single runs


def single_run(initial, batch, run, method, rate, updates):
    """Losses and log-probabilities of one run: plain network, torch.optim.Adam, loop over pairs."""
    network = PlainGPT({k: v.expand(1, *v.shape[1:]) for k, v in initial.items()}, 0)
    optimiser = torch.optim.Adam(network.parameters(), lr=rate)
    prompts, completions = (x[run] for x in flat_groups(batch))
    tokens = torch.cat([prompts[:, None], completions], -1)
    found = []
    for _ in range(updates):
        logp = token_logp(network(tokens[:, :-1]), tokens).sum(-1)
        loss = LOSS[method](logp, batch, run)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append((loss.item(), logp.detach()))
    return found


def loop_over_pairs(logp, batch, run):
    ref, rewards = sequence_logp(batch.ref, batch.mask)[run], batch.rewards[run]
    logp, terms = logp.view_as(ref), []
    for p in range(len(ref)):
        for i in range(ref.shape[1]):
            for j in range(ref.shape[1]):
                if rewards[p, i] > rewards[p, j]:
                    margin = logp[p, i] - ref[p, i] - logp[p, j] + ref[p, j]
                    terms.append((margin - 10) ** 2)
    return torch.stack(terms).mean()


def loop_over_completions(logp, batch, run):
    rewards = batch.rewards[run].double().flatten().numpy()
    advantage = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-8)
    return -sum(a * x for a, x in zip(advantage.tolist(), logp, strict=True)) / len(logp)


def loop_over_prompts(logp, batch, run):
    rewards = batch.rewards[run]
    return -sum(x[r.argmax()] for x, r in zip(logp.view_as(rewards), rewards, strict=True)) / len(
        rewards
    )


LOSS = {
    "ipo": loop_over_pairs,
    "reinforce": loop_over_completions,
    "best_of_n": loop_over_prompts,
}


@pytest.mark.parametrize("name", LOSS)
def test_stack_equals_the_loop_of_single_runs(name):
    """On given samples, over the first updates, at different rates: losses and log-probs (of those
    that carry loss; the others' are those of the sampling)."""
    runs = [small(name, seed, rate) for seed, rate in ((0, 0.003), (1, 0.001), (2, 1e-4))]
    problem = BanditProblem(runs)
    state = problem.initial_state()
    state.behaviour = state.policy.frozen()
    batch = problem.collect(state, METHODS[name])
    method = METHODS[name]
    batch = batch.labelled(method.prepare(batch, method.hyper))
    stacked = [state.policy.update(batch, method, method.hyper, method.items(batch))
               for _ in range(4)]  # fmt: skip
    for run, config in enumerate(runs):
        single = single_run(load(), batch, run, name, config.learning_rate, 4)
        for (logp, metrics), (loss, own) in zip(stacked, single, strict=True):
            assert metrics["loss"][run].item() == pytest.approx(loss, rel=1e-5, abs=1e-5)
            seen = method.active(batch)[run].flatten()
            total = logp[run].sum(-1).flatten()
            torch.testing.assert_close(total[seen], own[seen], rtol=1e-5, atol=1e-4)
            assert torch.equal(logp[run].flatten(0, 1)[~seen],
                               batch.logp[run].flatten(0, 1)[~seen])  # fmt: skip
    moved = method.active(batch)[2]
    assert not torch.allclose(stacked[0][0][2][moved], stacked[3][0][2][moved], atol=1e-3)


@pytest.mark.parametrize(("top_k", "dropout"), [(1, 0.0), (3, 0.0), (1, 0.1)])
def test_completions_without_loss_do_not_pass_through(monkeypatch, top_k, dropout):
    """And the others are trained on as if they did, with the same masks of dropout."""
    ends, seen, method = [], [], METHODS["best_of_n"]
    hyper = {**method.hyper, "top_k": top_k}
    forward = policy.logits
    monkeypatch.setattr(policy, "logits", lambda leaves, inputs, *rest: seen.append(
        inputs.shape[1]) or forward(leaves, inputs, *rest))  # fmt: skip
    for rows, trained in ((policy.carrying, 3 * top_k), (lambda *_: None, 3 * 4)):
        monkeypatch.setattr(policy, "carrying", rows)
        problem = BanditProblem([small("best_of_n", seed, dropout=dropout) for seed in (0, 1)])
        state = problem.initial_state()
        batch = problem.collect(state_with_behaviour(state), method)
        batch = batch.labelled(method.prepare(batch, hyper))
        seen.clear()
        for _ in range(3):
            logp, metrics = state.policy.update(batch, method, hyper, method.items(batch))
        ends.append((logp[method.active(batch)], metrics["loss"], metrics["grad_norm"]))
        assert set(seen) == {trained}
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-4)


def state_with_behaviour(state):
    state.behaviour = state.policy.frozen()
    return state


def test_how_many_carry_loss_is_not_asked_of_the_data():
    """Where ties decide it, or all of them may, nobody is left out."""
    problem = BanditProblem([small("best_of_n", 0)])
    batch = problem.collect(state_with_behaviour(problem.initial_state()), METHODS["best_of_n"])
    for name in ("best_of_n_negative", "rwr", "dpo", "pref_ft"):
        method = METHODS[name]
        labelled = batch.labelled(method.prepare(batch, method.hyper))
        assert policy.carrying(labelled, method, method.hyper) is None
    method = METHODS["best_of_n_offline"]
    labelled = batch.labelled(method.prepare(batch, {"top_k": 2}))
    rows = policy.carrying(labelled, method, {"top_k": 2})
    chosen = labelled.labels["selected"].flatten(1)
    assert torch.equal(rows[0], chosen[0].nonzero()[:, 0])


def test_grad_norm_is_that_of_the_run():
    runs = [small("best_of_n", seed) for seed in (0, 1)]
    problem = BanditProblem(runs)
    state = problem.initial_state()
    state.behaviour = state.policy.frozen()
    method = METHODS["best_of_n"]
    batch = problem.collect(state, method)
    batch = batch.labelled(method.prepare(batch, method.hyper))
    network = PlainGPT({k: v.expand(1, *v.shape[1:]) for k, v in load().items()}, 0)
    prompts, completions = (x[1] for x in flat_groups(batch))
    tokens = torch.cat([prompts[:, None], completions], -1)
    logp = token_logp(network(tokens[:, :-1]), tokens).sum(-1).view(3, 4)
    losses.best_of_n(logp, batch.labels["selected"][1]).sum().div(3).backward()
    norm = torch.stack([g.norm() for g in network.gradients().values()]).norm().item()
    _, metrics = state.policy.update(batch, method, method.hyper, method.items(batch))
    assert metrics["grad_norm"][1].item() == pytest.approx(norm, rel=1e-5)


# Copies and switches


def test_frozen_is_a_copy_that_does_not_train():
    policy = StackedPolicy(load(), torch.tensor([0.1, 0.1]))
    frozen = policy.frozen()
    policy.flat += 1
    assert torch.equal(frozen.parameters["token"][1], load()["token"][0])
    assert not hasattr(frozen, "update")


def test_state_dict_restores_all_that_training_changes():
    policy, other = (StackedPolicy(load(), torch.tensor([0.1, 0.2])) for _ in range(2))
    alive = torch.tensor([True, False])
    for seed in range(3):
        gradient = torch.randn(policy.flat.shape, generator=torch.Generator().manual_seed(seed))
        policy.optimiser.step(policy.flat, gradient, torch.ones(2, dtype=torch.bool))
    policy.alive &= alive
    other.load_state_dict({k: v.clone() for k, v in policy.state_dict().items()})
    for one in (policy, other):
        one.optimiser.step(one.flat, gradient, one.alive)
    assert torch.equal(policy.flat, other.flat)
    assert other.alive.tolist() == [True, False]
    assert torch.equal(policy.parameters["head.weight"], other.parameters["head.weight"])


@pytest.mark.parametrize(
    ("options", "breaks"),
    [({}, set()), ({"dropout": 0.1}, {"recomputed", "first loss"}),
     ({"shift": False}, {"recomputed", "reference"})],
)  # fmt: skip
def test_switches_declare_the_identities_that_they_break(options, breaks):
    assert StackedPolicy(load(), torch.tensor([0.1]), **options).breaks == breaks
