"""A length run: configuration, what it draws, what it reports, how it resumes."""

from __future__ import annotations

import json
import random
import shutil
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import runs
from lib.finetune import Schedule, fine_tune
from lib.lm import problem as problem_module
from lib.lm.batches import padded, unpadded
from lib.lm.config import LengthRun, length_run
from lib.lm.engine import LengthEngine
from lib.lm.models import ids, load_policy, load_tokenizer
from lib.lm.network import Network
from lib.lm.policy import Scorer
from lib.lm.problem import LengthProblem, task_data
from lib.lm.reward import RewardModel
from lib.methods import METHODS
from lib.runs import identity
from lib.training import Training
from lib.untracked import Untracked
from tests.bandit.helpers import Checkpoint
from tests.lm_folder import prepared_folder
from tests.runs.fake import exit_code, killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared_folder(tmp_path_factory.mktemp("prepared"))


def small(folder, method="reinforce", task="min", seed=0, **options):
    options = {"updates": 4, "minibatch": 8, "batch": 8, "max_tokens": 12, "prompts": 6,
               "evaluations": 2, **options}  # fmt: skip
    return length_run(method, task, 1e-2, seed, prepared=str(folder), **options)


# Configuration


def test_a_run_by_default_takes_100_updates_of_64_completions():
    for name, method in METHODS.items():
        run = length_run(name, "min", 1e-3, 0)
        schedule = run.schedule
        assert (run.updates, schedule.minibatch) == (100, 64), name
        drawn = schedule.iterations * schedule.batch
        assert drawn == 6400 and (schedule.iterations == 1) is not method.on_policy


@pytest.mark.parametrize(("batch", "inner", "iterations"), [(64, 1, 96), (128, 1, 48), (64, 4, 24)])
def test_dials_b_and_t_keep_the_updates(batch, inner, iterations):
    run = length_run("ppo_token", "min", 1e-3, 0, updates=96, batch=batch, inner_steps=inner)
    assert (run.updates, run.iterations) == (96, iterations)
    assert run.schedule == Schedule(iterations, batch, 64, 1, inner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "max"}, "task must be one of .*'max'"),
        ({"method": "dpo_online"}, "unknown method 'dpo_online'"),
        ({"label": "human"}, r"label must be one of \('learned', 'rule'\), got 'human'"),
        ({"dtype": "float64"}, "dtype must be one of .*'float64'"),
        ({"decoder": "fast"}, "decoder must be one of .*'fast'"),
        ({"learning_rate": -1.0}, "learning_rate must be between"),
        ({"max_tokens": 0}, "max_tokens must be between 1"),
        ({"method": "dpo", "completions": 1}, "dpo learns from pairs: completions must be at leas"),
        ({"method": "dpo_offline", "completions": 2, "iterations": 3}, "dpo_offline is offline"),
        ({"method": "pref_ft", "completions": 4, "iterations": 1}, "completions must be 2, got 4"),
        ({"tau": 0.1}, r"reinforce has no hyperparameter \['tau'\]"),
        ({"standardise": "prompt"}, r"completions must be at least 2 \(or standardise='batch'\)"),
        ({"batch": 1, "minibatch": 1}, "one reward has no .*: batch must be at least 2"),
        ({"batch": 1, "minibatch": 1, "standardise": "running"}, "batch must be at least 2"),
        ({"batch": 100}, "batch in minibatches: 100 is not a multiple of 64"),
    ],
)
def test_what_a_run_refuses(options, message):
    fields = {"method": "reinforce", "task": "min", "learning_rate": 1e-3, "seed": 0, **options}
    with pytest.raises(ValueError, match=message):
        LengthRun(**fields)


def test_an_option_that_is_no_field_is_named():
    with pytest.raises(ValueError, match=r"unknown option \['lora'\]; choose from .*'lora_rank'"):
        length_run("dpo", "min", 1e-3, 0, lora=4)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .safetensors in .*prepare it with"):
        LengthRun("dpo", "min", 1e-3, 0, completions=2, prepared=str(tmp_path)).data_files()


@pytest.mark.parametrize("file", ["pairs.parquet", "policy/model.safetensors",
    "policy/generation_config.json", "policy/tokenizer_config.json", "reward-min/config.json",
])  # fmt: skip
def test_identity_follows_the_content_of_what_a_run_reads(file, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = identity(small(copy))
    with open(copy / file, "ab") as stream:
        stream.write(b" ")
    assert identity(small(copy)) != before


# Data


def test_a_minibatch_draws_the_same_whatever_b_is(folder):
    one = LengthProblem(small(folder, batch=8))
    two = LengthProblem(small(folder, batch=16))
    first, state = one.initial_state(), two.initial_state()
    first.behaviour, state.behaviour = first.policy, state.policy
    for i in range(4):
        first.iteration, state.iteration = i, i // 2
        part = one.collect(first, one.method)
        same = two.collect(state, two.method).narrow(8 * (i % 2), 8)
        assert torch.equal(same.completions, part.completions)
        torch.testing.assert_close(same.rewards, part.rewards, atol=1e-5, rtol=1e-5)
        for a, b in zip(range(8), range(8), strict=True):
            assert (same.prompts[a][same.prompt_mask[a]].tolist()
                    == part.prompts[b][part.prompt_mask[b]].tolist())  # fmt: skip


def test_every_stream_of_random_numbers_follows_the_seed(folder, monkeypatch):
    same, first, other = (LengthProblem(small(folder, seed=seed)) for seed in (0, 0, 1))
    policy = first.initial_state().policy
    drawn = [problem._draw(policy, 0).completions for problem in (same, first)]
    assert torch.equal(*drawn)
    assert first._order("train", 0, 8) != other._order("train", 0, 8)
    state = first.initial_state()
    assert first.evaluate(state)["entropy"] != other.evaluate(state)["entropy"]
    monkeypatch.setattr(other, "_order", first._order)
    assert not torch.equal(drawn[0], other._draw(policy, 0).completions)
    given = [LengthProblem(small(folder, "dpo_offline", seed=seed)) for seed in (0, 1)]
    one, two = (p.collect(p.initial_state(), p.method).prompts for p in given)
    assert one.shape != two.shape or not torch.equal(one, two)


def test_a_label_is_that_of_the_responses_beside_it(folder):
    problem = LengthProblem(small(folder, "dpo_offline", "skew"))
    batch = problem.collect(problem.initial_state(), problem.method)
    gold = problem.gold(batch)
    assert torch.equal(batch.rewards, (gold > gold.flip(-1)).float()) and batch.rewards.sum() > 2


def test_every_prompt_is_used_once_before_any_is_used_again(folder):
    problem = LengthProblem(small(folder))
    size = len(problem.data.prompts["train"])
    walk = problem._order("train", 0, 2 * size)
    assert sorted(walk[:size]) == sorted(walk[size:]) == list(range(size))
    assert walk[:size] != walk[size:]
    assert problem._order("train", size - 3, 6) == walk[size - 3 : size + 3]


def test_offline_methods_of_one_seed_see_the_same_pairs(folder):
    seen = {}
    for name in ("dpo_offline", "ipo_offline", "pref_ft", "rwr_offline"):
        problem = LengthProblem(small(folder, name))
        seen[name] = problem.collect(problem.initial_state(), problem.method)
    first = seen["dpo_offline"]
    for name, batch in seen.items():
        assert torch.equal(batch.completions, first.completions), name
    assert set(first.rewards.flatten().tolist()) <= {0.0, 1.0}
    assert not torch.equal(seen["rwr_offline"].rewards, first.rewards)  # the model's scores


def test_skew_data_are_shorter_and_min_data_are_not(folder):
    plain, short = (
        task_data(folder / "policy", folder / "pairs.parquet", task) for task in ("min", "skew")
    )
    assert short.pairs["train"].lengths.mean() < 0.6 * plain.pairs["train"].lengths.mean()
    assert short.target == plain.target


def test_the_rule_label_trains_on_the_gold_reward(folder):
    problem = LengthProblem(small(folder, label="rule"))
    state = problem.initial_state()
    state.behaviour = state.policy
    batch = problem.collect(state, problem.method)
    assert torch.equal(batch.rewards, -problem.lengths(batch).float())


def test_special_tokens_are_read_without_the_weights(folder, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("weights are read")

    expected = ids(load_tokenizer(folder / "policy")[0], load_policy(folder / "policy")[0])
    monkeypatch.setattr(problem_module, "load_policy", loaded)
    task_data.cache_clear()
    assert task_data(folder / "policy", folder / "pairs.parquet", "min").ids == expected


def test_the_decoder_knows_the_longest_prompt(folder):
    policy = LengthProblem(small(folder)).initial_state().policy
    pairs = pd.read_parquet(folder / "pairs.parquet")
    assert policy.longest == pairs["prompt"].map(len).max()


# Evaluation


@pytest.fixture
def moved(folder):
    """A problem, and a state whose policy has left the reference."""
    problem = LengthProblem(small(folder, "dpo_offline"))
    state = problem.initial_state()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in state.policy.parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return problem, state


def by_hand(scorer, prompt, completion):
    """(L, V) log-probabilities of every token along a completion, by transformers alone."""
    with torch.no_grad():
        logits = scorer.network.model(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_kl_and_entropy_by_hand_on_the_first_validation_prompts(moved, monkeypatch):
    """Along completions of their own random numbers, which no training batch has."""
    problem, state = moved
    batches, drawn, sampled = [], [], problem._sampled

    def spy(policy, prompts, prompt_mask, numbers, count):
        drawn.append(set(numbers.flatten().tolist()))
        batches.append(sampled(policy, prompts, prompt_mask, numbers, count))
        return batches[-1]

    monkeypatch.setattr(problem, "_sampled", spy)
    found = problem.evaluate(state)
    (batch,) = batches
    prompts = unpadded(batch.prompts, batch.prompt_mask)
    assert prompts == problem.data.prompts["validation"][:6]
    completions = unpadded(batch.completions[:, 0], batch.mask[:, 0])
    kl = entropy = 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        p, q = (by_hand(s, prompt, completion) for s in (state.policy, problem.reference))
        kl += (p.exp() * (p - q)).sum().item() / 6
        entropy -= (p.exp() * p).sum().item() / 6
    assert found["kl_ref"].item() == pytest.approx(kl, rel=1e-4) and kl > 0.01
    assert found["entropy"].item() == pytest.approx(entropy, rel=1e-4)
    long = [len(c) - (c[-1] == 256) for c in completions]
    assert found["reward"] == -found["length"] != found["proxy"]
    assert found["length"].item() == pytest.approx(np.mean(long))
    assert found["length_sd"].item() == pytest.approx(np.std(long, ddof=1))
    assert found["ended"].item() == pytest.approx(np.mean([c[-1] == 256 for c in completions]))
    problem._draw(state.policy, 0)
    evaluated, trained = drawn
    assert not evaluated & trained


def test_a_response_ends_in_any_of_the_eos_ids_that_is_its_own(moved, monkeypatch):
    """The second of two EOS ids is also what padding is filled with."""
    problem, state = moved
    problem.reference.eos = torch.tensor([256, 7])
    ids, mask = padded([[5, 256], [5, 7], [7], [5, 6], [6, 6, 6], [1, 2, 3, 4]], 7)
    sampled = problem._sampled
    monkeypatch.setattr(problem, "_sampled", lambda *given: replace(
        sampled(*given), completions=ids[:, None], mask=mask[:, None]))  # fmt: skip
    found = problem.evaluate(state)
    assert found["ended"].item() == 3 / 6
    assert found["length"].item() == pytest.approx((1 + 1 + 0 + 2 + 3 + 4) / 6)


def test_held_out_log_ratios_by_hand(moved):
    problem, state = moved
    pairs, chosen, rejected = problem.held_out, [], []
    for i in range(pairs.groups):
        prompt = pairs.prompts[i][pairs.prompt_mask[i]].tolist()
        for j in range(2):
            tokens = pairs.completions[i, j][pairs.mask[i, j]]
            p, q = (by_hand(s, prompt, tokens.tolist()).gather(1, tokens[:, None]).sum().item()
                    for s in (state.policy, problem.reference))  # fmt: skip
            (chosen if pairs.rewards[i, j] else rejected).append(p - q)
    found = problem._pair_metrics(state.policy)
    assert found["chosen_logratio"].item() == pytest.approx(np.mean(chosen), abs=1e-3)
    assert found["rejected_logratio"].item() == pytest.approx(np.mean(rejected), abs=1e-3)
    right = np.mean(np.greater(chosen, rejected))
    assert found["held_out_accuracy"].item() == pytest.approx(right)
    assert abs(np.mean(chosen) - np.mean(rejected)) > 0.01


# Training


def test_bfloat16_is_refused_before_anything_is_loaded_on_a_gpu_without_it(folder, monkeypatch):
    class Loaded(Exception):
        pass

    def load(*_):
        raise Loaded

    engine = LengthEngine("cuda")
    monkeypatch.setattr(engine, "problem", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(RuntimeError, match="no bfloat16: -y 'options: {dtype: float16}'"):
        engine.run([small(folder, dtype="bfloat16")], Untracked())
    with pytest.raises(Loaded):
        engine.run([small(folder, dtype="float16")], Untracked())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(Loaded):
        engine.run([small(folder, dtype="bfloat16")], Untracked())


def test_what_is_frozen_is_held_in_the_dtype_of_its_products(folder):
    """The reference's numbers do not change; the reward model's change a little."""
    half = LengthProblem(small(folder, dtype="bfloat16"))
    names = {n: p.dtype for n, p in half.reference.network.named_parameters()}
    assert names["model.gpt_neox.layers.0.mlp.dense_4h_to_h.weight"] == torch.bfloat16
    assert names["model.gpt_neox.embed_in.weight"] == torch.float32
    assert half.reward.model.score.weight.dtype == torch.float32
    whole = load_policy(folder / "policy")[0]
    batch, exact = half.held_out, LengthProblem(small(folder))
    scorer = Scorer(Network(whole, dtype="bfloat16"), half.data.ids.eos, half.data.ids.pad)
    assert torch.equal(half.reference.score(batch), scorer.score(batch))
    expected = exact.reward.score(batch)
    assert 0 < (half.reward.score(batch) - expected).abs().max() < 0.02 * expected.abs().max()
    assert {p.dtype for p in exact.reward.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("task", ["min", "skew"])
def test_every_method_trains_and_reports(folder, name, task):
    (table,) = LengthEngine().run([small(folder, name, task)], Untracked())
    assert table["update"].tolist() == [0, 2, 4]
    first, last = table.iloc[0], table.iloc[-1]
    assert first["kl_ref"] < 1e-5 and first["chosen_logratio"] == pytest.approx(0, abs=1e-4)
    assert last["kl_ref"] > 1e-5
    assert not table["diverged"].any() and last["samples"] == 32
    assert (table[["length", "entropy"]] >= 0).all(axis=None)


def test_held_out_pairs_change_what_is_looked_at_and_not_the_run(folder):
    few = small(folder, "dpo_offline", "skew", held_out=3)
    many = small(folder, "dpo_offline", "skew")
    assert [len(LengthProblem(r).held_out.rewards) for r in (few, many)] == [3, 8]
    (one,), (other,) = (LengthEngine().run([r], Untracked()) for r in (few, many))
    own = ["chosen_logratio", "rejected_logratio", "held_out_accuracy", "held_out"]
    shared = [c for c in without_seconds(other) if c not in own]
    pd.testing.assert_frame_equal(one[shared], other[shared])
    assert one["chosen_logratio"].iloc[-1] != other["chosen_logratio"].iloc[-1]


def test_long_enough_training_against_the_rule_shortens_the_completions(folder):
    run = small(folder, "reinforce", label="rule", updates=40, minibatch=16, batch=16)
    (table,) = LengthEngine().run([run], Untracked())
    assert table["length"].iloc[-1] < table["length"].iloc[0] - 2


def test_completions_that_a_policy_has_no_positions_for_are_refused_before_any_run(folder):
    """Whether the first of several runs or the last has them; a run alone is refused as well."""
    fits, long = small(folder, "dpo"), small(folder, "dpo", max_tokens=5000)
    for several in ([fits, long], [long, fits]):
        with pytest.raises(ValueError, match=r"max_tokens must be at most \d+: the policy takes"):
            LengthEngine().check(several)
    LengthEngine().check([fits])
    with pytest.raises(ValueError, match="max_tokens must be at most"):
        LengthEngine().run([long], Untracked())


def test_a_reward_model_has_positions_for_what_it_scores(folder, tmp_path):
    short = shutil.copytree(folder, tmp_path / "short")
    config = json.loads((short / "reward-min/config.json").read_text())
    longest = max(len(p) for of in task_data(
        short / "policy", short / "pairs.parquet", "min").prompts.values() for p in of)
    config["max_position_embeddings"] = longest + 3
    (short / "reward-min/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="max_tokens must be at most 3: the reward model takes"):
        LengthEngine().check([small(folder, "dpo"), small(short, "dpo")])
    LengthEngine().check([small(short, "dpo", label="rule")])


def test_the_second_run_on_fixed_pairs_does_not_score_them_again(folder, monkeypatch):
    score, scored = Scorer.score, []
    monkeypatch.setattr(Scorer, "score",
                        lambda x, batch: scored.append(len(batch.mask)) or score(x, batch))
    problem_module.reference_scores.cache_clear()
    for _ in range(2):
        LengthEngine().run([small(folder, "dpo_offline")], Untracked())
    whole = len(task_data(folder / "policy", folder / "pairs.parquet", "min").pairs["train"])
    first, second = scored[: len(scored) // 2 + 1], scored[len(scored) // 2 + 1 :]
    assert whole in first and sorted([*second, whole]) == sorted(first)


def test_scores_that_are_not_finite_end_a_run(folder, monkeypatch):
    """The best of four would be the one without a number; a pair would be tied."""
    score = RewardModel.score
    monkeypatch.setattr(RewardModel, "score", lambda self, batch: score(self, batch).log())
    for method in ("best_of_n", "dpo"):
        with pytest.raises(FloatingPointError, match=r"of \d+ scores of the reward model are not"):
            LengthEngine().run([small(folder, method, updates=1)], Untracked())


def without_seconds(table):
    return table[[c for c in table if not c.startswith("seconds_")]]


@pytest.mark.parametrize(("name", "options"), [
    ("ppo_token", {}), ("dpo", {"batch": 16}), ("rwr", {"inner_steps": 2}), ("dpo_offline", {}),
    ("reinforce", {"standardise": "running"}),
])  # fmt: skip
@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_killed_run_ends_with_the_same_numbers(folder, name, options, kill_at):
    run = small(folder, name, **options)
    (expected,) = LengthEngine().run([run], Untracked())
    checkpoint = _KillWhenSaved(kill_at)
    with pytest.raises(Checkpoint.Killed):
        LengthEngine().run([run], checkpoint)
    checkpoint.kill_at = None
    (table,) = LengthEngine().run([run], checkpoint)
    pd.testing.assert_frame_equal(without_seconds(table), without_seconds(expected))


@pytest.mark.parametrize("name", ["ppo_token", "dpo", "dpo_offline"])
def test_killed_at_random_points_a_run_ends_with_the_same_numbers(
    folder, tmp_path, processes, name
):
    """By SIGKILL, after 1 to 3 updates and at any point of the next one or two."""
    config, store = small(folder, name, updates=8, batch=8), runs.Store(tmp_path)
    generator, ends = random.Random(name), []
    while 0 not in ends and len(ends) < 30:
        when = generator.randint(1, 3), generator.uniform(0.0, 0.1)
        worker = processes.Process(
            target=killed, args=([config], store.root, LengthEngine(), *when)
        )
        worker.start()
        ends.append(exit_code(worker))
    assert set(ends) == {0, -signal.SIGKILL}
    table, provenance = store.read(identity(config))
    assert provenance["block"]["resumed"] > 0
    (expected,) = LengthEngine().run([config], Untracked())
    pd.testing.assert_frame_equal(without_seconds(table), without_seconds(expected))


class _KillWhenSaved(Checkpoint):
    """Due from the n-th update on, until the problem is at a place where it can be resumed."""

    def due(self):
        self.seen += 1
        return self.kill_at is not None and self.seen >= self.kill_at


def test_the_clock_of_a_resumed_run_goes_on(folder):
    run, checkpoint = small(folder), _KillWhenSaved(2)
    with pytest.raises(Checkpoint.Killed):
        LengthEngine().run([run], checkpoint)
    tensors, meta = checkpoint.load()
    again = Training(LengthProblem(run), run.schedule, run.hyper, run.points)
    again.restore(tensors, meta)
    assert meta["seconds"]["training"] > 0 and again.clock.seconds == meta["seconds"]


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])  # with LoRA a run scores for itself
def test_a_resumed_run_pays_for_its_data_once(folder, options):
    problem = LengthProblem(small(folder, "dpo_offline", **options))
    state = problem.initial_state()
    problem.collect(state, problem.method)
    paid = dict(problem.clock.seconds)
    assert paid["scoring"] > 0
    state.step = 1
    problem.collect(state, problem.method)
    assert problem.clock.seconds == paid


def test_by_default_a_sampling_is_one_minibatch():
    assert length_run("rwr", "min", 1e-3, 0, updates=4, minibatch=16).batch == 16


def test_a_policy_that_is_not_the_one_sampled_from_stops_the_run(folder, monkeypatch):
    problem = LengthProblem(small(folder))
    collect = problem.collect

    def off(state, method):
        batch = collect(state, method)
        return replace(batch, logp=batch.logp + 0.01 * batch.mask)

    monkeypatch.setattr(problem, "collect", off)
    run, state = problem.config, problem.initial_state()
    with pytest.raises(AssertionError, match="identity 'recomputed' is off by 0.01"):
        next(fine_tune(state, problem, problem.method, run.schedule, run.hyper))


def test_evaluated_updates_are_even():
    def points(updates, evaluations):
        run = length_run("dpo", "min", 1e-3, 0, updates=updates, evaluations=evaluations)
        return run.points

    assert points(100, 4) == [0, 25, 50, 75, 100]
    assert points(3, 20) == [0, 1, 2, 3]
