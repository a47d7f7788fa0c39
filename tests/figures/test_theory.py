"""The figures of the chapter theory show the numbers of their tables."""

import numpy as np
import pytest
from matplotlib.text import Text

from lib.figures import style
from lib.figures import theory as figures
from lib.theory import early, scenes


def test_steps_draws_model_and_target():
    table = scenes.step_by_step()
    figure = figures.steps(table)
    assert len(figure.axes) == 8
    bars = [bar.get_height() for bar in figure.axes[1].patches]  # reverse KL, start
    assert bars[:6] == pytest.approx(scenes.START) and bars[6:] == pytest.approx(scenes.TARGET)
    late = table[(table["step"] == 200)]
    assert np.allclose(late["p"], late["q"], atol=0.01)


def test_the_example_leaves_a_category_behind():
    """What the chapter says of its first figure."""
    table = scenes.step_by_step()
    at = table[(table["step"] == 6) & (table["category"] == 2)].set_index("objective")["p"]
    assert at["reverse"] < 0.06 and at["forward"] > 0.1


def test_case_1_marks_the_constant():
    figure = figures.case1({0.5: scenes.case1_grid(0.5, points=21)})
    line = figure.axes[0].lines[0]
    assert line.get_xdata()[0] == pytest.approx(0.4551, abs=1e-4)


def test_cloud_satisfies_the_premises_and_splits():
    cloud = scenes.case3_cloud(c1=0.1, n=100)
    assert (cloud["height"] < 0.1).all()
    below = cloud["height"] < np.exp(-cloud["kl"])
    assert ((cloud["gap"] < 0) == below).all() and 0 < below.mean() < 1
    plane, boundary = figures.case23(scenes.case23_lines(points=50), cloud, 0.1).axes
    drawn = sum(len(line.get_xdata()) for line in boundary.lines if line.get_marker() in "ox")
    assert drawn == len(cloud)


def test_lines_of_the_plane_are_ordered():
    lines = scenes.case23_lines(points=50)
    assert (lines["always"] <= lines["mean"] + 1e-12).all()
    assert (lines["mean"] < lines["p1"]).all() and (lines["rises"] >= lines["always"]).all()


def test_weighted_likelihood_passes_the_optimum_and_leaves():
    table = scenes.toward_optimum(steps=200)
    assert table["reverse KL"].is_monotonic_decreasing and table["reverse KL"].iloc[-1] < 0.05
    values = table["weighted likelihood"]
    assert values.min() < values.iloc[0] / 2 and values.iloc[-1] > values.iloc[0]
    assert len(figures.toward(table).axes[0].lines) == 2


def test_small_figures_draw_their_tables():
    freed = scenes.freed()
    bars = [bar.get_height() for bar in figures.freed(freed).axes[0].patches]
    assert bars == pytest.approx(freed["alone"].tolist())
    assert freed[["alone", "pair", "proportional"]].sum().abs().max() < 1e-12
    resting = scenes.resting()
    assert resting["all pairs"].max() < 20 < resting["neighbours only"].max()
    assert len(figures.resting(resting).axes[0].lines) == 3
    assert figures.weights(scenes.weights()).axes[0].lines[1].get_ydata()[-1] < 0
    assert len(figures.pushes(scenes.push_grid(points=11)).axes) == 2
    assert len(figures.lift(scenes.lift_grid(points=21)).axes) == 2


def test_population_optima_are_at_rest():
    rest = scenes.rest_gradients(seed=4)
    assert all(row["gradient"] < 1e-12 for row in rest.values())
    assert rest["IPO"]["moved"] <= 20


def test_early_figures():
    table = early.compared(2, 0)
    left, right = figures.halves(table).axes
    assert sum(len(line.get_xdata()) for line in left.lines[:3]) == len(table)
    assert len(figures.distances(early.curves(2, 0, points=5)).axes) == 3


def test_text_is_as_large_as_in_every_figure_of_the_book():
    cloud, table = scenes.case3_cloud(c1=0.1, n=10), early.compared(1, 0)
    made = [
        figures.steps(scenes.step_by_step()), figures.pushes(scenes.push_grid(points=11)),
        figures.case1({0.5: scenes.case1_grid(0.5, points=21)}),
        figures.case23(scenes.case23_lines(points=50), cloud, 0.1),
        figures.toward(scenes.toward_optimum(steps=20)), figures.lift(scenes.lift_grid(points=21)),
        figures.freed(scenes.freed()), figures.weights(scenes.weights()),
        figures.resting(scenes.resting()), figures.halves(table),
        figures.distances(early.curves(1, 0, points=5)),
    ]  # fmt: skip
    for figure in made:
        assert figure.get_figwidth() <= style.WIDTH
        texts = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text())
        assert min(text.get_fontsize() for text in texts) >= 10


def test_masses_are_checked():
    with pytest.raises(ValueError, match="sum to 1"):
        scenes.logs(0.5, 0.6)
