"""The figures of the negative gradient draw what the table says, and say what they drew."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib.bandit.reference import histogram
from lib.figures import mechanism


def rows(seeds=(0, 1), held_out=True):
    """Three evaluated updates per seed: log-ratios that fall, mass that moves from bin 0 to 70."""
    table = pd.DataFrame([
        {"seed": s, "run": f"run{s}", "update": u, "chosen_logratio": -1.0 * u + s,
         "rejected_logratio": -2.0 * u,
         "held_out_chosen_logratio": -1.5 * u if held_out else np.nan,
         "held_out_rejected_logratio": -2.5 * u if held_out else np.nan,
         **{m: 0.0 for m in mechanism.MASSES}, "mass_00": 1 - u / 100, "mass_70": u / 100}
        for s in seeds for u in (0, 50, 100)
    ])  # fmt: skip
    return table


def test_log_ratios_average_over_seeds_and_draw_four_lines():
    figure, table = mechanism.log_ratios({"10 prompts": rows(), "100 prompts": rows()})
    assert not plt.get_fignums()
    assert set(table["line"]) == set(mechanism.RATIOS) and set(table["n"]) == {2}
    end = table.query("line == 'chosen_logratio' and update == 100 and panel == '10 prompts'")
    assert end["mean"].item() == pytest.approx(-99.5)
    assert len(figure.axes) == 2 and all(len(a.get_lines()) == 5 for a in figure.axes)


def test_log_ratios_without_held_out_pairs_draw_the_trained_ones():
    _, table = mechanism.log_ratios({"smoke": rows(held_out=False)})
    assert set(table["line"]) == {"chosen_logratio", "rejected_logratio"}


def test_marginals_compare_the_first_row_with_the_last():
    figure, table = mechanism.marginals({"R1": {"IPO": rows()}}, {"IPO": "red"})
    before, after = (table[table["line"] == name].set_index("token")["mean"]
                     for name in ("before", "IPO"))  # fmt: skip
    assert (before[0], before[70], after[0], after[70]) == (1, 0, 0, 1)
    assert len(figure.axes[0].patches) == 3  # two outlines, and a band


def test_marginals_need_a_reward_as_title():
    with pytest.raises(KeyError):
        mechanism.marginals({"R3": {"IPO": rows()}}, {"IPO": "red"})


def test_break_even_draws_the_exact_win_ratio_and_a_bar_per_weight():
    figure, table = mechanism.break_even([1.0, 0.1])
    r1 = table[table["reward"] == "R1"]
    assert r1["win_ratio"].to_numpy() @ histogram() == pytest.approx(1, abs=1e-6)
    assert r1["win_ratio"].idxmax() % 100 == 70
    heights = [line.get_ydata()[0] for line in figure.axes[0].get_lines()[1:]]
    assert heights == pytest.approx([5, 10 / 11])
