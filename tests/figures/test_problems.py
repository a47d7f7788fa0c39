"""The drawings of the chapters methods and problems show what is in their tables."""

from __future__ import annotations

import numpy as np
import pytest

from lib import cards, geometry
from lib.bandit.reference import histogram, reward_table
from lib.figures import methods, problems


def test_token_table_and_its_figure():
    table = geometry.token_table()
    figure = problems.tokens(table)
    above, below = figure.axes
    heights = [bar.get_height() for bar in above.patches]
    assert heights == pytest.approx(histogram().tolist())
    drawn = below.lines[0].get_ydata()
    assert drawn == pytest.approx(reward_table("R1").numpy(), abs=1e-6)
    assert above.get_xlim() == below.get_xlim()


def test_sampled_rewards_are_distributions():
    figure, table = problems.sampled_rewards(completions=10)
    assert len(figure.axes) == 2
    for _, rows in table.groupby("reward_function"):
        assert rows["one"].sum() == pytest.approx(1)
        assert rows["best"].sum() == pytest.approx(1)
        assert rows["best"] @ rows["reward"] > rows["one"] @ rows["reward"]


def test_alignment_and_frontier_draw_every_row():
    table = geometry.alignment([1.0, 0.1, 0.01])
    left, right = problems.alignment(table).axes
    for panel, column in ((left, "from_reference"), (right, "to_target")):
        drawn = np.concatenate([line.get_ydata() for line in panel.lines])
        assert drawn == pytest.approx(table[column].tolist())
    curve = geometry.frontier([1.0, 0.1, 0.01])
    (panel,) = problems.frontier(curve).axes
    drawn = np.concatenate([line.get_xdata() for line in panel.lines])
    assert drawn == pytest.approx(curve["kl"].tolist())


def test_pushes_are_written_in_their_cells():
    table = cards.pushes()
    (panel,) = methods.pushes(table).axes
    texts = [t.get_text() for t in panel.texts]
    assert texts[:4] == ["+1.00", "0", "0", "0"]
    assert len(texts) == table.size
