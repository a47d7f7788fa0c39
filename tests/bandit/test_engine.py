"""Blocks of runs: the same numbers whatever stands beside a run, and after a kill."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib import training
from lib.bandit import engine as module
from lib.bandit.config import bandit_run
from lib.bandit.engine import BLOCK, BanditEngine, stack
from lib.training import evaluated_updates
from tests.bandit.helpers import Checkpoint, small, tables

NEIGHBOURS = [
    small("ipo", seed=5, rate=0.1, reward="R2"),
    small("ipo", seed=6, rate=1e-4),
    small("ipo", seed=7, rate=0.3),
]


@pytest.fixture
def quick(monkeypatch):
    """Blocks of 3, for what does not depend on their size; no rows but the evenly spaced."""
    monkeypatch.setattr(module, "BLOCK", 3)
    monkeypatch.setattr(training, "EARLY", ())


def assert_same(a, b):
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_tables_have_a_row_for_each_evaluated_update(quick):
    run = bandit_run("ipo", "R1", 0.003, 2, prompts=3, completions=4, iterations=6, evaluations=3)
    (table,) = BanditEngine().run([run], Checkpoint())
    assert table["update"].tolist() == [0, 2, 4, 6]
    assert table["samples"].tolist() == [0, 24, 48, 72]
    assert not table["diverged"].any()
    metrics = table.drop(columns=["update", "samples", "diverged"])
    assert set(metrics.dtypes.astype(str)) == {"float32"}
    seconds = table[[c for c in table if c.startswith("seconds")]]
    assert (seconds.diff().iloc[1:] >= 0).all(axis=None)
    assert (seconds.iloc[-1] > 0).all()


def test_training_metrics_are_means_since_the_last_row(quick):
    run = small("ipo", iterations=6, evaluations=2)
    each, few = tables(small("ipo", iterations=6, evaluations=6))[0], tables(run)[0]
    for name in ("loss", "grad_norm", "pair_accuracy"):
        assert few[name][1] == pytest.approx(each[name][1:4].mean(), rel=1e-5)
        assert few[name][2] == pytest.approx(each[name][4:7].mean(), rel=1e-5)
    for name in ("reward", "kl_ref", "chosen_logratio"):
        assert few[name].tolist() == each[name][[0, 3, 6]].tolist()


def test_a_run_is_bit_equal_alone_and_anywhere_among_others():
    run, others = small("ipo", seed=1), NEIGHBOURS
    (alone,) = tables(run)
    assert_same(tables(others[0], run, others[1])[1], alone)
    full = [*others, *others, *others, run]
    assert len(full) == BLOCK
    assert_same(tables(*full)[9], alone)
    assert alone["kl_ref"].iloc[-1] > 0.01  # it did train


def test_a_run_of_the_books_size_is_bit_equal_anywhere():
    make = lambda seed, rate: bandit_run(  # noqa: E731
        "best_of_n", "R1", rate, seed, iterations=2, evaluations=1
    )
    (alone,) = tables(make(0, 0.003))
    assert_same(tables(make(1, 0.3), make(0, 0.003), make(2, 0.01))[1], alone)


INTERRUPTED = [
    small("ipo", seed=seed, rate=rate, sets=2, inner_steps=2, iterations=2, evaluations=3)
    for seed, rate in ((0, 0.01), (1, 0.003))
]


@pytest.fixture(scope="module")
def uninterrupted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 3)
        patch.setattr(training, "EARLY", ())
        return tables(*INTERRUPTED)


@pytest.mark.parametrize("kill_at", [1, 3, 4, 5, 6, 8])
def test_a_killed_run_resumes_with_the_same_numbers(kill_at, quick, uninterrupted):
    """2 sets and 2 passes: 4 updates an iteration, so that most kills are in its middle."""
    checkpoint = Checkpoint(kill_at)
    with pytest.raises(Checkpoint.Killed):
        tables(*INTERRUPTED, checkpoint=checkpoint)
    resumed = tables(*INTERRUPTED, checkpoint=checkpoint)
    for again, whole in zip(resumed, uninterrupted, strict=True):
        assert_same(again, whole)


def test_a_killed_offline_run_resumes_with_the_same_numbers(quick):
    run = small("dpo_offline", inner_steps=6)
    checkpoint = Checkpoint(4)
    with pytest.raises(Checkpoint.Killed):
        tables(run, checkpoint=checkpoint)
    assert_same(tables(run, checkpoint=checkpoint)[0], tables(run)[0])


DROPPED = small("ipo", seed=1, rate=0.01, sets=2, inner_steps=2, iterations=2, dropout=0.1)


def test_a_run_with_dropout_is_bit_equal_alone_and_among_others(quick):
    torch.manual_seed(0)
    (alone,) = tables(DROPPED)
    torch.manual_seed(1)
    others = [replace(DROPPED, seed=seed, learning_rate=0.1) for seed in (2, 3)]
    assert_same(tables(others[0], DROPPED, others[1])[1], alone)
    (plain,) = tables(replace(DROPPED, dropout=0.0))
    assert plain["reward"][0] == alone["reward"][0]
    assert plain["loss"].iloc[-1] != pytest.approx(alone["loss"].iloc[-1], rel=1e-3)


def test_a_run_with_dropout_has_the_same_masks_in_blocks_of_any_size(monkeypatch):
    """Products of another stack may round otherwise; other masks would differ in every digit."""
    monkeypatch.setattr(training, "EARLY", ())
    run, made = small("best_of_n", seed=1, dropout=0.1), []
    for size in (1, 2, 5):
        monkeypatch.setattr(module, "BLOCK", size)
        made += tables(run)
    for other in made[1:]:
        pd.testing.assert_frame_equal(other, made[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kill_at", [1, 3, 4, 6])
@pytest.mark.parametrize(
    "run",
    [DROPPED, small("ipo_offline", inner_steps=8, dropout=0.1, reference_dropout=0.1),
     small("reinforce", iterations=3, inner_steps=2, standardise="running")],
)  # fmt: skip
def test_a_killed_run_with_a_memory_of_its_own_resumes_with_the_same_numbers(run, kill_at, quick):
    checkpoint = Checkpoint(kill_at)
    with pytest.raises(Checkpoint.Killed):
        tables(run, checkpoint=checkpoint)
    torch.rand(1)  # what else the process draws does not matter
    assert_same(tables(run, checkpoint=checkpoint)[0], tables(run)[0])


def test_a_resumed_state_is_on_the_problems_device(quick):
    """Checkpoints hold tensors of the CPU; "meta" stands in for a GPU, and cannot be mixed."""
    run = small("ipo", sets=2, inner_steps=2, iterations=2, evaluations=3)
    checkpoint = Checkpoint(4)  # between two rows: metrics are summed up
    with pytest.raises(Checkpoint.Killed):
        tables(run, checkpoint=checkpoint)
    training = stack([run])
    training.problem.device = "meta"
    training.state.policy.alive = training.state.policy.alive.to("meta")
    training.restore(*checkpoint.load())
    sums = {name: value for name, value in training.sums.items() if name != "updates"}
    parameters = training.state.behaviour.parameters
    assert sums and parameters
    assert {x.device.type for x in (*sums.values(), *parameters.values())} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_killed_run_resumes_on_a_gpu(quick):
    engine, checkpoint = BanditEngine("cuda"), Checkpoint(4)
    with pytest.raises(Checkpoint.Killed):
        engine.run(INTERRUPTED, checkpoint)
    for table in engine.run(INTERRUPTED, checkpoint):
        assert table["reward"].notna().all() and not table["diverged"].any()


class Breaks(Checkpoint):
    """Poisons some runs of a stack after an update, as an overflow would."""

    def __init__(self, after, rows):
        super().__init__()
        self.after, self.rows, self.stack = after, rows, None

    def due(self):
        self.seen += 1
        if self.seen == self.after:
            self.stack.state.policy.flat[self.rows] = torch.nan
        return False


def broken(runs, after, rows):
    checkpoint = Breaks(after, rows)
    checkpoint.stack = stack(runs)
    checkpoint.stack.train(checkpoint)
    return [t.drop(columns=[c for c in t if c.startswith("seconds")])
            for t in checkpoint.stack.tables()]  # fmt: skip


def test_a_diverged_run_is_marked_and_its_neighbours_are_bit_equal_to_without_it(quick):
    runs = [small("ipo", seed=s, iterations=6, evaluations=3) for s in (0, 1, 2)]
    first, second, third = broken(runs, after=3, rows=[1])
    assert second["diverged"].tolist() == [False, False, True, True]
    assert second["reward"].iloc[2:].isna().all() and second["reward"].iloc[:2].notna().all()
    assert not first["diverged"].any() and not third["diverged"].any()
    assert_same(first, tables(runs[0])[0])
    assert_same(third, tables(runs[2])[0])


def test_an_overflowing_weight_freezes_the_run_before_that_step(quick):
    """An infinite weight of one run: it stops as it was, with finite parameters."""
    runs = [small("rwr", seed=s, iterations=6, evaluations=6) for s in (0, 1)]
    block = stack(runs)
    prepare = block.problem.method.prepare

    def overflowing(rollout, hyper):
        labels = prepare(rollout, hyper)
        if block.state.updates == 3:
            labels["weight"] = labels["weight"].clone()
            labels["weight"][0] = torch.inf
        return labels

    block.problem.method = replace(block.problem.method, prepare=overflowing)
    block.train(Checkpoint())
    first, second = block.tables()
    assert first["diverged"].tolist() == [False] * 4 + [True] * 3
    assert first["kl_ref"].notna().all()
    frozen = block.state.policy.flat[0]
    assert frozen.isfinite().all()
    assert first["chosen_logratio"][3:].nunique() == 1
    assert second["chosen_logratio"].nunique() == 7


def test_when_every_run_diverges_the_tables_are_still_whole(quick):
    runs = [small("ipo", seed=s, iterations=6, evaluations=3) for s in (0, 1)]
    for table in broken(runs, after=3, rows=slice(None)):
        assert table["update"].tolist() == [0, 2, 4, 6]
        assert table["diverged"].tolist() == [False, False, True, True]


@pytest.mark.parametrize("kill_at", [3, 4])
def test_a_block_that_is_killed_where_all_of_it_diverges_resumes_with_the_same_numbers(
    kill_at, quick
):
    """Two updates an iteration; the last one of the second breaks every run."""
    runs = [small("rwr", seed=s, inner_steps=2, iterations=4, evaluations=8) for s in (0, 1)]

    def block():
        made = stack(runs)
        loss = made.problem.method.loss

        def overflowing(batch, logp, hyper):
            item, metrics = loss(batch, logp, hyper)
            return item * torch.inf if made.state.updates == 3 else item, metrics

        made.problem.method = replace(made.problem.method, loss=overflowing)
        return made

    def without_seconds(tables):
        return [t.drop(columns=[c for c in t if c.startswith("seconds")]) for t in tables]

    whole = without_seconds(training.run(block(), Checkpoint()))
    assert whole[0]["diverged"].tolist() == [False] * 4 + [True] * 5
    checkpoint = Checkpoint(kill_at)
    with pytest.raises(Checkpoint.Killed):
        training.run(block(), checkpoint)
    resumed = without_seconds(training.run(block(), checkpoint))
    for again, before in zip(resumed, whole, strict=True):
        assert_same(again, before)


def test_too_many_runs_for_a_block_are_refused():
    with pytest.raises(ValueError, match="at most 10 runs, got 11"):
        BanditEngine().run([small(seed=s) for s in range(11)], Checkpoint())


def test_runs_that_cannot_be_stacked_have_different_keys():
    engine = BanditEngine()
    assert engine.block_key(small(seed=0)) == engine.block_key(small(seed=1, rate=0.1))
    assert engine.block_key(small()) != engine.block_key(small(top_k=2))
    with pytest.raises(ValueError, match="seed, rate and reward function only"):
        engine.run([small(), small(top_k=2)], Checkpoint())


def test_cost_grows_with_updates_and_completions():
    def cost(method="ipo", **options):
        return BanditEngine().cost([bandit_run(method, "R1", 0.01, 0, **options)])

    assert cost() > cost("best_of_n", top_k=3) > cost("best_of_n")  # of ten completions
    assert cost() > cost(iterations=4)
    assert cost(inner_steps=2) > cost()
    assert cost(prompts=20) > cost()


def test_a_short_block_costs_what_a_full_one_does_and_a_lone_run_its_own():
    """A short stack is filled up with copies, which train as well."""
    cost = BanditEngine().cost
    full = [bandit_run("ipo", "R1", 0.01, seed) for seed in range(BLOCK)]
    assert cost(full[:1]) == cost(full) == BLOCK * cost([replace(full[0], alone=True)])
    assert len(stack(full[:1]).problem.seeds) == BLOCK


@given(st.integers(1, 500), st.integers(1, 60))
def test_evaluated_updates_hold_the_ends(updates, evaluations):
    points = evaluated_updates(updates, evaluations)
    assert points[0] == 0 and points[-1] == updates
    assert points == sorted(set(points))
    assert len(points) >= min(evaluations, updates) + 1


def test_evaluated_updates_of_a_long_run_hold_those_of_100_updates():
    assert set(evaluated_updates(100, 25)) <= set(evaluated_updates(1000, 25))
    spaced = [0, 1, 2, 3, 4, 6, 8, 10, *range(12, 101, 4)]
    assert evaluated_updates(100, 25) == spaced
    assert evaluated_updates(5, 1) == [0, 1, 2, 3, 5]
