"""The registry: Table 1, what the losses do of it, hyperparameters and denominators."""

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
import torch

from lib import losses
from lib.advantages import Moments, standardise
from lib.finetune import Schedule, State, fine_tune
from lib.methods import METHODS, NEEDS, Method, _entries, get
from lib.rollouts import Rollout, sequence_logp
from tests.tabular import TabularPolicy, TabularProblem

# Table 1 of the paper (section 2.2): on-policy, sample reuse, negative gradient
PPO, REINFORCE = (True, True, True), (True, False, True)
CONTRASTIVE = (False, None, True)
OFFLINE_SUPERVISED = (False, None, False)
ON_POLICY_SUPERVISED = (True, True, False)
TABLE_1 = {
    "ppo_token": PPO,
    "pref_ft": OFFLINE_SUPERVISED,
    "ppo_sequence": PPO,
    "reinforce": REINFORCE,
    "dpo_offline": CONTRASTIVE,
    "ipo_offline": CONTRASTIVE,
    "rwr_offline": OFFLINE_SUPERVISED,
    "best_of_n_offline": OFFLINE_SUPERVISED,
    "rwr": ON_POLICY_SUPERVISED,
    "best_of_n": ON_POLICY_SUPERVISED,
}
# Not in Table 1: the variant of appendix I.2.1, and section 4.3's contrastive losses on-policy
BEYOND = {
    "best_of_n_negative": (False, None, True),
    "dpo": (True, True, True),
    "ipo": (True, True, True),
}


def rollout(runs=2, groups=3, count=4, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (runs, groups, count, length)

    def draw():
        return -2 * torch.rand(shape, generator=generator)

    mask = torch.rand(shape, generator=generator) > 0.2
    mask[..., 0] = True
    return Rollout(
        prompts=torch.zeros(runs, groups, dtype=torch.long),
        completions=torch.zeros(shape, dtype=torch.long),
        mask=mask, logp=draw(), ref=draw(), values=draw(), lead=1, scale=torch.ones(runs),
        rewards=torch.rand(runs, groups, count, generator=generator),
    )  # fmt: skip


def of_lengths(*lengths):
    """A rollout in which the completions of every prompt have these lengths."""
    batch = rollout(count=len(lengths))
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    return replace(batch, mask=mask.expand_as(batch.logp))


def labelled(method, batch):
    return batch.labelled(method.prepare(batch, method.hyper))


def test_the_registry_is_table_1():
    properties = {
        name: (m.on_policy, m.sample_reuse, m.negative_gradient) for name, m in METHODS.items()
    }
    assert properties == TABLE_1 | BEYOND


def test_names_are_the_keys_and_titles_are_distinct():
    assert len(_entries()) == len(METHODS)
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    assert {method.family for method in METHODS.values()} == {
        "supervised", "policy gradient", "contrastive"}  # fmt: skip


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_negative_gradient_is_what_the_loss_does(method):
    """Descent lowers some completion's log-probability if and only if the registry says so."""
    batch = labelled(method, rollout())
    # near the sampling policy, where neither clipping nor the threshold hides anything
    logp = (batch.logp + 0.01).requires_grad_()
    item, _ = method.loss(batch, logp, method.hyper)
    (gradient,) = torch.autograd.grad(item.sum(), logp)
    assert (gradient < 0).any()  # every method raises something
    assert (gradient > 0).any() == method.negative_gradient


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_needs_are_known_and_honest(method):
    """A method whose needs leave out the reference or the sampler's log-probs never reads them."""
    assert method.needs <= set(NEEDS)
    batch = labelled(method, rollout())
    logp = batch.logp + 0.3
    item, _ = method.loss(batch, logp, method.hyper)
    blind = replace(
        batch,
        ref=batch.ref if "reference" in method.needs else None,
        logp=batch.logp if "old" in method.needs else torch.full_like(batch.logp, torch.nan),
    )
    torch.testing.assert_close(method.loss(blind, logp, method.hyper)[0], item)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_masked_tokens_do_not_matter(method):
    batch = labelled(method, rollout())
    assert not batch.mask.all()
    logp = batch.logp + 0.3
    other = torch.where(batch.mask, logp, -50.0)
    item, _ = method.loss(batch, logp, method.hyper)
    torch.testing.assert_close(method.loss(batch, other, method.hyper)[0], item)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_runs_of_a_stack_are_apart(method):
    """Loss, items and metrics of a run are those that it has alone."""
    both = labelled(method, rollout())
    alone = labelled(method, rollout().narrow(0, 3))
    second = Rollout(**{
        k: v[1:] if isinstance(v, torch.Tensor) else v for k, v in vars(alone).items()
    } | {"labels": {}})  # fmt: skip
    second = labelled(method, second)
    item, metrics = method.loss(both, both.logp + 0.3, method.hyper)
    item1, metrics1 = method.loss(second, second.logp + 0.3, method.hyper)
    torch.testing.assert_close(item[1:], item1)
    torch.testing.assert_close(method.items(both)[1:], method.items(second))
    for name, value in metrics.items():
        assert value.shape == (2,)
        assert not value.requires_grad
        torch.testing.assert_close(value[1:], metrics1[name])


@pytest.mark.parametrize("name", ["dpo", "ipo", "dpo_offline", "ipo_offline"])
def test_first_loss_is_the_loss_at_the_reference(name):
    method = METHODS[name]
    batch = labelled(method, rollout())
    item, _ = method.loss(batch, batch.ref, method.hyper)
    loss = item.flatten(1).sum(-1) / method.items(batch)
    expected = {"dpo": log(2), "ipo": 1 / (4 * 0.05**2)}[name.partition("_")[0]]
    assert method.first_loss(method.hyper) == pytest.approx(expected)
    assert loss.tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_items_are_the_selected_the_pairs_or_the_completions():
    batch = rollout()
    rewards = torch.tensor([[[1.0, 2, 3, 3], [0, 0, 0, 0], [0, 1, 1, 1]], [[0.0] * 4] * 3])
    batch = replace(batch, rewards=rewards)
    items = {name: m.items(labelled(m, batch)).tolist() for name, m in METHODS.items()}
    assert items["best_of_n"] == items["best_of_n_negative"] == [3, 3]  # one for each prompt
    assert items["dpo"] == items["ipo"] == [5 + 0 + 3, 1]  # untied; never 0
    assert items["rwr"] == items["reinforce"] == items["ppo_sequence"] == [12, 12]
    assert items["pref_ft"] == [3 + 0 + 3, 1]  # all that beat another one
    assert items["ppo_token"] == batch.mask.flatten(1).sum(-1).tolist()
    two = METHODS["best_of_n"]
    two = batch.labelled(two.prepare(batch, two.resolve({"top_k": 2})))
    assert METHODS["best_of_n"].items(two).tolist() == [6, 6]


def test_items_of_minibatches_add_up():
    """The denominator is a sum: parts of a batch, weighed by their items, make the whole's mean."""
    for method in METHODS.values():
        whole = labelled(method, rollout())
        parts = [whole.narrow(i, 1) for i in range(3)]
        total, _ = method.loss(whole, whole.logp + 0.3, method.hyper)
        apart = [method.loss(p, p.logp + 0.3, method.hyper)[0].flatten(1).sum(-1) for p in parts]
        torch.testing.assert_close(sum(apart), total.flatten(1).sum(-1))
        torch.testing.assert_close(
            torch.stack([method.items(p) for p in parts]).sum(0), method.items(whole)
        )


def test_metrics_of_pairs_by_hand():
    method = METHODS["dpo"]
    batch = replace(
        rollout(1, 1, 3, 1), rewards=torch.tensor([[[3.0, 2.0, 2.0]]]),
        ref=torch.zeros(1, 1, 3, 1), mask=torch.ones(1, 1, 3, 1, dtype=torch.bool),
    )  # fmt: skip
    logp = torch.tensor([-2.0, -3.0, -1.0]).view(1, 1, 3, 1)  # margins 1 and -1 ... of two pairs
    _, metrics = method.loss(labelled(method, batch), logp, method.hyper)
    got = {name: value.item() for name, value in metrics.items()}
    assert got == {"pairs": 2.0, "pair_accuracy": 0.5, "pair_margin": 0.0}


def test_metrics_of_rwr_ppo_and_the_negative_gradient_by_hand():
    method, batch = METHODS["rwr"], rollout(1, 1, 4)
    weights = batch.labelled({"weight": torch.tensor([[[4.0, 0.0, 0.0, 0.0]]])})
    assert method.loss(weights, batch.logp, {})[1]["effective_samples"].item() == 1
    weights = batch.labelled({"weight": torch.ones(1, 1, 4)})
    assert method.loss(weights, batch.logp, {})[1]["effective_samples"].item() == 4
    weights = batch.labelled({"weight": torch.tensor([[[4e-30, 0.0, 4e-30, 0.0]]])})  # squares: 0
    assert method.loss(weights, batch.logp, {})[1]["effective_samples"].item() == 2
    method, shift = METHODS["ppo_sequence"], torch.tensor([0.5, -0.5, 0.1, -0.1])
    moved = batch.logp.clone()
    moved[..., 0] += shift
    metrics = method.loss(labelled(method, batch), moved, method.hyper)[1]
    assert metrics["clip_fraction"].item() == 0.5
    method = METHODS["best_of_n_negative"]
    far = labelled(method, batch)
    logp = far.logp.clone()
    logp[0, 0, 0, 0] -= 100 if not far.labels["selected"][0, 0, 0] else 0
    logp[0, 0, 3, 0] -= 100 if not far.labels["selected"][0, 0, 3] else 0
    pushed = method.loss(far, logp, {"beta": 1.0, "threshold": 0.01})[1]["pushed_share"].item()
    expected = (~far.labels["selected"][0, 0] & (sequence_logp(logp, far.mask)[0, 0] > -50)).sum()
    assert pushed == pytest.approx(expected.item() / 4)


def ppo_gradient(**overrides):
    method, batch = METHODS["ppo_sequence"], rollout()
    hyper = method.resolve(overrides)
    batch = batch.labelled(method.prepare(batch, hyper))
    logp = (batch.logp + 0.15 * torch.randn(batch.logp.shape)).requires_grad_()
    item, _ = method.loss(batch, logp, hyper)
    (gradient,) = torch.autograd.grad(item.sum(), logp)
    return batch, logp.detach(), item.detach(), gradient


def test_ppo_per_token_sums_over_tokens():
    torch.manual_seed(0)
    batch, logp, item, gradient = ppo_gradient(ratio_over="token", clip=0.1)
    ratio = (logp - batch.logp).exp()
    advantage = batch.labels["advantage"][..., None]
    expected = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
    torch.testing.assert_close(item, -(expected * batch.mask).sum(-1))
    assert (gradient[batch.mask] == 0).any()  # some tokens are clipped, others of theirs are not
    sequence = ppo_gradient(clip=0.1)[2]
    assert not torch.allclose(item, sequence)


def test_ppo_kl_penalty_adds_the_log_ratio_to_the_reference():
    torch.manual_seed(0)
    batch, logp, plain, _ = ppo_gradient()
    torch.manual_seed(0)
    penalised = ppo_gradient(kl_penalty=0.05)[2]
    log_ratio = ((logp - batch.ref) * batch.mask).sum(-1)
    torch.testing.assert_close(penalised - plain, 0.05 * log_ratio, atol=1e-6, rtol=1e-4)


def test_ppo_per_token_at_its_sampler_follows_the_whitened_advantage():
    method = METHODS["ppo_token"]
    batch = labelled(method, rollout())
    logp = batch.logp.clone().requires_grad_()
    item, metrics = method.loss(batch, logp, method.hyper)
    (gradient,) = torch.autograd.grad(item.sum(), logp)
    torch.testing.assert_close(gradient, -batch.labels["advantage"] * batch.mask)
    assert metrics["clip_fraction"].tolist() == [0.0, 0.0]


def test_a_larger_kl_coefficient_costs_tokens_that_left_the_reference():
    method, batch = METHODS["ppo_token"], rollout()
    low, high = (
        method.prepare(batch, {**method.hyper, "kl_coefficient": c})["returns"] for c in (0.0, 1.0)
    )
    ratio = (batch.logp - batch.ref) * batch.mask
    assert torch.corrcoef(torch.stack([(high - low).flatten(), ratio.flatten()]))[0, 1] < -0.3
    default = method.prepare(batch, method.hyper)["returns"]
    explicit = method.prepare(batch, {**method.hyper, "kl_coefficient": 0.2})["returns"]
    torch.testing.assert_close(default, explicit)


def test_returns_without_discount_are_what_is_still_to_come():
    """At gamma = lambda = 1: the standardised score, less what the KL costs from here on."""
    method, batch = METHODS["ppo_token"], of_lengths(5, 3, 1, 4)
    labels = method.prepare(batch, {**method.hyper, "lam": 1.0, "kl_coefficient": 0.3})
    rewards = batch.rewards
    score = (rewards - rewards.mean((1, 2), keepdim=True)) / rewards.std((1, 2), keepdim=True)
    cost = 0.3 * ((batch.logp - batch.ref) * batch.mask).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(labels["returns"], (score[..., None] - cost) * batch.mask)


@pytest.mark.parametrize(
    "name, overrides", [("ppo_token", {}), ("ppo_sequence", {"ratio_over": "token"})]
)
def test_tokens_that_are_clipped_on_either_side_are_counted(name, overrides):
    method = METHODS[name]
    hyper = method.resolve(overrides)
    batch = labelled(method, of_lengths(5, 3, 1, 4))
    for shift in (-1.0, 1.0):
        logp = batch.logp.clone()
        logp[..., 0] += shift  # every completion's first token, of 13 in a prompt
        share = method.loss(batch, logp, hyper)[1]["clip_fraction"]
        assert share.tolist() == pytest.approx([4 / 13] * 2)


def test_critic_is_the_clipped_error_of_the_returns():
    """By a clip of its own, here 0.3: from 1 below the returns, a step of 0.5 counts as one of 0.3,
    and where they are passed by more, the error as it is."""
    method = METHODS["ppo_token"]
    batch = rollout()
    batch = batch.labelled({"returns": batch.values + 1.0})
    hyper = {**method.hyper, "value_clip": 0.3}
    for step, error in ((0.0, 1.0), (0.2, 0.8), (0.5, 0.7), (2.0, 1.0), (-0.5, 1.5)):
        item = method.critic(batch, batch.values + step, hyper)
        torch.testing.assert_close(item, 0.1 * error**2 / 2 * batch.mask)


def test_completions_that_carry_no_loss_are_said_to_be_inactive():
    """Where `active` is False the loss has no gradient: a policy may leave those out."""
    rewards = torch.tensor([[[1.0, 2, 3, 3], [0, 0, 0, 0], [0, 1, 1, 1]]] * 2)
    for method in METHODS.values():
        batch = labelled(method, replace(rollout(), rewards=rewards))
        logp = (batch.logp + 0.01).requires_grad_()
        item, _ = method.loss(batch, logp, method.hyper)
        (gradient,) = torch.autograd.grad(item.sum(), logp)
        assert (gradient[~method.active(batch)] == 0).all(), method.name
    assert METHODS["best_of_n"].active(labelled(METHODS["best_of_n"], rollout())).sum() == 6
    tied = labelled(METHODS["dpo"], replace(rollout(), rewards=rewards))
    assert not METHODS["dpo"].active(tied)[:, 1].any()


def test_the_completions_that_carry_loss_are_counted_where_the_rewards_do_not_decide():
    counted = {name: m.carriers(m.hyper) for name, m in METHODS.items()}
    assert {k: v for k, v in counted.items() if v} == {"best_of_n": 1, "best_of_n_offline": 1}
    for k in (1, 3):
        method, hyper = METHODS["best_of_n"], METHODS["best_of_n"].resolve({"top_k": k})
        batch = rollout().labelled(method.prepare(rollout(), hyper))
        assert (method.active(batch).sum(-1) == method.carriers(hyper)).all()


def test_standardise_option_reaches_the_advantage():
    method, batch = METHODS["reinforce"], rollout()
    batchwise = method.prepare(batch, method.hyper)["advantage"]
    per_prompt = method.prepare(batch, method.resolve({"standardise": "prompt"}))["advantage"]
    assert batchwise.mean((1, 2)).abs().max() < 1e-6
    assert batchwise.mean(2).abs().max() > 0.1
    assert per_prompt.mean(2).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["reinforce", "ppo_sequence", "ppo_token", "rwr", "rwr_offline"])
def test_running_moments_reach_every_method_that_standardises(name):
    """Moments of many equal rewards of 0.2: a small spread, and nearly all rewards above the mean
    (but for whitening, which comes after)."""
    method, batch, moments = METHODS[name], rollout(), Moments()
    moments.add(torch.full((*batch.rewards.shape[:2], 10_000), 0.2))
    moments.add(batch.rewards)
    hyper = {**method.resolve({"standardise": "running"}), "moments": moments}
    ready = replace(batch, rewards=standardise(batch.rewards, "running", moments))
    expected = method.prepare(ready, method.resolve({"standardise": "none"}))
    got, usual = method.prepare(batch, hyper), method.prepare(batch, method.hyper)
    for label in got:
        torch.testing.assert_close(got[label], expected[label])
    assert any(not torch.allclose(got[label], usual[label]) for label in got)


@pytest.mark.parametrize("name", ["dpo", "ipo", "dpo_offline", "ipo_offline"])
def test_pairs_of_tokens_are_a_switch_of_the_loss_alone(name):
    method, batch = METHODS[name], rollout()
    hyper = method.resolve({"margin_over": "token"})
    batch = batch.labelled(method.prepare(batch, hyper))
    logp = batch.logp + torch.linspace(-1, 1, batch.logp.numel()).view_as(batch.logp)
    by_token, metrics = method.loss(batch, logp, hyper)
    whole, same = method.loss(batch, logp, method.hyper)
    form = {"d": losses.dpo_token, "i": losses.ipo_token}[name[0]]
    weight = hyper.get("beta", hyper.get("tau"))
    expected = form(logp, batch.ref, batch.mask, batch.labels["prefer"], weight)
    assert torch.equal(by_token, expected) and not torch.allclose(by_token, whole)
    assert all(torch.equal(metrics[k], same[k]) for k in same)


def test_resolve_overrides_the_defaults_and_leaves_them_alone():
    method = METHODS["rwr"]
    assert method.resolve({}) == method.hyper
    assert method.resolve({"temperature": 0.5})["temperature"] == 0.5
    assert method.hyper["temperature"] == 0.1


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dpo", {"tau": 0.1}, r"dpo has no hyperparameter \['tau'\]; it has \['beta', 'gap', "
         r"'margin_over'\]"),
        ("best_of_n_negative", {"top_k": 2}, "no hyperparameter .*top_k"),
        ("rwr", {"standardise": "run"}, r"standardise must be one of \('batch', 'prompt', 'run"),
        ("dpo", {"margin_over": "word"}, "margin_over must be .*'completion', 'token'"),
        ("rwr", {"weights": "huge"}, "weights must be one of .*'huge'"),
        ("ppo_sequence", {"ratio_over": "word"}, "ratio_over must be .*'completion', 'token'"),
        ("ipo", {"tau": 0.0}, "tau must be between .* got 0.0"),
        ("ipo", {"tau": float("nan")}, "tau must be between .* got nan"),
        ("rwr", {"temperature": -1.0}, "temperature must be between .* got -1.0"),
        ("ppo_sequence", {"clip": 0.0}, "clip must be between"),
        ("best_of_n_negative", {"threshold": 1.5}, "threshold must be between 0.0 and 1.0"),
        ("best_of_n", {"top_k": 0}, "top_k must be between 1"),
        ("dpo", {"gap": -0.1}, "gap must be between 0.0"),
    ],
)
def test_resolve_refuses_what_a_method_cannot_take(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name].resolve(overrides)


def test_an_unknown_method_is_told_the_known_ones():
    with pytest.raises(ValueError, match="unknown method 'ppo'") as error:
        get("ppo")
    assert all(name in str(error.value) for name in METHODS)
    assert get("dpo") is METHODS["dpo"]


def test_adding_a_method_touches_only_the_registry(monkeypatch):
    """A method of one's own (a hinge on all pairs) trains through Algorithm 1 as it stands."""

    def hinge(batch, logp, hyper):
        new, ref = sequence_logp(logp, batch.mask), sequence_logp(batch.ref, batch.mask)
        ratio = hyper["beta"] * (new - ref)
        margin = ratio[..., :, None] - ratio[..., None, :]
        return torch.relu(1 - margin) * batch.labels["prefer"], {}

    slic = Method(
        "slic", "SLiC", "contrastive", on_policy=True, sample_reuse=True, negative_gradient=True,
        needs=frozenset({"pairs", "reference"}), unit="pair", prepare=METHODS["dpo"].prepare,
        loss=hinge, paper="Zhao et al. 2023", hyper={"beta": 1.0, "gap": 0.0},
        first_loss=lambda hyper: 1.0,
    )  # fmt: skip
    monkeypatch.setitem(METHODS, "slic", slic)
    policy = TabularPolicy(rate=1.0)
    problem = TabularProblem(groups=4)
    state = State(policy, policy.frozen())
    before = policy.expected(problem.values)
    schedule = Schedule(iterations=20, batch=16, minibatch=16, completions=4)
    rows = list(fine_tune(state, problem, get("slic"), schedule, slic.resolve({})))
    assert rows[0]["loss"].tolist() == pytest.approx([1.0, 1.0])
    assert (policy.expected(problem.values) > before + 0.1).all()
