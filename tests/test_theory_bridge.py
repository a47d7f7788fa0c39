"""The 1-token bandit: exact dynamics at one end of the switches, the engine at the other."""

import numpy as np
import pytest
import torch

from lib import optima
from lib.bandit.reference import histogram, reward_table
from lib.chapter import trial
from lib.theory import bridge, dynamics


@pytest.mark.parametrize("method", bridge.METHODS)
def test_all_switches_on_is_the_engine(method):
    switches = bridge.Switches(method, "R2", True, True, True, updates=3)
    run = trial(switches.run).set_index("update")
    ours = bridge.train(switches).set_index("update").loc[run.index]
    np.testing.assert_allclose(ours["reward"], run["reward"], atol=1e-5)
    np.testing.assert_allclose(ours["kl_ref"], run["kl_ref"], atol=1e-5)


def test_all_switches_off_is_lemma_e4():
    """Best-of-N with exact expectations is forward KL to the best-of-N law: same trajectory."""
    switches = bridge.Switches("best_of_n_offline", "R1", updates=5)
    ours = bridge.train(switches)
    order = bridge.contexts([switches.seed])[0]
    _, score = bridge._model(switches, order)
    ref = score(bridge._model(switches, order)[0]).detach()
    target = bridge.best_of_law(ref, reward_table("R1"))
    path = dynamics.trajectory(ref.double(), target.double().log(), "forward", 2.0, 5)
    expected = (path.exp() @ reward_table("R1").double()).mean(-1)
    np.testing.assert_allclose(ours["reward"], expected, atol=1e-5)


@pytest.mark.parametrize("reward", ["R1", "R2"])
def test_best_of_law_matches_the_law_of_scores(reward):
    law = bridge.best_of_law(torch.from_numpy(histogram()).log(), reward_table(reward).double())
    assert float(law.sum()) == pytest.approx(1)
    mean = float(law @ reward_table(reward).double())
    assert mean == pytest.approx(optima.best_of(10, reward, length=1), abs=1e-6)


def test_best_of_law_shares_ties_in_proportion():
    logp = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64).log()
    law = bridge.best_of_law(logp, torch.tensor([0.0, 1.0, 1.0]), n=2)
    assert law.tolist() == pytest.approx([0.25, 0.15, 0.6])


def test_ladder_turns_one_switch_at_a_time():
    rungs = bridge.ladder("reinforce", "R1")
    on = {name: (s.network, s.sampled, s.adam) for name, s in rungs.items()}
    assert on == {"theory": (False, False, False), "sampled": (False, True, False),
                  "Adam": (False, False, True), "network": (True, False, False),
                  "all three": (True, True, True)}  # fmt: skip


def test_paths_and_ends():
    table = bridge.paths(rewards=("R2",), updates=2)
    ends = bridge.ends(table)
    assert len(ends) == 2 * 5 and list(ends.columns)[2:] == ["reward, R2", "KL, nats, R2"]
    assert table["kl_ref"].min() >= 0 and set(table["update"]) == {0, 1, 2}


def test_a_method_without_a_theory_is_refused():
    with pytest.raises(ValueError, match="method must be one of .*got 'ipo'"):
        bridge.Switches("ipo", "R1")
