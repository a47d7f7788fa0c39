"""Configurations: defaults, schedules, and what is refused before any work."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from lib.bandit.config import LEARNING_RATES, REWARD_FUNCTIONS, BanditRun, bandit_run
from lib.experiments.bandit import CHAPTERS as BANDIT
from lib.experiments.settings import Setting
from lib.methods import METHODS

RUN = bandit_run("best_of_n", "R1", 0.003, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ppo"}, "unknown method 'ppo'; choose from .*ppo_sequence"),
        ({"reward_function": "R3"}, r"reward_function must be one of \('R1', 'R2'\), got 'R3'"),
        ({"learning_rate": -0.1}, "learning_rate must be between 0.0 and 10.0, got -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate must be between .* got nan"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"prompts": 101}, "prompts must be between 1 and 100, got 101"),
        ({"prompts": 0}, "prompts must be between 1 and 100, got 0"),
        ({"completions": 1}, "completions must be between 2 and"),
        ({"sets": 0}, "sets must be between 1 and"),
        ({"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"evaluations": 0}, "evaluations must be between 1 and"),
        ({"dropout": 1.0}, "dropout must be between 0.0 and 0.9, got 1.0"),
        ({"length": 8}, r"length must be one of \(9, 10, 1\), got 8"),
        ({"length": 10, "shift": False}, "shift=False .* length must be 9 or 1, got 10"),
        ({"histogram": "folded"}, r"histogram must be one of \('squashed', 'clipped'\)"),
        ({"reward_over": "prompt"}, "reward_over must be one of .* got 'prompt'"),
        ({"shift": None}, r"shift must be one of \(True, False\), got None"),
        ({"tau": 0.1}, r"best_of_n has no hyperparameter \['tau'\]; it has \['top_k'\]"),
        ({"top_k": 11}, "top_k must be between 1 and 10, got 11"),
        ({"method": "rwr", "standardise": "run"}, r"standardise must be one of .* got 'run'"),
        ({"method": "rwr", "temperature": 0.0}, "temperature must be between .* got 0.0"),
        ({"method": "dpo_offline"}, "dpo_offline is offline: iterations and sets must be 1"),
        ({"method": "ipo_offline", "iterations": 1, "sets": 2}, "got 1 and 2"),
        ({"reference_dropout": 0.1}, "best_of_n reads no reference: reference_dropout must be 0"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_values_are_refused_with_the_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RUN, **changes)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="learning_rates"):
        bandit_run("best_of_n", "R1", 0.003, 0, learning_rates=(0.1,))


def test_a_method_that_needs_a_value_head_is_refused():
    with pytest.raises(ValueError, match=r"bandit has no \['value_head'\], which ppo_token needs"):
        bandit_run("ppo_token", "R1", 0.01, 0)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "value_head" not in m.needs])
def test_every_method_takes_100_updates_of_100_completions(name):
    run = bandit_run(name, "R2", 0.01, 3)
    schedule = run.schedule
    assert (run.updates, schedule.minibatch, schedule.completions) == (100, 100, 10)
    samplings = 100 if METHODS[name].on_policy else 1
    assert (schedule.iterations, schedule.batch) == (samplings, 100)
    assert run.hyper == METHODS[name].hyper


@pytest.mark.parametrize("sets", [1, 2, 5, 10, 50, 100])
def test_dial_b_keeps_updates_and_completions(sets):
    schedule = bandit_run("ipo", "R1", 0.01, 0, sets=sets).schedule
    assert (schedule.updates, schedule.batch, schedule.minibatch) == (100, 100 * sets, 100)
    assert schedule.iterations * schedule.batch == 10_000


def test_uneven_sets_are_refused():
    """33 samplings of 3 sets would silently be 99 updates."""
    with pytest.raises(ValueError, match="100 is not a multiple of 3"):
        bandit_run("ipo", "R1", 0.01, 0, sets=3)
    profile = replace(BANDIT["on_policy"].profiles["cpu"], updates=40)
    for sets in (3, 50):
        with pytest.raises(ValueError, match=f"40 updates in sets: 40 is not a multiple of {sets}"):
            Setting("ipo", "R1", (("sets", sets),)).run(profile, 0.01, 0)


def test_dial_t_keeps_samplings():
    schedule = bandit_run("ipo", "R1", 0.01, 0, inner_steps=7).schedule
    assert (schedule.iterations, schedule.updates) == (100, 700)


def test_overrides_reach_the_hyperparameters():
    run = replace(RUN, method="rwr", temperature=0.05, standardise="prompt", top_k=None)
    assert run.hyper == {"temperature": 0.05, "standardise": "prompt", "weights": "normalised"}


def test_stacks_may_differ_in_rate_seed_and_reward_only():
    varied = {
        "method": "ipo", "reward_function": "R2", "learning_rate": 0.1, "seed": 1, "prompts": 5,
        "completions": 4, "sets": 2, "inner_steps": 3, "iterations": 7, "evaluations": 3,
        "top_k": 2, "length": 10, "histogram": "clipped", "dropout": 0.1, "reference_seed": 1,
        "reward_over": "prompt_and_response", "shift": False, "held_out": False,
    }  # fmt: skip
    free = {"reward_function", "learning_rate", "seed"}
    names = {f.name for f in fields(BanditRun)}
    for name, value in varied.items():
        assert name in names
        same = replace(RUN, **{name: value}).stack_key == RUN.stack_key
        assert same == (name in free), name


def test_constants_of_the_paper():
    assert REWARD_FUNCTIONS == {"R1": 70, "R2": 20}
    assert LEARNING_RATES == (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5)


def test_the_reference_is_part_of_the_data_and_shipped():
    for histogram in ("squashed", "clipped"):
        (file,) = replace(RUN, histogram=histogram).data_files()
        assert histogram in file.name and file.exists()
    assert replace(RUN, reference_seed=7).data_files() == ()
