"""What a figure returns as drawn must be what the result table says."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from lib import stats
from lib.figures import curves, mechanism

matplotlib.use("Agg")


def rows(seeds, rewards, kl=(0.0, 1.0, 3.0)):
    """A result table of runs with three evaluations; `rewards` (seeds, 3)."""
    parts = []
    for seed, values in zip(seeds, rewards, strict=True):
        parts.append(pd.DataFrame({
            "run": f"run-{seed}", "seed": seed, "update": [0, 50, 100], "reward": values,
            "kl_ref": np.array(kl) * (seed + 1), "learning_rate": 0.1, "samples": [0, 5000, 10000],
            "seconds_sampling": [0.5, 1.5, 2.5], "seconds_scoring": [0.0, 0.5, 1.0],
            "seconds_training": [0.0, 2.0, 4.0], "seconds_evaluation": [9.0, 9.0, 9.0],
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


TWO = rows([0, 1], [[0.0, 0.5, 1.0], [0.0, 0.7, 0.8]])
LOOKS = curves.dial_looks(["a", "b"])


def test_mean_and_interval_at_each_update():
    _, drawn = curves.curves([curves.Panel("R1", {"a": TWO})], LOOKS)
    assert drawn["mean"].tolist() == pytest.approx([0.0, 0.6, 0.9])
    assert drawn["low"][2] == pytest.approx(stats.interval([1.0, 0.8])[1])
    assert set(drawn["n"]) == {2} and set(drawn["panel"]) == {"R1"} and set(drawn["line"]) == {"a"}


def test_kl_is_averaged_at_the_update_of_its_reward():
    _, drawn = curves.curves([curves.Panel("R1", {"a": TWO}, x="kl_ref")], LOOKS)
    assert drawn["kl_ref"].tolist() == pytest.approx([0.0, 1.5, 4.5])


def test_seconds_leave_evaluation_and_its_data_out():
    _, drawn = curves.curves([curves.Panel("R1", {"a": TWO}, x="seconds")], LOOKS)
    assert drawn["seconds"].tolist() == pytest.approx([0.0, 3.5, 7.0])


def test_a_band_is_drawn_only_where_x_does_not_fold_back():
    straight, _ = curves.curves([curves.Panel("R1", {"a": TWO}, x="kl_ref")], LOOKS)
    folded = rows([0, 1], [[0.0, 0.5, 1.0], [0.0, 0.7, 0.8]], kl=(0.0, 3.0, 1.0))
    back, _ = curves.curves([curves.Panel("R1", {"a": folded}, x="kl_ref")], LOOKS)
    assert len(straight.axes[0].collections) == 1 and not back.axes[0].collections


def test_limit_cuts_the_line_and_the_axis_carries_its_words():
    figure, drawn = curves.curves([curves.Panel("R1", {"a": TWO}, limit=50)], LOOKS)
    assert drawn["update"].tolist() == [0, 50]
    (axis,) = figure.axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("updates", "mean reward")
    assert axis.lines[0].get_xdata().tolist() == [0, 50]


def test_a_reward_may_be_named_by_its_panel():
    figure, _ = curves.curves([curves.Panel("Min", {"a": TWO}, ylabel="gold, tokens")], LOOKS)
    assert figure.axes[0].get_ylabel() == "gold, tokens"


def test_an_unknown_label_is_refused():
    with pytest.raises(ValueError, match="no look for \\['c'\\]"):
        curves.curves([curves.Panel("R1", {"c": TWO})], LOOKS)


def test_a_panel_without_runs_is_left_out_with_its_statistic_and_levels():
    figure, drawn = curves.curves([curves.Panel("R1", {}), curves.Panel("R2", {"a": TWO})], LOOKS)
    assert [axis.get_title() for axis in figure.axes] == ["R2"] and set(drawn["panel"]) == {"R2"}
    panels = {"R1": {"a": {}}, "R2": {"a": {1: TWO}}}
    statistics = ["mean reward over updates", "final reward"]
    levels = [{"low": 0.1}, {"high": 0.9}]
    figure, drawn = curves.dial(panels, LOOKS, statistics, levels=levels)
    (axis,) = figure.axes
    assert set(drawn["statistic"]) == {"final reward"}
    assert "high" in axis.get_legend_handles_labels()[1]


@pytest.mark.parametrize("drawn", [
    lambda: curves.curves([], LOOKS), lambda: curves.curves([curves.Panel("R1", {})], LOOKS),
    lambda: curves.dial({"R1": {"a": {}}}, LOOKS),
    lambda: curves.forest(pd.DataFrame(columns=["label", "effect", "low", "high", "n"]), "x"),
    lambda: mechanism.log_ratios({}), lambda: mechanism.marginals({"R1": {}}, {}),
])  # fmt: skip
def test_there_is_no_figure_without_runs(drawn):
    figure, table = drawn()
    assert figure is None and table.empty


def test_legend_names_every_line_once_over_all_panels():
    panels = [curves.Panel("R1", {"a": TWO}), curves.Panel("R2", {"a": TWO, "b": TWO})]
    figure, _ = curves.curves(panels, LOOKS)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]


def test_dial_draws_the_statistic_of_every_value():
    points = {"a": {1: TWO, 10: rows([0, 1], [[0.0, 0.1, 0.2], [0.0, 0.1, 0.4]])}}
    figure, drawn = curves.dial({"R1": points}, LOOKS, "final reward", "T")
    assert drawn["value"].tolist() == [1, 10]
    assert drawn["mean"].tolist() == pytest.approx([0.9, 0.3])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1", "10"]


def test_each_panel_has_its_own_statistic_and_levels():
    points = {"a": {1: TWO, 10: TWO}}
    names = ["final reward", "mean reward over updates"]
    figure, drawn = curves.dial({"x": points, "y": points}, LOOKS, names, levels=[{"best": 0.9}])
    assert drawn.groupby("panel")["statistic"].first().to_dict() == {"x": names[0], "y": names[1]}
    left, right = figure.axes
    named = [axis.get_legend_handles_labels()[1] for axis in (left, right)]
    assert named == [["best", "a"], ["a"]]
    assert [axis.get_ylabel().replace("\n", " ") for axis in (left, right)] == names
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "best"]


def test_rows_are_split_by_rate():
    table = pd.concat([TWO, TWO.assign(learning_rate=0.3)])
    assert {k: len(v) for k, v in curves.by_value(table, "learning_rate").items()} == {
        0.1: 6, 0.3: 6,
    }  # fmt: skip


def test_forest_lists_rows_from_top_to_bottom():
    table = pd.DataFrame({"label": ["first", "second"], "effect": [0.1, -0.2],
                          "low": [0.0, -np.inf], "high": [0.2, np.inf], "n": [5, 1]})  # fmt: skip
    figure, drawn = curves.forest(table, "difference", margin=0.02)
    axis = figure.axes[0]
    heights = {text.get_text(): text.xy[1] for text in axis.texts}
    assert heights["first"] > heights["second"]
    assert axis.lines[1].get_xdata().tolist() == [0.1, -0.2]
    assert drawn is table


def test_methods_keep_their_colour_in_every_figure():
    looks = curves.method_looks(["ipo", "ipo_offline"])
    on, off = looks["IPO (on-policy)"], looks["IPO (offline)"]
    assert on["color"] == off["color"] and on["linestyle"] != off["linestyle"]
