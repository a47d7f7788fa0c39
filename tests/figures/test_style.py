"""What every figure shares: its width, text that a phone can show, one legend, no label twice."""

import matplotlib
import pytest
from matplotlib.text import Text

from lib import methods
from lib.figures import style

matplotlib.use("Agg")
PHONE = 325  # px: the width of a figure on a page 360 px wide
SMALLEST = 10  # px


def drawn(labels, rows=1, columns=2):
    with style.panels(columns, rows) as (figure, axes):
        for axis in axes.flat:
            for label in labels:
                axis.plot([0, 1], [0, 1], label=label)
            style.label(axis, "updates", "mean reward over updates", "PPO")
        style.outer_labels(axes)
        style.legend_below(figure, axes.flat)
        figure.canvas.draw()
    return figure, axes


@pytest.mark.parametrize("labels", [
    [m.title for m in methods.METHODS.values()], ["k = 1", "k = 2", "k = 5"], ["a", "b" * 40],
])  # fmt: skip
def test_text_is_readable_on_a_phone_and_inside_the_figure(labels):
    figure, _ = drawn(labels)
    assert figure.get_figwidth() == style.WIDTH
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text()):
        assert text.get_fontsize() / 72 * PHONE / style.WIDTH >= SMALLEST
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1
    assert not any(legend.overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_a_label_is_written_once_for_its_row_and_column():
    _, axes = drawn(["a"], rows=2)
    assert [axis.get_xlabel() for axis in axes.flat] == ["", "", "updates", "updates"]
    assert [bool(axis.get_ylabel()) for axis in axes.flat] == [True, False, True, False]


def test_labels_that_differ_stay():
    with style.panels(2, 2) as (_, axes):
        for i, axis in enumerate(axes.flat):
            axis.set(xlabel=f"x{i}", ylabel=f"y{i}")
        style.outer_labels(axes)
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in axes.flat)


def test_the_last_panel_of_a_column_keeps_its_label():
    with style.panels(2, 2) as (_, axes):
        for axis in axes.flat:
            axis.set(xlabel="updates")
        axes[1, 1].set_visible(False)
        style.outer_labels(axes)
    assert [axis.get_xlabel() for axis in axes.flat] == ["", "updates", "updates", "updates"]


def test_legend_follows_the_given_order():
    with style.panels(2) as (figure, axes):
        for label in "cab":
            axes[0, 0].plot([0, 1], label=label)
        style.legend_below(figure, axes.flat, ["b", "a", "absent"])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["b", "a", "c"]
