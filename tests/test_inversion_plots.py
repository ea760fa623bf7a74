"""Figures of an inversion: what is drawn, and from what."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from layer_reference import planted
from matplotlib.figure import Figure

from attnfit import inversion, minimize, plots, problems
from attnfit.solvers import LevenbergMarquardt


@pytest.fixture(scope="module")
def several():
    problem, X = planted("two outputs", n=16, d=8, scale=1.0, seed=1)
    result = minimize(problem, solver=LevenbergMarquardt(), random_state=0)
    return problem, X, result


def test_a_line_a_start_and_the_residual_reached(several):
    problem, _, result = several
    (ax,) = plots.inversion_progress(result).axes
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(labels) == len(ax.lines) == len(result.local_values)
    assert ax.get_yscale() == "log"
    least = min(line.get_ydata().min() for line in ax.lines)
    reached = np.linalg.norm(problem.residuals(result.x)) / np.linalg.norm(problem.B)
    assert least == pytest.approx(reached, rel=1e-6)
    assert ax.get_ylabel() == "relative residual"


def test_starts_that_descend_together_share_a_line():
    problem, _ = planted("base", n=8, d=4, scale=3.0, seed=0)
    result = minimize(problem, solver=LevenbergMarquardt(), max_iter=200, random_state=0)
    (ax,) = plots.inversion_progress(result).axes
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["B V^+", "moments", "Gaussian 1 to 8"][: len(labels)]


def test_the_error_is_drawn_beside_the_residual(several):
    problem, X, _ = several
    start = X + 0.1
    result = minimize(problem, start, LevenbergMarquardt())
    errors = np.linspace(1.0, 0.0, len(result.history))
    errors[1] = np.nan
    (ax,) = plots.inversion_progress(result, errors).axes
    residual, error, *_ = ax.lines
    assert len(residual.get_xdata()) == len(error.get_xdata()) + 1 == len(errors)
    assert error.get_linestyle() == "--"
    assert error.get_ydata()[-1] > 0.0
    with pytest.raises(ValueError, match="errors has 3 values; pass one a record of the history"):
        plots.inversion_progress(result, [1.0, 2.0, 3.0])


def test_penalties_are_named(several):
    problem, X, _ = several
    result = minimize(problem.with_gamma(1e-3), X, LevenbergMarquardt(), max_iter=200)
    (ax,) = plots.inversion_progress(result).axes
    assert ax.get_ylabel() == "relative residual with penalty"


def test_spectrum_of_full_rank(several):
    problem, X, _ = several
    at = inversion.identifiable(problem, X)
    (ax,) = plots.jacobian_spectrum(at).axes
    values = ax.lines[0].get_ydata()
    assert len(values) == 128
    assert 1.0 / values[-1] == pytest.approx(at.condition)
    assert ax.get_title(loc="left").startswith("Jacobian: rank 128 of 128, condition")


def test_directions_that_are_not_seen_are_marked():
    rng = np.random.default_rng(1)
    layer = problems.LayerInversion(rng.standard_normal((3, 3)), rng.standard_normal((3, 2)), np.ones((4, 2)))
    (ax,) = plots.jacobian_spectrum(inversion.identifiable(layer, rng.standard_normal((3, 4)))).axes
    seen, unseen, mark = ax.lines
    assert (len(seen.get_xdata()), len(unseen.get_xdata())) == (8, 4)
    assert mark.get_xdata()[0] == 8.5
    assert ax.get_title(loc="left") == "Jacobian: rank 8 of 12"
    with pytest.raises(ValueError, match="call identifiable"):
        plots.jacobian_spectrum(inversion.identifiable(layer))


def test_success_map_shows_its_numbers():
    shares = np.array([[0.0, 0.25, 1.0], [0.5, 0.75, 0.125]])
    figure = plots.success_map([0.3, 1.0, 3.0], [0.0, 0.5], shares)
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts] == ["0.00", "0.25", "1.00", "0.50", "0.75", "0.12"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.3", "1", "3"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0%", "50%"]
    np.testing.assert_array_equal(ax.images[0].get_array(), shares)
    with pytest.raises(ValueError, match=r"shares has shape \(2, 3\); expected"):
        plots.success_map([0.3, 1.0], [0.0, 0.5, 0.75], shares)


def test_given_axes_are_used(several):
    problem, X, result = several
    figure = Figure()
    left, middle, right = figure.subplots(1, 3)
    assert plots.inversion_progress(result, ax=left) is figure
    assert plots.jacobian_spectrum(inversion.identifiable(problem, X), ax=middle) is figure
    assert plots.success_map([1.0], [0.0], [[1.0]], ax=right) is figure
