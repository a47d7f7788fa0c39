"""Cells say what their table says; points lie where tau is."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from lib.figures import audit as figures

matplotlib.use("Agg")


def test_cells_hold_the_texts_and_a_line_parts_the_families():
    texts = pd.DataFrame({"end": ["0.9", "0.1"], "worst seed": ["0.8", "0.0"]},
                         index=["dpo", "rwr_offline"])  # fmt: skip
    shades = pd.DataFrame([[1.0, 1.0], [0.0, 0.0]], texts.index, texts.columns)
    figure, drawn = figures.cells({"R1": texts}, {"R1": shades})
    (axis,) = figure.axes
    assert [t.get_text() for t in axis.texts] == ["0.9", "0.8", "0.1", "0.0"]
    light = [np.mean(matplotlib.colors.to_rgb(t.get_color())) > 0.5 for t in axis.texts]
    assert light == [True, True, False, False]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["end", "worst\nseed"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["DPO", "RWR"]
    assert [line.get_ydata()[0] for line in axis.lines] == [1.0]
    assert drawn["method"].tolist() == ["dpo", "rwr_offline"] and set(drawn["panel"]) == {"R1"}


def test_points_are_taus_by_family():
    columns = ["change", "family", "criterion", "tau", "low", "high"]
    table = pd.DataFrame([
        ("other seeds", "all", "end", 0.9, 0.8, 1.0),
        ("all at 0.1", "all", "end", 0.5, np.nan, np.nan),
        ("all at 0.1", "offline", "end", np.nan, np.nan, np.nan),
        ("all at 0.1", "offline", "speed", -0.2, np.nan, np.nan),
    ], columns=columns)  # fmt: skip
    figure, drawn = figures.taus({"R1": table})
    end, speed = figure.axes
    points = {line.get_label(): line.get_xdata().tolist() for line in end.lines
              if line.get_label() in figures.LOOKS}  # fmt: skip
    assert points == {"all": [0.9, 0.5], "on-policy": [], "offline": []}
    assert [t.get_text() for t in end.get_yticklabels()] == ["other seeds", "all at 0.1"]
    (offline,) = [line for line in speed.lines if line.get_label() == "offline"]
    assert offline.get_xdata().tolist() == [-0.2]
    assert offline.get_ydata()[0] == pytest.approx(1.22)
    assert len(drawn) == 4
