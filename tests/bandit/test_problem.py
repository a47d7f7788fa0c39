"""Prompts, rewards, collection and evaluation, with enumeration where the bandit allows it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lib.bandit import problem as module
from lib.bandit.network import logits
from lib.bandit.policy import Samples
from lib.bandit.problem import BanditProblem, contexts
from lib.bandit.reference import load, reward_table
from lib.methods import METHODS
from lib.randomness import uniforms
from lib.rollouts import Rollout
from tests.bandit.helpers import random_parameters, small, start


def advanced(*runs, updates):
    """Problem and state after some updates, and the metrics of each."""
    problem, state, rows = start(*runs)
    return problem, state, [next(rows) for _ in range(updates)]


# Random numbers


def test_uniforms_depend_on_seed_stream_and_counter_only():
    shape = (5, 3)
    drawn = uniforms([7, 8], 1, 4, shape)
    assert drawn.shape == (2, 5, 3)
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert torch.equal(uniforms([8], 1, 4, shape)[0], drawn[1])
    for other in (uniforms([7], 2, 4, shape), uniforms([7], 1, 5, shape), drawn[1:]):
        assert not (other[0] == drawn[0]).any()


def test_contexts_are_each_seeds_own_order():
    order = contexts([0, 1, 0])
    assert (order.sort(-1).values == torch.arange(100)).all()
    assert torch.equal(order[0], order[2]) and not torch.equal(order[0], order[1])


def test_another_seed_changes_the_first_batch():
    (a, state_a, _), (b, state_b, _) = start(small(seed=0)), start(small(seed=1))
    state_a.behaviour, state_b.behaviour = state_a.reference, state_b.reference
    first, second = (p.collect(s, p.method) for p, s in ((a, state_a), (b, state_b)))
    assert not torch.equal(first.prompts, second.prompts)
    assert not torch.equal(first.completions, second.completions)


def test_more_prompts_contain_the_fewer():
    few, many = BanditProblem([small(prompts=3)]), BanditProblem([small(prompts=20)])
    assert torch.equal(few.prompts, many.prompts[:, :3])


def test_held_out_prompts_are_not_trained_on():
    problem = BanditProblem([small(prompts=50), small(prompts=50, seed=1)])
    for trained, unseen in zip(problem.prompts, problem.unseen, strict=True):
        assert not set(trained.tolist()) & set(unseen.tolist())


# Collection


def collected(run, iteration=0):
    problem, state, _ = start(run)
    state.behaviour, state.iteration = state.policy.frozen(), iteration
    return problem.collect(state, problem.method)


@pytest.mark.parametrize(("sets", "iteration"), [(4, 0), (2, 1)])
def test_every_b_sees_the_same_random_numbers(sets, iteration):
    """Before any update, the sets of one sampling are the samplings of k = 1 at the same place."""
    many = collected(small("ipo", sets=sets, iterations=2), iteration)
    assert many.groups == 3 * sets
    for s in range(sets):
        single = collected(small("ipo"), iteration * sets + s)
        part = many.narrow(3 * s, 3)
        for name in ("prompts", "completions", "logp", "ref", "rewards"):
            torch.testing.assert_close(
                getattr(part, name), getattr(single, name), rtol=1e-5, atol=1e-5, msg=name
            )


def test_sets_are_different_draws():
    sets = collected(small("ipo", sets=2, iterations=1)).completions
    assert (sets[:, :3] != sets[:, 3:]).any()


def test_offline_methods_with_one_seed_see_the_same_data():
    names = [name for name, m in METHODS.items() if not m.on_policy]
    data = {name: collected(small(name)) for name in names}
    for name in names[1:]:
        assert torch.equal(data[name].completions, data[names[0]].completions)
        assert torch.equal(data[name].prompts, data[names[0]].prompts)


def test_offline_data_are_the_pairs_that_are_followed():
    problem, state, _ = start(small("dpo_offline"))
    state.behaviour = state.policy.frozen()
    data = problem.collect(state, problem.method)
    assert torch.equal(data.completions, problem.fixed.completions)


def test_collected_log_probabilities_are_the_sampling_policys_and_the_references():
    problem, state, _ = advanced(small("ipo", rate=0.01), updates=2)
    state.behaviour, state.iteration = state.policy.frozen(), 2
    data = problem.collect(state, problem.method)
    prompts = data.prompts.repeat_interleave(4, -1)
    completions = data.completions.view(1, 12, 9)
    for found, scorer in ((data.logp, state.policy), (data.ref, state.reference)):
        expected = scorer.score(prompts, completions).detach().view_as(found)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert (data.logp - data.ref).abs().max() > 0.1


def test_reference_is_scored_for_those_that_need_it():
    assert collected(small("best_of_n")).ref is None
    assert collected(small("dpo")).ref is not None
    assert collected(small("ppo_sequence")).ref is None
    assert collected(small("ppo_sequence", kl_penalty=0.05)).ref is not None


def test_decoding_in_pieces_changes_nothing(monkeypatch):
    whole = collected(small("ipo"))
    monkeypatch.setattr(module, "DECODE_BUDGET", 5)
    pieces = collected(small("ipo"))
    assert torch.equal(whole.completions, pieces.completions)
    torch.testing.assert_close(whole.logp, pieces.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.scale, pieces.scale)


def test_runs_that_differ_in_more_than_rate_seed_and_reward_are_no_stack():
    with pytest.raises(ValueError, match="may differ in seed, rate and reward function only"):
        BanditProblem([small(), small(top_k=2)])


# Rewards


def test_reward_is_the_mean_over_the_response():
    problem = BanditProblem([small(reward="R1"), small(reward="R2")])
    tokens = torch.randint(100, (2, 3, 4, 9))
    got = problem.label(problem.prompts, tokens)
    for run, peak in enumerate((70, 20)):
        expected = np.exp(-(((tokens[run].numpy() - peak) / 10) ** 2)).mean(-1)
        np.testing.assert_allclose(got[run], expected, rtol=1e-5, atol=1e-7)


def test_reward_over_prompt_and_response_is_the_response_and_the_prompts_own():
    """10 r' = 9 r + R(prompt): the ceiling then depends on the prompt."""
    text = BanditProblem([small(reward="R1")])
    code = BanditProblem([small(reward="R1", reward_over="prompt_and_response")])
    tokens = torch.randint(100, (1, 3, 4, 9))
    own = reward_table("R1")[text.prompts][..., None]
    torch.testing.assert_close(
        10 * code.label(text.prompts, tokens), 9 * text.label(text.prompts, tokens) + own
    )
    best = torch.full((1, 3, 4, 9), 70)
    assert text.label(text.prompts, best).eq(1).all()
    ceiling = code.label(torch.arange(100)[None], best[:, :1].expand(1, 100, 4, 9)).mean().item()
    assert ceiling == pytest.approx(0.918, abs=5e-4)  # Table 3 prints 0.92


# Evaluation


def test_at_update_0_the_policy_is_the_reference():
    problem, state, _ = start(small(seed=3), small(seed=4, reward="R2"))
    metrics = problem.evaluate(state)
    for name in ("kl_ref", "kl_gen", "chosen_logratio", "rejected_logratio",
                 "held_out_chosen_logratio", "held_out_rejected_logratio"):  # fmt: skip
        assert metrics[name].abs().max() < 1e-4, name
    uniform = np.full(20, 0.05)
    mass = np.array([metrics[f"mass_{5 * i:02d}"][0].item() for i in range(20)])
    assert mass.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(mass - uniform).max() > 0.05


def test_the_mass_on_a_token_is_that_of_its_bin():
    problem = BanditProblem([small()])
    certain = torch.nn.functional.one_hot(torch.full((1, 4, 9), 42), 100).float()
    mass = {name: value.item() for name, value in problem._marginal(certain).items()}
    assert {name: value for name, value in mass.items() if value} == {"mass_40": 1.0}


def exact(parameters, table, reference):
    """Reward and KL of the 1-token bandit, enumerated over 100 contexts and 100 tokens."""
    reward = kl = entropy = 0.0
    for context in range(100):
        tokens = torch.tensor([[[context]]])
        p, q = (logits({k: v[:1] for k, v in x.items()}, tokens)[0, 0, 0].double().log_softmax(-1)
                for x in (parameters, reference))  # fmt: skip
        for token in range(100):
            reward += (p[token].exp() * table[token]).item() / 100
            kl += (p[token].exp() * (p[token] - q[token])).item() / 100
            entropy -= (p[token].exp() * p[token]).item() / 100
    return reward, kl, entropy


def test_evaluation_of_the_one_token_bandit_is_exact():
    """Appendix J.3, enumerable: at the start and after a few updates, away from zero."""
    problem, state, rows = start(small("reinforce", rate=0.01, length=1, completions=10))
    first = problem.evaluate(state)
    for _ in range(3):
        next(rows)
    last = problem.evaluate(state)
    for metrics, policy in ((first, state.reference), (last, state.policy)):
        reward, kl, entropy = exact(
            policy.parameters, problem.rewards[0], state.reference.parameters
        )
        assert metrics["reward"].item() == pytest.approx(reward, rel=1e-4)
        assert metrics["kl_ref"].item() == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert metrics["entropy"].item() == pytest.approx(entropy, rel=1e-4)
    assert last["kl_ref"].item() > 0.05


def test_reward_is_unbiased_for_the_sampled_completions():
    """Over many evaluations, the expectation along prefixes and the plain mean reward agree."""
    problem, state, _ = advanced(small("reinforce", rate=0.01), updates=3)
    state.behaviour = state.policy.frozen()
    along, kl = [], []
    for counter in range(20):
        state.updates = counter
        metrics = problem.evaluate(state)
        along.append(metrics["reward"].item())
        kl.append(metrics["kl_ref"].item())
    prompts = torch.arange(100).repeat(1, 40)
    samples = state.policy.sample(prompts, torch.rand(1, 4000, 9, generator=torch.manual_seed(0)))
    rewards = problem.rewards[0][samples.completions[0]].mean(-1)
    error = (rewards.var() / len(rewards) + np.var(along) / 20) ** 0.5
    assert abs(rewards.mean() - np.mean(along)) < 4 * error
    ratio = samples.logp - state.reference.score(prompts, samples.completions)
    ratio = ratio.sum(-1)[0]
    error = (ratio.var() / len(ratio) + np.var(kl) / 20) ** 0.5
    assert abs(ratio.mean() - np.mean(kl)) < 4 * error
    assert ratio.mean() > 10 * error


def test_kl_to_the_generating_policy_grows_within_an_iteration_only():
    problem, state, rows = start(small("best_of_n", rate=0.001, inner_steps=3, iterations=2))
    found = [(next(rows), problem.evaluate(state)["kl_gen"].item())[1] for _ in range(4)]
    assert 0 < found[0] < found[1] < found[2]
    assert found[3] < found[2]  # a new sampling: pi_gen is the policy of one update ago


def test_evaluation_changes_nothing():
    problem, state, rows = start(small("ipo"))
    next(rows)
    before = state.policy.flat.clone()
    first = problem.evaluate(state)
    second = problem.evaluate(state)
    assert torch.equal(before, state.policy.flat)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_followed_log_ratios_by_hand():
    """y_w is the best of N, y_l the mean of the others; both against the reference."""
    problem, state, _ = advanced(small("dpo_offline", rate=0.01), updates=3)
    metrics, pairs = problem.evaluate(state), problem.fixed
    chosen, rejected = [], []
    for p in range(3):
        prompts = pairs.prompts[:, p : p + 1]
        ratios = []
        for c in range(4):
            y = pairs.completions[:, p, c][:, None]
            ratio = state.policy.score(prompts, y) - state.reference.score(prompts, y)
            ratios.append(ratio.sum().item())
        best = pairs.rewards[0, p].argmax().item()
        chosen.append(ratios.pop(best))
        rejected.append(np.mean(ratios))
    assert metrics["chosen_logratio"].item() == pytest.approx(np.mean(chosen), abs=1e-3)
    assert metrics["rejected_logratio"].item() == pytest.approx(np.mean(rejected), abs=1e-3)
    assert np.mean(chosen) > np.mean(rejected) + 1


def test_support_share_on_a_hand_made_case():
    """Mass on the tokens seen at the same prompt and position, duplicates counted once."""
    problem, state, _ = start(small(length=1))
    tokens = torch.tensor([[[[5], [5], [9], [9]], [[1], [2], [3], [4]]]])  # two prompts: 40, 60
    problem.fixed = Rollout(
        prompts=torch.tensor([[40, 60]]), completions=tokens, mask=tokens > 0, logp=None,
        ref=None, rewards=torch.zeros(1, 2, 4), scale=torch.zeros(1), lead=1,
    )  # fmt: skip
    probabilities = torch.zeros(1, 100, 1, 100)
    probabilities[0, 40, 0, [5, 9, 50]] = torch.tensor([0.2, 0.3, 0.5])
    probabilities[0, 60, 0, [4, 5]] = torch.tensor([0.1, 0.9])
    assert problem._support_share(probabilities).item() == pytest.approx((0.5 + 0.1) / 2)


def test_a_policy_of_nan_reads_as_a_failure():
    """Not as a reward of 0: every metric of the policy is NaN, and the neighbour's are not."""
    problem, state, _ = start(small(seed=0), small(seed=1))
    state.policy.flat[0] = torch.nan
    metrics = problem.evaluate(state)
    for name in ("reward", "kl_ref", "kl_gen", "entropy", "support_share", "chosen_logratio"):
        assert metrics[name][0].isnan(), name
        assert metrics[name][1].isfinite(), name


def test_evaluation_scores_the_policys_own_samples(monkeypatch):
    """All 100 contexts, once each, with numbers of the update."""
    problem, state, _ = start(small())
    seen = []
    sample = type(state.policy).sample

    def spy(self, prompts, numbers, *, keep=False) -> Samples:
        seen.append((prompts, numbers))
        return sample(self, prompts, numbers, keep=keep)

    monkeypatch.setattr(type(state.policy), "sample", spy)
    problem.evaluate(state)
    state.updates = 5
    problem.evaluate(state)
    assert all(prompts.tolist() == [list(range(100))] for prompts, _ in seen)
    assert not torch.equal(seen[0][1], seen[1][1])


# Methods and conventions on the bandit


def test_ppo_at_t_1_and_b_equal_to_m_is_reinforce():
    """The ratio is 1 at every update, so that the gradients and the policies agree."""
    ppo = advanced(small("ppo_sequence", rate=0.001), updates=4)
    reinforce = advanced(small("reinforce", rate=0.001), updates=4)
    for a, b in zip(ppo[2], reinforce[2], strict=True):
        assert a["grad_norm"].item() == pytest.approx(b["grad_norm"].item(), rel=1e-3)
    tokens = ppo[0].fixed.completions.view(1, -1, 9)
    prompts = ppo[0].fixed.prompts.repeat_interleave(4, -1)
    scores = [state.policy.score(prompts, tokens) for _, state, _ in (ppo, reinforce)]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)
    start_score = ppo[1].reference.score(prompts, tokens)
    assert (scores[0] - start_score).abs().max() > 0.05
    assert all(metrics["clip_fraction"].item() == 0 for metrics in ppo[2])


def test_ppo_with_reuse_is_not_reinforce():
    ppo = advanced(small("ppo_sequence", rate=0.01, inner_steps=3), updates=3)[2]
    reinforce = advanced(small("reinforce", rate=0.01, inner_steps=3), updates=3)[2]
    assert ppo[0]["grad_norm"].item() == pytest.approx(reinforce[0]["grad_norm"].item(), rel=1e-3)
    assert abs(ppo[2]["grad_norm"].item() / reinforce[2]["grad_norm"].item() - 1) > 0.01
    assert ppo[2]["clip_fraction"].item() > 0


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("reinforce", {"standardise": "prompt"}),
        ("rwr", {"standardise": "prompt"}),
        ("rwr", {"weights": "clipped"}),
        ("rwr", {"temperature": 0.5}),
        ("ppo_sequence", {"ratio_over": "token"}),
        ("ppo_sequence", {"kl_penalty": 0.05}),
        ("best_of_n", {"top_k": 2}),
        ("best_of_n", {"shift": False}),
        ("best_of_n", {"dropout": 0.1}),
        ("best_of_n", {"histogram": "clipped"}),
        ("best_of_n", {"reference_seed": 1}),
        ("reinforce", {"reward_over": "prompt_and_response"}),
        ("dpo", {"gap": 0.1}),
        ("dpo", {"beta": 1.0}),
        ("ipo", {"tau": 0.5}),
    ],
    ids=str,
)  # fmt: skip
def test_each_option_moves_the_trained_policy(method, changes, monkeypatch):
    """And only from the point on where it acts: prompts and random numbers stay."""
    if "reference_seed" in changes:  # fitting another network takes long: any other one will do
        monkeypatch.setattr(module, "load", shipped_or_random)
    run = small(method, rate=0.01, inner_steps=2)
    (a, one, _), (b, two, _) = (advanced(r, updates=2) for r in (run, replace(run, **changes)))
    assert torch.equal(a.prompts, b.prompts)
    assert (one.policy.flat - two.policy.flat).abs().max() > 1e-4
    (name,) = changes
    same_data = name not in ("histogram", "reference_seed")
    assert torch.equal(a.fixed.completions, b.fixed.completions) == same_data
    same_rewards = same_data and name != "reward_over"
    assert torch.equal(a.fixed.rewards, b.fixed.rewards) == same_rewards


def shipped_or_random(kind, seed):
    return load(kind, 0) if seed == 0 else random_parameters(1, seed)


def test_lengths_of_the_text_and_of_one_token():
    for length in (1, 10):
        problem, _, rows = advanced(small("ipo", length=length), updates=2)
        assert problem.fixed.completions.shape == (1, 3, 4, length)
        assert rows[0]["loss"].item() == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("method", ["best_of_n", "ipo_offline"])
def test_every_update_of_every_seed_has_masks_of_its_own(method):
    """Also where minibatches and passes share a sampling; learning rates of one seed share them."""
    dials = {"sets": 2, "inner_steps": 2, "iterations": 2} if method == "best_of_n" else {}
    run = small(method, dropout=0.1, **dials)
    _, state, rows = start(run, replace(run, learning_rate=0.1), replace(run, seed=1))
    drawn, dropout = [], state.policy.dropout

    def spy(counter, shape):
        drawn.append(dropout.numbers(counter, shape))
        return drawn[-1]

    state.policy.dropout = replace(dropout, numbers=spy)
    assert len(list(rows)) == len(drawn) == run.updates
    assert all(torch.equal(one[0], one[1]) for one in drawn)
    apart = [one[row] < 0.1 for one in drawn for row in (0, 2)]
    for i, one in enumerate(apart):
        assert one.float().mean().item() == pytest.approx(0.1, abs=0.01)
        for other in apart[:i]:  # as many in common as chance gives
            assert (one & other).float().mean().item() == pytest.approx(0.01, abs=0.004)


def test_samples_and_evaluations_are_without_dropout():
    """With the same parameters, a run with dropout measures and samples as one without it."""
    made = [advanced(small("ipo", rate=0.01, dropout=rate), updates=1) for rate in (0.0, 0.5)]
    (plain, one, _), (dropped, two, _) = made
    assert not torch.equal(one.policy.flat, two.policy.flat)
    one.policy.flat.copy_(two.policy.flat)
    metrics, same = plain.evaluate(one), dropped.evaluate(two)
    assert all(torch.equal(metrics[name], same[name]) for name in metrics)
    for state in (one, two):
        state.behaviour = state.policy.frozen()
    drawn, alike = plain.collect(one, plain.method), dropped.collect(two, dropped.method)
    assert torch.equal(drawn.completions, alike.completions)
    assert torch.equal(drawn.logp, alike.logp)


def test_policy_and_reference_drop_other_units():
    _, state, _ = start(small("ipo", dropout=0.1, reference_dropout=0.1))
    one, other = state.policy.dropout, state.policy.reference_dropout
    assert not torch.equal(one.numbers(0, (3, 4)), other.numbers(0, (3, 4)))


def test_dropout_in_the_reference_moves_what_the_loss_reads_and_nothing_else():
    """Fresh noise at every update, of the reference alone; the policy has none."""
    run = small("ipo", rate=0.01, reference_dropout=0.5, inner_steps=2, iterations=2)
    _, state, rows = start(run)
    method, seen = state.policy.update.__self__, []
    score = method._logp_of

    def spy(parameters, batch, chosen, dropout):
        if dropout is not None:
            first = state.reference.parameters
            assert all(torch.equal(parameters[k][0], first[k][0]) for k in first)
        seen.append((dropout, score(parameters, batch, chosen, dropout)))
        return seen[-1][1]

    method._logp_of = spy
    losses = [row["loss"].item() for row in rows]
    noisy = [logp for dropout, logp in seen if dropout is state.policy.reference_dropout]
    assert len(noisy) == len(losses) == len(seen) / 2
    assert all(dropout is None for dropout, _ in seen[1::2])
    assert not torch.allclose(noisy[0], noisy[1], atol=0.1)  # two passes over one sampling
    assert losses[0] != pytest.approx(100, rel=1e-3)
    plain, clean, _ = advanced(replace(run, reference_dropout=0.0), updates=1)
    other, mine, _ = advanced(run, updates=1)
    assert not torch.equal(clean.policy.flat, mine.policy.flat)
    mine.policy.flat.copy_(clean.policy.flat)
    first, same = plain.evaluate(clean), other.evaluate(mine)
    assert all(torch.equal(first[name], same[name]) for name in first)


def test_dropout_breaks_recomputed_and_says_so():
    """Without the declaration the run stops; with it, it goes on."""
    _, state, rows = start(small("best_of_n", dropout=0.1))
    next(rows)
    _, state, rows = start(small("best_of_n", dropout=0.1))
    state.policy.breaks = frozenset()
    with pytest.raises(AssertionError, match="identity 'recomputed' is off by"):
        next(rows)


def test_a_policy_that_is_not_the_one_sampled_from_stops_the_run():
    _, state, rows = start(small("best_of_n"))
    frozen = state.policy.frozen

    def shifted():
        copy = frozen()
        copy.parameters["head.weight"] *= 1.05
        return copy

    state.policy.frozen = shifted
    with pytest.raises(AssertionError, match="best_of_n: identity 'recomputed'"):
        next(rows)


@pytest.mark.parametrize(("off", "stops"), [(1e-5, False), (1e-3, True)])
def test_log_probabilities_that_are_off_by_1e_3_stop_the_run(off, stops, monkeypatch):
    """As a share of the largest logit, and one more; rounding does not."""
    problem, _, rows = start(small("best_of_n"))
    collect = problem.collect

    def shifted(state, method):
        batch = collect(state, method)
        return replace(batch, logp=batch.logp + off * (1 + batch.scale[:, None, None, None]))

    monkeypatch.setattr(problem, "collect", shifted)
    if stops:
        with pytest.raises(AssertionError, match="best_of_n: identity 'recomputed'"):
            next(rows)
    else:
        next(rows)
